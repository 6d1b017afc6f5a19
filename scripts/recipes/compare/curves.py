"""The picture of a comparison: curves over training, and final values."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from hf_specattn.figures import COLORS, MARKERS, draw_log10, log10_of, new_figure, render

from .comparison import METRICS, Metric, RunGroup, columns, mean_curve

HUGE = 1e6


def picture(groups: Sequence[RunGroup], metric: Metric) -> dict[str, bytes]:
    """Training loss and the validation's metric over steps, and its final values; file ending -> image.

    Runs under a time budget come to different steps in the same time, so theirs are drawn over training tokens.
    """
    figure = new_figure(14, 4.6)
    training, validation, final = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    drawn = {key: _is_huge(groups, key) for key in ("train_loss", metric.key)}  # on an axis of logarithms
    over_tokens = any(run.time_budget is not None for group in groups for run in group.runs)
    for index, group in enumerate(groups):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        _draw_curves(training, group, "train_loss", 1.0, over_tokens, drawn["train_loss"], color, None)
        _draw_curves(validation, group, metric.key, metric.factor, over_tokens, drawn[metric.key], color, marker)
        _draw_final(final, index, group, metric, drawn[metric.key], color, marker)
    unit = groups[0].runs[0].unit
    x = f"training {unit}" if over_tokens else "optimizer step"
    log = {key: "log10 of " if huge else "" for key, huge in drawn.items()}
    losses = "sum of losses" if metric.name.endswith(" AP") else METRICS[unit]["loss"].unit  # a detector's
    training.set(xlabel=x, ylabel=f"{log['train_loss']}training loss ({losses})", title="Training")
    measured = f"{metric.name} ({metric.unit})"
    validation.set(xlabel=x, ylabel=f"{log[metric.key]}validation {measured}", title="Validation")
    of_runs = "runs, mean" if drawn[metric.key] else "runs, mean, deviation"
    final.set(ylabel=f"{log[metric.key]}final validation {measured}", title=f"Final: {of_runs}")
    final.set_xticks(range(len(groups)), [group.label.replace(", ", "\n") for group in groups], fontsize=7)
    final.set_xlabel("group")
    final.margins(x=0.2)
    for axes in (training, validation, final):
        axes.grid(alpha=0.3)
    validation.legend(fontsize=8)
    return render(figure, "comparison")


def _is_huge(groups: Sequence[RunGroup], key: str) -> bool:
    """Whether a value is so large that beside it nothing else would show; of a run that diverged."""
    return any(value > HUGE for group in groups for run in group.runs for _, value in run.curve(key))


def _draw_curves(
    axes: Any,
    group: RunGroup,
    key: str,
    factor: float,
    over_tokens: bool,
    logarithmic: bool,
    color: str,
    marker: str | None,
) -> None:
    """Every run of a group thin, their mean thick; `factor` is from the recorded values to those drawn."""
    plot = partial(_plot, axes, logarithmic)
    curves = [[(at, value * factor) for at, value in run.curve(key, over_tokens)] for run in group.runs]
    for points in curves:
        # Without a marker a single point would not show.
        style = {"color": color, "marker": marker or ("." if len(points) == 1 else None)}
        plot(points, linewidth=0.6, markersize=2.5, alpha=0.5, **style)
    # An empty one, too, has its entry in the legend: the runs of a time budget may have no position in common.
    style = {"color": color, "marker": marker, "label": group.label}
    plot(mean_curve(curves), linewidth=2, markersize=5, **style)


def _plot(axes: Any, logarithmic: bool, points: Sequence[tuple[float, float]], **style: Any) -> None:
    x, values = columns(points)
    if logarithmic:
        draw_log10(axes, x, log10_of(values), **style)
    else:
        axes.plot(x, values, **style)


def _draw_final(
    axes: Any, position: int, group: RunGroup, metric: Metric, logarithmic: bool, color: str, marker: str
) -> None:
    """Each run's value as an open marker, and beside them the mean with one standard deviation either way."""
    values = list(group.values(metric).values())
    style = {"color": color, "marker": marker, "linestyle": "none"}
    _plot(axes, logarithmic, [(position - 0.12, value) for value in values], fillstyle="none", **style)
    if logarithmic:  # a deviation goes below zero there
        _plot(axes, logarithmic, [(position + 0.12, group.mean(metric))], **style)
        return
    axes.errorbar(position + 0.12, group.mean(metric), yerr=group.deviation(metric), capsize=4, **style)
