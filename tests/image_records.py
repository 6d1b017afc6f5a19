"""Small records of image classification, as a training script writes them."""

import json
from pathlib import Path


def write_image_record(folder: Path, seed: int, accuracies: list[float], *, seconds: float = 10.0, **facts) -> Path:
    """Write a `metrics.json` of a run with one validation for each accuracy (between 0 and 1), 10 steps apart."""
    validation = [
        {"step": 10 * number, "validation_accuracy": accuracy, "validation_loss": 1 - accuracy}
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    record = {
        "arguments": {"seed": seed, "learning_rate": 1e-3},
        "facts": {
            "validation_fingerprint": "abc",
            "images_per_step": 8,
            "train_images": 40,
            "classes": 10,
            "device": "cpu",
            "images": "squares",
        }
        | facts,
        "history": [{"step": 10, "train_loss": 1.0, "images_per_second": 100.0}],
        "validation": validation,
        "final": {**validation[-1], "seconds": seconds, "train_images_seen": 80 * len(accuracies)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
