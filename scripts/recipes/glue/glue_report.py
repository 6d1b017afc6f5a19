"""The table and the picture of GLUE runs."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hf_specattn.figures import COLORS, MARKERS, markdown_table, new_figure, render

from ..compare.comparison import PairedDifference
from .glue_results import differing_settings
from .summary import Scores, Summary
from .tasks import METRIC_TITLES, Column

NAME = "glue"
NOTHING = "–"
CONSTANT = "best constant answer"
LONGEST_MESSAGE = 200
# Facts that say on what a run ran, and versions that can change its scores in the last digits.
ENVIRONMENT = ("device",)
VERSIONS = ("torch", "transformers", "hf_specattn")
# Differs between models as their names do.
IDENTITY = "model_fingerprint"

SAME_TRAINING = (
    "Without weight decay, a checkpoint that is conditioned by preserve with a fixed C trains as the stock one does, step "
    "for step: W starts as W - C, and the two differ only by rounding. A difference between them is not an effect of "
    "conditioning."
)
ADVICE_ON_INTERVALS = (
    "The interval is that of the mean difference over seeds (Student's t, paired: a seed fixes the order of the batches and, "
    "for models with the same head, its start). One that contains 0 means that these seeds do not tell which model is "
    "better, not that they are equal. Each interval stands by itself: among many comparisons some leave out 0 by chance. "
    "No interval covers the spread between examples: another development set would move all seeds together."
)


# --------------------------------------------------------------------------------------------------------------- table


def markdown(summary: Summary) -> str:
    """Return the report: the table of all models, the failed runs, and what the reader has to know."""
    parts = [markdown_table(table_header(summary), _rows(summary))]
    if summary.failures:
        parts.append(_failure_table(summary))
    parts += [f"{note}\n" for note in notes(summary)]
    return "\n".join(parts)


def table_header(summary: Summary) -> list[str]:
    header = ["model", "statistic", *(column.heading for column in summary.columns), "average (of how many numbers)"]
    return header if summary.one_mnli is None else [*header, "average with one MNLI number"]


def _averages(summary: Summary, model: str) -> list[Scores]:
    averages = [summary.average(model)]
    return averages if summary.one_mnli is None else [*averages, summary.average(model, summary.one_mnli)]


def _rows(summary: Summary) -> list[list[str]]:
    rows = []
    for model in summary.models:
        scores = [*(summary.scores(model, column) for column in summary.columns), *_averages(summary, model)]
        rows.append([model, "mean ± deviation", *map(_mean_cell, scores)])
        rows.append([model, "median", *map(_median_cell, scores)])
    constants = [summary.constant_score(column) for column in summary.columns]
    if any(value is not None for value in constants):
        cells = [NOTHING if value is None else f"{value:.2f}" for value in constants]
        rows.append([CONSTANT, "", *cells, *[NOTHING] * (1 + (summary.one_mnli is not None))])
    for model in summary.models:
        if model != summary.reference:
            rows += difference_rows(summary, model)
    return rows


def _mean_cell(scores: Scores) -> str:
    if scores.mean is None:
        return f"failed ({scores.failed})" if scores.failed else NOTHING
    deviation = "" if scores.deviation is None else f" ± {scores.deviation:.2f}"
    total = len(scores.by_seed) + scores.failed
    some = f" ({len(scores.by_seed)} of {total})" if scores.failed else ""
    return f"{scores.mean:.2f}{deviation}{some}{_of_columns(scores)}"


def _median_cell(scores: Scores) -> str:
    return NOTHING if scores.median is None else f"{scores.median:.2f}{_of_columns(scores)}"


def _of_columns(average: Scores) -> str:
    return "" if average.columns is None else f" ({average.columns})"


def difference_rows(summary: Summary, model: str) -> list[list[str]]:
    found = [summary.difference(model, column) for column in (*summary.columns, None)]
    filler = [] if summary.one_mnli is None else [NOTHING]
    name = f"{model} minus {summary.reference}"
    means = [NOTHING if item is None else f"{item.mean:+.2f} ({len(item.seeds)})" for item in found]
    return [
        [name, "mean difference (seeds)", *means, *filler],
        [name, "95 % interval", *map(_interval_cell, found), *filler],
    ]


def _interval_cell(difference: PairedDifference | None) -> str:
    if difference is None:
        return NOTHING
    if difference.interval is None:
        return "needs scipy" if len(difference.seeds) > 1 and find_spec("scipy") is None else NOTHING
    low, high = difference.interval
    return f"{low:+.2f} to {high:+.2f}"


def _failure_table(summary: Summary) -> str:
    rows = []
    for run in summary.failures:
        failure = run.failure or {}
        what = f"{failure.get('kind', 'unknown')}: {failure.get('message', 'no message')}"
        short = what if len(what) <= LONGEST_MESSAGE else f"{what[: LONGEST_MESSAGE - 1]}…"
        rows.append([run.model, run.task, str(run.seed), short])
    return markdown_table(["failed run", "task", "seed", "what happened"], rows)


def notes(summary: Summary) -> list[str]:
    """Return what the reader of the table has to know, one paragraph each."""
    metrics = dict.fromkeys(METRIC_TITLES[column.task.main_metric] for column in summary.columns)
    lines = [
        f"Scores on the development sets after the last epoch, in points of 100 ({', '.join(metrics)}), over "
        f"{_count(len(summary.seeds), 'seed')}; the deviation is the standard deviation over them. An average is that of the "
        "columns' means or medians, of as many numbers as stand in parentheses.",
        _settings_note(summary),
    ]
    if any(summary.constant_score(column) is not None for column in summary.columns):
        lines.append(f"The {CONSTANT} gives one class to all examples. A model near it has not learned the task.")
    if any(_trains_as_stock(record.settings) for record in summary.records):
        lines.append(SAME_TRAINING)
    if summary.failures:
        lines.append(
            "Failed runs are not part of any mean, median or difference, which therefore favor the models that they "
            "belong to."
        )
    scored = {tuple(summary.scored_columns(model)) for model in summary.models}
    if len(scored) > 1:
        lines.append("**The averages do not compare**: the models have scores in different columns.")
    others = [model for model in summary.models if model != summary.reference]
    differences = [summary.difference(model, column) for model in others for column in summary.columns]
    if any(difference is not None and difference.interval is not None for difference in differences):
        lines.append(ADVICE_ON_INTERVALS)
    return [*lines, *_environment_notes(summary)]


def _trains_as_stock(settings: dict[str, Any]) -> bool:
    # With adapters W and C are frozen alike, whatever the decay.
    unpulled = settings.get("weight_decay") == 0 or settings.get("lora") is not None
    return unpulled and str(settings.get("conditioning")).endswith("preserve")


def _settings_note(summary: Summary) -> str:
    differing = differing_settings(summary.records)
    shared = {name: value for name, value in summary.records[0].settings.items() if name not in differing}
    text = "All runs: " + ", ".join(
        f"{name} {_spelled(value)}" for name, value in shared.items() if value is not None and name != IDENTITY
    )
    for name, values in differing.items():
        if name != IDENTITY:
            text += f". {name}: " + ", ".join(f"{_spelled(value)} ({model})" for model, value in values.items())
    sizes = {record.task: record.data.get("train_examples") for record in summary.records}
    sizes_told = ", ".join(f"{task} {size:,}" for task, size in sizes.items() if size is not None)
    return f"{text}. Training examples: {sizes_told}."


def _spelled(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value)


def _environment_notes(summary: Summary) -> list[str]:
    lines = []
    for what, found in (
        (ENVIRONMENT, [[record.facts.get(name) for name in ENVIRONMENT] for record in summary.records]),
        (VERSIONS, [[record.versions.get(name) for name in VERSIONS] for record in summary.records]),
    ):
        kinds = {json.dumps(values): values for values in found}
        if len(kinds) > 1:
            told = "; ".join(" ".join(map(str, values)) for values in kinds.values())
            lines.append(f"The runs differ in {', '.join(what)} ({told}), which can change scores a little.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------------- picture


def picture(summary: Summary) -> dict[str, bytes]:
    """Return file ending -> image: per column all seeds with mean and deviation, and the paired differences below.

    Raises:
        ImportError: if matplotlib is missing.
    """
    others = [model for model in summary.models if model != summary.reference]
    width = max(7.0, 1.7 * len(summary.columns) + 1.0)
    figure = new_figure(width, 7.0 if others else 3.8)
    panels = figure.subfigures(2, 1, height_ratios=(1, 1)) if others else [figure]
    axes = panels[0].subplots(1, len(summary.columns), squeeze=False)[0]
    for place, (axis, column) in enumerate(zip(axes, summary.columns)):
        _draw_scores(axis, summary, column)
        if place == 0:
            axis.set_ylabel("development score (points of 100)")
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    panels[0].legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
    if others:
        _draw_differences(panels[1].subplots(), summary, others)
    return render(figure, NAME)


def _style(summary: Summary, model: str) -> dict[str, Any]:
    place = summary.models.index(model)
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": "none"}


def _draw_scores(axis: Any, summary: Summary, column: Column) -> None:
    """Each seed as an open marker, and beside them the mean with one standard deviation either way."""
    for place, model in enumerate(summary.models):
        scores, style = summary.scores(model, column), _style(summary, model)
        values = list(scores.by_seed.values())
        axis.plot([place - 0.15] * len(values), values, fillstyle="none", markersize=5, **style)
        # Without a score too, so that every model has its entry in the legend.
        mean = [] if scores.mean is None else [scores.mean]
        axis.errorbar([place + 0.15] * len(mean), mean, yerr=scores.deviation, capsize=3, label=model, **style)
    if (constant := summary.constant_score(column)) is not None:
        axis.axhline(constant, color="gray", linewidth=0.8, linestyle=":", label=CONSTANT)
    axis.set_title(column.heading.replace(" (", "\n("), fontsize=9)
    axis.set_xticks([])
    axis.set_xlabel("models, seeds", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.3)
    axis.grid(alpha=0.3, axis="y")


def _draw_differences(axis: Any, summary: Summary, others: Sequence[str]) -> None:
    places = [*summary.columns, None]
    for shift, model in enumerate(others):
        offset = (shift - (len(others) - 1) / 2) * 0.6 / len(others)
        style, labeled = _style(summary, model), False
        for place, column in enumerate(places):
            difference = summary.difference(model, column)
            if difference is None:
                continue
            half = None if difference.interval is None else difference.interval[1] - difference.mean
            label = None if labeled else model
            axis.errorbar(place + offset, difference.mean, yerr=half, capsize=4, label=label, **style)
            labeled = True
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(places)), [column.title if column else "average" for column in places], fontsize=8)
    axis.set_ylabel(f"minus {summary.reference} (points of 100)")
    axis.set_xlabel("development set")
    axis.set_title("Paired difference over seeds: mean and 95 % interval", fontsize=9)
    axis.grid(alpha=0.3, axis="y")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
