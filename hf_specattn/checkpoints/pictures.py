"""The figure of a model card: condition numbers over the layers, before and after."""

from ..figures import OKABE_ITO, new_figure, render
from .records import KappaRow, Record

PICTURE = "kappa.png"


def kappa_picture(record: Record) -> bytes | None:
    """A PNG with one panel per projection: kappa of the whole projection over the layers, before and after.

    None if matplotlib is not installed, or there is nothing to draw.
    """
    panels: dict[str, list[KappaRow]] = {}
    for row in record.rows:
        panels.setdefault(row.projection, []).append(row)
    if not panels:
        return None
    try:
        figure = new_figure(1 + 2.6 * len(panels), 3.0)
    except ImportError:
        return None
    labels = ("W before", "W balanced") if record.command == "balance" else ("W", "W + C")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (projection, rows) in zip(axes, panels.items()):
        layers = range(len(rows))
        before = [row.before or float("nan") for row in rows]
        after = [row.after or float("nan") for row in rows]
        axis.plot(
            layers, before, label=labels[0], color=OKABE_ITO["vermillion"], marker="o", linewidth=1.2, markersize=4
        )
        axis.plot(layers, after, label=labels[1], color=OKABE_ITO["blue"], marker="s", linewidth=1.2, markersize=4)
        axis.set_title(projection)
        axis.set_xlabel("layer")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("condition number (no unit)")
    axes[0].legend()
    return render(figure, "kappa")["png"]
