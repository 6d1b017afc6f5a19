"""Checkpoints of a running training, from which it continues bit for bit.

A checkpoint is a folder `checkpoint-<step>`:

- the model as `save_pretrained` writes it, so that the Auto classes load the folder;
- `training_state.safetensors` and `training_state.json`: optimizer, schedule, loss scaler, random number generators,
  progress, and the description of the run; the JSON file holds what is no tensor, and there is no pickle;
- `manifest.json`: size and checksum of each file, written last.

It is written under a hidden temporary name, forced to the disk and renamed: under its own name it is whole. Sharded tensors
are gathered, so a checkpoint is the same whatever the number of processes. The main process alone writes and reads.

The data need no place in it: batch order and masking are pure functions of (seed, step).
"""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from ..layers import STEPS_SINCE_REFRESH, spectral_layers
from ..refreshing import steps_since_refresh
from .distributed import run_on_main_process

logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
STATE_TENSORS_FILE = "training_state.safetensors"
FORMAT = 1

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{6,})")
TEMPORARY_NAME = re.compile(r"\.checkpoint-\d{6,}\.tmp-(\d+)(-replaced)?")

# A temporary folder of a process number that is in use is another run's work, unless nothing in it changed for so long:
# then the number has been given to another process since.
ABANDONED_AFTER_SECONDS = 3600

# Configuration, tokenizer and the file system's own needs, beyond the tensors.
SMALL_FILES_BYTES = 4 * 2**20

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

# What activation checkpointing puts into the names of parameters, and state dicts leave out.
WRAPPER_PREFIX = "_checkpoint_wrapped_module."

Result = TypeVar("Result")
Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


class DiskFullError(CheckpointError):
    """There is no space for a checkpoint; earlier ones are untouched."""


class DifferentRunError(CheckpointError, ValueError):
    """The checkpoint belongs to a run with other settings."""


@dataclass(frozen=True)
class TrainingParts:
    """What a checkpoint restores, in place.

    Attributes:
        model: The model itself, not what accelerate or DDP wrapped around it; FSDP2 shards it in place.
        optimizer: The optimizer, bare or prepared by accelerate; all its parameters belong to `model`.
        schedule: The learning-rate schedule, or None.
        scaler: The loss scaler of fp16 training (`accelerator.scaler`), or None.
        processor: The tokenizer or image processor, written beside the model for the Auto classes; never restored.
    """

    model: PreTrainedModel
    optimizer: Optimizer
    schedule: Any = None
    scaler: Any = None
    processor: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(self.model).__name__}; give the transformers model itself, as it was before "
                "accelerator.prepare."
            )
        if isinstance(self.optimizer, AcceleratedOptimizer):
            object.__setattr__(self, "optimizer", self.optimizer.optimizer)


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
        accelerator: Of the run.
        parts: What to save and restore, after `accelerator.prepare`.
        description: The settings that must not change within a run: name -> what JSON holds. Values are compared after a
            round trip through JSON, so tuples equal lists.
        free_to_change: Names in `description` that are recorded but not compared.
        keep_last: How many checkpoints to keep, at least 1.

    Raises:
        ValueError: for `keep_last` below 1.
        TypeError: for a description that JSON does not hold.
    """

    def __init__(
        self,
        directory: str | Path,
        accelerator: Accelerator,
        parts: TrainingParts,
        description: Mapping[str, Any],
        *,
        free_to_change: Collection[str] = (),
        keep_last: int = 2,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint; give 1 or more.")
        self.directory = Path(directory)
        self.accelerator = accelerator
        self.parts = parts
        self.description: dict[str, Any] = json.loads(json.dumps(dict(description)))
        self.free_to_change = frozenset(free_to_change)
        self.keep_last = keep_last
        self._saved: Path | None = None
        self._damaged: set[Path] = set()
        on_main_process(accelerator, lambda: remove_leftovers(self.directory))

    def start_over(self) -> None:
        """Remove the checkpoints of an earlier run, for a run that starts anew in its folder."""

        def remove_all() -> None:
            for checkpoint in list_checkpoints(self.directory):
                remove_checkpoint(checkpoint)

        on_main_process(self.accelerator, remove_all)

    def save(self, progress: Progress) -> Path:
        """Write `checkpoint-<step>`, then remove all but the last `keep_last`.

        A second call for the same step does nothing, so a run that is stopped just after a checkpoint need not ask.

        Returns:
            The checkpoint's folder, durable on the disk.

        Raises:
            DiskFullError: if there is too little space; nothing is left of the attempt, earlier checkpoints stay.
            OSError: if the folder cannot be written for another reason; the same holds.
            TypeError: for a part whose state has other things than numbers, text and tensors, and a record that JSON does
                not hold; the same holds.
        """
        folder = self.directory / checkpoint_name(progress.step)
        if self._saved == folder:
            return folder
        weights, state = gather_state(self.parts, self.accelerator)
        on_main_process(self.accelerator, lambda: self._write(folder, weights, state, progress))
        self._saved = folder
        return folder

    def resume(self) -> Progress | None:
        """Restore the newest undamaged checkpoint into the parts, and this process's random number generators.

        Call it last before the loop: whatever draws random numbers afterwards moves the generators on. A damaged
        checkpoint is skipped with a warning. Each process holds a whole copy of the state for a moment.

        Returns:
            How far the run had come; None where there is no checkpoint at all.

        Raises:
            DifferentRunError: (a ValueError) if the checkpoint's description differs; lists each difference.
            CheckpointError: if there are checkpoints and all are damaged; names each and why.
        """
        tensors: Tensors = {}
        found = on_main_process(self.accelerator, lambda: self._read(tensors))
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
        with no_progress_bars():
            # Under the names that the modules have, and not under those of older checkpoints, so that they are found again.
            self.parts.model.save_pretrained(directory, state_dict=dict(weights), save_original_format=False)
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
            f"No checkpoint in {self.directory} can be used ({'; '.join(problems)}). Restore one of them from a copy, or "
            "start the run anew in another folder."
        )

    def _refuse_other_run(self, folder: Path, recorded: dict[str, Any]) -> None:
        absent = "(not recorded)"
        names = [name for name in {**recorded, **self.description} if name not in self.free_to_change]
        pairs = [(name, recorded.get(name, absent), self.description.get(name, absent)) for name in names]
        lines = [f"  {name}: {json.dumps(old)} -> {json.dumps(new)}" for name, old, new in pairs if old != new]
        if lines:
            raise DifferentRunError(
                f"{folder} is of a run with other settings (the checkpoint's value -> this run's value):\n"
                + "\n".join(lines)
                + "\nTo continue that run, give its settings; to train with these, start a new run in another folder."
            )


# --- the state of a training -----------------------------------------------------------------------------------------


def gather_state(parts: TrainingParts, accelerator: Accelerator) -> tuple[Tensors, dict[str, Any]]:
    """Collect the whole state on the main process; every process calls it.

    Returns:
        The weights and persistent buffers by name, tied ones as one tensor; and a tree of everything else. Tensors are
        whole and on the CPU, and may share memory with the live ones. On other processes: without the tensors.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # a collective, on every process
        return whole.detach().cpu().contiguous() if accelerator.is_main_process else None

    weights: Tensors = {}
    for names, target in tied_groups(parts.model):
        weights.update(dict.fromkeys(names, gathered(target)))
    state = {
        "optimizer": gather_optimizer(parts, gathered),
        "schedule": None if parts.schedule is None else parts.schedule.state_dict(),
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
        "steps_since_refresh": steps_since_refresh(parts.model),
        "random": gather_object([random_state(accelerator.device)]),  # of every process
    }
    return weights, state


def gather_optimizer(parts: TrainingParts, gathered: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the optimizer's state by the names of parameters.

    Not through torch.distributed.checkpoint.state_dict: that takes an optimizer step to create missing state, which moves
    the step counts of a run that has not begun and those of dynamic corrections.
    """
    names = parameter_names(parts.model)
    groups, state = [], {}
    for group in parts.optimizer.param_groups:
        settings = {name: gathered(value) for name, value in group.items() if name != "params"}
        groups.append({"params": [names[parameter] for parameter in group["params"]], **settings})
        for parameter in group["params"]:
            if parameter in parts.optimizer.state:
                values = parts.optimizer.state[parameter]
                state[names[parameter]] = {name: gathered(value) for name, value in values.items()}
    return {"groups": groups, "state": state}


@torch.no_grad()
def restore_state(parts: TrainingParts, weights: Tensors, state: dict[str, Any], accelerator: Accelerator) -> None:
    """The inverse of `gather_state`, from the whole state on every process.

    Raises:
        CheckpointError: if the model's tensors or the optimizer's groups are not those of the checkpoint.
    """
    restore_weights(parts.model, weights)
    restore_optimizer(parts, state["optimizer"])
    for part, values in ((parts.schedule, state["schedule"]), (parts.scaler, state["scaler"])):
        if part is not None and values is not None:
            part.load_state_dict(values)
    for _, layer in spectral_layers(parts.model):
        if layer in STEPS_SINCE_REFRESH:
            STEPS_SINCE_REFRESH[layer] = state["steps_since_refresh"]
    if len(state["random"]) == accelerator.num_processes:
        restore_random_state(state["random"][accelerator.process_index], accelerator.device)
    else:
        logger.warning(
            f"The checkpoint is of {len(state['random'])} processes and this run has {accelerator.num_processes}: random "
            "number generators start anew, so dropout differs from an uninterrupted run. Nothing else does."
        )


def restore_weights(model: PreTrainedModel, weights: Tensors) -> None:
    """Copy whole weights and buffers into the model's own, sharded or not; tied ones need one of their names."""
    unused = set(weights)
    for names, target in tied_groups(model):
        present = unused.intersection(names)
        value = weights[min(present)] if present else None
        if value is None or value.shape != target.shape or value.dtype != target.dtype:
            found = "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
            raise CheckpointError(
                f"The checkpoint's model is another one: for {names[0]}, {tuple(target.shape)} {target.dtype}, it has "
                f"{found}."
            )
        target.copy_(laid_out_as(target, value))
        unused -= present
    if unused:
        raise CheckpointError(f"The checkpoint's model is another one: this model has no {', '.join(sorted(unused))}.")


def restore_optimizer(parts: TrainingParts, saved: dict[str, Any]) -> None:
    """Load the optimizer's state from that by name."""
    names = parameter_names(parts.model)
    groups = [[names[parameter] for parameter in group["params"]] for group in parts.optimizer.param_groups]
    if groups != [group["params"] for group in saved["groups"]]:
        raise CheckpointError(
            "The optimizer groups its parameters otherwise than the checkpoint's; build it as that run did."
        )
    state, param_groups, index = {}, [], 0
    for group, settings in zip(parts.optimizer.param_groups, saved["groups"]):
        indices = range(index, index + len(group["params"]))
        param_groups.append({**settings, "params": list(indices)})
        for index, parameter in zip(indices, group["params"]):
            if names[parameter] in saved["state"]:
                values = saved["state"][names[parameter]]
                state[index] = {name: laid_out_as(parameter, value) for name, value in values.items()}
        index = indices.stop
    parts.optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def laid_out_as(target: Tensor, value: Any) -> Any:
    """Return the shards of a whole `value` that belong beside `target`; unsharded and other shapes as they are."""
    if isinstance(target, DTensor) and isinstance(value, Tensor) and value.shape == target.shape:
        mesh = target.device_mesh
        whole = value.to(mesh.device_type)
        return distribute_tensor(whole, mesh, target.placements, src_data_rank=None)  # each process has all of it
    return value


def tied_groups(model: PreTrainedModel) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each parameter and persistent buffer once, with all its names."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(
        keep_vars=True
    ).items():  # the tensors themselves, so that tied ones are the same
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from groups.values()


def parameter_names(model: PreTrainedModel) -> dict[Tensor, str]:
    """Return the name of each parameter, in `state_dict`'s spelling; the first name of tied ones."""
    return {parameter: name.replace(WRAPPER_PREFIX, "") for name, parameter in model.named_parameters()}


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators: Python's, NumPy's global one, torch's for the CPU and a GPU."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  libraries draw from the global one
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def to_json(value: Any, tensors: Tensors, path: str) -> Any:
    """Return a tree of dicts, lists, tuples, scalars and tensors as JSON, and put the tensors into `tensors`.

    Tuples and dicts are marked, so that they come back as they were, keys that are no text included.

    Raises:
        TypeError: for anything else, naming where.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, to_json(item, tensors, f"{path}/{key}".lstrip("/"))] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [to_json(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; use numbers, text or tensors."
    )


def from_json(value: Any, tensors: Tensors) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(from_json(item, tensors) for item in content)
    return {key: from_json(item, tensors) for key, item in content}


# --- processes -------------------------------------------------------------------------------------------------------


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process and return its result on every process; an error is raised on every process."""

    def attempt() -> tuple[Any, Exception | None]:
        try:
            return work(), None
        except Exception as error:  # whichever: the others wait for it
            return None, error

    result, error = run_on_main_process(accelerator, attempt)
    if error is not None:
        raise error
    return result


def share_tensors(accelerator: Accelerator, tensors: Tensors, shapes: dict[str, Any]) -> Tensors:
    """Send the main process's tensors to all; `shapes`, on every process, has the shape and dtype of each."""
    if accelerator.num_processes == 1:
        return tensors
    received = {}
    for name, (shape, dtype) in shapes.items():
        value = tensors[name] if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
        received[name] = broadcast(value.to(accelerator.device)).cpu()
    return received


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


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file, in hexadecimal.

    Damage by accident is what it must find, not forgery, and it is the fastest that Python has: several times as fast as
    SHA-256 and BLAKE2, whose time would show for checkpoints of gigabytes.
    """
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_folder(folder: Path) -> Path:
    """Return the hidden name beside `folder` under which this process writes or removes it."""
    return folder.with_name(f".{folder.name}.tmp-{os.getpid()}")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give the complete `temporary` its name, durably."""
    aside = temporary.with_name(f"{temporary.name}-replaced")
    if folder.exists():  # a damaged one, or of an earlier run
        os.rename(folder, aside)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that none is seen half-removed: rename it first."""
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary folders that processes left which are no more."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and not is_being_written(path, int(match[1])):
            logger.info(f"Removing {path}, which an interrupted run left.")
            shutil.rmtree(path, ignore_errors=True)


def is_being_written(temporary: Path, process: int) -> bool:
    """Whether another living process seems to be at work in a temporary folder."""
    if process == os.getpid() or not is_alive(process):
        return False
    try:
        changed = max(path.stat().st_mtime for path in [temporary, *temporary.rglob("*")])
    except FileNotFoundError:  # it changes while we look
        return True
    return time.time() - changed < ABANDONED_AFTER_SECONDS


def is_alive(process: int) -> bool:
    """Whether a process of that number exists on this machine; taken for granted where there is no harmless way to ask."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but is another user's
        return True
    return True


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, also one of safetensors' writer, which is no OSError, says that the disk or quota is full."""
    return getattr(error, "errno", None) in NO_SPACE or any(f"(os error {code})" in str(error) for code in NO_SPACE)


def bytes_of(tensors: Collection[Tensor]) -> int:
    """Return the bytes of all tensors, the same one counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def megabytes(count: int) -> str:
    """Return a number of bytes as text in MB."""
    return f"{count / 1e6:,.1f} MB"


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
