"""Dynamic corrections: recomputing them, and noticing when nobody does."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging

from .existing_adapters import adapted_layers
from .layers import STEPS_SINCE_REFRESH, OutputLayout, SpectralLayer, refuse_replaced, spectral_layers
from .ordinary import refuse_no_module, refuse_unordinary
from .polar import complete, correction_by_products

logger = logging.get_logger(__name__)

# Training stops after this many intervals without a refresh: the first one was missed, which is an error in the loop.
MISSED_INTERVALS = 2
# Entries of the weights whose corrections are computed together: enough for a GPU (28 matrices of 768 x 768), while the
# work takes about six times their memory.
ELEMENTS_AT_ONCE = 2**24


def refresh_interval(model: nn.Module) -> int | None:
    """`refresh_every` of the model's dynamic corrections, in optimizer steps; None if it has none."""
    return next((layer.spectral.refresh_every for _, layer in spectral_layers(model) if layer.spectral.dynamic), None)


def steps_since_refresh(model: nn.Module) -> int:
    """Optimizer steps since the dynamic corrections of `model` were computed; 0 if it has none."""
    return max((STEPS_SINCE_REFRESH.get(layer, 0) for _, layer in spectral_layers(model)), default=0)


@torch.no_grad()
def refresh(model: nn.Module, exact: bool | None = None) -> None:
    """Recompute the dynamic svd corrections of `model` once, in place, from the current weights.

    Call it after the optimizer step, every `refresh_every` steps; with the Trainer, [`SpectralCallback`] does it. A
    refresh changes the model's function by the change of `C`. Projections under a PEFT adapter keep their correction,
    because their `W` is frozen.

    Args:
        model: conditioned with `refresh_every`.
        exact: True computes the SVD of each weight. False uses matrix products (`polar.py`), for all weights of one
            shape at once: the same `C` up to rounding, with `kappa(W + C) <= 2.02` checked. None: products on a GPU,
            and elsewhere the SVD, which takes LAPACK about as long as 15 products of the weight's size, while the
            products need 27. It is an argument rather than a setting, because the function does not depend on it.

    Raises:
        ValueError: if the model has no dynamic correction: a static one is part of the trained function; if a projection was
            replaced, or its weight is computed from other tensors or not there. Nothing is changed then.
    """
    refuse_no_module(model, "refresh")
    refuse_replaced(model)
    named = [(name, layer) for name, layer in spectral_layers(model) if layer.spectral.dynamic]
    layers = [layer for _, layer in named]
    if not layers:
        raise ValueError(
            "refresh() found no dynamic correction: corrections stay fixed unless SpectralConfig(method='svd', "
            "refresh_every=n) was given. Remove the call, or condition with refresh_every."
        )
    refuse_unordinary(model, named, "refresh", sharded=True, reads_only=True)
    adapted = adapted_layers(model)
    following = [layer for layer in layers if layer not in adapted]
    by_products = [layer for layer in following if not _takes_svd(layer, exact)]
    for layer in following:
        if _takes_svd(layer, exact):
            recompute(layer)
    recompute_by_products(by_products)
    for layer in layers:
        _restart(layer)


def _takes_svd(layer: SpectralLayer, exact: bool | None) -> bool:
    return layer.weight.device.type != "cuda" if exact is None else exact


@torch.no_grad()
def recompute(layer: SpectralLayer) -> None:
    """Recompute one stored svd correction; FSDP2-sharded weights are gathered first, on every rank alike."""
    layer.correction.copy_(layer.orient(layer.correction_of(layer.orient(_whole_weight(layer)))))
    if layer.spectral.dynamic:
        _restart(layer)


class _Block(NamedTuple):
    """Matrices of one shape from one weight, `(matrices, m, n)`, and the part of the correction that belongs to them."""

    matrices: Tensor
    correction: Tensor


@torch.no_grad()
def recompute_by_products(layers: Sequence[SpectralLayer]) -> None:
    """Recompute stored svd corrections by [`correction_by_products`], many matrices of one shape at once.

    What is taken together follows from the layers' order and shapes alone, so that every rank does the same and a resumed
    run, too. The host waits for the device once, for the checks of all; and once more for each batch in which one failed.
    FSDP2-sharded weights are gathered one after the other, on every rank alike; there it waits for each batch, so that no
    more than one batch of whole weights is held.
    """
    checked: list[tuple[list[_Block], Tensor]] = []
    for blocks in _batches(layers):
        correction, good = correction_by_products(torch.cat([block.matrices for block in blocks]))
        _store(blocks, correction)
        checked.append((blocks, good))
        if any(hasattr(layer.weight, "full_tensor") for layer in layers):
            _complete(checked)
            checked = []
    _complete(checked)


def _batches(layers: Sequence[SpectralLayer]) -> Iterator[list[_Block]]:
    waiting: dict[Any, list[_Block]] = defaultdict(list)
    for layer in layers:
        for block in _blocks(layer):
            key = (block.matrices.shape[1:], block.matrices.dtype, block.matrices.device)
            waiting[key].append(block)
            if sum(each.matrices.numel() for each in waiting[key]) >= ELEMENTS_AT_ONCE:
                yield waiting.pop(key)
    yield from waiting.values()


def _blocks(layer: SpectralLayer) -> Iterator[_Block]:
    layout, per_head = layer.layout, layer.spectral.granularity == "head"
    corrections = layout.grouped(layer.orient(layer.correction))
    for name, matrix in layout.split(layer.orient(_whole_weight(layer))).items():
        if name not in layer.spectral.targets:
            continue
        into = corrections[name]
        if per_head and isinstance(layout, OutputLayout):
            into = layout.head_blocks(name, into[0])
        yield _Block(layout.head_blocks(name, matrix) if per_head else matrix[None], into)


def _store(blocks: Sequence[_Block], corrections: Tensor) -> None:
    for block, correction in zip(blocks, corrections.split([len(block.matrices) for block in blocks])):
        block.correction.copy_(correction.reshape(block.correction.shape))


def _complete(checked: Sequence[tuple[Sequence[_Block], Tensor]]) -> None:
    """Look at all checks at once, and use other methods for what failed its own."""
    if not checked:
        return
    device = checked[0][1].device
    passed = torch.cat([good.to(device) for _, good in checked]).tolist()
    begin, exact = 0, 0
    for blocks, good in checked:
        failing = [place for place, each in enumerate(passed[begin : begin + len(good)]) if not each]
        begin += len(good)
        if failing:
            matrices = torch.cat([block.matrices for block in blocks])
            corrections = torch.cat([block.correction.reshape(block.matrices.shape) for block in blocks])
            exact += len(complete(matrices, corrections, failing))
            _store(blocks, corrections)
    logger.debug(
        f"{len(passed)} corrections by matrix products: {passed.count(False)} needed more of them, and {exact} an SVD."
    )


def _whole_weight(layer: SpectralLayer) -> Tensor:
    weight: Any = layer.weight.detach()
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


# --- noticing that nobody refreshes ----------------------------------------------------------------------------------


class _Watch:
    """Whether optimizer steps move one layer's weight.

    An optimizer that holds the weight says so itself. One that holds copies of it (float32 masters of a half-precision
    model, the flat partitions of DeepSpeed) does not: then a step counts where a gradient of the weight came before it, and
    all that were counted so are void if the weight has not moved in the end.

    Attributes:
        is_owned: an optimizer that holds the weight was seen.
        suspected: steps since the refresh that were counted by gradients.
    """

    def __init__(self) -> None:
        self.is_owned = False
        self.suspected = 0
        self._has_gradient = False
        self._before: Tensor | None = None
        self._parameter: Any = None  # a weak reference
        self._handle: Any = None

    def own(self) -> None:
        self.is_owned = True
        self.suspected = 0
        if self._handle is not None:
            self._handle.remove()

    def suspect(self, weight: Tensor) -> bool:
        """Whether a step of another optimizer counts."""
        if not (weight.requires_grad and weight.is_leaf):
            return False
        if self._parameter is None or self._parameter() is not weight:
            self._parameter = weakref.ref(weight)
            self._has_gradient = weight.grad is not None
            mark = functools.partial(_mark_gradient, weakref.ref(self))
            self._handle = weight.register_post_accumulate_grad_hook(mark)
        if not self._has_gradient:
            return False
        self._has_gradient = False
        if self.suspected == 0:
            self._before = _fingerprint(weight)
        self.suspected += 1
        return True

    def has_moved(self, weight: Tensor) -> bool:
        return self.is_owned or self._before is None or not torch.equal(self._before, _fingerprint(weight))


def _mark_gradient(watch: "weakref.ref[_Watch]", parameter: Tensor) -> None:
    if (found := watch()) is not None:
        found._has_gradient = True


def _fingerprint(weight: Tensor) -> Tensor:
    """A number that changes with any bit of a weight; not brought to the CPU."""
    local: Any = weight.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return local.contiguous().view(integers).sum(dtype=torch.int64)


_WATCHES: "weakref.WeakKeyDictionary[SpectralLayer, _Watch]" = weakref.WeakKeyDictionary()


def _restart(layer: SpectralLayer) -> None:
    STEPS_SINCE_REFRESH[layer] = 0
    if layer in _WATCHES:
        _WATCHES[layer].suspected = 0


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # torch calls this after every optimizer's step: the forward pass (which torch.compile traces) needs no counter, and
    # any training loop is covered that steps a torch.optim.Optimizer.
    if not STEPS_SINCE_REFRESH:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(STEPS_SINCE_REFRESH):
        watch = _WATCHES.setdefault(layer, _Watch())
        if id(layer.weight) in stepped:
            if not watch.is_owned:
                STEPS_SINCE_REFRESH[layer] -= watch.suspected
                watch.own()
        elif watch.is_owned or not watch.suspect(layer.weight):
            continue
        STEPS_SINCE_REFRESH[layer] += 1
        every = layer.spectral.refresh_every
        assert every is not None
        if (steps := STEPS_SINCE_REFRESH[layer]) < MISSED_INTERVALS * every:
            continue
        if not watch.has_moved(layer.weight):  # it has gradients, but nobody trains it
            _restart(layer)
            continue
        raise RuntimeError(
            f"refresh_every={every} was requested, but {steps} optimizer steps have passed without a call of "
            "refresh(model). Add SpectralCallback() to the Trainer's callbacks, or call hf_specattn.refresh(model) after "
            f"the optimizer step every {every} steps; for fixed corrections use refresh_every=None."
        )


register_optimizer_step_post_hook(_count_step)
