"""Saving a model with its tokenizer or image processor so that an interruption leaves no half-written file."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_specattn.files import remove_leftovers, temporary_name


def save_pretrained(
    model: PreTrainedModel,
    processor: Any,
    directory: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save model and processor into `directory`, from which the Auto classes load them.

    All files are written to a temporary folder inside it first and renamed then, the configuration last. What processes
    that were killed while they wrote there left is removed.

    Args:
        model: The unwrapped model.
        processor: Its tokenizer or image processor; None: it has none.
        directory: Created if missing; files of the same names are replaced.
        state_dict: The gathered weights, where the model's own are sharded.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f"{temporary_name('saving')}-") as temporary:
        if processor is not None:
            processor.save_pretrained(temporary)
        model.save_pretrained(temporary, state_dict=state_dict)
        files = sorted(Path(temporary).iterdir(), key=lambda path: (path.name == "config.json", path.name))
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(file, directory / file.name)
