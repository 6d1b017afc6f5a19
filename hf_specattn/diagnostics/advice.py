"""Before training: is the softmax saturated, does the Weyl bound hold, which lambda is better, and which weights matter?"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..layers import SpectralLayer
from .attentions import Architecture, find_attentions
from .head_products import value_path
from .residuals import lacks_residual
from .saturation import is_saturated, saturation
from .spectra import effective_rank, spectra

# lambda is searched down to this share of itself.
SMALLEST_FACTOR = 1e-3
# The Weyl bound on kappa that the lambda named for it gives: (lambda + s) / (lambda - s) = 3 at lambda = 2 s.
WEYL_MULTIPLE = 2.0
# The value path of attention without a residual connection passes few directions where its effective rank is below this
# share of the width: in docs/evidence.md it is 0.13 to 0.24 where conditioning gained, 0.6 to 1 where it was conditioned.
FEW_DIRECTIONS = 0.5


@dataclass(frozen=True)
class Advice:
    """What was found on one batch.

    Attributes:
        saturated_layers: indices of the attention layers in which more than half of the rows have a weight above 0.999.
        lambda_: the current lambda of query and key (the larger one) with identity conditioning; otherwise None.
        unsaturated_lambda: the largest lambda for query and key, to two digits and below the current one, at which no layer
            is saturated on this batch; None if none was needed or found.
        unbounded: projections whose `lambda <= sigma_max(W)`, so that nothing is guaranteed.
        bounded_lambda: the lambda at which the Weyl bound gives kappa(W + C) <= 3 for all conditioned projections; None where
            the bound holds everywhere.
        bounded_saturates: whether that lambda on query and key saturates a layer; None if it was not tried.
        path_rank: effective rank of the product of all layers' `W_O W_V` over the width, where some attention has no residual
            connection around it; else None, and where it cannot be told.
    """

    saturated_layers: tuple[int, ...]
    lambda_: float | None
    unsaturated_lambda: float | None
    unbounded: tuple[str, ...]
    bounded_lambda: float | None
    bounded_saturates: bool | None
    path_rank: float | None = None

    def warnings(self) -> list[str]:
        """One sentence for each problem; empty if there is none."""
        return [*self._of_saturation(), *self._of_bound(), *self._of_path()]

    def _of_saturation(self) -> list[str]:
        if not self.saturated_layers:
            return []
        where = f"The softmax of attention layers {', '.join(map(str, self.saturated_layers))} is saturated"
        effect = (
            f"{where} (more than half of the rows have a weight above 0.999): almost no gradient reaches W_Q and W_K. "
        )
        if self.unsaturated_lambda is not None:
            return [
                f"{effect}With lambda_={self.unsaturated_lambda:g} on query and key instead of {self.lambda_:g} no "
                "layer is saturated on this batch."
            ]
        if self.lambda_ is None:
            return [f"{effect}No lambda is in use; scale W_Q and W_K down, or use method='identity' with lambda_=1."]
        return [
            f"{effect}No smaller lambda on query and key changes that (tried down to {self.lambda_ * SMALLEST_FACTOR:g}): "
            "W_Q and W_K themselves are too large."
        ]

    def _of_bound(self) -> list[str]:
        if self.bounded_lambda is None:
            return []
        others = "" if len(self.unbounded) == 1 else f" and {len(self.unbounded) - 1} more"
        text = (
            f"lambda does not exceed sigma_max(W) of {self.unbounded[0]}{others}, so that nothing bounds the condition "
            f"number of W + C; lambda_={self.bounded_lambda:g} would give at most 3."
        )
        if self.bounded_saturates:
            text += " On query and key it saturates the softmax: use it for value, and method='svd' for query and key."
        return [text]

    def _of_path(self) -> list[str]:
        if self.path_rank is None or self.path_rank >= FEW_DIRECTIONS:
            return []
        return [
            "Attention has no residual connection around it, and the product of its W_O W_V over all layers passes "
            f"{self.path_rank:.0%} of the directions. In small ViTs of this kind, conditioning value and output helped more "
            "than conditioning query and key: use method='svd' with targets=('value', 'output'), or initialize(model, "
            "'orthogonal', targets=('value', 'output'))."
        ]


def advise(
    model: nn.Module, inputs: Mapping[str, Any], architecture: Architecture = None, *, bound: bool = True
) -> Advice:
    """Examine the model's attention on a batch, and find by trial which lambda would work better.

    Each trial is a forward pass with another lambda; the model is not changed. It is meant for a model conditioned with
    `init="additive"`, before training: later, W has adapted to its lambda.

    Args, errors: as in [`capture`]; without `bound` the Weyl bound, which takes an SVD of each weight, is left out.
    """

    def saturated_layers() -> tuple[int, ...]:
        return tuple(row.layer for row in is_saturated(saturation(model, inputs, architecture)))

    layers = _identity_layers(model, architecture)
    present = [
        value
        for layer in layers
        for name in ("query", "key")
        if name in layer.layout.projections and (value := layer.spectral.lambda_for(name)) is not None
    ]
    lambda_ = max(present, default=None)
    saturated, better = saturated_layers(), None
    if saturated and lambda_ is not None:

        def is_fine(factor: float) -> bool:
            with _scaled_lambda(layers, factor):
                return not saturated_layers()

        better = _largest_fine(is_fine, lambda_)
    unbounded, bounded = _bounded_lambda(model, architecture) if bound else ((), None)
    saturates = None
    if bounded is not None and lambda_ is not None:
        with _scaled_lambda(layers, bounded / lambda_):
            saturates = bool(saturated_layers())
    rank = _path_rank(model, architecture) if lacks_residual(model, inputs, architecture) else None
    return Advice(saturated, lambda_, better, unbounded, bounded, saturates, rank)


def _path_rank(model: nn.Module, architecture: Architecture) -> float | None:
    path = value_path(model, architecture)
    return None if path is None else (effective_rank(path) / len(path)).item()


def unsaturated_lambda(model: nn.Module, inputs: Mapping[str, Any], architecture: Architecture = None) -> float | None:
    """The largest lambda, at most the current one, at which no layer's softmax is saturated on a batch.

    All projections share it. It is found by trial, a forward pass each, to 5 %; the model is not changed.

    Args, errors: as in [`capture`]; the model is conditioned by the identity with one lambda, with `init="additive"`.

    Returns:
        The current lambda if nothing is saturated, otherwise a smaller one, rounded down to three digits; None if even
        a thousandth of the current one saturates.
    """
    layers = _identity_layers(model, architecture)
    (lambda_,) = {layer.spectral.lambda_for(name) for layer in layers for name in layer.spectral.targets}
    assert lambda_ is not None

    def is_fine(factor: float) -> bool:
        with _scaled_lambda(layers, factor, ("query", "key", "value")):
            return not is_saturated(saturation(model, inputs, architecture))

    return lambda_ if is_fine(1.0) else _largest_fine(is_fine, lambda_, width=0.04, digits=3)


def _largest_fine(is_fine: Any, lambda_: float, width: float = 0.05, digits: int = 2) -> float | None:
    """The largest lambda below the current one, by bisection of its logarithm to a width, rounded down to `digits` digits."""
    low, high = math.log(SMALLEST_FACTOR), 0.0
    if not is_fine(SMALLEST_FACTOR):
        return None
    while high - low > width:
        middle = (low + high) / 2
        low, high = (middle, high) if is_fine(math.exp(middle)) else (low, middle)
    value = lambda_ * math.exp(low)
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.{digits}g}")


def _bounded_lambda(model: nn.Module, architecture: Architecture) -> tuple[tuple[str, ...], float | None]:
    unbounded, largest = [], 0.0
    modules = {item.name: item.module for found in find_attentions(model, architecture) for item in found.holders}
    for row in spectra(model, architecture):
        layer = modules[row.name]
        if not isinstance(layer, SpectralLayer) or layer.spectral.method != "identity":
            continue
        if (lambda_ := layer.spectral.lambda_for(row.projection)) is None:
            continue
        by_head = layer.spectral.granularity == "head"
        sigma_max = max(row.raw.head_sigma_max) if by_head else row.raw.sigma_max
        largest = max(largest, sigma_max)
        if lambda_ <= sigma_max:
            unbounded.append(f"{row.name} ({row.projection})")
    if not unbounded:
        return (), None
    value = WEYL_MULTIPLE * largest
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return tuple(unbounded), float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def _identity_layers(model: nn.Module, architecture: Architecture) -> list[SpectralLayer]:
    holders = [item.module for found in find_attentions(model, architecture) for item in found.holders]
    return [module for module in holders if isinstance(module, SpectralLayer) and module.spectral.method == "identity"]


@contextlib.contextmanager
def _scaled_lambda(
    layers: list[SpectralLayer], factor: float, projections: tuple[str, ...] = ("query", "key")
) -> Iterator[None]:
    """While within, lambda of these projections is `factor` times what it is; that of the others stays."""
    before = [layer.spectral for layer in layers]
    try:
        for layer in layers:
            spectral = layer.spectral
            numbers = {
                name: value * (factor if name in projections else 1.0)
                for name in spectral.targets
                if (value := spectral.lambda_for(name)) is not None
            }
            layer.spectral = replace(spectral, lambda_=numbers)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, spectral in zip(layers, before):
            layer.spectral = spectral
