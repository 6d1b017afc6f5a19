"""How much memory training takes, from the tensors that the forward pass saves for the backward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .training_state import random_state, restore_random_state

# A storage has one object for all tensors on it, while somebody holds that object; unlike an address of the data, tensors
# on the meta device have it, too.
Storages = set[torch.UntypedStorage]

ADAMW_MOMENTS = 2  # of the gradient and of its square, each in the parameter's dtype
ADAMW_STEP_COUNT = 4  # bytes of a float32 scalar for each parameter


@dataclass(frozen=True)
class MemoryEstimate:
    """What training with AdamW holds when the backward pass begins, in bytes.

    `activations_per_sequence` is what each sequence adds to the tensors kept for the backward pass, `activations_fixed` what
    is kept whatever the batch, such as weights cast by autocast.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations_per_sequence: int
    activations_fixed: int
    sequences: int

    @property
    def activations(self) -> int:
        """All that is kept for the backward pass beside parameters and buffers."""
        return self.activations_fixed + self.sequences * self.activations_per_sequence

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.activations

    def describe(self, mixed_precision: str, unit: str, corrections: int = 0) -> str:
        """The estimate in a sentence; `unit` is what a sequence is ("an example"), `corrections` bytes come on top."""
        weights = self.parameters + self.gradients + self.optimizer
        stored = f", stored corrections {corrections / 1e9:.2f} GB" if corrections else ""
        return (
            f"Memory of a process, expected at least (uncompiled, unsharded, mixed precision {mixed_precision}): "
            f"{(self.total + corrections) / 1e9:.2f} GB: weights, gradients and AdamW {weights / 1e9:.2f} GB, activations "
            f"{self.activations / 1e9:.2f} GB ({self.activations_per_sequence / 1e6:.2f} MB {unit}){stored}; temporary "
            "tensors come on top."
        )


def autocast_on_cpu(mixed_precision: str) -> AbstractContextManager[Any]:
    """The context of a forward pass on a CPU, where a run's memory is estimated."""
    half_precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
    return torch.autocast("cpu", half_precision) if half_precision else nullcontext()


def storages_of(tensors: Iterable[Tensor]) -> Storages:
    """Return the distinct storages of tensors: views of one tensor and tied parameters have theirs in common."""
    return {tensor.untyped_storage() for tensor in tensors}


def total_bytes(storages: Storages) -> int:
    """Return the size of all storages together."""
    return sum(storage.nbytes() for storage in storages)


@contextmanager
def saved_for_backward() -> Iterator[Storages]:
    """Collect the storages of everything that autograd saves inside, parameters and inputs included.

    What a region under `torch.utils.checkpoint` saves, and drops again, is not among them, but its inputs are.
    """
    storages: Storages = set()

    def collect(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        # Detached: an operation's own output, saved with its history, would keep itself alive for ever.
        return tensor.detach()

    with saved_tensors_hooks(collect, lambda tensor: tensor):
        yield storages


def estimate_training_memory(
    model: nn.Module,
    run_batch: Callable[[int], Any],
    per_device_batch_size: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> MemoryEstimate:
    """Estimate what training a model with AdamW needs on one device.

    The forward pass runs on one and on two sequences, on the model's device and in training mode; what it saves for the
    backward pass is counted, each storage once, and continued linearly to the batch. The model is left as it was.

    Not counted, so that the peak lies above: temporaries of the forward, backward and optimizer pass (large ones are the
    gradient of the logits and, under gradient checkpointing, the activations of one layer at a time), fragments, the CUDA
    context, and the buckets of distributed data parallel (once the gradients). Compiled graphs are not seen: they usually
    keep less for the backward pass.

    Args:
        model: On the device that it will be trained on, or on the meta device, where attention may take another kernel;
            not wrapped, sharded or compiled.
        run_batch: Runs the forward pass up to the loss, as training does, on this many sequences of the usual length.
        per_device_batch_size: Sequences per forward pass on one device.
        autocast: Makes the context of the forward pass, such as `accelerator.autocast`.

    Raises:
        ValueError: if two sequences do not keep more than one, as where `run_batch` ignores its argument.
    """
    with _restored(model):
        model.train()
        one, two = (_kept_for_backward(model, run_batch, sequences, autocast) for sequences in (1, 2))
    if two <= one:
        raise ValueError(
            f"The forward pass keeps {one:,} bytes for the backward pass of 1 sequence and {two:,} for that of 2: "
            "run_batch must run as many sequences as it is told, with parameters that require gradients."
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trainable)
    return MemoryEstimate(
        parameters=sum(parameter.nbytes for parameter in model.parameters()),
        gradients=gradients,
        optimizer=ADAMW_MOMENTS * gradients + ADAMW_STEP_COUNT * len(trainable),
        buffers=total_bytes(storages_of(model.buffers())),
        activations_per_sequence=two - one,
        activations_fixed=one - (two - one),
        sequences=per_device_batch_size,
    )


def _kept_for_backward(
    model: nn.Module,
    run_batch: Callable[[int], Any],
    sequences: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Bytes that the forward pass of a batch saves beside parameters and buffers, which are there anyway."""
    with torch.enable_grad(), autocast(), saved_for_backward() as saved:
        run_batch(sequences)
    return total_bytes(saved - storages_of([*model.parameters(), *model.buffers()]))


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back training modes, buffers and random states afterwards."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                # Running statistics change. What did not is left alone: an expanded buffer could not be written to.
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)
