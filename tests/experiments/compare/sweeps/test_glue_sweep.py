"""Table 4: its runs parse and belong together, its numbers by hand, and data that are missing cost no pretraining."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats

from recipes.compare.sweeps import glue_sweep
from recipes.compare.sweeps.design import PlannedRun, SweepError
from recipes.compare.sweeps.glue_sweep import (
    TABLE_4,
    TRAINING_EXAMPLES,
    check_fine_tunings,
    fine_tune,
    fine_tuning_operations,
    fine_tunings,
    glue_arms,
    glue_section,
    table4,
)
from recipes.compare.sweeps.runner import Machine
from recipes.glue.glue_arguments import parse_arguments as parse_glue_arguments
from recipes.glue.glue_files import GlueDataError, read_examples
from recipes.glue.glue_results import FAILED, Results, RunRecord
from recipes.glue.tasks import TASKS
from recipes.text.pretrain_arguments import parse_arguments as parse_text_arguments

ROOT = Path(__file__).resolve().parents[4]
SMALL, PAPER = (table4(scale, ROOT / "scripts") for scale in ("small", "paper"))
STOCK, CONTROL, MIMETIC, TREATED = (variant.label for variant in SMALL.variants)


@pytest.mark.parametrize("sweep", [SMALL, PAPER], ids=["small", "paper"])
def test_every_run_parses_and_each_model_has_every_task(sweep, tmp_path):
    runs = fine_tunings(sweep)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for run in runs:
        pretraining, spectral = parse_text_arguments(run.pretrained.arguments(tmp_path), "a run")
        glue, conditioning = parse_glue_arguments(run.arguments(tmp_path), "a run")
        assert pretraining.seed == run.seed
        assert glue.seeds == [run.seed]
        assert glue.model_name_or_path == [pretraining.output_dir]
        assert Path(glue.output_dir).is_relative_to(pretraining.output_dir)
        assert glue.resolved_protocol.max_seq_length <= pretraining.max_seq_length
        # What is conditioned are the checkpoints.
        assert not conditioning.spectral_conditioning
        assert spectral.spectral_conditioning == run.label.startswith("identity")
        assert pretraining.match_norm_of == (f"identity={run.label[-2:].strip()}" if "norm of" in run.label else None)
        assert (pretraining.projection_init == "mimetic") == (run.label == MIMETIC)
    count = len(sweep.variants) * len(sweep.seeds) * len(sweep.glue_tasks)
    assert len({run.directory(tmp_path) for run in runs}) == len(runs) == count


def test_the_paper_trains_five_models_of_each_kind_by_its_recipe(tmp_path):
    assert len(PAPER.seeds) == 5
    assert set(PAPER.glue_tasks) == set(TASKS)
    run = fine_tunings(PAPER)[0]
    pretraining, _ = parse_text_arguments(run.pretrained.arguments(tmp_path), "a run")
    assert (pretraining.preset, pretraining.num_hidden_layers, pretraining.max_train_hours) == ("crammed-bert", 12, 24)
    protocol = parse_glue_arguments(run.arguments(tmp_path), "a run")[0].resolved_protocol
    assert (protocol.learning_rate, protocol.num_train_epochs, protocol.max_seq_length) == (4e-5, 5, 128)
    assert PAPER.variants[-1].strength == 10
    for row, average in zip(TABLE_4[1][1:], (78.6, 79.4)):
        scores = [float(cell.split(" ")[0]) for cell in row[1:-1]]
        assert float(row[-1]) == average == pytest.approx(fmean(scores), abs=0.1)


def test_the_operations_are_those_of_the_products():
    pretraining, _ = parse_text_arguments(SMALL.common, "a run")
    flags = ["--model_name_or_path", "x", "--tasks", ",".join(SMALL.glue_tasks), *SMALL.glue_flags]
    glue, _ = parse_glue_arguments(flags, "a run")
    width, wide, layers, length = 64, 128, 4, 64
    layer = 4 * width**2 + width * wide + width * wide // 2 + 2 * length * width
    # The head: one position to 1024, and that to two classes.
    sequence = 3 * 2 * (layers * layer * length + width * 1024 + 1024 * 2)
    examples = 3 * (8_551 + 2_490 + glue.max_train_samples)
    assert fine_tuning_operations(pretraining, glue) == sequence * examples


def test_the_examples_are_those_of_the_official_files():
    assert sum(TRAINING_EXAMPLES.values()) == 949_098  # docs/glue.md
    folder = ROOT.parent / "shared" / "data" / "glue"
    if not folder.is_dir():
        pytest.skip("GLUE's files are not here")
    for name in SMALL.glue_tasks:
        (split,) = TASKS[name].splits_of("train")
        assert len(read_examples(TASKS[name], split, folder)) == TRAINING_EXAMPLES[name]


def record(model, task, seed, score, **changes):
    (split,) = TASKS[task].splits_of("validation")
    scores = {split.name: {TASKS[task].main_metric: score / 100}}
    return RunRecord(model, task, seed, {}, {}, scores=scores, seconds={"total": 10.0 + seed}, **changes)


SCORES = {
    STOCK: {"cola": (1.0, 2.0), "sst2": (70.0, 72.0)},
    CONTROL: {"cola": (5.0, 4.0), "sst2": (75.0, 74.0)},
    TREATED: {"cola": (6.0, 8.0), "sst2": (75.5, 77.0)},
}
RECORDS = [
    record(model, task, seed, score)
    for model, tasks in SCORES.items()
    for task, scores in tasks.items()
    for seed, score in enumerate(scores)
]


def test_scores_become_arms():
    arms = {(arm["setting"], arm["variant"]): arm for arm in glue_arms(RECORDS)}
    assert len(arms) == 3 * 3
    assert arms["SST-2 (accuracy)", TREATED]["values"] == pytest.approx({"0": 75.5, "1": 77.0})
    assert arms["CoLA (Matthews)", STOCK]["values"] == pytest.approx({"0": 1.0, "1": 2.0})
    assert arms["CoLA (Matthews)", STOCK]["seconds"] == {"0": 10.0, "1": 11.0}
    assert arms["GLUE, average", CONTROL]["values"] == pytest.approx({"0": 40.0, "1": 39.0})
    assert arms["GLUE, average", CONTROL]["seconds"] == {}


def test_the_seconds_of_two_development_sets_count_once():
    scores = {split.name: {"accuracy": 0.5} for split in TASKS["mnli"].splits_of("validation")}
    arms = glue_arms([RunRecord(STOCK, "mnli", 0, {}, {}, scores=scores, seconds={"total": 7.0})])
    assert [arm["seconds"] for arm in arms] == [{"0": 7.0}, {}, {}]


def test_differences_are_to_stock_and_to_the_control(tmp_path):
    failed = [fine_tunings(SMALL)[0]]
    text = glue_section(SMALL, RECORDS, failed, tmp_path)
    low, high = stats.ttest_rel([75.5, 77.0], [75.0, 74.0]).confidence_interval(0.95)
    beside = text.partition("Beside its control:")[2]
    assert f"| {TREATED} minus {CONTROL} | mean difference (seeds) | +1.75 (2) | +2.50 (2) | +2.12 (2) |" in beside
    assert f"| {TREATED} minus {CONTROL} | 95 % interval | {low:+.2f} to {high:+.2f} |" in beside
    assert f"| {TREATED} minus {STOCK} | mean difference (seeds) | +5.25 (2) |" in text.partition("Beside")[0]
    folder = failed[0].directory(tmp_path).relative_to(tmp_path)
    assert f"and are in no mean: {folder}." in text


# --- runs ------------------------------------------------------------------------------------------------------------


def score(run, runs_dir, threads, gpu):
    """Stands in for `eval_glue.py`."""
    status = {"status": FAILED} if run.name == "rte" else {}
    Results(run.directory(runs_dir)).add(record(run.label, run.name, run.seed, 50.0, **status))


@pytest.fixture
def run_by(monkeypatch):
    """Let runs be done by a function in this process."""

    def set_up(train):
        def run_all(runs, runs_dir, machine, **_):
            for run in runs:
                if run.finished(runs_dir) is None:
                    train(run, runs_dir, 1, None)
            return [run for run in runs if run.finished(runs_dir) is None]

        monkeypatch.setattr(glue_sweep, "run_all", run_all)

    return set_up


def test_only_models_that_came_to_their_end_are_fine_tuned(run_by, tmp_path, monkeypatch):
    trained = [run for run in fine_tunings(SMALL) if run.seed == 1 and run.label in (STOCK, TREATED)]
    folders = {run.pretrained.directory(tmp_path) for run in trained}
    monkeypatch.setattr(PlannedRun, "finished", lambda run, runs_dir: run.directory(runs_dir) in folders or None)
    run_by(score)
    records, failed = fine_tune(SMALL, tmp_path, Machine(1, 1))
    assert [(item.model, item.task, item.seed) for item in records] == [
        (model, task, 1) for model in (STOCK, TREATED) for task in ("cola", "sst2")
    ]
    assert failed == [run for run in trained if run.name == "rte"]
    again = []
    run_by(lambda run, *_: again.append(run))
    assert fine_tune(SMALL, tmp_path, Machine(1, 1)) == (records, failed)
    assert again == failed


def test_without_any_score_the_first_failure_is_told(run_by, tmp_path, monkeypatch):
    monkeypatch.setattr(PlannedRun, "finished", lambda run, runs_dir: True)
    run_by(lambda *_: None)
    with pytest.raises(SweepError, match="No fine-tuning of table4 came to its end; the first: it printed nothing"):
        fine_tune(SMALL, tmp_path, Machine(1, 1))


def test_missing_data_are_named_before_any_run(tmp_path):
    sweep = replace(SMALL, glue_flags=(*SMALL.glue_flags, "--data_dir", str(tmp_path)))
    with pytest.raises(GlueDataError, match=r"CoLA.*train\.tsv"):
        check_fine_tunings(sweep, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
