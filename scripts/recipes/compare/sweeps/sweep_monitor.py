"""What the monitor saw of a sweep's runs, before the first step and at the end: heads and paths, well conditioned or not."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from hf_specattn.diagnostics.monitor import MONITOR_FILE
from hf_specattn.figures import markdown_table

from ..comparison import Run
from ..monitor_records import read_records
from .sweep_results import ArmResult, Results

NOTHING = "–"
# Names of the monitor's file -> of a table's column.
QUANTITIES = {
    "kappa_output_value_effective": "kappa(W_O W_V)",
    "kappa_query_key_effective": "kappa(W_Q W_K^T)",
    "path_effective_rank": "effective rank of the value path",
    "path_largest_to_median": "s_1 / s_median of the value path",
    "kappa_jacobian": "kappa of the Jacobian",
}
EXPLANATION = (
    "Medians over the seeds, and within a run over the layers and heads looked at, before the first step → after the last "
    "one measured. The value path is the product over all layers of the heads' summed `W_O W_V`, through which the mean "
    "token passes where attention has no residual connection; its effective rank is at most the width."
)


Seen = dict[str, dict[str, float | None]]


def seen(run: Run) -> Seen | None:
    """Return what a run's monitor recorded, as "first" and "last" -> quantity -> median; None for a run without one.

    A median that is infinite is None, as in the monitor's file.
    """
    if not (run.directory / MONITOR_FILE).is_file():
        return None
    records = read_records(run.directory)
    return {when: _medians(records[place]) for when, place in (("first", 0), ("last", -1))}


def _medians(record: Mapping[str, Any]) -> dict[str, float | None]:
    found = {}
    for name in QUANTITIES:
        if name in record:
            value = record[name]
            numbers = [number for row in value for number in row] if isinstance(value, list) else [value]
            found[name] = _median(numbers)
    return found


def _median(numbers: Sequence[float | None]) -> float | None:
    value = median(math.inf if number is None else number for number in numbers)
    return value if math.isfinite(value) else None


def seen_by_seed(arm: ArmResult) -> dict[int, Seen]:
    """Seed -> what its monitor recorded, without runs that had none."""
    return {seed: record for seed, run in arm.runs.items() if (record := seen(run)) is not None}


def monitor_table(results: Results) -> str | None:
    """One row for each arm; None where no run was monitored."""
    several = len(results.sweep.settings) > 1
    rows = []
    for setting in results.sweep.settings:
        for variant in results.sweep.variants:
            found = list(seen_by_seed(results.arm(setting, variant)).values())
            if found:
                cells = [_cell(found, name) for name in QUANTITIES]
                rows.append([*([setting.label] if several else []), variant.label, *cells])
    if not rows:
        return None
    return markdown_table([*(["model"] if several else []), "variant", *QUANTITIES.values()], rows)


def _cell(found: Sequence[Seen], name: str) -> str:
    texts = []
    for when in ("first", "last"):
        values = [record[when][name] for record in found if name in record[when]]
        middle = _median(values) if values else None
        texts.append(NOTHING if not values else "inf" if middle is None else f"{middle:.3g}")
    return " → ".join(texts)
