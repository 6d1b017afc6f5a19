"""Singular values of query, key, value and output projections, of conditioned and stock models alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..projection_report import Spectrum
from .attentions import Architecture, Attention, find_attentions, to_dtype


@dataclass(frozen=True, eq=False)
class FullSpectrum(Spectrum):
    """All singular values of one matrix, and of each of its heads' blocks.

    Attributes:
        singular_values: `(k,)`, descending, `k = min(rows, columns)`.
        head_singular_values: `(heads, k)` of the blocks, likewise.
    """

    singular_values: Tensor
    head_singular_values: Tensor

    @classmethod
    def of_values(cls, singular_values: Tensor, head_singular_values: Tensor) -> "FullSpectrum":
        """From singular values that are known."""
        whole, heads = singular_values.cpu(), head_singular_values.cpu()
        extremes = whole[-1].item(), whole[0].item(), tuple(heads[:, -1].tolist()), tuple(heads[:, 0].tolist())
        return cls(*extremes, whole, heads)

    @property
    def effective_rank(self) -> float:
        """Of the whole matrix; see [`effective_rank`]."""
        return effective_rank(self.singular_values).item()

    @property
    def head_effective_rank(self) -> tuple[float, ...]:
        """Of each head's block."""
        return tuple(effective_rank(self.head_singular_values).tolist())


@dataclass(frozen=True)
class ProjectionSpectra:
    """One projection of a model in its current state.

    Attributes:
        name: full name of the module that holds the weight.
        projection: `query`, `key`, `value` or `output`.
        raw: spectrum of the trained weight W; a head's block is what maps the layer's input to that head's queries, keys
            or values, or, for the output projection, that head's values to the layer's output.
        effective: spectrum of what the forward pass uses, `W + C`; the same object as `raw` if nothing is added.
        layer: index of its attention in the model, from 0.
        shape: `(heads * head_dim, in_features)`; of the output projection `(out_features, heads * head_dim)`.
    """

    name: str
    projection: str
    raw: FullSpectrum
    effective: FullSpectrum
    layer: int
    shape: tuple[int, int]


@torch.no_grad()
def spectra(
    model: nn.Module,
    architecture: Architecture = None,
    *,
    output: bool = False,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[ProjectionSpectra]:
    """The spectra of every query, key and value projection of `model`, in the order of its modules.

    Args:
        architecture: as in [`condition`], for a model that the table of architectures does not know.
        output: whether to add the output projection W_O of each attention for which the architecture says where it is.
        layers: indices of attention modules, from 0, negative ones from the end. None: all.
        dtype: to compute in; float32 is faster, and accurate to about 1e-7 of the *largest* singular value.

    Raises:
        ValueError: if no projection is found, or a layer does not exist.
    """
    attentions = find_attentions(model, architecture, layers)
    return [row for attention in attentions for row in _rows(attention, output, dtype)]


def effective_rank(singular_values: Tensor) -> Tensor:
    """`exp` of the entropy of `s_i / sum(s)` (Roy and Vetterli, 2007): k for k equal values, 1 for a single one.

    Args:
        singular_values: `(..., k)`.

    Returns:
        `(...)`; 0 for a zero matrix.
    """
    total = singular_values.sum(dim=-1, keepdim=True)
    shares = singular_values / total.clamp_min(torch.finfo(singular_values.dtype).tiny)
    return torch.special.entr(shares).sum(dim=-1).exp() * (total[..., 0] > 0)


def _rows(attention: Attention, output: bool, dtype: torch.dtype) -> list[ProjectionSpectra]:
    raw, effective = attention.head_weights(effective=False), attention.head_weights()
    names = {part: item.name for item in attention.holders for part in item.layout.projections}
    if output and (weight := attention.output_weight(effective=False)) is not None:
        names["output"] = str(attention.spec.output_name(attention.name))
        heads = attention.heads.get("query", next(iter(attention.heads.values())))
        # Transposed, so that heads are runs of rows here as well.
        raw["output"] = weight.mT.unflatten(0, (heads, -1))
        effective["output"] = attention.output_weight().mT.unflatten(0, (heads, -1))  # type: ignore[union-attr]
    changed = [name for name in raw if not torch.equal(raw[name], effective[name])]
    blocks = [*raw.values(), *(effective[name] for name in changed)]
    matrices = [block.flatten(0, 1) for block in blocks]
    values = _singular_values([*matrices, *blocks], dtype)
    found = [FullSpectrum.of_values(*pair) for pair in zip(values[: len(blocks)], values[len(blocks) :])]
    of_raw = dict(zip(raw, found))
    of_effective = of_raw | dict(zip(changed, found[len(raw) :]))
    shapes = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in zip(raw, matrices)}
    if "output" in shapes:
        shapes["output"] = shapes["output"][::-1]
    return [
        ProjectionSpectra(names[name], name, of_raw[name], of_effective[name], attention.layer, shapes[name])
        for name in raw
    ]


def _singular_values(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those of each `(..., m, n)` tensor, descending; tensors of one shape go through LAPACK as one batch."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    found: dict[int, Tensor] = {}
    for indices in by_shape.values():
        batch = torch.stack([to_dtype(matrices[index], dtype) for index in indices])
        found |= dict(zip(indices, torch.linalg.svdvals(batch)))
    return [found[index] for index in range(len(matrices))]
