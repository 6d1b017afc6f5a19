"""The state of a running training: everything that determines how it continues, collected and restored bit for bit.

Weights, optimizer, learning-rate schedule, loss scaler, the steps since dynamic corrections were refreshed, and the random
number generators of every process. The tensors are whole, whatever the number of processes; the rest is a tree that JSON
holds beside them.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_specattn.layers import STEPS_SINCE_REFRESH, spectral_layers
from hf_specattn.refreshing import steps_since_refresh

logger = logging.get_logger(__name__)

Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingParts:
    """What a checkpoint restores, in place.

    Attributes:
        model: The model itself, not what accelerate or DDP wrapped around it; FSDP2 shards it in place.
        optimizer: The optimizer, bare or prepared by accelerate; all its parameters belong to `model`.
        schedule: The learning-rate schedule, or None.
        scaler: The loss scaler of fp16 training (`accelerator.scaler`), or None.
        processor: The tokenizer or image processor, written beside the model for the Auto classes; never restored.
        averaged: An average of the weights over steps, with `state_dict` and `load_state_dict`, or None.
    """

    model: PreTrainedModel
    optimizer: Optimizer
    schedule: Any = None
    scaler: Any = None
    processor: Any = None
    averaged: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(self.model).__name__}; give the transformers model itself, as it was before "
                "accelerator.prepare."
            )
        if isinstance(self.optimizer, AcceleratedOptimizer):
            object.__setattr__(self, "optimizer", self.optimizer.optimizer)


def gather_state(parts: TrainingParts, accelerator: Accelerator) -> tuple[Tensors, dict[str, Any]]:
    """Collect the whole state on the main process; every process calls it.

    Returns:
        The weights and persistent buffers by name, tied ones as one tensor; and a tree of everything else. Tensors are
        whole and on the CPU, and may share memory with the live ones. On other processes: without the tensors.
    """

    gathered = gathering(accelerator)
    weights = gather_weights(parts.model, accelerator)
    state = {
        "optimizer": gather_optimizer(parts, gathered),
        "schedule": None if parts.schedule is None else parts.schedule.state_dict(),
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
        "steps_since_refresh": steps_since_refresh(parts.model),
        "averaged": None if parts.averaged is None else parts.averaged.state_dict(),
        "random": gather_object([random_state(accelerator.device)]),  # of every process
    }
    return weights, state


def gather_weights(model: PreTrainedModel, accelerator: Accelerator) -> Tensors:
    """Return whole weights and persistent buffers by name, as `gather_state` does; every process calls it."""
    gathered = gathering(accelerator)
    weights: Tensors = {}
    for names, target in tied_groups(model):
        weights.update(dict.fromkeys(names, gathered(target)))
    return weights


def gathering(accelerator: Accelerator) -> Callable[[Any], Any]:
    """Return the function that makes a tensor whole on the main process and None on others; what is none stays as it is."""

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # a collective, on every process
        return whole.detach().cpu().contiguous() if accelerator.is_main_process else None

    return gathered


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
    # Checkpoints of before there were averages have none.
    averaged = state.get("averaged")
    for part, values in (
        (parts.schedule, state["schedule"]),
        (parts.scaler, state["scaler"]),
        (parts.averaged, averaged),
    ):
        if part is not None and values is not None:
            part.load_state_dict(values)
    for _, layer in spectral_layers(parts.model):
        if layer in STEPS_SINCE_REFRESH:
            STEPS_SINCE_REFRESH[layer] = state["steps_since_refresh"]
    if len(state["random"]) == accelerator.num_processes:
        restore_random_state(state["random"][accelerator.process_index], accelerator.device)
    else:
        logger.warning(
            f"The checkpoint is of {len(state['random'])} processes and this run has {accelerator.num_processes}: "
            "random number generators are reseeded, so dropout differs from an uninterrupted run. Nothing else does."
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
    tensors = model.state_dict(keep_vars=True)  # the tensors themselves, so that tied ones are the same
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from groups.values()


def parameter_names(model: PreTrainedModel) -> dict[Tensor, str]:
    """Return the name of each parameter, in `state_dict`'s spelling; the first name of tied ones."""
    # Names of `named_parameters` have a prefix in them under activation checkpointing.
    return {tensor: names[0] for names, tensor in tied_groups(model) if isinstance(tensor, nn.Parameter)}


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

    Tuples and dicts are marked, so that they come back as they were, including keys that are not text.

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


def share_tensors(accelerator: Accelerator, tensors: Tensors, shapes: dict[str, Any]) -> Tensors:
    """Send the main process's tensors to all; `shapes`, on every process, has the shape and dtype of each."""
    if accelerator.num_processes == 1:
        return tensors
    received = {}
    for name, (shape, dtype) in shapes.items():
        value = tensors[name] if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
        received[name] = broadcast(value.to(accelerator.device)).cpu()
    return received
