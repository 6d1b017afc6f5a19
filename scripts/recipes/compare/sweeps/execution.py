"""A sweep from its first run to its results: the tuning, then the grid."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .design import PlannedRun, Setting, Sweep, SweepError
from .runner import Machine, failure, run_all
from .sweep_results import Results, choose, metric_of, read_arm


def run_sweep(sweep: Sweep, runs_dir: Path, machine: Machine, disable_tqdm: bool = False) -> Results:
    """Run what is missing of a sweep, and read everything.

    Seeds stand outermost: a machine that gets slower is slow for every variant, and an interrupted sweep has whole seeds.

    Raises:
        SweepError: if no run of a tuning, or of the sweep, came to its end.
    """
    tried, chosen = _tune(sweep, runs_dir, machine, disable_tqdm)
    planned = {
        (setting.label, variant.label): sweep.runs(setting, variant, chosen[setting.label])
        for setting in sweep.settings
        for variant in sweep.variants
    }
    ordered = [run for position in range(len(sweep.seeds)) for runs in planned.values() for run in [runs[position]]]
    run_all(ordered, runs_dir, machine, description=sweep.name, disable_tqdm=disable_tqdm)
    arms = {key: read_arm(runs, runs_dir) for key, runs in planned.items()}
    metric = metric_of(arms.values())
    if metric is None:
        raise SweepError(f"No run of {sweep.name} came to its end; the first: {failure(ordered[0], runs_dir)}")
    return Results(sweep, metric, chosen, tried, arms)


def planned_runs(sweep: Sweep, values: Mapping[str, float | str]) -> list[tuple[Setting, PlannedRun]]:
    """Return every run of a sweep with its setting, those of the tuning first.

    Args:
        sweep: To plan.
        values: Of each tuning, or what stands in place of what it has yet to choose.
    """
    runs: list[tuple[Setting, PlannedRun]] = []
    for setting in sweep.settings:
        for tuning in sweep.tunings:
            candidates = sweep.tuning_runs(setting, tuning, values)
            runs += [(setting, run) for same_value in candidates.values() for run in same_value]
        for variant in sweep.variants:
            runs += [(setting, run) for run in sweep.runs(setting, variant, values)]
    return runs


def _tune(
    sweep: Sweep, runs_dir: Path, machine: Machine, disable_tqdm: bool
) -> tuple[dict[str, dict[str, dict[float, float | None]]], dict[str, dict[str, float]]]:
    """Choose the values of one tuning after the other, of all settings at once.

    Returns:
        Setting's label -> name of the tuning -> value -> mean result, and the same down to the value chosen.
    """
    tried: dict[str, dict[str, dict[float, float | None]]] = {setting.label: {} for setting in sweep.settings}
    chosen: dict[str, dict[str, float]] = {setting.label: {} for setting in sweep.settings}
    for tuning in sweep.tunings:
        planned = {
            setting.label: sweep.tuning_runs(setting, tuning, chosen[setting.label]) for setting in sweep.settings
        }
        candidates = [run for values in planned.values() for runs in values.values() for run in runs]
        run_all(candidates, runs_dir, machine, description=f"tuning {tuning.name}", disable_tqdm=disable_tqdm)
        for label, values in planned.items():
            arms = {value: read_arm(runs, runs_dir) for value, runs in values.items()}
            metric = metric_of(arms.values())
            if metric is None:
                first = next(run for runs in values.values() for run in runs)
                raise SweepError(
                    f"No run that tunes the {tuning.name} of {label} came to its end: {failure(first, runs_dir)}"
                )
            metric = replace(metric, final_key=None)  # by the validation data, also where the results are of others
            tried[label][tuning.name] = {value: arm.mean(metric) for value, arm in arms.items()}
            best = choose(tried[label][tuning.name], metric)
            assert best is not None
            chosen[label][tuning.name] = best
    return tried, chosen
