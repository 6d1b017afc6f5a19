"""The report of a sweep: tables in Markdown, a picture, and every number as JSON."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from hf_specattn.figures import COLORS, MARKERS, markdown_table, new_figure, render

from ..comparison import PairedDifference, Run
from .design import Setting, Variant
from .sweep_monitor import EXPLANATION, monitor_table, seen_by_seed
from .sweep_results import ArmResult, Results

NOTHING = "–"


# --- tables ----------------------------------------------------------------------------------------------------------


def report(results: Results, runs_dir: Path, command: str) -> str:
    """Return the whole report as Markdown: the short table, the paper's, what was tuned, every arm, and what to know.

    Args:
        results: Of the sweep.
        runs_dir: Where its runs are, for those that failed.
        command: That made it.
    """
    sweep = results.sweep
    parts = [f"# {sweep.title}", f"    {command}", _introduction(results), short_table(results)]
    if guesses := baseline_table(results):
        parts += ["Without a model, on the same data:", guesses]
    if sweep.published is not None:
        caption, (header, *rows) = sweep.published
        parts += [f"{caption}:", markdown_table(header, rows)]
    if sweep.tunings:
        parts += ["## Tuned first", _tuning_text(results), tuning_table(results)]
    parts += ["## Every arm", arm_table(results), *_notes(results, runs_dir)]
    if (table := monitor_table(results)) is not None:
        parts += ["## What the monitor saw", EXPLANATION, table]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def short_table(results: Results) -> str:
    """The results in the layout of the paper's table."""
    return LAYOUTS[results.sweep.layout](results)


def baseline_table(results: Results) -> str:
    """What guessing comes to for each setting, as its runs recorded it; empty where they did not."""
    found = {}
    for setting in results.sweep.settings:
        runs = [run for variant in results.sweep.variants for run in results.arm(setting, variant).runs.values()]
        if runs and "baselines" in runs[0].record.facts:
            found[setting.label] = runs[0].record.facts["baselines"]
    if not found:
        return ""
    rows = []
    for name in dict.fromkeys(name for guesses in found.values() for name in guesses):
        values = (guesses.get(name) for guesses in found.values())
        rows.append(
            [name.replace("_", " "), *(NOTHING if value is None else f"{100 * value:.2f}" for value in values)]
        )
    return markdown_table(["test accuracy (%)", *found], rows)


def _settings_as_columns(results: Results) -> str:
    sweep = results.sweep
    header = [f"{results.metric.name} ({results.metric.unit})", *(setting.label for setting in sweep.settings)]
    rows = [
        [variant.label, *(describe_arm(results, results.arm(setting, variant)) for setting in sweep.settings)]
        for variant in sweep.variants
    ]
    return markdown_table(header, rows)


def _variants_as_columns(results: Results) -> str:
    sweep = results.sweep
    names = [variant.label if variant.strength is None else f"{variant.strength:g}" for variant in sweep.variants]
    header = [f"{results.metric.name} ({results.metric.unit}); numbers are lambdas", *names]
    rows = [
        [setting.label, *(describe_arm(results, results.arm(setting, variant)) for variant in sweep.variants)]
        for setting in sweep.settings
    ]
    return markdown_table(header, rows)


def _with_times(results: Results) -> str:
    header = ["model", f"{results.metric.name} ({results.metric.unit})", "training time (s)", "times that of stock"]
    rows = []
    for setting in results.sweep.settings:
        for variant in results.sweep.variants:
            arm = results.arm(setting, variant)
            seconds = arm.seconds()
            rows.append(
                [
                    f"{setting.label} {variant.label}",
                    describe_arm(results, arm),
                    NOTHING if seconds is None else f"{seconds:.1f}",
                    _time_ratio(arm, results.reference(setting)),
                ]
            )
    return markdown_table(header, rows)


def _time_ratio(arm: ArmResult, reference: ArmResult) -> str:
    """The median over seeds of the time of a run over that of the reference's run of the same seed."""
    ratios = [
        run.record.final["seconds"] / reference.runs[seed].record.final["seconds"]
        for seed, run in arm.runs.items()
        if seed in reference.runs
    ]
    if not ratios:
        return NOTHING
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _with_results(results: Results) -> str:
    header = ["model (all in %)", *(header for _, header in results.sweep.results)]
    rows = []
    for setting in results.sweep.settings:
        for variant in results.sweep.variants:
            runs = results.arm(setting, variant).runs.values()
            rows.append(
                [
                    f"{setting.label}, {variant.label}",
                    *(
                        _mean_and_deviation([100.0 * run.record.final[name] for run in runs], 1)
                        for name, _ in results.sweep.results
                    ),
                ]
            )
    return markdown_table(header, rows)


LAYOUTS: dict[str, Callable[[Results], str]] = {
    "settings": _settings_as_columns,
    "variants": _variants_as_columns,
    "time": _with_times,
    "results": _with_results,
}


def arm_table(results: Results) -> str:
    """One row for each arm: result, differences with intervals, runs at chance, speed of learning."""
    sweep, metric = results.sweep, results.metric
    several = len(sweep.settings) > 1
    second = _second_label(results)
    controlled = any(variant.control for variant in sweep.variants)
    header = [
        *(["model"] if several else []),
        "variant",
        "runs",
        f"{metric.name} ({metric.unit})",
        f"minus {sweep.reference.label}, 95 % interval",
        *([f"minus {second}, 95 % interval"] if second else []),
        *(["minus its control, 95 % interval"] if controlled else []),
        "at chance",
        f"passes to the final {metric.name} of {second or sweep.reference.label} (runs)",
    ]
    rows = []
    for setting in sweep.settings:
        reference, found = results.reference(setting), results.second_reference(setting)
        other = None if found is None else found[1]
        target = (other or reference).mean(replace(metric, final_key=None))  # as the curves: of the validation data
        for variant in sweep.variants:
            arm = results.arm(setting, variant)
            rows.append(
                [
                    *([setting.label] if several else []),
                    variant.label,
                    f"{len(arm.runs)} of {len(sweep.seeds)}",
                    describe_arm(results, arm),
                    _difference(arm, reference, results),
                    *([NOTHING if other is None else _difference(arm, other, results)] if second else []),
                    *([_difference_to_control(setting, variant, results)] if controlled else []),
                    str(arm.at_chance()),
                    NOTHING if target is None else _passes(arm, results, target),
                ]
            )
    return markdown_table(header, rows)


def _second_label(results: Results) -> str | None:
    labels = results.sweep.second_references
    return "the best control" if len(labels) > 1 else next(iter(labels), None)


def tuning_table(results: Results) -> str:
    """What each value of a tuning came to; the chosen one is marked."""
    names = [tuning.name for tuning in results.sweep.tunings]
    rows = []
    for setting in results.sweep.settings:
        for name in names:
            chosen = results.chosen[setting.label][name]
            tried = results.tried[setting.label][name]
            texts = [
                f"{value:g}: {NOTHING if mean is None else f'{mean:.{results.metric.digits}f}'}"
                f"{' **(chosen)**' if value == chosen else ''}"
                for value, mean in tried.items()
            ]
            rows.append([setting.label, name, "; ".join(texts)])
    return markdown_table(["model", "tuned", f"value: mean {results.metric.name} ({results.metric.unit})"], rows)


def describe_arm(results: Results, arm: ArmResult) -> str:
    """Mean and standard deviation of an arm."""
    return _mean_and_deviation(list(arm.values(results.metric).values()), results.metric.digits)


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    if not values:
        return "failed"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _difference(arm: ArmResult, reference: ArmResult, results: Results) -> str:
    if arm is reference:
        return NOTHING
    found: PairedDifference | None = arm.difference(reference, results.metric)
    if found is None:
        return "no common seed"
    text = f"{found.mean:+.{results.metric.digits}f}"
    if found.interval is None:
        return f"{text} ({NOTHING})"
    low, high = (f"{end:+.{results.metric.digits}f}" for end in found.interval)
    return f"{text} ({low} to {high})"


def _difference_to_control(setting: Setting, variant: Variant, results: Results) -> str:
    if variant.control is None:
        return NOTHING
    control = results.arms[setting.label, variant.control]
    return _difference(results.arm(setting, variant), control, results)


def _passes(arm: ArmResult, results: Results, target: float) -> str:
    passes, runs = arm.passes_until(results.metric, target)
    return f"{NOTHING if passes is None else f'{passes:.1f}'} ({runs} of {len(arm.runs)})"


# --- text ------------------------------------------------------------------------------------------------------------


def _introduction(results: Results) -> str:
    runs = [run for arm in results.arms.values() for run in arm.runs.values()]
    facts = runs[0].record.facts
    device = facts.get("device_name") or facts.get("device", "an unknown device")
    seeds = len(results.sweep.seeds)
    shown = "the mean and the standard deviation (divisor n - 1)" if seeds > 1 else "the value"
    return (
        f"Trained on {'; '.join(dict.fromkeys(map(_training_of, runs)))}, {seeds} seed{'s' * (seeds > 1)}, device: {device}. "
        f"Cells show {shown} of the {'saved model' if results.sweep.results else results.metric.final_name}."
    )


def _training_of(run: Run) -> str:
    facts, arguments = run.record.facts, run.record.arguments
    named = (facts.get("images"), facts.get("data"), arguments.get("train_file"), arguments.get("dataset_name"))
    what = next((each for each in named if each), "the script's data")
    if not isinstance(what, str):
        what = ", ".join(what)
    items = "sequences" if run.unit == "tokens" else run.unit
    return f"{what} ({facts[f'train_{items}']:,} training {items}), {run.steps:,} steps"


def _tuning_text(results: Results) -> str:
    at_end = [
        f"{name} of {setting.label}"
        for setting in results.sweep.settings
        for name, value in results.chosen[setting.label].items()
        if value in (min(results.tried[setting.label][name]), max(results.tried[setting.label][name]))
    ]
    seeds = ", ".join(map(str, results.sweep.tuning_seeds))
    by = (
        f"with {' '.join(results.sweep.tuning_flags)}"
        if results.sweep.tuning_flags
        else "the validation data are the same"
    )
    text = f"Chosen by the mean over the seeds {seeds}, which no table below uses; {by}."
    if at_end:
        text += f" The best value lies at an end of its range, so a better one may lie beyond: {', '.join(at_end)}."
    return text


def _notes(results: Results, runs_dir: Path) -> list[str]:
    notes = [f"**Caution, runs differ where they should not.** {line}." for line in results.differences()]
    arms = results.arms.values()
    if any(len(arm.runs) > 1 for arm in arms):
        notes.append(
            "Intervals are those of the mean difference over seeds (Student's t; paired: a seed fixes the initial weights "
            "and the batches). One that contains 0 does not tell which is better. Among many comparisons about one in twenty "
            "leaves out 0 by chance."
        )
    if controls := {variant.label: variant.control for variant in results.sweep.variants if variant.control}:
        pairs = "; ".join(f"of {label}: {control}" for label, control in controls.items())
        notes.append(f"Controls: {pairs}.")
    if len(results.sweep.second_references) > 1:
        best = {setting.label: results.second_reference(setting) for setting in results.sweep.settings}
        named = "; ".join(f"{label}: {found[0]}" for label, found in best.items() if found is not None)
        notes.append(f"Best controls, by their means: {named}.")
    if any(arm.at_chance() for arm in arms):
        notes.append(
            "At chance: the runs whose test accuracy is less than three standard errors above the most frequent class's."
            if baseline_table(results)
            else "At chance: the runs whose final accuracy is below twice that of guessing."
        )
    if failed := [run for arm in arms for run in arm.failed]:
        folders = "; ".join(os.path.relpath(run.directory(runs_dir), runs_dir) for run in failed)
        notes.append(f"Runs that did not come to their end, and are in no mean: {folders}.")
    if results.sweep.layout == "time":
        notes.append(
            "Training times are those of runs side by side on one machine: medians over seeds, ratios paired by seed with "
            "their range. `benchmarks/bench_step.py` measures steps alone."
        )
    return notes


def as_json(results: Results) -> dict[str, Any]:
    """Return every number of the report, by setting and variant."""
    arms = []
    for setting in results.sweep.settings:
        for variant in results.sweep.variants:
            arm = results.arm(setting, variant)
            monitored = seen_by_seed(arm)
            shown = {
                name: {str(seed): run.record.final[name] for seed, run in arm.runs.items()}
                for name, _ in results.sweep.results
            }
            arms.append(
                {
                    "setting": setting.label,
                    "variant": variant.label,
                    "values": {str(seed): value for seed, value in arm.values(results.metric).items()},
                    "seconds": {str(seed): run.record.final["seconds"] for seed, run in arm.runs.items()},
                    "failed_seeds": [run.seed for run in arm.failed],
                    "at_chance": arm.at_chance(),
                    **({"results": shown} if shown else {}),
                    **({"monitor": {str(seed): record for seed, record in monitored.items()}} if monitored else {}),
                }
            )
    tried = {
        setting: {name: {f"{value:g}": mean for value, mean in values.items()} for name, values in names.items()}
        for setting, names in results.tried.items()
    }
    unit = {"metric": results.metric.key, "unit": results.metric.unit}
    return {"sweep": results.sweep.name, **unit, "chosen": results.chosen, "tried": tried, "arms": arms}


# --- picture ---------------------------------------------------------------------------------------------------------


def picture(results: Results) -> dict[str, bytes]:
    """Draw the results; file ending -> image. Over lambda where variants are the columns, else one row per variant."""
    draw = _over_lambda if results.sweep.layout == "variants" else _rows
    return render(draw(results), results.sweep.name)


def _over_lambda(results: Results) -> Any:
    from matplotlib.ticker import LogLocator, NullFormatter

    sweep, metric = results.sweep, results.metric
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    for index, setting in enumerate(sweep.settings):
        color = COLORS[index % len(COLORS)]
        strengths = [variant for variant in sweep.variants if variant.strength is not None]
        drawn = [(variant.strength, results.arm(setting, variant)) for variant in strengths]
        _errorbars(axes, drawn, results, f"{setting.label}, identity", color, MARKERS[index % len(MARKERS)], "-")
        plain = [variant for variant in sweep.variants if variant.strength is None]
        for style, variant in zip(("--", ":", "-."), plain):
            arm = results.arm(setting, variant)
            mean, deviation = arm.mean(metric), arm.deviation(metric) or 0.0
            if mean is not None:
                axes.axhline(mean, color=color, linestyle=style, label=f"{setting.label}, {variant.label}")
                axes.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("lambda")
    axes.set_ylabel(f"{metric.final_name} ({metric.unit}), mean and deviation")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _errorbars(
    axes: Any, drawn: Sequence[tuple[Any, ArmResult]], results: Results, label: str, color: str, marker: str, line: str
) -> None:
    known = [(x, arm) for x, arm in drawn if arm.runs]
    axes.errorbar(
        [x for x, _ in known],
        [arm.mean(results.metric) for _, arm in known],
        yerr=[arm.deviation(results.metric) or 0.0 for _, arm in known],
        color=color,
        marker=marker,
        linestyle=line,
        capsize=3,
        label=label,
    )


def _rows(results: Results) -> Any:
    """A panel for each setting; a row for each variant, with a marker for each start."""
    sweep, metric = results.sweep, results.metric
    rows = list(dict.fromkeys(_row_of(variant) for variant in sweep.variants))
    starts = list(dict.fromkeys(variant.start for variant in sweep.variants))
    columns = min(3, len(sweep.settings))
    lines = -(-len(sweep.settings) // columns)
    width = 8.0 if columns == 1 else 4.6 * columns
    figure = new_figure(width, lines * (1.2 + 0.27 * len(rows)))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel, setting in zip(grid.flat, sweep.settings):
        for index, start in enumerate(starts):
            drawn = [
                (rows.index(_row_of(item)), results.arm(setting, item))
                for item in sweep.variants
                if item.start == start
            ]
            drawn = [(row, arm) for row, arm in drawn if arm.runs]
            panel.errorbar(
                [arm.mean(metric) for _, arm in drawn],
                [row + 0.22 * (index - (len(starts) - 1) / 2) for row, _ in drawn],
                xerr=[arm.deviation(metric) or 0.0 for _, arm in drawn],
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linestyle="none",
                capsize=2,
                label=f"from the {start}" if start else "from the model's own start",
            )
        second = results.second_reference(setting)
        references = [results.reference(setting), *([] if second is None else [second[1]])]
        for index, reference in enumerate(references):
            if reference.runs:
                panel.axvline(reference.mean(metric), color=COLORS[index], linewidth=0.8, linestyle="--")
        panel.set_title(setting.label)
        panel.set_yticks(range(len(rows)), rows, fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(grid.flat)[len(sweep.settings) :]:
        panel.set_axis_off()
    grid.flat[0].set_ylim(len(rows) - 0.4, -0.6)
    for row in grid:
        row[0].set_ylabel("variant")
    x_label = f"{metric.final_name} ({metric.unit}), mean and deviation"
    if len(sweep.settings) == 1:
        grid.flat[0].set_xlabel(x_label)
    else:
        figure.supxlabel(x_label, fontsize="medium")
    if len(starts) > 1:
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=len(starts)
        )
    return figure


def _row_of(variant: Variant) -> str:
    """The label without the start, so that the starts of one treatment share a row."""
    return variant.label.removesuffix(f", {variant.start}") if variant.start else variant.label
