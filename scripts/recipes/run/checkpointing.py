"""Checkpoints of a running training, from which it continues bit for bit.

A checkpoint is a folder `checkpoint-<step>`:

- the model as `save_pretrained` writes it, so that the Auto classes load the folder; of a model that they could not load
  as it is (a conditioned one of timm), the weights alone;
- `training_state.safetensors` and `training_state.json`: optimizer, schedule, loss scaler, random number generators,
  progress, and the description of the run; the JSON file holds what is no tensor, and there is no pickle;
- `manifest.json`: size and checksum of each file, written last.

It is written under a hidden temporary name, forced to the disk and renamed: under its own name it is whole. Sharded tensors
are gathered, so a checkpoint is the same whatever the number of processes. The main process alone writes and reads.

The data need no place in it: batch order and masking are pure functions of (seed, step).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hf_specattn.conditioning import can_be_saved
from hf_specattn.files import (
    CannotWriteError,
    bytes_of,
    checksum,
    is_disk_full,
    megabytes,
    remove_leftovers,
    replace_folder,
    require_writable,
    sync,
    temporary_name,
)

from .distributed import run_on_main_process
from .training_state import (
    CheckpointError,
    Tensors,
    TrainingParts,
    from_json,
    gather_state,
    restore_state,
    share_tensors,
    to_json,
)

logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
STATE_TENSORS_FILE = "training_state.safetensors"
FORMAT = 1

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{6,})")

# Configuration, tokenizer and the file system's own needs, beyond the tensors.
SMALL_FILES_BYTES = 4 * 2**20


class DiskFullError(CheckpointError):
    """There is no space for a checkpoint; earlier ones are untouched."""


class DifferentRunError(CheckpointError, ValueError):
    """The checkpoint belongs to a run with other settings."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        seconds: Time spent training, over all of its processes' lives.
        record: What the run measured so far: anything that JSON holds.
    """

    step: int = 0
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in one folder. Every process makes one and calls its methods alike.

    Making it removes what dead runs left half-written in `directory`.

    Args:
        directory: Where the folders `checkpoint-<step>` lie; created at the first `save`.
        parts: What to save and restore, after `accelerator.prepare`.
        description: The settings that must not change within a run: name -> what JSON holds. Values are compared after a
            round trip through JSON, so tuples equal lists.
        keep_last: How many checkpoints to keep, at least 1.
    """

    def __init__(
        self,
        directory: str | Path,
        accelerator: Accelerator,
        parts: TrainingParts,
        description: Mapping[str, Any],
        *,
        keep_last: int = 2,
    ) -> None:
        self.directory = Path(directory)
        self.accelerator = accelerator
        self.parts = parts
        self.description: dict[str, Any] = json.loads(json.dumps(dict(description)))
        self.keep_last = keep_last
        self._saved: Path | None = None
        self._damaged: set[Path] = set()
        run_on_main_process(accelerator, lambda: remove_leftovers(self.directory))

    def require_space(self, with_checkpoints: bool = True) -> None:
        """Refuse, before training, a disk that has no space for the model and as many checkpoints as are kept at once.

        Those of an earlier run in the folder count as room. AdamW's two moments count, which come with the first step.

        Raises:
            DiskFullError: naming both figures.
        """
        parts = self.parts
        copies = [parts.model] if parts.averaged is None else [parts.model, parts.averaged.model]
        weights = sum(bytes_of([*model.parameters(), *model.buffers()]) for model in copies)
        moments = 2 * sum(4 * each.numel() for each in parts.model.parameters() if each.requires_grad)
        existing = len(list_checkpoints(self.directory))
        # One more than are kept: the new one is written before the oldest is removed; and the model in the end.
        count = max(self.keep_last + 1 - existing, 1) if with_checkpoints else 0
        needed = count * (weights + moments + SMALL_FILES_BYTES) + weights
        purpose = f"{self.keep_last} checkpoints and the model" if with_checkpoints else "the model"

        def refuse() -> None:
            try:
                require_writable(self.directory, "--output_dir", needed)
            except CannotWriteError as error:
                raise DiskFullError(f"{error} That is for {purpose}.") from error

        run_on_main_process(self.accelerator, refuse)

    def start_over(self) -> None:
        """Remove the checkpoints of an earlier run, for a run that starts over in its folder."""

        def remove_all() -> None:
            for checkpoint in list_checkpoints(self.directory):
                remove_checkpoint(checkpoint)

        run_on_main_process(self.accelerator, remove_all)

    def save(self, progress: Progress) -> Path:
        """Write `checkpoint-<step>`, durable on the disk, then remove all but the last `keep_last`; returns its folder.

        A second call for the same step does nothing. Of a failure nothing is left, and earlier checkpoints stay.

        Raises:
            DiskFullError: if there is too little space.
            OSError: if the folder cannot be written for another reason.
            TypeError: for a state of other things than numbers, text and tensors, and a record that JSON does not hold.
        """
        folder = self.directory / checkpoint_name(progress.step)
        if self._saved == folder:
            return folder
        weights, state = gather_state(self.parts, self.accelerator)
        run_on_main_process(self.accelerator, lambda: self._write(folder, weights, state, progress))
        self._saved = folder
        return folder

    def resume(self) -> Progress | None:
        """Restore the newest undamaged checkpoint into the parts, and this process's random number generators.

        Call it last before the loop: whatever draws random numbers afterwards moves the generators on. A damaged checkpoint
        is skipped with a warning.

        Returns:
            How far the run had come; None where there is no checkpoint at all.

        Raises:
            DifferentRunError: if the checkpoint's description differs; lists each difference.
            CheckpointError: if there are checkpoints and all are damaged; names each and why.
        """
        tensors: Tensors = {}
        found = run_on_main_process(self.accelerator, lambda: self._read(tensors))
        if found is None:
            return None
        content, shapes = found
        tensors = share_tensors(self.accelerator, tensors, shapes)
        weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        restore_state(self.parts, weights, from_json(content["state"], tensors), self.accelerator)
        folder = self.directory / checkpoint_name(content["step"])
        self._saved = folder
        logger.info(f"Continuing from {folder}.")
        return Progress(content["step"], content["seconds"], content["record"])

    # --- on the main process only ---

    def _write(self, folder: Path, weights: Tensors, state: dict[str, Any], progress: Progress) -> None:
        tensors: Tensors = {}
        content = {**vars(progress), "description": self.description, "state": to_json(state, tensors, "")}
        text = json.dumps(content, separators=(",", ":"))
        needed = bytes_of([*weights.values(), *tensors.values()]) * 101 // 100 + len(text) + SMALL_FILES_BYTES
        made = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        if made:
            sync(self.directory.parent)
        if shutil.disk_usage(self.directory).free < needed:
            raise self._disk_full(folder, needed)
        temporary = temporary_folder(folder)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write_files(temporary, weights, tensors, text)
            write_manifest(temporary)
            replace_folder(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_disk_full(error):
                raise self._disk_full(folder, needed) from error
            raise
        self._prune(folder)

    def _write_files(self, directory: Path, weights: Tensors, tensors: Tensors, text: str) -> None:
        if can_be_saved(self.parts.model):
            with no_progress_bars():
                # Under the names that the modules have, and not under those of older checkpoints, so that they are found
                # again.
                self.parts.model.save_pretrained(directory, state_dict=dict(weights), save_original_format=False)
        else:
            # No Auto class could load it as what it is, so there is no configuration either, by which one would try.
            save_file(without_aliases(weights), directory / "model.safetensors")
        if self.parts.processor is not None:
            self.parts.processor.save_pretrained(directory)
        save_file(tensors, directory / STATE_TENSORS_FILE)
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    def _disk_full(self, folder: Path, needed: int) -> DiskFullError:
        free = shutil.disk_usage(self.directory).free
        kept = [checkpoint.name for checkpoint in list_checkpoints(self.directory)]
        safe = f"Safe is {', '.join(kept)}" if kept else "There is no earlier checkpoint"
        return DiskFullError(
            f"No space for {folder}: it needs about {megabytes(needed)}, and {megabytes(free)} are free on that disk. "
            f"{safe}. Free at least {megabytes(max(needed - free, 2**20))} there, or keep fewer checkpoints (now "
            f"{self.keep_last}, and the new one is written before the oldest is removed), then resume the run."
        )

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints that are no longer wanted; call it once `newest` is durable."""
        found = list_checkpoints(self.directory)
        # A damaged checkpoint of a later step than the one resumed from was reached again, or will be.
        unwanted = [folder for folder in found if folder in self._damaged and folder != newest]
        sound = [folder for folder in found if folder not in unwanted and step_of(folder) <= step_of(newest)]
        unwanted += sound[: -self.keep_last]
        self._damaged.clear()
        for folder in unwanted:
            try:
                remove_checkpoint(folder)
            except OSError as error:
                logger.warning(f"{folder} is no longer needed but cannot be removed: {error}")

    def _read(self, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Fill `tensors` and return the JSON part, and shape and dtype of each tensor."""
        checkpoints = list_checkpoints(self.directory)
        if not checkpoints:
            return None
        folder, content = self._newest_sound(checkpoints)
        self._refuse_other_run(folder, content["description"])
        tensors.update(load_file(folder / STATE_TENSORS_FILE))
        for file in sorted(folder.glob("model*.safetensors")):  # several, if the model is very large
            tensors.update({f"model/{name}": value for name, value in load_file(file).items()})
        # load_file maps the file into memory. A copy lies aligned, as all tensors that torch makes: vectorized kernels may
        # round the unaligned ends differently. It also does not depend on a file that will be removed.
        tensors.update({name: value.clone() for name, value in tensors.items()})
        return content, {name: (value.shape, value.dtype) for name, value in tensors.items()}

    def _newest_sound(self, checkpoints: list[Path]) -> tuple[Path, dict[str, Any]]:
        problems = []
        for folder in reversed(checkpoints):
            problem = damage(folder)
            if problem is None:
                return folder, json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            self._damaged.add(folder)
            problems.append(f"{folder.name}: {problem}")
            logger.warning(f"{folder} is damaged and skipped: {problem}.")
        raise CheckpointError(
            f"No checkpoint in {self.directory} can be used ({'; '.join(problems)}). Restore one of them from a copy, "
            "or start the run again in another folder."
        )

    def _refuse_other_run(self, folder: Path, recorded: dict[str, Any]) -> None:
        absent = "(not recorded)"
        names = {**recorded, **self.description}
        pairs = [(name, recorded.get(name, absent), self.description.get(name, absent)) for name in names]
        lines = [f"  {name}: {json.dumps(old)} -> {json.dumps(new)}" for name, old, new in pairs if old != new]
        if lines:
            raise DifferentRunError(
                f"{folder} is of a run with other settings (the checkpoint's value -> this run's value):\n"
                + "\n".join(lines)
                + "\nTo continue that run, give its settings; to train with these, start a new run in another folder."
            )


# --- folders ---------------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """Return the name of the folder for `step`."""
    return f"checkpoint-{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Return the checkpoints in `directory`, sound or damaged, oldest first; none where the folder does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        written_format, files = manifest["format"], dict(manifest["files"])
        if written_format != FORMAT:
            return f"{MANIFEST_FILE} is of format {written_format}, and this version reads format {FORMAT}"
        for name, recorded in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != recorded["bytes"]:
                return f"{name} has {file.stat().st_size} of {recorded['bytes']} bytes"
            if checksum(file) != recorded["crc32"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} is unreadable ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    missing = {STATE_FILE, STATE_TENSORS_FILE} - files.keys()
    return f"{MANIFEST_FILE} does not list {', '.join(sorted(missing))}" if missing else None


def write_manifest(directory: Path) -> None:
    """Force every file in `directory` to the disk, write the manifest of them, and force that and the folder too."""
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(file)
        name = file.relative_to(directory).as_posix()
        files[name] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
    manifest = directory / MANIFEST_FILE
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync(directory)


def temporary_folder(folder: Path) -> Path:
    """Return the hidden name beside `folder` under which this process writes or removes it."""
    return folder.with_name(temporary_name(folder.name))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that none is seen half-removed: rename it first."""
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def without_aliases(tensors: Tensors) -> Tensors:
    """Return each tensor once, under the first of its names."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars for shards out of the training's own bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
