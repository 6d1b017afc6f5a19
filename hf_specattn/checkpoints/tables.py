"""Condition numbers as a plain-text table."""

from collections.abc import Sequence

from ..projection_report import text_table
from .records import KappaRow


def format_rows(rows: Sequence[KappaRow], is_conditioned: bool) -> str:
    """One line per projection: the condition number of the whole projection, and the mean over its heads.

    Args:
        is_conditioned: show `W + C` next to `W`.
    """
    header = ("projection", "kappa(W)", "kappa(W+C)", "per head", "per head+C", "")
    cells = [header] + [
        (
            f"{row.name} {row.projection}",
            *(_number(value) for value in (row.before, row.after, row.head_before, row.head_after)),
            row.note,
        )
        for row in rows
    ]
    if not is_conditioned:
        cells = [(line[0], line[1], line[3], line[5]) for line in cells]
    return text_table(cells)


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4g}"
