"""The picture of a comparison: curves over training, and final values."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from hf_specattn.figures import COLORS, MARKERS, capped, draw_log10, label_powers, log10_of, new_figure, render

from .comparison import METRICS, Metric, RunGroup, columns, mean_curve

HUGE = 1e6


def picture(groups: Sequence[RunGroup], metric: Metric) -> dict[str, bytes]:
    """Training loss and the validation's metric over steps, and its final values; file ending -> image.

    Runs under a time budget come to different steps in the same time, so theirs are drawn over training tokens. Of one or
    two validations no curve is drawn: their last is among the final values.
    """
    over_tokens = any(run.time_budget is not None for group in groups for run in group.runs)
    unit = groups[0].runs[0].unit
    losses = "sum of losses" if metric.name.endswith(" AP") else METRICS[unit]["loss"].unit  # a detector's
    curves = [("train_loss", 1.0, f"training loss ({losses})", "Training")]
    if any(len(run.curve(metric.key)) > 2 for group in groups for run in group.runs):
        curves.append((metric.key, metric.factor, f"validation {metric.name} ({metric.unit})", "Validation"))
    figure = new_figure(4.6 * len(curves) + 5, max(4.6, 1.5 + 0.45 * len(groups)))
    *panels, final = figure.subplots(1, len(curves) + 1)
    for axes, (key, factor, label, title) in zip(panels, curves):
        huge = _is_huge(groups, key)  # on an axis of logarithms
        for index, group in enumerate(groups):
            style = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)] if key == metric.key else None
            _draw_curves(axes, group, key, factor, over_tokens, huge, *style)
        axes.set(xlabel=f"training {unit}" if over_tokens else "optimizer step", ylabel=label, title=title)
        if huge:
            label_powers(axes, "y")
    _draw_finals(final, groups, metric)
    for axes in (*panels, final):
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
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


def _draw_finals(axes: Any, groups: Sequence[RunGroup], metric: Metric) -> None:
    """A row for each group: its runs as open markers, and where there are several their mean with its deviation."""
    huge = _is_huge(groups, metric.key)
    several = any(len(group.runs) > 1 for group in groups)
    for row, group in enumerate(groups):
        values = list(group.values(metric).values())
        style = {"color": COLORS[row % len(COLORS)], "marker": MARKERS[row % len(MARKERS)], "linestyle": "none"}
        axes.plot(capped(log10_of(values))[0] if huge else values, [row] * len(values), fillstyle="none", **style)
        if len(values) > 1:
            mean = capped(log10_of(group.mean(metric)))[0] if huge else group.mean(metric)
            deviation = None if huge else group.deviation(metric)  # which goes below zero there
            axes.errorbar(mean, row + 0.2, xerr=deviation, capsize=4, **style)
    measured = f"final validation {metric.name} ({metric.unit})"
    axes.set(xlabel=measured, title="Final: runs, mean, deviation" if several else "Final")
    axes.set_yticks(range(len(groups)), [group.label.replace(", ", ",\n") for group in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    if huge:
        label_powers(axes, "x")
