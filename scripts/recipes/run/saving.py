"""Saving a model with its tokenizer or image processor so that an interruption leaves no half-written file."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_specattn.files import cannot_be_written, remove_leftovers, temporary_name

from .messages import one_line
from .training_state import CheckpointError


class SavedElsewhereError(CheckpointError):
    """The folder asked for could not be written; the message names the one that has the model."""


def save_pretrained(
    model: PreTrainedModel,
    processor: Any,
    directory: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save model and processor into `directory`, from which the Auto classes load them.

    All files are written to a temporary folder inside it first and renamed then, the configuration last. What processes
    that were killed while they wrote there left is removed. Where the folder cannot be written any more, what was trained is
    written elsewhere.

    Args:
        model: The unwrapped model.
        processor: Its tokenizer or image processor; None: it has none.
        directory: Created if missing; files of the same names are replaced.
        state_dict: The gathered weights, where the model's own are sharded.

    Raises:
        SavedElsewhereError: naming the folder that has it all instead.
    """
    try:
        _save_whole(model, processor, Path(directory), state_dict)
    except Exception as error:
        if not cannot_be_written(error):
            raise
        elsewhere = _save_elsewhere(model, processor, state_dict)
        kept = (
            "It could not be written anywhere else either." if elsewhere is None else f"It is in {elsewhere} instead."
        )
        raise SavedElsewhereError(
            f"The model could not be saved into {directory}: {one_line(error)}. {kept} It was not evaluated, and "
            f"{directory} still has its earlier content."
        ) from error


def _save_elsewhere(model: PreTrainedModel, processor: Any, state_dict: dict[str, torch.Tensor] | None) -> Path | None:
    for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        folder = place / f"rescued-model-{os.getpid()}"
        try:
            _save_whole(model, processor, folder, state_dict)
        except Exception:  # the next place, then; the first error is the one to tell of
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return folder
    return None


def _save_whole(
    model: PreTrainedModel, processor: Any, directory: Path, state_dict: dict[str, torch.Tensor] | None
) -> None:
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
