"""Image classification: data, augmentation, models, recipes; used by `scripts/train_image_classification.py`."""
