"""The presets of `pretrain_mlm.py`, and what a run changes of the published recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run.preset_files import read_yaml

_FILE = read_yaml(Path(__file__).with_name("pretrain_presets.yaml"))
PUBLISHED_RECIPE: dict[str, Any] = _FILE["published"]
PRESETS: dict[str, dict[str, Any]] = _FILE["presets"]
PUBLISHED_BATCH_SIZE = (
    PUBLISHED_RECIPE["per_device_train_batch_size"] * PUBLISHED_RECIPE["gradient_accumulation_steps"]
)

# How the batch is cut among forward passes and processes changes nothing; the global batch is compared instead. None of
# the others decides what is learned.
NOT_DEVIATING = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "streaming", "torch_compile"})


def deviations(settings: Mapping[str, Any], global_batch_size: int) -> list[str]:
    """Return one line for each setting in which a run is not the published recipe.

    Args:
        settings: The run's, by the names of the flags.
        global_batch_size: Sequences per optimizer step at the end of the ramp, over all processes.
    """
    lines = [
        f"{name}: {settings[name]} (published: {value})"
        for name, value in PUBLISHED_RECIPE.items()
        if name not in NOT_DEVIATING and settings[name] != value
    ]
    if global_batch_size != PUBLISHED_BATCH_SIZE:
        lines.append(
            f"global batch size: {global_batch_size} sequences (published: {PUBLISHED_BATCH_SIZE}; it is the product of "
            "per_device_train_batch_size, gradient_accumulation_steps and the number of processes)"
        )
    if settings["model_name_or_path"] is not None:
        lines.append(f"model: continued from {settings['model_name_or_path']} (published: from random weights)")
    if settings["tokenizer_name"] is not None:
        lines.append(f"tokenizer: {settings['tokenizer_name']} (published: trained on the corpus)")
    return lines
