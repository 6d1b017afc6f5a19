"""The table and the picture of small records, against numbers computed by hand, NumPy and SciPy."""

import sys

import numpy as np
import pytest
from scipy import stats

from recipes.glue.glue_report import CONSTANT, markdown, notes, picture
from recipes.glue.glue_results import RunRecord
from recipes.glue.summary import Summary
from recipes.glue.tasks import COLUMNS, TASKS

# Model -> task -> a score per seed, of each development set.
SCORES = {
    "stock": {"cola": (0.10, 0.30, 0.20), "rte": (0.50, 0.56, 0.53), "mnli": ((0.70, 0.72, 0.74), (0.71, 0.75, 0.76))},
    "svd": {"cola": (0.12, 0.38, 0.22), "rte": (0.55, 0.54, 0.59), "mnli": ((0.71, 0.72, 0.75), (0.72, 0.75, 0.78))},
}


def records_of(scores, conditioning=None, **fields):
    records = []
    for model, tasks in scores.items():
        settings = {
            "learning_rate": 4e-5,
            "conditioning": None if model == "stock" else "svd()",
            "model_fingerprint": model,
        }
        for task_name, values in tasks.items():
            task = TASKS[task_name]
            splits = task.splits_of("validation")
            rows = values if len(splits) == 2 else (values,)
            constant = {} if task.is_regression else {split.name: 0.33 for split in splits}
            data = {"train_examples": 1234, "constant_answer": constant}
            for seed in range(len(rows[0])):
                found = {split.name: {task.main_metric: row[seed]} for split, row in zip(splits, rows)}
                records.append(RunRecord(model, task_name, seed, settings, data, scores=found, **fields))
    return records


@pytest.fixture
def records():
    return records_of(SCORES)


def cells_of(text):
    """(model, statistic) -> heading -> cell, of the first table."""
    rows = [
        line.strip("| \n").split(" | ") for line in text.partition("\n\n")[0].splitlines() if line.startswith("| ")
    ]
    return {(row[0], row[1]): dict(zip(rows[0], row)) for row in rows[1:]}


def test_means_deviations_and_medians(records):
    cells = cells_of(markdown(Summary(records)))
    stock = cells["stock", "mean ± deviation"]
    assert list(stock) == [
        "model",
        "statistic",
        "MNLI-m (accuracy)",
        "MNLI-mm (accuracy)",
        "RTE (accuracy)",
        "CoLA (Matthews)",
        "average (of how many numbers)",
        "average with one MNLI number",
    ]
    assert stock["CoLA (Matthews)"] == "20.00 ± 10.00"
    assert stock["RTE (accuracy)"] == f"53.00 ± {np.std((50, 56, 53), ddof=1):.2f}"
    assert cells["stock", "median"]["MNLI-mm (accuracy)"] == "75.00"
    assert cells["svd", "median"]["CoLA (Matthews)"] == "22.00"


def test_averages_say_of_how_many_numbers(records):
    cells = cells_of(markdown(Summary(records)))
    per_seed = np.mean([(70, 72, 74), (71, 75, 76), (50, 56, 53), (10, 30, 20)], axis=0)
    expected = f"{per_seed.mean():.2f} ± {per_seed.std(ddof=1):.2f} (4)"
    assert cells["stock", "mean ± deviation"]["average (of how many numbers)"] == expected
    one = np.mean([(70, 72, 74), (50, 56, 53), (10, 30, 20)], axis=0)
    expected = f"{one.mean():.2f} ± {one.std(ddof=1):.2f} (3)"
    assert cells["stock", "mean ± deviation"]["average with one MNLI number"] == expected
    medians = np.mean([72, 75, 53, 20])
    assert cells["stock", "median"]["average (of how many numbers)"] == f"{medians:.2f} (4)"


def test_paired_differences_and_their_intervals(records):
    cells = cells_of(markdown(Summary(records)))
    difference, interval = (cells["svd minus stock", name] for name in ("mean difference (seeds)", "95 % interval"))
    low, high = stats.ttest_rel((12, 38, 22), (10, 30, 20)).confidence_interval(0.95)
    assert difference["CoLA (Matthews)"] == "+4.00 (3)"
    assert interval["CoLA (Matthews)"] == f"{low:+.2f} to {high:+.2f}"
    averages = [
        np.mean([[100 * value for value in row] for row in (*tasks["mnli"], tasks["rte"], tasks["cola"])], axis=0)
        for tasks in (SCORES["svd"], SCORES["stock"])
    ]
    low, high = stats.ttest_rel(*averages).confidence_interval(0.95)
    assert difference["average (of how many numbers)"] == f"{np.mean(averages[0] - averages[1]):+.2f} (3)"
    assert interval["average (of how many numbers)"] == f"{low:+.2f} to {high:+.2f}"
    assert any("these seeds do not tell which model is better" in note for note in notes(Summary(records)))


def test_the_whole_benchmark_has_nine_numbers_in_the_paper_s_order():
    tasks = {task.name: ((0.5,), (0.6,)) if task.name == "mnli" else (0.5,) for task in TASKS.values()}
    cells = cells_of(markdown(Summary(records_of({"stock": tasks}))))["stock", "mean ± deviation"]
    assert list(cells)[2:11] == [column.heading for column in COLUMNS]
    assert cells["average (of how many numbers)"] == f"{(8 * 50 + 60) / 9:.2f} (9)"
    assert cells["average with one MNLI number"] == "50.00 (8)"


def test_the_reference_is_the_first_model_without_conditioning_or_the_one_named(records):
    assert Summary(records[::-1]).reference == "stock"
    assert Summary(records, "svd").reference == "svd"
    only = [record for record in records if record.model == "svd"]
    assert Summary(only).reference == "svd"
    assert Summary(records, "other").reference == "stock"  # it has no run yet
    with pytest.raises(ValueError, match="no run to report"):
        Summary([])


def fail(record, message="the loss is nan"):
    record.status, record.scores, record.failure = "failed", {}, {"kind": "diverged", "message": message}


def test_failed_runs_are_rows_and_in_no_mean(records):
    for record in records:
        if (record.model, record.task) == ("svd", "cola") and record.seed in (0, 2):
            fail(record, "the loss | is nan" + "!" * 300)
        if (record.model, record.task) == ("svd", "rte"):
            fail(record)
    text = markdown(Summary(records))
    cells = cells_of(text)
    assert cells["svd", "mean ± deviation"]["CoLA (Matthews)"] == "38.00 (1 of 3)"
    assert cells["svd", "mean ± deviation"]["RTE (accuracy)"] == "failed (3)"
    assert cells["svd", "median"]["RTE (accuracy)"] == "–"
    assert cells["svd", "mean ± deviation"]["average (of how many numbers)"].endswith("(3)")
    assert cells["svd minus stock", "mean difference (seeds)"]["CoLA (Matthews)"] == "+8.00 (1)"
    assert cells["svd minus stock", "95 % interval"]["CoLA (Matthews)"] == "–"
    # averages over other columns are no pair
    assert cells["svd minus stock", "mean difference (seeds)"]["average (of how many numbers)"] == "–"
    assert "**The averages do not compare**" in text
    assert "Failed runs are not part of any mean, median or difference" in text
    failures = [line for line in text.splitlines() if "diverged" in line]
    assert len(failures) == 5
    assert failures[0].startswith("| svd | cola | 0 | diverged: the loss \\| is nan!!")
    assert failures[0].endswith("…|") or failures[0].endswith("… |")


def test_the_best_constant_answer_is_a_row(records):
    cells = cells_of(markdown(Summary(records)))[CONSTANT, ""]
    assert cells["RTE (accuracy)"] == "33.00"
    assert cells["average (of how many numbers)"] == "–"
    stsb = Summary(records_of({"stock": {"stsb": (0.8, 0.9)}}))
    assert stsb.constant_score(stsb.columns[0]) is None
    assert CONSTANT not in markdown(stsb)


def test_one_model_with_one_seed():
    text = markdown(Summary(records_of({"stock": {"rte": (0.5,)}})))
    assert cells_of(text)["stock", "mean ± deviation"]["RTE (accuracy)"] == "50.00"
    assert cells_of(text)["stock", "mean ± deviation"]["average (of how many numbers)"] == "50.00 (1)"
    assert "1 seed;" in text
    assert "interval" not in text
    assert "minus" not in text


def test_models_with_different_tasks_or_seeds(records):
    part = [record for record in records if record.model == "stock" or (record.task == "cola" and record.seed < 2)]
    cells = cells_of(markdown(Summary(part)))
    assert cells["svd", "mean ± deviation"]["RTE (accuracy)"] == "–"
    assert cells["svd minus stock", "mean difference (seeds)"]["RTE (accuracy)"] == "–"
    assert cells["svd minus stock", "mean difference (seeds)"]["CoLA (Matthews)"] == "+5.00 (2)"


def test_the_notes_tell_settings_that_are_shared_and_that_differ(records):
    for record in records:
        record.settings["lora_rank"] = 8 if record.model == "svd" else None
    text = " ".join(notes(Summary(records)))
    assert "All runs: learning_rate 4e-05." in text
    assert "lora_rank: none (stock), 8 (svd)" in text
    assert "conditioning: none (stock), svd() (svd)" in text
    assert "Training examples: cola 1,234, rte 1,234, mnli 1,234." in text
    assert "model_fingerprint" not in text


def test_the_notes_tell_different_machines_and_versions(records):
    assert "which can change scores" not in " ".join(notes(Summary(records)))
    records[0].facts["device"] = "cuda"
    records[1].versions["torch"] = "2.11"
    text = " ".join(notes(Summary(records)))
    assert "The runs differ in device (" in text
    assert "The runs differ in torch, transformers, hf_specattn (" in text


def test_without_scipy_there_are_no_intervals(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    cells = cells_of(markdown(Summary(records)))
    assert cells["svd minus stock", "mean difference (seeds)"]["CoLA (Matthews)"] == "+4.00 (3)"
    assert cells["svd minus stock", "95 % interval"]["CoLA (Matthews)"] == "needs scipy"


# ------------------------------------------------------------------------------------------------------------ picture


def figures_of(records, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    picture(Summary(records))
    return figures[0]


def test_the_picture_shows_every_seed_means_and_differences(records, monkeypatch):
    figure = figures_of(records, monkeypatch)
    *columns, differences = figure.get_axes()
    assert [axes.get_title() for axes in columns] == [
        "MNLI-m\n(accuracy)",
        "MNLI-mm\n(accuracy)",
        "RTE\n(accuracy)",
        "CoLA\n(Matthews)",
    ]
    assert columns[0].get_ylabel() == "development score (points of 100)"
    cola = columns[-1]
    drawn = [list(line.get_ydata()) for line in cola.lines if line.get_fillstyle() == "none"]
    assert drawn == [pytest.approx([10, 30, 20]), pytest.approx([12, 38, 22])]
    assert [container.get_label() for container in cola.containers] == ["stock", "svd"]
    assert differences.get_ylabel() == "minus stock (points of 100)"
    assert [label.get_text() for label in differences.get_xticklabels()] == [
        "MNLI-m",
        "MNLI-mm",
        "RTE",
        "CoLA",
        "average",
    ]
    means = [float(container[0].get_ydata()[0]) for container in differences.containers]
    assert means[3] == pytest.approx(4.0)
    low, high = stats.ttest_rel((12, 38, 22), (10, 30, 20)).confidence_interval(0.95)
    (segment,) = differences.containers[3][2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([low, high])
    assert len({line.get_color() for line in cola.lines if line.get_fillstyle() == "none"}) == 2


def test_the_picture_of_one_model_or_of_failures(records, monkeypatch):
    assert len(figures_of([record for record in records if record.model == "stock"], monkeypatch).get_axes()) == 4
    for record in records:
        if record.model == "svd":
            fail(record)
    assert len(figures_of(records, monkeypatch).get_axes()) == 5


def test_the_same_records_give_the_same_files(records):
    cola = [record for record in records if record.task == "cola"]
    first, second = picture(Summary(cola)), picture(Summary(cola))
    assert first == second
    assert first.keys() == {"png", "svg"}
    assert first["png"][:8] == b"\x89PNG\r\n\x1a\n"
    many = {f"model {number}": {"cola": (0.1, 0.2)} for number in range(12)}
    assert picture(Summary(records_of(many)))
