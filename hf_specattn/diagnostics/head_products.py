"""What a head computes with: the products `W_Q^T W_K` and `W_O W_V`, whose conditioning no gauge changes.

Other weights of the same function, `W_Q M` and `W_K M^-T`, or `W_V G` and `G^-1 W_O`, have a different kappa(W), but
the same products. The signal passes through `W_O W_V` of each head, the scores are `X W_Q^T W_K X^T` (with rotary
position embeddings at distance 0; they turn the middle of the product at others).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..projection_report import singular_value_ratio
from .attentions import Architecture, find_attentions, to_dtype


@dataclass(frozen=True)
class HeadProducts:
    """One of the two products of an attention, by head.

    Attributes:
        layer: index of the attention in the model, from 0.
        name: its full name.
        product: `query-key` or `output-value`.
        kappa_raw: condition number of each query head's product of the trained weights, on the head_dim directions that a
            head has (the others of the width are always zero).
        kappa: the same of what the forward pass uses, `W + C`.
    """

    layer: int
    name: str
    product: str
    kappa_raw: tuple[float, ...]
    kappa: tuple[float, ...]


@torch.no_grad()
def head_products(
    model: nn.Module,
    architecture: Architecture = None,
    *,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[HeadProducts]:
    """The conditioning of each head's products, in the order of the model's attentions; without W_O if it is not known.

    Args, errors: as in [`spectra`].
    """
    rows = []
    for attention in find_attentions(model, architecture, layers):
        raw, used = attention.products(effective=False), attention.products()
        for product, factors in used.items():
            kappa = _kappa(*factors, dtype)
            rows.append(HeadProducts(attention.layer, attention.name, product, _kappa(*raw[product], dtype), kappa))
    return rows


@torch.no_grad()
def value_path(
    model: nn.Module, architecture: Architecture = None, *, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    """Singular values of the product over all layers of `W_O W_V`, the last layer's first, descending.

    It is what uniform attention turns the mean token into if nothing is added to the output of attention: without
    residual connections, a large ratio means that few directions pass through. Computed from the weights that the
    forward pass uses.

    Args, errors: as in [`spectra`].

    Returns:
        `(width,)`; None if an output projection is not known, or layers have different widths.
    """
    path: Tensor | None = None
    for attention in find_attentions(model, architecture):
        factors = attention.products().get("output-value")
        if factors is None:
            return None
        output, value = (to_dtype(factor, dtype) for factor in factors)
        layer = (output @ value).sum(0)
        if path is not None and layer.shape[1] != path.shape[0]:
            return None
        # Scaled, so that no product of many layers leaves the range of floats.
        path = layer / layer.norm() if path is None else layer @ path / (layer @ path).norm()
    return None if path is None else torch.linalg.svdvals(path).cpu()


def _kappa(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    """Of each `left @ right`, `(heads, m, d)` and `(heads, d, n)`, on its d directions: by the triangles of both factors."""
    triangles = [torch.linalg.qr(to_dtype(factor, dtype), mode="r").R for factor in (left, right.mT)]
    values = torch.linalg.svdvals(triangles[0] @ triangles[1].mT)
    return tuple(singular_value_ratio(row[0], row[-1]) for row in values.tolist())
