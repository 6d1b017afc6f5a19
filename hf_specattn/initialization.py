"""Initializations of query, key, value and output to compare conditioning with.

A fixed correction amounts to an initialization with `C` added, and another center of the weight decay. It also makes the
weights larger. Stock models that differ from the usual one only in scale, or only in the spectrum, show whether a gain comes
from the conditioning or from the scale; *conditioned initialization* (arXiv 2609.07086), by the method's own authors, reports
gains as large as those of the fixed correction, or larger, with nothing fixed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import AttentionSpec
from .config import PROJECTIONS, SpectralConfig, check_choice, checked_targets
from .corrections import at_least_float32
from .layers import SPECTRAL_CLASSES, correction_matrix, spectral_layers
from .ordinary import refuse_no_module, refuse_unordinary
from .preconditioner import stock_class_of
from .projections import AttentionModule, Projection, find_attention_modules

INITIALIZATIONS = ("default", "orthogonal", "mimetic", "conditioned")
# These have a norm of their own, which is kept unless another is asked for.
WITH_OWN_NORM = ("mimetic", "conditioned")

# Trockman and Kolter, "Mimetic initialization of self-attention layers" (ICML 2023), section 4: of noise and identity in
# W_Q W_K^T, and in W_V W_O.
MIMETIC_QUERY_KEY = (0.7, 0.7)
MIMETIC_VALUE_OUTPUT = (0.4, -0.4)
# What an attention module that the table says nothing about calls its output projection.
OUTPUT_NAMES = ("proj", "o_proj", "out_proj")


@dataclass(frozen=True)
class Initialization:
    """How to initialize query, key and value weights, or other targets, of a stock model; steps in the order of the
    arguments.

    Args:
        kind: `"default"` keeps them. `"orthogonal"` replaces each of them by a random matrix with equal singular values and
            the same Frobenius norm. `"mimetic"` draws them so that `W_Q W_K^T` is near a multiple of I and `W_V W_O` near
            one of -I (Trockman and Kolter, ICML 2023); it sets the output projection too. `"conditioned"` (arXiv
            2609.07086) makes `W_V` a rectangular identity, ones on its main diagonal, and `W_Q` and `W_K` of each head
            random matrices with all singular values 1, `U V^T` of a Gaussian one.
        scale: a factor above 0 of the targets, or one for each projection named, "output" too, a target or not. With
            "conditioned" one number is of query and key alone, whose scale the paper, as far as we could read it, does not
            state.
        norm_reference: scale each target to the Frobenius norm that `W + C` of the weights as they stood would have.
        targets: a non-empty subset of query, key, value and output. "conditioned" is of the first three, "mimetic" of all.

    Raises:
        ValueError: for invalid values, and for a scale together with a norm.
    """

    kind: str = "default"
    scale: float | Mapping[str, float] = 1.0
    norm_reference: SpectralConfig | None = None
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, INITIALIZATIONS)
        object.__setattr__(self, "targets", checked_targets(self.targets))
        if self.kind in WITH_OWN_NORM and self.targets != PROJECTIONS:
            raise ValueError(
                f"targets={self.targets}: kind={self.kind!r} initializes all projections; leave targets out."
            )
        for number in self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]:
            if not 0 < number < math.inf:
                raise ValueError(
                    f"scale={self.scale} must be a finite number above 0, or one for each projection named."
                )
        if isinstance(self.scale, Mapping):
            checked_targets(list(self.scale))
        if self.norm_reference is not None and self.scale != 1:
            raise ValueError(
                f"scale={self.scale} would change the norm that norm_reference sets; pass only one of the two."
            )

    @property
    def changed(self) -> set[str]:
        """The projections that are set or scaled."""
        return {*self.targets, *(self.scale if isinstance(self.scale, Mapping) else ())}

    def kind_for(self, projection: str) -> str:
        """How a projection is initialized, before it is scaled."""
        return self.kind if projection in self.targets else "default"

    def scale_for(self, projection: str) -> float:
        """The factor of a projection."""
        if isinstance(self.scale, Mapping):
            return self.scale.get(projection, 1.0)
        is_fixed = self.kind == "conditioned" and projection == "value"
        return self.scale if projection in self.targets and not is_fixed else 1.0

    @property
    def is_default(self) -> bool:
        """Whether nothing is done."""
        return self == Initialization()


@torch.no_grad()
def initialize(
    model: nn.Module,
    kind: str,
    scale: float | Mapping[str, float] = 1.0,
    norm_reference: SpectralConfig | None = None,
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
    *,
    targets: Sequence[str] = PROJECTIONS,
) -> None:
    """Set the query, key and value weights of a stock model (or others) in place; each block of a fused tensor for itself.

    Draws from torch's global generator. Biases do not change. A checkpoint does not record it: only weights are saved.

    Args:
        model: not conditioned yet; [`condition`] may follow.
        kind, scale, norm_reference, targets: as in [`Initialization`]: "default", "orthogonal", "mimetic" or "conditioned".
        architecture: as in [`condition`].

    Raises:
        ValueError: for bad settings, a conditioned model, one without known projections or with tied, quantized or
        otherwise unusual weights, and for a mimetic initialization if the output projection is not known.
    """
    refuse_no_module(model, "initialize")
    initialization = Initialization(kind, scale, norm_reference, tuple(targets))
    if initialization.is_default:
        return
    if (first := next(spectral_layers(model), None)) is not None:
        raise ValueError(
            f"{first[0]} is already conditioned, with corrections for its current weights; initialize the stock "
            "model, then condition it."
        )
    attentions = find_attention_modules(model, architecture)
    projections = [
        item
        for attention in attentions
        for item in attention.projections(output="output" in initialization.changed)
        if set(item.layout.projections) & initialization.changed
    ]
    refuse_unordinary(model, [(item.name, item.module) for item in projections], "initialize")
    norms = [_target_norms(item, initialization) for item in projections]
    if kind == "mimetic":
        for attention in attentions:
            _initialize_mimetic(attention)
    for item, before in zip(projections, norms):
        matrix = item.orient(item.module.weight)
        parts = item.layout.split(matrix.clone()).items()
        matrix.copy_(item.layout.join({name: _new_block(item, name, block, before[name], initialization)
                                       for name, block in parts}))  # fmt: skip


def _target_norms(item: Projection, initialization: Initialization) -> dict[str, Tensor]:
    """The Frobenius norm that each block should have before it is scaled."""
    matrix = item.orient(item.module.weight)
    if initialization.norm_reference is not None:
        matrix = matrix + correction_matrix(matrix, item.layout, initialization.norm_reference)
    return {name: block.norm() for name, block in item.layout.split(matrix).items()}


def _new_block(item: Projection, name: str, block: Tensor, target: Tensor, initialization: Initialization) -> Tensor:
    """The `(heads * head_dim, in_features)` matrix of one projection."""
    kind, scale = initialization.kind_for(name), initialization.scale_for(name)
    if kind == "default" and (initialization.norm_reference is None or name not in initialization.targets):
        return block * scale
    if kind == "orthogonal":
        block = nn.init.orthogonal_(torch.empty_like(block))
    elif kind == "conditioned":
        block = _conditioned_block(item, name, block)
    keeps_norm = kind in WITH_OWN_NORM and initialization.norm_reference is None
    return block * ((1.0 if keeps_norm else (target / block.norm()).item()) * scale)


def _conditioned_block(item: Projection, name: str, block: Tensor) -> Tensor:
    if name == "value":
        return torch.eye(*block.shape, dtype=block.dtype, device=block.device)
    heads = at_least_float32(item.layout.head_blocks(name, block))  # QR has no half-precision kernel
    drawn = torch.stack([nn.init.orthogonal_(torch.empty_like(head)) for head in heads])
    return drawn.flatten(0, 1).to(block.dtype)


# --- mimetic ---------------------------------------------------------------------------------------------------------


def mimetic_factors(width: int, rank: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return `A` and `B`, each `(width, rank)`, with `A B^T` the best approximation of that rank to `noise Z + identity I`.

    `Z` has independent entries of variance `1 / width`, drawn from torch's global generator.
    """
    target = noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)
    left, sigma, right = torch.linalg.svd(target)
    roots = sigma[:rank].sqrt()
    return left[:, :rank] * roots, right[:rank].T * roots


def _initialize_mimetic(attention: AttentionModule) -> None:
    output, heads = _mimetic_output(attention), attention.heads
    parts: dict[str, Tensor] = {}
    for item in attention.holders:
        parts |= item.layout.split(item.orient(item.module.weight).clone())
    if set(parts) != {"query", "key", "value"} or heads["query"] != heads["key"]:
        raise ValueError(
            f"A mimetic initialization needs as many key heads as query heads, all with one input, which {attention.name} "
            "does not have; choose another one."
        )
    width, head_dim = parts["query"].shape[1], len(parts["query"]) // heads["query"]
    pairs = [mimetic_factors(width, head_dim, *MIMETIC_QUERY_KEY) for _ in range(heads["query"])]
    parts["query"], parts["key"] = (torch.cat([pair[side].T for pair in pairs]) for side in (0, 1))
    value, out = mimetic_factors(width, len(parts["value"]), *MIMETIC_VALUE_OUTPUT)
    parts["value"] = value.T
    SPECTRAL_CLASSES[stock_class_of(output)].orient(output.weight).copy_(out)
    for item in attention.holders:
        item.orient(item.module.weight).copy_(item.layout.join(parts))


def _mimetic_output(attention: AttentionModule) -> Any:
    """The module with W_O: from the table, or else the child with a usual name."""
    located = attention.located_output()
    usual = [getattr(attention.module, child) for child in OUTPUT_NAMES if hasattr(attention.module, child)]
    found = located[1] if located is not None else next(iter(usual), None)
    if found is None or stock_class_of(found) not in SPECTRAL_CLASSES:
        raise ValueError(
            f"A mimetic start: the output projection of {attention.name} ({type(attention.module).__name__}) is not known; "
            "pass architecture=AttentionSpec(..., output=...), or take another start."
        )
    return found
