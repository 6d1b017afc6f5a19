"""Fine-tune a trained model with the Trainer, conditioned without changing its function first.

    python examples/fine_tune.py

A small ViT learns to read scikit-learn's digits. It is saved, loaded with `spectral_init="preserve"`, which subtracts C from
W, so that its outputs do not change, and fine-tuned to tell odd digits from even ones. Prints:

    ten digits: accuracy 0.93
    conditioned: outputs changed by at most 0.0000
    odd or even: accuracy 0.97
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import hf_specattn  # noqa: F401  teaches from_pretrained the flag


def samples(images, labels):
    pixels = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels)]


def fit(model, training, held_out, folder):
    arguments = TrainingArguments(
        folder, num_train_epochs=5, learning_rate=2e-3, report_to="none", disable_tqdm=True, logging_strategy="no",
        save_strategy="no", use_cpu=True, per_device_train_batch_size=64, per_device_eval_batch_size=512,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=training, eval_dataset=held_out,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


set_seed(0)
digits = load_digits()
split = train_test_split(digits.images, digits.target, random_state=0)
training, held_out = samples(split[0], split[2]), samples(split[1], split[3])
parity = [[sample | {"labels": sample["labels"] % 2} for sample in part] for part in (training, held_out)]

with tempfile.TemporaryDirectory() as folder:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    stock = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
    )
    print(f"ten digits: accuracy {fit(stock, training, held_out, folder):.2f}")
    stock.save_pretrained(folder)

    conditioned = ViTForImageClassification.from_pretrained(
        folder, spectral_conditioning=True, lambda_=1.0, spectral_init="preserve"
    )
    with torch.no_grad():
        pixels = torch.stack([sample["pixel_values"] for sample in held_out])
        change = (conditioned.eval()(pixels).logits - stock.eval()(pixels).logits).abs().max()
    print(f"conditioned: outputs changed by at most {change:.4f}")
    conditioned.classifier = torch.nn.Linear(64, 2)
    conditioned.num_labels = conditioned.config.num_labels = 2
    print(f"odd or even: accuracy {fit(conditioned, *parity, folder):.2f}")
