"""What conditioning did to each projection: singular values and condition numbers before and after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from .corrections import extreme_singular_values, weyl_bound
from .layers import SpectralLayer


@dataclass(frozen=True)
class Spectrum:
    """The extreme singular values of one matrix, and of each of its heads' blocks."""

    sigma_min: float
    sigma_max: float
    head_sigma_min: tuple[float, ...]
    head_sigma_max: tuple[float, ...]

    @classmethod
    def of(cls, matrix: Tensor, head_blocks: Tensor) -> "Spectrum":
        """Of an `(out, in)` matrix and its `(heads, head_dim, in)` blocks, computed in float64."""
        sigma_min, sigma_max = extreme_singular_values(matrix)
        head_min, head_max = extreme_singular_values(head_blocks)
        return cls(sigma_min.item(), sigma_max.item(), tuple(head_min.tolist()), tuple(head_max.tolist()))

    @property
    def kappa(self) -> float:
        """Condition number of the whole projection."""
        return singular_value_ratio(self.sigma_max, self.sigma_min)

    @property
    def head_kappa(self) -> tuple[float, ...]:
        """Condition number of each head's block."""
        return tuple(map(singular_value_ratio, self.head_sigma_max, self.head_sigma_min))


@dataclass(frozen=True)
class ProjectionReport:
    """One conditioned projection.

    Both granularities are always reported, because they can disagree: a correction per head can worsen the whole
    projection, and one per projection leaves some heads without identity where `heads * head_dim > in_features`.

    Attributes:
        name: full name of the module that holds the weight.
        projection: `query`, `key`, `value` or `output`.
        layout: `separate`, `qkv_blocked` or `qkv_interleaved`.
        shape: `(heads * head_dim, in_features)` of this projection; `(out_features, heads * head_dim)` of the output.
        method, lambda_, granularity: what was applied; lambda_ is None for svd.
        before: spectrum of the original W.
        after: spectrum of the current `W + C`.
        weyl_bound: identity added to W: the bound `(lambda_ + s_1) / (lambda_ - s_1)` on the condition number of each block
            that got its own `C` (the worst of them), s_1 being its `sigma_max`; None where `lambda_ <= s_1` and nothing is
            guaranteed, for svd, and for a preserved weight, whose `W + C` is the original W.
        preserved: whether C was subtracted from W first (`init="preserve"`).
    """

    name: str
    projection: str
    layout: str
    shape: tuple[int, int]
    method: str
    lambda_: float | None
    granularity: str
    before: Spectrum
    after: Spectrum
    weyl_bound: float | None
    preserved: bool = False

    @property
    def sigma_min(self) -> float:
        """Smallest singular value of the original W."""
        return self.before.sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest singular value of the original W."""
        return self.before.sigma_max

    @property
    def kappa_before(self) -> float:
        """Condition number of the original W."""
        return self.before.kappa

    @property
    def kappa_after(self) -> float:
        """Condition number of W + C."""
        return self.after.kappa

    @property
    def weyl_bound_holds(self) -> bool | None:
        """identity: whether `lambda_ > sigma_max(W)`, so that the bound is guaranteed; None for svd and preserved weights."""
        return None if self.method != "identity" or self.preserved else self.weyl_bound is not None

    @property
    def kappa_fell(self) -> bool:
        """Whether the condition number of the whole projection is lower than before."""
        return self.kappa_after < self.kappa_before


def projection_spectra(layer: SpectralLayer, weight: Tensor) -> dict[str, Spectrum]:
    """The spectrum of each target of a conditioned layer, in a tensor of its weight's shape."""
    parts = layer.layout.split(layer.orient(weight.detach()))
    return {
        name: Spectrum.of(part, layer.layout.head_blocks(name, part))
        for name, part in parts.items()
        if name in layer.spectral.targets
    }


def build_report(
    name: str, layer: SpectralLayer, projection: str, before: Spectrum, after: Spectrum, preserved: bool
) -> ProjectionReport:
    """The report of one target of a conditioned layer whose spectra are known."""
    spectral, layout = layer.spectral, layer.layout
    index = layout.projections.index(projection)
    lambda_ = spectral.lambda_for(projection)
    rows, columns = layer.matrix().shape
    if projection != "output":  # the weight may hold others, too
        rows = layout.heads[index] * layout.head_dims[index]
    return ProjectionReport(
        name=name,
        projection=projection,
        layout=layout.kind,
        shape=(rows, columns),
        method=spectral.method,
        lambda_=lambda_,
        granularity=spectral.granularity,
        before=before,
        after=after,
        weyl_bound=None if lambda_ is None or preserved else _worst_weyl_bound(spectral.granularity, before, lambda_),
        preserved=preserved,
    )


def _worst_weyl_bound(granularity: str, before: Spectrum, lambda_: float) -> float | None:
    return weyl_bound(max(before.head_sigma_max) if granularity == "head" else before.sigma_max, lambda_)


def format_reports(reports: Sequence[ProjectionReport]) -> str:
    """Return a plain-text table with one line per projection; where kappa grew, the line says so."""
    header = ("projection", "shape", "sigma_min", "sigma_max", "kappa(W)", "kappa(W+C)", "per head", "per head+C", "")
    return text_table([header, *map(_row, reports)])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines with the first column left-aligned and the others right-aligned; all rows have the same number of cells."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _row(report: ProjectionReport) -> tuple[str, ...]:
    return (
        f"{report.name} {report.projection}",
        f"{report.shape[0]}x{report.shape[1]}",
        f"{report.sigma_min:.3g}",
        f"{report.sigma_max:.3g}",
        f"{report.kappa_before:.4g}",
        f"{report.kappa_after:.4g}",
        f"{fmean(report.before.head_kappa):.4g}",
        f"{fmean(report.after.head_kappa):.4g}",
        _verdict(report),
    )


def _verdict(report: ProjectionReport) -> str:
    notes = []
    # As printed: kappa_before of a preserved weight differs from kappa_after by roundoff alone.
    if float(f"{report.kappa_after:.4g}") > float(f"{report.kappa_before:.4g}"):
        notes.append("kappa GREW")
    if report.weyl_bound_holds is False:
        notes.append("lambda <= sigma_max: no bound")
    return "; ".join(notes)


def singular_value_ratio(sigma_max: float, sigma_min: float) -> float:
    """The condition number; inf where the smallest singular value is 0."""
    return sigma_max / sigma_min if sigma_min > 0 else math.inf
