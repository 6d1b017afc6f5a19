"""The presets of `train_image_classification.py`, and what a run changes of a published recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run.preset_files import on_one_gpu, read_yaml

_FILE = read_yaml(Path(__file__).with_name("image_presets.yaml"))
RECIPES: dict[str, dict[str, Any]] = _FILE["published"]


# The defaults of the flags, and each recipe.
PRESETS: dict[str, dict[str, Any]] = {"digits": {}} | {
    name: on_one_gpu(recipe, _FILE["one_gpu"]) for name, recipe in RECIPES.items()
}


def deviations(preset: str, settings: Mapping[str, Any], global_batch_size: int, changes: list[str]) -> list[str]:
    """Return one line for each setting, by flag, in which a run is not the recipe of its preset; and its changes."""
    run = dict(settings) | {"global_batch_size": global_batch_size}
    recipe = RECIPES[preset]
    lines = [f"{name}: {run[name]} (published: {value})" for name, value in recipe.items() if run[name] != value]
    lines += [f"{name}: {run[name]} (published: None)" for name in ("model_name_or_path", "config_name") if run[name]]
    if run["mixed_precision"] == "bf16":
        lines.append("mixed precision bf16 (published: fp16 or none)")
    if recipe["mixup"]:
        lines.append(
            "mixup and CutMix: each image with its neighbor (published: with another of the same process's batch)"
        )
    return lines + changes
