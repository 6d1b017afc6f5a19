"""Saturation of the softmax: with a large lambda on query and key every token may attend only to itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attentions import Architecture, find_attentions, to_dtype
from .capture import CapturedAttention, capture

# A row of attention weights with a larger one than this passes almost no gradient to query and key.
SATURATED_WEIGHT = 0.999


@dataclass(frozen=True, eq=False)
class Saturation:
    """The attention weights of one layer; rows of padded queries do not count.

    Attributes:
        layer: index of the attention in the model, from 0.
        name: its full name.
        entropy: `(heads,)`, mean entropy of the rows, in nats; 0 is a softmax that picks one token.
        uniform_entropy: the same if every query attended evenly to all it may see: log N without a causal mask.
        saturated_share: `(heads,)`, share of the rows (of those that may see more than one key) whose largest weight exceeds
            0.999; nan where there is no such row.
    """

    layer: int
    name: str
    entropy: Tensor
    uniform_entropy: float
    saturated_share: Tensor

    @classmethod
    def of(cls, captured: CapturedAttention) -> "Saturation":
        """From one attention of a forward pass."""
        weights, real = to_dtype(captured.weights, torch.float64), captured.real
        real = real.to(weights.device)
        keys = captured.visible().to(weights.device).sum(dim=-1).clamp_min(1)  # (batch, 1 or heads, N)
        counted = real[:, None].expand(weights.shape[:3])
        several = counted & (keys > 1)
        entropy = torch.special.entr(weights).sum(dim=-1)
        largest = weights.amax(dim=-1) > SATURATED_WEIGHT
        uniform = keys.double().log().expand(weights.shape[:3])
        return cls(
            layer=captured.attention.layer,
            name=captured.attention.name,
            entropy=((entropy * counted).sum(dim=(0, 2)) / counted.sum(dim=(0, 2))).cpu(),
            uniform_entropy=(uniform[counted].mean()).item(),
            saturated_share=((largest & several).sum(dim=(0, 2)) / several.sum(dim=(0, 2))).cpu(),
        )


def saturation(
    model: nn.Module,
    inputs: Mapping[str, Any],
    architecture: Architecture = None,
    layers: Iterable[int] | None = None,
) -> list[Saturation]:
    """How saturated the softmax of each attention layer is on a batch. Arguments and errors as in [`capture`]."""
    return [Saturation.of(captured) for captured in capture(model, inputs, architecture, layers)]


def attention_entropy(model: nn.Module, inputs: Mapping[str, Any], architecture: Architecture = None) -> Tensor:
    """Mean entropy of the attention weights, in nats, per layer and head.

    0 is a softmax that picks one token and passes no gradient to query and key; `log n` is uniform attention over n
    tokens. The model runs once in eval mode with eager attention, and is not changed.

    Args:
        model: any model whose attention modules are known; see [`capture`].
        inputs: its keyword arguments; rows of padded queries (`attention_mask` 0) do not count.

    Returns:
        `(layers, heads)`, float32, on the CPU.
    """
    return torch.stack([row.entropy for row in saturation(model, inputs, architecture)]).float()


@dataclass(frozen=True, eq=False)
class GradientNorms:
    """Frobenius norms of the gradient of one attention's weights, by head.

    Attributes:
        layer: index of the attention in the model, from 0.
        name: its full name.
        norms: `query`, `key` and `value`, each `(heads,)`.
    """

    layer: int
    name: str
    norms: dict[str, Tensor]


@torch.no_grad()
def gradient_norms(
    model: nn.Module, architecture: Architecture = None, layers: Iterable[int] | None = None
) -> list[GradientNorms]:
    """The norms of the gradients that a backward pass left in W_Q, W_K and W_V, by layer and head.

    Raises:
        ValueError: where a weight has no gradient: call it after `loss.backward()` and before they are set to None.
    """
    rows = []
    for attention in find_attentions(model, architecture, layers):
        norms: dict[str, Tensor] = {}
        for item in attention.holders:
            gradient = item.module.weight.grad
            if gradient is None:
                raise ValueError(
                    f"The weight of {item.name} has no gradient; call gradient_norms after loss.backward() and before "
                    "optimizer.zero_grad()."
                )
            for name, part in item.layout.split(item.orient(to_dtype(gradient, torch.float64))).items():
                norms[name] = torch.linalg.matrix_norm(item.layout.head_blocks(name, part)).cpu()
        rows.append(GradientNorms(attention.layer, attention.name, norms))
    return rows


def is_saturated(rows: Sequence[Saturation], share: float = 0.5) -> list[Saturation]:
    """Those layers in which more than `share` of the rows, over all heads, are saturated."""
    return [row for row in rows if row.saturated_share.mean() > share]
