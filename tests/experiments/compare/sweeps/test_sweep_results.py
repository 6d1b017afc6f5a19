"""Cells, choices and the report, by hand from small records."""

import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from image_records import write_image_record
from PIL import Image
from scipy import stats

from recipes.compare.comparison import METRICS, Run
from recipes.compare.sweeps import execution
from recipes.compare.sweeps.design import Setting, Sweep, SweepError, Tuning, Variant
from recipes.compare.sweeps.execution import planned_runs, run_sweep
from recipes.compare.sweeps.runner import Machine
from recipes.compare.sweeps.sweep_report import as_json, picture, report, short_table
from recipes.compare.sweeps.sweep_results import ArmResult, choose
from recipes.run.run_metrics import RunMetrics

ACCURACY, LOSS = METRICS["images"]["accuracy"], METRICS["images"]["loss"]
SCALED = Variant("stock, tuned scale", ("--scale", "{scale}"), start="tuned scale")
ONE = Variant("identity, lambda 1", ("--lambda_", "1"), 1.0, control="identity, lambda 10")
TEN = Variant("identity, lambda 10", ("--lambda_", "10"), 10.0)
SWEEP = Sweep(
    "example",
    "An example",
    Path("train.py"),
    settings=(Setting("A", ("--model", "a")), Setting("B", ("--model", "b"))),
    variants=(Variant("stock"), ONE, TEN, SCALED),
    seeds=(0, 1, 2),
    tunings=(Tuning("scale", (1.0, 2.0, 4.0), ("--scale", "{value}")),),
    tuning_seeds=(7, 8),
    second_references=(SCALED.label,),
    published=("Table 9 of nowhere", (("model", "A"), ("original", "80.7"))),
)
# The validation accuracies of a run, by what its flags say; seeds add a little to the last one.
CURVES = {
    (): [0.30, 0.60],
    ("--lambda_", "1"): [0.55, 0.71],
    ("--lambda_", "10"): [0.10, 0.12],
    ("--scale", "1"): [0.30, 0.60],
    ("--scale", "2"): [0.50, 0.70],
    ("--scale", "4"): [0.40, 0.65],
}
# Seed -> what it adds; of lambda 1 the other way round for the last two.
BY_SEED = {0: 0.0, 1: 0.01, 2: 0.03, 7: 0.0, 8: 0.0}


def accuracy(flags, seed):
    curve = CURVES[flags]
    shift = {1: 0.03, 2: 0.01}.get(seed, 0.0) if flags == ("--lambda_", "1") else BY_SEED[seed]
    return [curve[0], round(curve[1] + shift, 10)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    return make_results(SWEEP, tmp_path, monkeypatch)


def make_results(sweep, runs_dir, monkeypatch, failing=()):
    def run_all(runs, runs_dir, machine, **_):
        for run in runs:
            flags = run.flags[2:]
            if (run.flags[1], flags, run.seed) not in failing:
                seconds = 10.0 + run.seed if flags == () else 15.0 + run.seed
                write_image_record(run.directory(runs_dir), run.seed, accuracy(flags, run.seed), seconds=seconds)
        return []

    monkeypatch.setattr(execution, "run_all", run_all)
    return run_sweep(sweep, runs_dir, Machine(1, 1), disable_tqdm=True)


def table_of(text, first):
    """The rows of the table whose header's first cell is `first`."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith(f"| {first} |"))
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return [cell.strip() for cell in header.strip("|").split(" | ")], rows[1:]


def test_the_best_value_is_chosen():
    assert choose({1.0: 60.0, 2.0: 70.0, 4.0: 70.0, 8.0: None}, ACCURACY) == 2.0
    assert choose({1.0: 60.0, 2.0: 70.0}, LOSS) == 1.0
    assert choose({1.0: None}, ACCURACY) is None


def test_the_tuned_value_is_what_the_grid_runs(results):
    assert results.chosen == {"A": {"scale": 2.0}, "B": {"scale": 2.0}}
    assert results.tried["A"]["scale"] == pytest.approx({1.0: 60.0, 2.0: 70.0, 4.0: 65.0})
    tuned = results.arms["A", SCALED.label].values(ACCURACY)
    assert tuned == pytest.approx({0: 70.0, 1: 71.0, 2: 73.0})


def test_the_best_of_several_references_is_taken_and_named(tmp_path, monkeypatch):
    labels = ("stock", "identity, lambda 10", "identity, lambda 1")
    results = make_results(replace(SWEEP, second_references=labels), tmp_path, monkeypatch)
    setting = SWEEP.settings[0]
    assert results.second_reference(setting) == ("identity, lambda 1", results.arm(setting, ONE))
    text = report(results, tmp_path, "the command")
    header, rows = table_of(text.partition("## Every arm")[2], "model")
    place = header.index("minus the best control, 95 % interval")
    scaled = next(row for row in rows if row[:2] == ["A", SCALED.label])
    # 70, 71, 73 minus 71, 74, 72.
    assert scaled[place].startswith("-1.00 (")
    assert "Best controls, by their means: A: identity, lambda 1; B: identity, lambda 1." in text


def test_the_short_table(results):
    header, rows = table_of(short_table(results), "accuracy (%)")
    assert header == ["accuracy (%)", "A", "B"]
    values = [60.0, 61.0, 63.0]
    expected = f"{fmean(values):.2f} ± {stdev(values):.2f}"
    assert rows[0] == ["stock", expected, expected]
    assert [row[0] for row in rows] == [variant.label for variant in SWEEP.variants]


def test_every_cell_with_its_differences(results, tmp_path):
    text = report(results, tmp_path, "python scripts/sweep.py example")
    _, rows = table_of(text.split("## Every arm")[1], "model")
    arms = {tuple(row[:2]): row[2:] for row in rows}
    stock, one = [60.0, 61.0, 63.0], [71.0, 74.0, 72.0]
    low, high = stats.ttest_rel(one, stock).confidence_interval(0.95)
    runs, _, to_stock, to_tuned, to_control, at_chance, passes = arms["A", "identity, lambda 1"]
    assert (runs, at_chance) == ("3 of 3", "0")
    assert to_stock == f"+11.00 ({low:+.2f} to {high:+.2f})"
    low, high = stats.ttest_rel(one, [70.0, 71.0, 73.0]).confidence_interval(0.95)
    assert to_tuned == f"+1.00 ({low:+.2f} to {high:+.2f})"
    low, high = stats.ttest_rel(one, [12.0, 13.0, 15.0]).confidence_interval(0.95)
    assert to_control == f"+59.00 ({low:+.2f} to {high:+.2f})"
    assert "Controls: of identity, lambda 1: identity, lambda 10." in text
    # The target is the mean of the tuned stock, 71.33: the second validation, step 20 of 8 images over 40, of two runs.
    assert passes == "4.0 (2 of 3)"
    assert arms["A", "stock"][2:] == ["–", arms["A", "stock"][3], "–", "0", "– (0 of 3)"]
    # Below twice 1 / 10.
    assert arms["A", "identity, lambda 10"][5] == "3"
    assert "At chance" in text
    assert "Table 9 of nowhere:" in text
    assert "Chosen by the mean over the seeds 7, 8" in text
    assert "2: 70.00 **(chosen)**" in text
    assert "Trained on squares (40 training images), 20 steps, 3 seeds" in text
    assert "an end of its range" not in text


def test_passes_over_text_follow_a_batch_that_grows(tmp_path):
    record = RunMetrics(
        arguments={},
        facts={"tokens_per_step": 400, "train_tokens": 1000},
        history=[{"step": 4, "train_tokens_seen": 500}, {"step": 6, "train_tokens_seen": 1500}],
        validation=[{"step": step, "validation_loss": loss} for step, loss in ((2, 3.0), (5, 2.0))],
        final={"step": 6, "train_tokens_seen": 1500},
    )
    arm = ArmResult({0: Run(tmp_path, 0, "stock", {}, record)})
    loss = METRICS["tokens"]["loss"]
    assert [arm.passes_until(loss, target) for target in (3.0, 2.5, 1.0)] == [(0.25, 1), (1.0, 1), (None, 0)]


def test_a_choice_at_the_end_of_its_range_is_said(tmp_path, monkeypatch):
    tuning = replace(SWEEP.tunings[0], values=(1.0, 2.0))
    text = report(make_results(replace(SWEEP, tunings=(tuning,)), tmp_path, monkeypatch), tmp_path, "x")
    assert "a better one may lie beyond: scale of A, scale of B." in text


def test_lambdas_as_columns(tmp_path, monkeypatch):
    results = make_results(replace(SWEEP, layout="variants"), tmp_path, monkeypatch)
    header, rows = table_of(short_table(results), "accuracy (%); numbers are lambdas")
    assert header[1:] == ["stock", "1", "10", "stock, tuned scale"]
    assert rows[0][0] == "A"
    assert rows[0][2].startswith("72.33 ± ")


def test_several_results_as_columns(tmp_path, monkeypatch):
    columns = (("validation_accuracy", "top-1"), ("validation_loss", "loss"))
    results = make_results(replace(SWEEP, layout="results", results=columns), tmp_path, monkeypatch)
    header, rows = table_of(short_table(results), "model (all in %)")
    assert header == ["model (all in %)", "top-1", "loss"]
    accuracies, losses = [71.0, 74.0, 72.0], [29.0, 26.0, 28.0]
    cells = [f"{fmean(values):.1f} ± {stdev(values):.1f}" for values in (accuracies, losses)]
    assert rows[1] == ["A, identity, lambda 1", *cells]
    arm = next(arm for arm in as_json(results)["arms"] if arm["variant"] == "identity, lambda 1")
    assert arm["results"]["validation_loss"] == pytest.approx({"0": 0.29, "1": 0.26, "2": 0.28})


def test_times_are_paired_by_seed(tmp_path, monkeypatch):
    results = make_results(replace(SWEEP, layout="time"), tmp_path, monkeypatch)
    _, rows = table_of(short_table(results), "model")
    times = {row[0]: row[2:] for row in rows}
    assert times["A stock"] == ["11.0", "1.00 (1.00 to 1.00)"]
    # 15 / 10, 16 / 11, 17 / 12.
    assert times["B identity, lambda 1"] == ["16.0", f"{16 / 11:.2f} ({17 / 12:.2f} to 1.50)"]


def test_failed_runs_are_named_and_in_no_mean(tmp_path, monkeypatch):
    failing = {("a", ("--lambda_", "10"), seed) for seed in range(3)} | {("b", ("--lambda_", "1"), 2)}
    results = make_results(SWEEP, tmp_path, monkeypatch, failing)
    text = report(results, tmp_path, "x")
    _, rows = table_of(text, "accuracy (%)")
    assert rows[2][1] == "failed"
    assert rows[1][2] == f"{fmean([71.0, 74.0]):.2f} ± {stdev([71.0, 74.0]):.2f}"
    folders = [run.directory(tmp_path).relative_to(tmp_path) for arm in results.arms.values() for run in arm.failed]
    assert len(folders) == 4
    assert all(str(folder) in text for folder in folders)
    assert set(picture(results)) == {"png", "svg"}


def test_a_sweep_without_any_result(tmp_path, monkeypatch):
    every = {(model, flags, seed) for model in "ab" for flags in CURVES for seed in BY_SEED}
    with pytest.raises(SweepError, match="No run that tunes the scale of A came to its end: it printed nothing"):
        make_results(SWEEP, tmp_path, monkeypatch, every)
    untuned = replace(SWEEP, tunings=(), variants=SWEEP.variants[:3], second_references=())
    with pytest.raises(SweepError, match="No run of example came to its end"):
        make_results(untuned, tmp_path, monkeypatch, every)


def test_runs_that_do_not_compare_are_said(results, tmp_path):
    run = SWEEP.runs(SWEEP.settings[0], ONE, {})[0]
    write_image_record(run.directory(tmp_path), 0, [0.7, 0.7], validation_fingerprint="another")
    again = replace(results, arms={**results.arms, ("A", ONE.label): execution.read_arm([run], tmp_path)})
    assert "**Caution, runs differ where they should not.** A: validation data" in report(again, tmp_path, "x")


@pytest.mark.parametrize("layout", ["settings", "variants"])
def test_the_pictures_decode_and_repeat(layout, tmp_path, monkeypatch):
    results = make_results(replace(SWEEP, layout=layout), tmp_path, monkeypatch)
    first, second = picture(results), picture(results)
    assert first == second
    Image.open(io.BytesIO(first["png"])).verify()
    assert b"final validation accuracy (%)" in first["svg"] or b"<svg" in first["svg"]


def test_every_number_as_json(results):
    content = as_json(results)
    arm = next(arm for arm in content["arms"] if (arm["setting"], arm["variant"]) == ("B", ONE.label))
    assert arm["values"] == pytest.approx({"0": 71.0, "1": 74.0, "2": 72.0})
    assert arm["seconds"] == {"0": 15.0, "1": 16.0, "2": 17.0}
    assert content["chosen"]["A"] == {"scale": 2.0}
    assert len(content["arms"]) == 8


def test_what_the_monitor_saw_at_both_ends(results, tmp_path):
    assert "What the monitor saw" not in report(results, tmp_path, "the command")
    assert all("monitor" not in arm for arm in as_json(results)["arms"])

    runs = results.arms["A", "stock"].runs
    for seed, run in runs.items():
        # By layer and head; null is infinite.
        first = {
            "step": 0,
            "kappa_output_value_effective": [[1.0 + seed, 9.0], [5.0, None]],
            "path_effective_rank": 2.0,
        }
        last = {
            "step": 20,
            "kappa_output_value_effective": [[4.0, None], [None, None]],
            "path_effective_rank": 3.0 + seed,
        }
        content = {"every": 10, "records": [first, {**first, "step": 10}, last]}
        (run.directory / "spectral_monitor.json").write_text(json.dumps(content), encoding="utf-8")

    _, rows = table_of(report(results, tmp_path, "the command").split("## What the monitor saw")[1], "model")
    assert rows == [["A", "stock", "7 → inf", "– → –", "2 → 4", "– → –", "– → –"]]
    stock = next(arm for arm in as_json(results)["arms"] if (arm["setting"], arm["variant"]) == ("A", "stock"))
    assert stock["monitor"]["2"] == {
        "first": {"kappa_output_value_effective": 7.0, "path_effective_rank": 2.0},
        "last": {"kappa_output_value_effective": None, "path_effective_rank": 5.0},
    }


def test_the_plan_has_the_tuning_first():
    planned = planned_runs(SWEEP, {"scale": "SCALE"})
    assert len(planned) == 2 * (3 * 2 + 4 * 3)
    assert [run.flags[2:] for _, run in planned[:2]] == [("--scale", "1")] * 2
    assert planned[17][1].flags[2:] == ("--scale", "SCALE")
