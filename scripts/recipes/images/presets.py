"""Named settings of `train_image_classification.py`: the recipes by which the paper's five models were published.

The conditioning paper trains "following the hyperparameters used in the original papers", on ImageNet-1k with timm's models.
Each recipe cites where its values come from. Batches are those of all processes together; a preset cuts them for one GPU.
"""

from collections.abc import Mapping
from typing import Any

IMAGENET: dict[str, Any] = {
    "dataset_name": "ILSVRC/imagenet-1k",
    "train_split": "train",
    "validation_split": "validation",
    "image_size": 224,
    "random_shift": 0,
    "random_resized_crop": 0.08,
    "horizontal_flip": 0.5,
}

# Touvron et al., "Training data-efficient image transformers", table 9, and the defaults of their code: most later recipes
# are changes of this one.
DEIT: dict[str, Any] = IMAGENET | {
    "timm_model": "deit_base_patch16_224",
    "crop_share": 0.875,
    "num_train_epochs": 300.0,
    "global_batch_size": 1024,
    "learning_rate": 1e-3,  # 5e-4 per 512 images
    "warmup_epochs": 5.0,
    "warmup_learning_rate": 1e-6,
    "min_learning_rate": 1e-5,
    "weight_decay": 0.05,
    "max_grad_norm": 0.0,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "repeated_augmentation": 3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "drop_path_rate": 0.1,
    "model_ema_decay": None,
}

RECIPES: dict[str, dict[str, Any]] = {
    # Dosovitskiy et al., "An image is worth 16x16 words", table 3, the row of ImageNet: Inception crops and mirroring only,
    # 10,000 steps of warmup, dropout 0.1 everywhere but in the projections of attention.
    "vit-base": DEIT
    | {
        "timm_model": "vit_base_patch16_224",
        "timm_model_args": '{"pos_drop_rate": 0.1, "proj_drop_rate": 0.1}',
        "global_batch_size": 4096,
        "learning_rate": 3e-3,
        "warmup_epochs": 32.0,
        "warmup_learning_rate": 0.0,
        "min_learning_rate": 0.0,
        "weight_decay": 0.3,
        "max_grad_norm": 1.0,
        "rand_augment": None,
        "random_erasing": 0.0,
        "repeated_augmentation": 1,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.0,
        "drop_path_rate": 0.0,
    },
    "deit-base": DEIT,
    # Liu et al., "Swin Transformer", section 4.1, and config.py of their code.
    "swin-base": DEIT
    | {
        "timm_model": "swin_base_patch4_window7_224",
        "warmup_epochs": 20.0,
        "max_grad_norm": 5.0,
        "repeated_augmentation": 1,
        "drop_path_rate": 0.5,
    },
    # El-Nouby et al., "XCiT": DeiT's code and recipe, longer, validated on the whole image.
    "xcit-medium": DEIT | {"timm_model": "xcit_medium_24_p16_224", "crop_share": 1.0, "num_train_epochs": 400.0},
    # Ding et al., "DaViT", section 4.1: Swin's recipe with the gradient clipped at 1 and stochastic depth 0.4. Its
    # "triangular" schedule is a cosine here.
    "davit-base": DEIT
    | {
        "timm_model": "davit_base",
        "warmup_epochs": 20.0,
        "max_grad_norm": 1.0,
        "repeated_augmentation": 1,
        "drop_path_rate": 0.4,
    },
}

# For one GPU, and what the recipes say nothing about: the range of float32 instead of scaled losses, readers and reporting.
ONE_GPU: dict[str, Any] = {
    "mixed_precision": "bf16",
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "dataloader_num_workers": 12,
    "save_steps": 1000,
    "logging_steps": 100,
}


def _preset(recipe: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in recipe.items() if name != "global_batch_size"}
    cuts = recipe["global_batch_size"] // ONE_GPU["per_device_train_batch_size"]
    return values | ONE_GPU | {"gradient_accumulation_steps": cuts}


# The defaults of the flags, and each recipe.
PRESETS: dict[str, dict[str, Any]] = {"digits": {}} | {name: _preset(recipe) for name, recipe in RECIPES.items()}


def deviations(preset: str, settings: Mapping[str, Any], global_batch_size: int, changes: list[str]) -> list[str]:
    """Return one line for each setting in which a run is not the published recipe.

    Args:
        preset: Whose recipe.
        settings: The run's, by the names of the flags.
        global_batch_size: Images per optimizer step, over all processes.
        changes: What else the run does to the model, in words.
    """
    run = dict(settings) | {"global_batch_size": global_batch_size}
    recipe = RECIPES[preset]
    lines = [f"{name}: {run[name]} (published: {value})" for name, value in recipe.items() if run[name] != value]
    lines += [f"{name}: {run[name]} (published: None)" for name in ("model_name_or_path", "config_name") if run[name]]
    if run["mixed_precision"] == "bf16":
        lines.append("mixed precision bf16 (published: fp16 or none)")
    if recipe["mixup"]:
        lines.append(
            "mixup and CutMix: each image with its neighbour (published: with another of the same process's batch)"
        )
    return lines + changes
