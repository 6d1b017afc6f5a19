"""The picture of a comparison: curves over training, and final values."""

from collections.abc import Sequence
from typing import Any

from hf_specattn.figures import COLORS, MARKERS, new_figure, render

from .comparison import METRICS, Metric, RunGroup, columns, mean_curve


def picture(groups: Sequence[RunGroup], metric: Metric) -> dict[str, bytes]:
    """Training loss and the validation's metric over steps, and its final values; file ending -> image.

    Runs under a time budget come to different steps in the same time, so theirs are drawn over training tokens.
    """
    figure = new_figure(14, 4.6)
    training, validation, final = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    over_tokens = any(run.time_budget is not None for group in groups for run in group.runs)
    for index, group in enumerate(groups):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        _draw_curves(training, group, "train_loss", 1.0, over_tokens, color, None)
        _draw_curves(validation, group, metric.key, metric.factor, over_tokens, color, marker)
        _draw_final(final, index, group, metric, color, marker)
    unit = groups[0].runs[0].unit
    x = f"training {unit}" if over_tokens else "optimizer step"
    training.set(xlabel=x, ylabel=f"training loss ({METRICS[unit]['loss'].unit})", title="Training")
    validation.set(xlabel=x, ylabel=f"validation {metric.name} ({metric.unit})", title="Validation")
    final.set(ylabel=f"final validation {metric.name} ({metric.unit})", title="Final: runs, mean, deviation")
    final.set_xticks(range(len(groups)), [group.label.replace(", ", "\n") for group in groups], fontsize=7)
    final.set_xlabel("group")
    final.margins(x=0.2)
    for axes in (training, validation, final):
        axes.grid(alpha=0.3)
    validation.legend(fontsize=8)
    return render(figure, "comparison")


def _draw_curves(
    axes: Any, group: RunGroup, key: str, factor: float, over_tokens: bool, color: str, marker: str | None
) -> None:
    """Every run of a group thin, their mean thick; `factor` is from the recorded values to those drawn."""
    curves = [[(at, value * factor) for at, value in run.curve(key, over_tokens)] for run in group.runs]
    for points in curves:
        # Without a marker a single point would not show.
        style = {"color": color, "marker": marker or ("." if len(points) == 1 else None)}
        axes.plot(*columns(points), linewidth=0.6, markersize=2.5, alpha=0.5, **style)
    # An empty one, too, has its entry in the legend: the runs of a time budget may have no position in common.
    style = {"color": color, "marker": marker, "label": group.label}
    axes.plot(*columns(mean_curve(curves)), linewidth=2, markersize=5, **style)


def _draw_final(axes: Any, position: int, group: RunGroup, metric: Metric, color: str, marker: str) -> None:
    """Each run's value as an open marker, and beside them the mean with one standard deviation either way."""
    values = list(group.values(metric).values())
    style = {"color": color, "marker": marker, "linestyle": "none"}
    axes.plot([position - 0.12] * len(values), values, fillstyle="none", **style)
    axes.errorbar(position + 0.12, group.mean(metric), yerr=group.deviation(metric), capsize=4, **style)
