"""The attention modules of a model, with their projections as blocks of heads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import AttentionSpec
from ..layers import SPECTRAL_CLASSES, SpectralLayer
from ..preconditioner import stock_class_of
from ..projections import AttentionModule, find_attention_modules

Architecture = AttentionSpec | Sequence[AttentionSpec] | None


@dataclass(frozen=True)
class Attention(AttentionModule):
    """One attention module, stock or conditioned.

    Attributes:
        layer: its index among the model's attention modules, from 0.
    """

    layer: int

    def output(self) -> nn.Module | None:
        """The module with W_O; None if the architecture does not say where it is.

        Raises:
            ValueError: if it is not where the architecture says, or has no weight that can be read.
        """
        located = self.located_output()
        if located is None:
            return None
        name, module = located
        if not isinstance(module, SpectralLayer) and stock_class_of(module) not in SPECTRAL_CLASSES:
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}; the output projection is "
                "read from exact torch.nn.Linear and transformers Conv1D modules only. Examine the model before "
                "quantizing it or wrapping it with PEFT."
            )
        _check_readable(name, module.weight)
        return module

    def output_weight(self, effective: bool = True) -> Tensor | None:
        """W_O + C, or W_O, as `nn.Linear` stores it, `(out_features, heads * head_dim)`, detached; None where not known."""
        module = self.output()
        if module is None:
            return None
        if isinstance(module, SpectralLayer):
            return module.orient((module.effective_weight() if effective else module.weight).detach())
        weight: Any = module.weight
        return SPECTRAL_CLASSES[stock_class_of(module)].orient(weight.detach())

    def products(self, effective: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of what a head computes with, whatever its gauge; detached, in the weights' dtype.

        Returns:
            `"query-key"`: `W_Q` and `W_K` of each query head, `(heads, head_dim, in_features)` twice, of which
            `W_Q^T W_K` is the product; `"output-value"`, where W_O is known: `W_O`, `(heads, out_features, head_dim)`, and
            `W_V`, `(heads, head_dim, in_features)`.
        """
        blocks = self.head_weights(effective)
        found = {}
        if {"query", "key"} <= blocks.keys():
            query = blocks["query"]
            found["query-key"] = (query.mT, _for_each(blocks["key"], len(query)))
        if "value" in blocks and (output := self.output_weight(effective)) is not None:
            heads = self.heads.get("query", self.heads["value"])
            columns = output.unflatten(1, (heads, -1)).movedim(1, 0)
            value = _for_each(blocks["value"], heads)
            if columns.shape[-1] == value.shape[-2]:
                found["output-value"] = (columns, value)
        return found


def _for_each(blocks: Tensor, heads: int) -> Tensor:
    """Those of fewer key and value heads repeated, for each query head that shares them."""
    return blocks.repeat_interleave(heads // len(blocks), dim=0)


def find_attentions(
    model: nn.Module, architecture: Architecture = None, layers: Iterable[int] | None = None
) -> list[Attention]:
    """Every attention module of `model`, or those with the given indices, in the order of its modules.

    Args:
        architecture: as in [`condition`], for a model that the table of architectures does not know.
        layers: indices among the attention modules, from 0; negative ones count from the end. None: all.

    Raises:
        ValueError: where no projection is found, a place does not exist, or weights have no values that can be read
            (sharded, on the meta device).
    """
    attentions = [
        Attention(**vars(found), layer=layer)
        for layer, found in enumerate(find_attention_modules(model, architecture))
    ]
    for item in (item for attention in attentions for item in attention.holders):
        _check_readable(item.name, item.module.weight)
    return attentions if layers is None else [attentions[layer] for layer in _places(layers, len(attentions))]


def _places(layers: Iterable[int], count: int) -> list[int]:
    wanted = list(layers)
    wrong = [layer for layer in wanted if not -count <= layer < count]
    if wrong or not wanted:
        raise ValueError(
            f"layers={wanted} must name one or more of the model's {count} attention layers, 0 to {count - 1} (negative "
            "numbers count from the end)."
        )
    return sorted({layer % count for layer in wanted})


def _check_readable(name: str, weight: object) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"The weight of {name} is quantized; examine the model before quantizing it.")
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"The weight of {name} is sharded (a DTensor); examine the model before it is sharded.")
    if weight.is_meta:
        raise ValueError(f"The weight of {name} is on the meta device and has no values; load the weights first.")


def to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, on the CPU where its device has no float64."""
    return tensor.cpu().to(dtype) if tensor.device.type == "mps" and dtype == torch.float64 else tensor.to(dtype)
