"""The papers' figures of monitored runs, from records by hand: what is drawn, of which variants, and steps to a result."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from hf_specattn.diagnostics.monitor import MONITOR_FILE
from recipes.compare.comparison import METRICS, Run
from recipes.compare.sweeps.design import Setting, Sweep, Variant
from recipes.compare.sweeps.sweep_figures import heads_figure, monitor_figures, spectra_figure, steps_to_reference
from recipes.compare.sweeps.sweep_results import ArmResult, Results
from recipes.run.run_metrics import RunMetrics

TEXT, IMAGE = Setting("Text"), Setting("Image, gray")
STOCK, IDENTITY, ROW = Variant("stock"), Variant("identity"), Variant("row")
VARIANTS = (STOCK, IDENTITY, ROW)
SWEEP = Sweep("example", "An example", Path("train.py"), (TEXT, IMAGE), VARIANTS, (0, 1), draws_monitor=True)
# Validation accuracies at steps 2, 4 and 6 of each seed, and of the weights that were saved.
CURVES = {
    "stock": {0: ([0.2, 0.5, 0.4], 0.5), 1: ([0.2, 0.3, 0.6], 0.6)},
    "identity": {0: ([0.5, 0.4, 0.4], 0.5), 1: ([0.1, 0.7, 0.6], 0.7)},
    "row": {0: ([0.1, 0.2, 0.3], 0.3), 1: ([0.1, 0.2, 0.6], 0.6)},
}


def record_of(step, label, seed):
    """Two layers of two heads; query has twice the values of key, and value three times."""
    record = {"step": step, "layers": [0, 1], "seconds": 0.1}
    base = np.array([[1.0, 2.0], [3.0, 6.0]]) + step + 10 * seed
    for factor, projection in enumerate(("key", "query", "value"), start=1):
        for quantity in ("sigma_min", "sigma_max", "kappa"):
            record[f"{quantity}_{projection}"] = (factor * base).tolist()
            conditioned = base if label == "identity" else factor * base
            record[f"{quantity}_{projection}_effective"] = conditioned.tolist()
    record["kappa_jacobian"] = record["indicator"] = [[5.0], [7.0]]
    record["kappa_head_output"] = (100 * base).tolist()
    if label == "row":
        record["kappa_head_output_preconditioned"] = (10 * base).tolist()
    return record


def arm(folder, label, monitored=True):
    runs = {}
    for seed, (accuracies, final) in CURVES[label].items():
        directory = folder / f"{label}-{seed}"
        directory.mkdir(parents=True)
        records = [record_of(step, label, seed) for step in (0, 4)]
        (directory / MONITOR_FILE).write_text(json.dumps({"every": 4, "records": records}))
        record = RunMetrics(
            arguments={"seed": seed, "spectral_monitor_every": 4 if monitored else 0},
            facts={"examples_per_step": 8},
            validation=[{"step": 2 * place, "validation_accuracy": each} for place, each in enumerate(accuracies, 1)],
            # The test part says something else, and decides nothing here.
            final={"step": 6, "validation_accuracy": final, "test_accuracy": 0.1, "validation_loss": 1.0},
        )
        runs[seed] = Run(directory, seed, label, {}, record)
    return ArmResult(runs)


@pytest.fixture
def results(tmp_path):
    arms = {
        (setting.label, variant.label): arm(tmp_path / str(place), variant.label, monitored=setting is TEXT)
        for place, setting in enumerate(SWEEP.settings)
        for variant in SWEEP.variants
    }
    return Results(SWEEP, METRICS["examples"]["accuracy"], {}, {}, arms)


def records_of(label):
    return [[record_of(step, label, seed) for step in (0, 4)] for seed in (0, 1)]


def lines_of(axes):
    """Label -> x and the numbers drawn, whose decimal logarithms the axes have."""
    return {line.get_label(): (list(line.get_xdata()), 10 ** line.get_ydata()) for line in axes.get_lines()}


def test_figures_are_of_monitored_settings_and_of_the_variants_that_they_are_about(results):
    figures = monitor_figures(results)
    assert list(figures) == ["text-training", "text-spectra", "heads"]
    for images in figures.values():
        assert images["png"].startswith(b"\x89PNG")
        assert images["svg"].lstrip().startswith(b"<?xml")


def test_nothing_is_drawn_without_a_variant_to_draw(results):
    assert monitor_figures(replace(results, sweep=replace(SWEEP, draws_monitor=False))) == {}
    for place, run in enumerate(run for arm in results.arms.values() for run in arm.runs.values()):
        run.record.arguments["spectral_monitor_every"] = 0 if place < 2 else 4  # the reference of Text has none
    assert set(monitor_figures(results)) == {"image-gray-training", "image-gray-spectra", "heads"}
    for run in (run for arm in results.arms.values() for run in arm.runs.values()):
        run.record.arguments["spectral_monitor_every"] = 0
    assert monitor_figures(results) == {}


def test_spectra_are_means_over_heads_layers_and_runs_of_w_and_of_w_plus_c():
    figure = spectra_figure({label: records_of(label) for label in ("stock", "identity")}, "Text")
    assert figure.get_suptitle() == "Text"
    for row, quantity in zip(
        np.reshape(figure.axes, (3, 2)), ("smallest singular value", "largest singular value", "kappa")
    ):
        assert [axes.get_ylabel() for axes in row] == [quantity] * 2
        left, right = map(lines_of, row)
        # The mean of 1, 2, 3, 6 is 3, to which come the step and ten times the seed.
        for projection, factor in {"key": 1, "query": 2, "value": 3}.items():
            for label in ("stock", "identity"):
                steps, values = left[f"{label}, {projection}"]
                assert steps == [0, 4]
                assert values == pytest.approx([factor * 8, factor * 12])
            assert f"stock, {projection}" not in right
            if projection == "key":  # whose correction changed nothing
                assert f"identity, {projection}" not in right
            else:
                assert right[f"identity, {projection}"][1] == pytest.approx([8, 12])
    pyplot.close("all")


def test_an_infinite_kappa_is_at_the_top_and_in_no_mean():
    runs = records_of("identity")
    runs[0][1]["kappa_query"][0][0] = None
    axes = np.reshape(spectra_figure({"identity": runs}, "Text").axes, (3, 2))[2][0]
    _, values = lines_of(axes)["identity, query"]
    assert values[0] == pytest.approx(16)
    assert values[1] > 1000 * values[0]
    assert "x: beyond" in "".join(text.get_text() for text in axes.texts)


def test_the_result_of_the_reference_is_reached_by_validation_seed_by_seed(results):
    assert steps_to_reference(results, TEXT, STOCK) == [4, 6]
    assert steps_to_reference(results, TEXT, IDENTITY) == [2, 4]
    assert steps_to_reference(results, TEXT, ROW) == [None, 6]


def test_heads_show_kappa_before_and_after_the_preconditioner_and_the_steps(results):
    figure = heads_figure(results, {"Text": {label: records_of(label) for label in ("stock", "row")}})
    kappa, steps = figure.axes
    drawn = lines_of(kappa)
    assert set(drawn) == {"stock: A", "row: A", "row: preconditioned"}
    assert drawn["row: A"][1] == pytest.approx([800, 1200])
    assert drawn["row: preconditioned"][1] == pytest.approx([80, 120])
    filled = {line.get_label(): list(line.get_ydata()) for line in steps.get_lines() if line.get_fillstyle() == "full"}
    assert filled == {"stock": [5.0], "row": [6]}
    assert [text.get_text() for text in steps.texts] == ["2/2", "1/2"]
    assert steps.get_title() == "Steps to stock's validation accuracy"
