"""Singular values and condition numbers of query, key and value, of conditioned and stock models alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..architectures import AttentionSpec
from ..conditioning import Projection, find_projections
from ..layers import SpectralLayer
from ..reports import Spectrum


@dataclass(frozen=True)
class ProjectionSpectra:
    """One projection of a model as it stands.

    Attributes:
        name: full name of the module that holds the weight.
        projection: `query`, `key` or `value`.
        raw: spectrum of the trained weight W.
        effective: spectrum of what the forward pass uses, `W + C`; the same object as `raw` where nothing is added.
    """

    name: str
    projection: str
    raw: Spectrum
    effective: Spectrum


def spectra(
    model: nn.Module, architecture: AttentionSpec | Sequence[AttentionSpec] | None = None
) -> list[ProjectionSpectra]:
    """The spectra of every query, key and value projection of `model`, in float64, in the order of its modules.

    Args:
        architecture: as in [`condition`], for a model that the table of architectures does not know.

    Raises:
        ValueError: if no projection is found.
    """
    rows = []
    for item in find_projections(model, architecture):
        raw = _parts_spectra(item, item.module.weight)
        conditioned = isinstance(item.module, SpectralLayer)
        effective = _parts_spectra(item, item.module.effective_weight()) if conditioned else raw
        rows += [ProjectionSpectra(item.name, name, raw[name], effective[name]) for name in raw]
    return rows


def _parts_spectra(item: Projection, weight: Tensor) -> dict[str, Spectrum]:
    parts = item.layout.split(item.orient(weight.detach()))
    return {name: Spectrum.of(part, item.layout.head_blocks(name, part)) for name, part in parts.items()}
