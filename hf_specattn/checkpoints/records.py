"""A record of what was done to a checkpoint, in a file next to its weights, so that a model card does not need the source."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..balance import BalanceReport
from ..diagnostics.spectra import ProjectionSpectra
from ..files import write_json
from ..preconditioning import PreconditionReport
from ..projection_report import ProjectionReport, Spectrum
from ..version import __version__

RECORD = "specattn.json"
FORMAT = 1


@dataclass(frozen=True)
class KappaRow:
    """Condition numbers of one projection before and after; None where one is infinite, which JSON does not have.

    Attributes:
        name: full name of the module that holds the weight.
        projection: `query`, `key`, `value` or `output`.
        before, after: of the whole projection. For a conditioned model of W and W + C, for a balanced one of W and W.
        head_before, head_after: means over the heads.
        note: a remark on this row, or "".
    """

    name: str
    projection: str
    before: float | None
    after: float | None
    head_before: float | None
    head_after: float | None
    note: str = ""


@dataclass(frozen=True)
class HeadsRow:
    """What the preconditioner does to the heads of one attention on a probe.

    Attributes:
        name: full name of the attention module.
        before, after: geometric means over the heads of the condition number of a head's output; None where infinite.
        grew, heads: of how many heads it grew, and how many there are.
    """

    name: str
    before: float | None
    after: float | None
    grew: int
    heads: int


@dataclass(frozen=True)
class Record:
    """What was done.

    Attributes:
        command: `convert`, `fold` or `balance`.
        source: name of the source on the Hub, or of its folder; never where the folder lies.
        source_revision: commit of the source on the Hub.
        base_model: name on the Hub of the model that this one was made of; None where it is not known.
        spectral: settings of the correction; None where there is none.
        init: how the weights entered; of a converted model with a correction.
        comparison: the change of the outputs on the probe (see `probe.Comparison`).
        diagonal_loss: mean relative error of W's diagonal that half precision cost; None where it cost nothing.
        rows: the condition numbers.
        notes: further remarks.
        card: what the source's model card says: license, language, tags, datasets.
        version: of this package.
        preconditioner: settings of the preconditioner; None where there is none.
        heads: what it does to the heads.
    """

    command: str
    source: str
    source_revision: str | None
    base_model: str | None
    spectral: dict[str, Any] | None
    init: str | None
    comparison: dict[str, Any]
    diagonal_loss: float | None
    rows: list[KappaRow]
    notes: list[str] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    preconditioner: dict[str, Any] | None = None
    heads: list[HeadsRow] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        write_json(folder / RECORD, {"format": FORMAT, **asdict(self)})


def read_record(folder: Path) -> Record | None:
    """The record in a checkpoint's folder; None if there is none, or one in another version's format."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            return None
        rows = [KappaRow(**row) for row in content["rows"]]
        heads = [HeadsRow(**row) for row in content.get("heads", ())]
        return Record(**{**content, "rows": rows, "heads": heads})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def conditioning_rows(reports: Sequence[ProjectionReport], init: str) -> list[KappaRow]:
    """Of [`condition`]'s reports; with `init="preserve"` W + C is W as it was, and no row is to be judged."""
    notes = ("" if init == "preserve" or report.kappa_fell else "kappa did not fall" for report in reports)
    return [
        _row(report.name, report.projection, report.before, report.after, note) for report, note in zip(reports, notes)
    ]


def balance_rows(reports: Sequence[BalanceReport]) -> list[KappaRow]:
    """Of [`balance`]'s reports."""
    rows = []
    for report in reports:
        notes = [f"left alone: {report.left_alone}"] if report.left_alone else []
        if report.left_alone_heads:
            notes.append(f"rank-deficient, left alone: heads {', '.join(map(str, report.left_alone_heads))}")
        rows.append(_row(report.name, report.projection, report.before, report.after, "; ".join(notes)))
    return rows


def spectra_rows(spectra: Sequence[ProjectionSpectra]) -> list[KappaRow]:
    """Of the current model: W, and W + C."""
    return [_row(item.name, item.projection, item.raw, item.effective, "") for item in spectra]


def heads_rows(reports: Sequence[PreconditionReport]) -> list[HeadsRow]:
    """Of [`precondition`]'s reports."""
    rows = []
    for report in reports:
        before, after = map(_finite, report.mean_kappa)
        rows.append(HeadsRow(report.attention, before, after, len(report.kappa_grew), len(report.kappa_before)))
    return rows


def _row(name: str, projection: str, before: Spectrum, after: Spectrum, note: str) -> KappaRow:
    return KappaRow(
        name,
        projection,
        _finite(before.kappa),
        _finite(after.kappa),
        _finite(fmean(before.head_kappa)),
        _finite(fmean(after.head_kappa)),
        note,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
