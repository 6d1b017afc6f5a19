"""Figures of the conditioning of attention: of one model, and of training runs in the paper's layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..figures import COLORS, MARKERS, capped, draw_log10, label_powers, log10_of, new_figure
from .monitor import summary_of
from .saturation import Saturation
from .spectra import ProjectionSpectra

PROJECTION_ORDER = ("query", "key", "value", "output")
# Perceptually uniform, and distinguishable with any color vision.
COLOR_MAP = "viridis"
Record = Mapping[str, Any]


def projections_in(rows: Sequence[ProjectionSpectra]) -> list[str]:
    """The projections that occur, in the usual order."""
    return [name for name in PROJECTION_ORDER if any(row.projection == name for row in rows)]


def is_conditioned(rows: Sequence[ProjectionSpectra]) -> bool:
    """Whether anything is added to some weight."""
    return any(row.raw is not row.effective for row in rows)


def spectra_figure(rows: Sequence[ProjectionSpectra]) -> Any:
    """Smallest and largest singular value and condition number of each projection over the layers, of W and of W + C."""
    figure = new_figure(12, 4.2)
    panels = (("sigma_min", "smallest singular value"), ("sigma_max", "largest singular value"), ("kappa", "kappa"))
    for axes, (attribute, label) in zip(figure.subplots(1, 3), panels):
        for index, name in enumerate(projections_in(rows)):
            chosen = [row for row in rows if row.projection == name]
            style = {"color": COLORS[index], "marker": MARKERS[index], "markersize": 4}
            layers = [row.layer for row in chosen]
            raw = log10_of([getattr(row.raw, attribute) for row in chosen])
            draw_log10(axes, layers, raw, linestyle=":", fillstyle="none", label=f"{name}: W", **style)
            if is_conditioned(chosen):
                effective = log10_of([getattr(row.effective, attribute) for row in chosen])
                draw_log10(axes, layers, effective, label=f"{name}: W + C", **style)
        axes.set(xlabel="attention layer", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        label_powers(axes, "y")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("Spectra of the whole projections")
    return figure


def distributions_figure(rows: Sequence[ProjectionSpectra]) -> Any:
    """All singular values of each projection by rank, one line per layer, of what the forward pass uses."""
    names = projections_in(rows)
    figure = new_figure(3.4 * len(names), 3.8)
    layers = max(row.layer for row in rows) + 1
    colors = _colors(layers)
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(all_axes, names):
        for row in rows:
            if row.projection == name:
                values = log10_of(row.effective.singular_values.numpy())
                draw_log10(axes, np.arange(1, len(values) + 1), values, color=colors[row.layer], linewidth=1)
        conditioned = is_conditioned([row for row in rows if row.projection == name])
        axes.set(xlabel="rank of the singular value", title=f"{name}: {'W + C' if conditioned else 'W'}")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("singular value")
    label_powers(all_axes[0], "y")
    _layer_scale(figure, all_axes, layers)
    return figure


def heat_maps_figure(rows: Sequence[ProjectionSpectra], saturations: Sequence[Saturation]) -> Any:
    """Condition number of every head's block, of what the forward pass uses, and attention entropy, by layer and head."""
    names = projections_in(rows)
    maps = [
        (f"kappa, {name}", _by_layer({row.layer: log10_of(row.effective.head_kappa) for row in rows
                                      if row.projection == name}))
        for name in names
    ]  # fmt: skip
    if saturations:
        shares = {row.layer: row.entropy.numpy() / max(row.uniform_entropy, 1e-12) for row in saturations}
        maps.append(("entropy / entropy of uniform attention", _by_layer(shares)))
    figure = new_figure(3.2 * len(maps), 3.4)
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps):
        limits = {"vmin": 0.0, "vmax": 1.0} if title.startswith("entropy") else {}
        values, beyond = capped(values)
        picture = axes.imshow(values, aspect="auto", cmap=COLOR_MAP, **limits)
        axes.plot(*np.nonzero(beyond)[::-1], linestyle="none", marker="X", color="white", label="_beyond")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="head", ylabel="attention layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(picture, ax=axes)
        if title.startswith("kappa"):
            label_powers(bar.ax, "y")
    return figure


def jacobian_figure(rows: Sequence[Any]) -> Any:
    """kappa of the Jacobian of the measured heads, next to the indicator, over the layers.

    Args:
        rows: `JacobianRow`s of the report.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for index, (attribute, label) in enumerate((("kappa", "kappa of the Jacobian"), ("product", "indicator (10)"))):
        values = [log10_of(row.kappa) if attribute == "kappa" else row.indicator.log10_product for row in rows]
        values = np.nan_to_num(
            values, nan=np.inf, posinf=np.inf, neginf=-np.inf
        )  # a one-hot softmax has no nonzero Lambda
        layers = [row.layer for row in rows]
        style = {"color": COLORS[index], "marker": MARKERS[index]}
        draw_log10(axes, layers, values, linestyle="none", alpha=0.5, markersize=4, **style)
        places = sorted(set(layers))
        means = [np.mean([value for value, here in zip(values, layers) if here == layer]) for layer in places]
        draw_log10(axes, places, means, label=f"{label}, geometric mean over heads", color=COLORS[index])
    if lower := [row for row in rows if row.is_lower_bound]:
        draw_log10(axes, [row.layer for row in lower], log10_of([row.kappa for row in lower]), linestyle="none", marker="^",
                   color="black", markersize=8, fillstyle="none",
                   label="at least: beyond what the Gram matrix resolves")  # fmt: skip
    axes.set(xlabel="attention layer", ylabel="condition number")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    label_powers(axes, "y")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center")
    return figure


def training_figure(groups: Mapping[str, Sequence[Sequence[Record]]]) -> Any:
    """The papers' layouts over training: smallest singular value, kappa of W and W + C, of the Jacobian, of heads' outputs.

    Lines are means over the runs of a group (seeds), bands their standard deviations. Query, key and value are averaged.

    Args:
        groups: label -> the records of each run, as `spectral_monitor.json` has them.
    """
    # The monitor of older runs did not look at the outputs.
    panels = (
        4 if any("kappa_head_output" in record for runs in groups.values() for run in runs for record in run) else 3
    )
    figure = new_figure(1 + 4 * panels, 4.4)
    left, middle, right, *last = figure.subplots(1, panels)
    for index, (label, runs) in enumerate(groups.items()):
        color = COLORS[index % len(COLORS)]
        curves = [_curves(records) for records in runs]
        for axes, raw, effective in ((left, "sigma_min", "sigma_min_effective"), (middle, "kappa", "kappa_effective")):
            draw_band(axes, [(steps, values[raw]) for steps, values in curves], f"{label}: W", color, ":")
            if any(values[raw] != values[effective] for _, values in curves):
                draw_band(axes, [(s, v[effective]) for s, v in curves], f"{label}: W + C", color, "-")
        draw_band(right, [(s, v["kappa_jacobian"]) for s, v in curves], f"{label}: Jacobian", color, "-")
        draw_band(right, [(s, v["indicator"]) for s, v in curves], f"{label}: indicator (10)", color, "--")
        for axes in last:
            draw_band(axes, [(s, v["kappa_head_output"]) for s, v in curves], f"{label}: A", color, ":")
            scaled = [(s, v["kappa_head_output_preconditioned"]) for s, v in curves]
            draw_band(axes, scaled, f"{label}: preconditioned", color, "-")
    left.set(ylabel="smallest singular value", title="Smallest singular value")
    middle.set(ylabel="kappa", title="Condition number of W and W + C")
    right.set(ylabel="kappa", title="Condition number of the Jacobian")
    for axes in last:
        axes.set(ylabel="kappa", title="Condition number of a head's output A")
    for axes in (left, middle, right, *last):
        axes.set(xlabel="optimizer step")
        axes.grid(alpha=0.3)
        label_powers(axes, "y")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)  # off the data
    return figure


def outcome_figure(
    groups: Mapping[str, Sequence[Sequence[Record]]], outcomes: Mapping[str, Sequence[float]], measure: str
) -> Any:
    """The outcome of training against the final kappa(W + C) and kappa of the Jacobian: one marker per run.

    Args:
        groups: as in [`training_figure`].
        outcomes: label -> the final value of each run, in the order of `groups`.
        measure: what the values are, for the axis.
    """
    figure = new_figure(9, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    kappas = (("kappa_effective", "kappa of W + C"), ("kappa_jacobian", "kappa of the Jacobian"))
    for axes, (name, label) in zip(panels, kappas):
        for index, (group, runs) in enumerate(groups.items()):
            ends = log10_of([_curves(records)[1][name][-1] for records in runs])
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            places, _ = capped(ends)
            axes.plot(places, outcomes[group], linestyle="none", label=group, **style)
        axes.set(xlabel=f"{label}, end of training", title=f"Against the {label}")
        axes.grid(alpha=0.3)
        label_powers(axes, "x")
    panels[0].set_ylabel(measure)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _curves(records: Sequence[Record]) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and per quantity its means over layers, heads and the three projections."""
    summaries = [summary_of(record) | _infinite(record) for record in records]
    curves: dict[str, list[float]] = {}
    for name in ("sigma_min", "sigma_min_effective", "kappa", "kappa_effective"):
        base, ending, _ = name.partition("_effective")
        keys = [f"{base}_{projection}{ending}" for projection in PROJECTION_ORDER[:3]]
        curves[name] = [float(np.mean([values.get(key, np.nan) for key in keys])) for values in summaries]
    for name in ("kappa_jacobian", "indicator", "kappa_head_output", "kappa_head_output_preconditioned"):
        curves[name] = [values.get(name, np.nan) for values in summaries]
    return [record["step"] for record in records], curves


def _infinite(record: Record) -> dict[str, float]:
    """The condition numbers of a measurement, some of which may be infinite: JSON has null there, and they enter no mean."""
    rows = {name: rows for name, rows in record.items() if name.startswith(("kappa", "indicator"))}
    return {name: np.inf for name, by_layer in rows.items() if any(None in row for row in by_layer)}


def draw_band(
    axes: Any, curves: Sequence[tuple[Sequence[int], Sequence[float]]], label: str, color: str, style: str
) -> None:
    """Draw the mean over runs at the steps that all have, and where there are several the standard deviation around it.

    Args:
        axes: whose y shows decimal logarithms.
        curves: of each run, its steps and its values there; where all are nan nothing is drawn.
        label, color, style: of the line.
    """
    common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    values = np.array([[dict(zip(steps, row))[step] for step in common] for steps, row in curves])
    if np.isnan(values).all():
        return
    with np.errstate(over="ignore", invalid="ignore"):  # beyond floats: inf, and a deviation of nan
        mean = values.mean(axis=0)
        draw_log10(axes, common, log10_of(mean), label=label, color=color, linestyle=style)
        if len(values) > 1:
            deviation = values.std(axis=0, ddof=1)
            ends = log10_of(np.maximum(mean - deviation, mean * 1e-2)), log10_of(mean + deviation)
            axes.fill_between(common, *(capped(end)[0] for end in ends), color=color, alpha=0.15)


def _by_layer(values: Mapping[int, np.ndarray]) -> np.ndarray:
    """A (layers, heads) array; nan where a layer has fewer heads."""
    heads = max(len(row) for row in values.values())
    filled = np.full((max(values) + 1, heads), np.nan)
    for layer, row in values.items():
        filled[layer, : len(row)] = row
    return filled


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps[COLOR_MAP](np.linspace(0, 0.9, max(count, 2)))


def _layer_scale(figure: Any, axes: Any, layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    mappable = ScalarMappable(Normalize(0, max(layers - 1, 1)), ListedColormap(_colors(layers)))
    bar = figure.colorbar(mappable, ax=list(axes), label="attention layer")
    bar.locator.set_params(integer=True)
