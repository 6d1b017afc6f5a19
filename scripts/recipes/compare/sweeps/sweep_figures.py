"""The papers' figures of monitored runs: spectra and condition numbers over training, and how soon a result is reached.

Those of conditioning show the reference beside the variants with a correction, those of preconditioning beside the variants
with a preconditioner.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from hf_specattn.diagnostics.attention_figures import draw_band, training_figure
from hf_specattn.diagnostics.monitor import summary_of
from hf_specattn.figures import COLORS, MARKERS, label_powers, new_figure, render

from ..monitor_records import read_records
from .design import Setting, Variant
from .sweep_results import Results

Records = Sequence[Mapping[str, Any]]
STYLES = {"query": "-", "key": "--", "value": ":"}
SPECTRA = {"sigma_min": "smallest singular value", "sigma_max": "largest singular value", "kappa": "kappa"}
OUTPUT, PRECONDITIONED = "kappa_head_output", "kappa_head_output_preconditioned"


def monitor_figures(results: Results) -> dict[str, dict[str, bytes]]:
    """Draw what the monitor saw: name of a figure -> file ending -> image; empty where it saw nothing that the sweep draws.

    `<setting>-training` and `<setting>-spectra` are figures 4 and 13 to 16 of the conditioning paper, and their like;
    `heads` is figure 4 of the preconditioning paper.
    """
    figures: dict[str, Any] = {}
    preconditioned: dict[str, dict[str, list[Records]]] = {}
    if not results.sweep.draws_monitor:
        return {}
    for setting in results.sweep.settings:
        groups = _monitored(results, setting)
        conditioned = _beside_reference(results, groups, _is_conditioned)
        if len(conditioned) > 1:
            name = re.sub(r"\W+", "-", setting.label.lower())
            figures[f"{name}-training"] = training_figure(conditioned)
            figures[f"{name}-spectra"] = spectra_figure(conditioned, setting.label)
        if len(found := _beside_reference(results, groups, lambda record: PRECONDITIONED in record)) > 1:
            preconditioned[setting.label] = found
    if preconditioned:
        figures["heads"] = heads_figure(results, preconditioned)
    return {name: render(figure, name) for name, figure in figures.items()}


def _monitored(results: Results, setting: Setting) -> dict[str, list[Records]]:
    """Variant's label -> the records of its runs; without variants of which a run has none."""
    groups: dict[str, list[Records]] = {}
    for variant in results.sweep.variants:
        runs = results.arm(setting, variant).runs.values()
        if runs and all(run.record.arguments.get("spectral_monitor_every") for run in runs):
            groups[variant.label] = [read_records(run.directory) for run in runs]
    return groups


def _is_conditioned(record: Mapping[str, Any]) -> bool:
    return any(record.get(f"kappa_{name}_effective") != record.get(f"kappa_{name}") for name in STYLES)


def _beside_reference(
    results: Results, groups: Mapping[str, list[Records]], is_chosen: Callable[[Mapping[str, Any]], bool]
) -> dict[str, list[Records]]:
    """The reference, first, and the variants of whose records the first one is chosen."""
    reference = results.sweep.reference.label
    if reference not in groups:
        return {}
    return {reference: groups[reference]} | {label: runs for label, runs in groups.items() if is_chosen(runs[0][0])}


def spectra_figure(groups: Mapping[str, Sequence[Records]], title: str) -> Any:
    """Smallest and largest singular value and kappa of query, key and value over training: of W (left) and W + C (right).

    Means over layers and heads, and over the runs of a group, whose standard deviation is the band.

    Args:
        groups: label -> the records of each run.
        title: of the figure.
    """
    figure = new_figure(11, 11)
    panels = figure.subplots(len(SPECTRA), 2, sharex=True)
    for (quantity, name), row in zip(SPECTRA.items(), panels):
        for axes, ending, matrix in zip(row, ("", "_effective"), ("W", "W + C")):
            for index, (label, runs) in enumerate(groups.items()):
                color = COLORS[index % len(COLORS)]
                for projection, style in STYLES.items():
                    key = f"{quantity}_{projection}"
                    curves = [_curve(records, f"{key}{ending}") for records in runs]
                    if not ending or curves != [_curve(records, key) for records in runs]:
                        draw_band(axes, curves, f"{label}, {projection}", color, style)
            axes.set(ylabel=name, title=f"{name[0].upper()}{name[1:]} of {matrix}")
            axes.grid(alpha=0.3)
            label_powers(axes, "y")
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.suptitle(title)
    return figure


def _curve(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps, and the means over layers and heads there; infinite where one of them is, as JSON has no number for it."""
    values = []
    for record in records:
        infinite = any(number is None for row in record.get(name, []) for number in row)
        values.append(np.inf if infinite else summary_of(record).get(name, np.nan))
    return [record["step"] for record in records], values


def heads_figure(results: Results, settings: Mapping[str, Mapping[str, Sequence[Records]]]) -> Any:
    """kappa of what a head gives over training, a panel for each setting, and the steps to the reference's result.

    Args:
        settings: setting's label -> variant's label -> the records of each run.
    """
    figure = new_figure(4.5 * (len(settings) + 1), 4.6)
    *panels, last = figure.subplots(1, len(settings) + 1)
    variants = {variant.label: variant for variant in results.sweep.variants}
    labels = list(dict.fromkeys(label for groups in settings.values() for label in groups))
    for place, (axes, (name, groups)) in enumerate(zip(panels, settings.items())):
        setting = next(each for each in results.sweep.settings if each.label == name)
        for label, runs in groups.items():
            index = labels.index(label)
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            draw_band(axes, [_curve(records, OUTPUT) for records in runs], f"{label}: A", color, ":")
            scaled = [_curve(records, PRECONDITIONED) for records in runs]
            draw_band(axes, scaled, f"{label}: preconditioned", color, "-")
            at = place + 0.15 * (index - (len(labels) - 1) / 2)
            _draw_steps(last, at, steps_to_reference(results, setting, variants[label]), label, color, marker)
        axes.set(xlabel="optimizer step", ylabel="kappa", title=f"{name}: kappa of a head's output A")
        axes.grid(alpha=0.3)
        label_powers(axes, "y")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    last.set_xticks(range(len(settings)), settings)
    of = results.sweep.reference.label
    # Room for the numbers of runs, also where none got there.
    last.set(ylabel="optimizer steps", title=f"Steps to {of}'s validation {results.metric.name}")
    last.set_ylim(0, 1.15 * last.get_ylim()[1])
    last.grid(alpha=0.3, axis="y")
    handles, names = last.get_legend_handles_labels()
    shown = dict(zip(names, handles))
    last.legend(shown.values(), shown, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def _draw_steps(axes: Any, at: float, steps: Sequence[float | None], label: str, color: str, marker: str) -> None:
    """Each run that got there as an open marker, their median as a filled one with the number of runs."""
    reached = [step for step in steps if step is not None]
    style = {"color": color, "marker": marker, "linestyle": "none"}
    axes.plot([at] * len(reached), reached, fillstyle="none", **style)
    middle = [median(reached)] if reached else []
    axes.plot([at] * len(middle), middle, label=label, **style)
    axes.annotate(f"{len(reached)}/{len(steps)}", (at, middle[0] if middle else 0), (0, 8), textcoords="offset points",
                  ha="center", fontsize=7)  # fmt: skip


def steps_to_reference(results: Results, setting: Setting, variant: Variant) -> list[float | None]:
    """Return after how many steps each run's validation first reached what the reference's run of the same seed came to.

    Validation against validation: the result of a task may be of other data. None for a run that never did.
    """
    metric = replace(results.metric, final_key=None)
    sign = 1 if metric.higher_is_better else -1
    targets = results.reference(setting).values(metric)
    found: list[float | None] = []
    for seed, run in results.arm(setting, variant).runs.items():
        if seed in targets:
            curve = run.curve(metric.key)
            reached = (step for step, value in curve if sign * value * metric.factor >= sign * targets[seed])
            found.append(next(reached, None))
    return found
