"""Markdown tables and figures, shared by all reports."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

# Okabe and Ito's palette: distinguishable with any color vision, and in gray.
OKABE_ITO = {"blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73", "orange": "#E69F00"}
# The rest of Okabe and Ito's palette except yellow, which is too light for lines on white.
COLORS = (*OKABE_ITO.values(), "#56B4E9", "#CC79A7", "#000000")
# Powers of ten at which a figure caps its values.
LOG10_LIMITS = (-30.0, 30.0)
MARKERS = "os^Dv*XP"  # one more than the colors, so that both repeat together only after many groups


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: the first column left-aligned, the others right-aligned; `|` within cells is escaped."""
    lines = [_table_row(header), f"|---|{'---:|' * (len(header) - 1)}", *map(_table_row, rows)]
    return "\n".join(lines) + "\n"


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def log10_of(values: Any) -> Any:
    """Decimal logarithms of numbers >= 0: -inf of 0, inf of infinity."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return np.log10(np.asarray(values, dtype=float))


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure that needs no display; its size is in inches.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        # Imported here, and without pyplot: training must run where matplotlib or a display is missing.
        from matplotlib import figure
    except ImportError as error:
        raise ImportError(
            "The figure needs matplotlib, which is not installed: pip install 'hf_specattn[train]'."
        ) from error
    return figure.Figure(figsize=(width, height), dpi=150, layout="constrained")


def capped(log10: Any) -> tuple[Any, Any]:
    """Decimal logarithms clipped to `LOG10_LIMITS`, and which of them were beyond; nan stays."""
    import numpy as np

    log10 = np.asarray(log10, dtype=float)
    limited = np.clip(log10, *LOG10_LIMITS)
    return limited, (limited != log10) & ~np.isnan(log10)


def draw_log10(axes: Any, x: Any, log10: Any, **style: Any) -> None:
    """Plot decimal logarithms over `x`; values beyond `LOG10_LIMITS` are drawn at the limit, with a mark.

    matplotlib's own logarithmic axes overflow at 1e308, and leave out what is infinite or zero.
    """
    import numpy as np

    limited, beyond = capped(log10)
    axes.plot(x, limited, **style)
    if beyond.any():
        low, high = LOG10_LIMITS
        mark = {"linestyle": "none", "marker": "X", "markersize": 8, "color": style.get("color"), "label": "_beyond"}
        axes.plot(np.asarray(x)[beyond], limited[beyond], **mark)
        note = axes.annotate(
            f"x: beyond 1e{low:.0f} or 1e{high:.0f}", (0.02, 0.02), xycoords="axes fraction", fontsize=7
        )
        note.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})


def label_powers(axes: Any, *axis_names: str) -> None:
    """Label axes on which decimal logarithms are drawn ("x", "y") with the numbers themselves: 2, 50, 1e+06.

    Call it when everything is drawn: the ticks depend on the limits at that time.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    for name in axis_names:
        low, high = getattr(axes, f"get_{name}lim")()
        if high - low < 1:  # less than a decade: round numbers
            ticks = np.array([tick for tick in MaxNLocator(5).tick_values(10.0**low, 10.0**high) if tick > 0])
        elif high - low < 3:
            ticks = np.array(
                [digit * 10.0**power for power in range(int(low) - 2, int(high) + 2) for digit in (1, 2, 5)]
            )
        else:
            ticks = np.power(10.0, MaxNLocator(7, integer=True).tick_values(low, high))
        places = np.log10(ticks)
        seen = (places >= low - 1e-9) & (places <= high + 1e-9)
        digits = 5 if ticks[seen].max(initial=0) >= 1e6 else 6  # 1e+05 next to 1e+06, but 100000 next to 50000
        getattr(axes, f"set_{name}ticks")(places[seen], [f"{tick:.{digits}g}" for tick in ticks[seen]])
        getattr(axes, f"set_{name}lim")(low, high)


def render(figure: Any, name: str) -> dict[str, bytes]:
    """Return a figure as file ending -> image, for "png" and "svg"; the same figure and name give the same bytes."""
    from matplotlib import rc_context

    images = {}
    # Without a date and with fixed identifiers.
    with rc_context({"svg.hashsalt": name}):
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=metadata)
            images[ending] = buffer.getvalue()
    return images
