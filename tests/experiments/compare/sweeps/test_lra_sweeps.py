"""The sweeps on Long Range Arena: every command parses, data of each task, costs, and tuning by the validation part."""

import shlex
from dataclasses import replace

import pytest
import torch
from scripts_loading import REPOSITORY, load_script

from recipes.compare.comparison import METRICS, Metric, Run
from recipes.compare.sweeps.design import SweepError
from recipes.compare.sweeps.execution import planned_runs
from recipes.compare.sweeps.lra_sweeps import LRA_SWEEPS, TASKS, lra_operations, with_data
from recipes.compare.sweeps.sweep_presets import SCALES, STOCK
from recipes.compare.sweeps.sweep_report import report
from recipes.compare.sweeps.sweep_results import ArmResult, Results
from recipes.lra.lra_arguments import PRESETS, parse_arguments
from recipes.run.run_metrics import RunMetrics

SCRIPTS = REPOSITORY / "scripts"
DATA = ["text=/data/imdb", "retrieval=/data/aan", "image=/data/cifar"]


@pytest.fixture(scope="module")
def sweep_script():
    return load_script(SCRIPTS / "sweep.py")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LRA_SWEEPS)
def test_every_run_parses_and_is_of_its_preset(name, scale, tmp_path):
    sweep = with_data(LRA_SWEEPS[name](scale, SCRIPTS), DATA)
    assert sweep.script.is_file()
    for setting, run in planned_runs(sweep, {tuning.name: tuning.values[0] for tuning in sweep.tunings}):
        arguments, _ = parse_arguments(run.arguments(tmp_path, anew=True), "a run")
        assert arguments.task == TASKS[setting.label]
        assert arguments.max_steps == PRESETS["small" if scale == "small" else "lra"][arguments.task]["max_steps"]
        assert arguments.data_dir == dict(item.split("=") for item in DATA).get(arguments.task)


def test_the_tables_have_the_papers_rows_and_columns():
    table3 = LRA_SWEEPS["table3"]("paper", SCRIPTS)
    assert [setting.label for setting in table3.settings] == ["ListOps", "Text", "Retrieval", "Image", "Pathfinder"]
    assert [variant.label for variant in table3.variants] == ["stock", "identity, lambda 10"]
    assert len(table3.seeds) == 5
    strengths = [variant.strength for variant in LRA_SWEEPS["table11"]("paper", SCRIPTS).variants]
    assert strengths == [None, 2, 4, 6, 8, 10, 12, 14, 16]
    norms = [("--no_layer_norm" in variant.flags) for variant in LRA_SWEEPS["table12"]("small", SCRIPTS).variants]
    assert norms == [False, False, True, True]


def test_runs_of_the_papers_figures_are_monitored_alike_in_every_sweep(tmp_path):
    for scale, every in (("small", 100), ("paper", 500)):
        folders = []
        for name in LRA_SWEEPS:
            sweep = with_data(LRA_SWEEPS[name](scale, SCRIPTS), DATA)
            for setting in sweep.settings:
                run = sweep.runs(setting, sweep.reference, {})[0]
                arguments, _ = parse_arguments(run.arguments(tmp_path, anew=True), "a run")
                drawn = setting.label in ("ListOps", "Text")
                assert arguments.spectral_monitor_every == (every if drawn else 0)
                if setting.label == "Text":
                    folders.append(run.directory(tmp_path))
        assert len(folders) == 4
        assert len(set(folders)) == 1


def test_the_plan_prints_commands_and_costs(sweep_script, capsys):
    sweep_script.main(["table3", "--scale", "paper", "--num_seeds", "1", "--lra_data", *DATA])
    output = capsys.readouterr().out
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("accelerate launch")]
    assert len(commands) == 10
    assert "keeps no GPU busy" in output
    assert (
        len([line for line in output.splitlines() if line.startswith(("| ListOps | 2 |", "| Pathfinder | 2 |"))]) == 2
    )


def test_operations_are_those_of_the_products():
    flags = ["--attention_type", "softmax", "--max_length", "64", "--show_plan"]
    arguments, _ = parse_arguments(flags, "a run")
    length, width, hidden, layers = 64, 64, 128, 2
    attention = 4 * width * width + 2 * length * width
    per_token = layers * (attention + 2 * width * hidden)
    head = width * hidden + hidden * 10
    products = 2 * (length * per_token + head)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = lra_operations(arguments)
    assert found == pytest.approx(3 * products * 1500 * 32)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table3"], "table3 needs the data of Text: give --lra_data text=<folder>"),
        (["table3", "--lra_data", "movies=/x"], "--lra_data movies: give each as task=folder"),
        (["table11", "--lra_data", "text"], "--lra_data text: give each as task=folder"),
        (["table5", "--lra_data", "text=/x"], "--lra_data: of table3, table11, table12, lra_controls"),
    ],
)
def test_data_that_are_missing_or_not_asked_for_are_named(sweep_script, argv, message):
    with pytest.raises(SystemExit, match=message):
        sweep_script.main([*argv, "--plan"])


def test_made_data_need_no_folder_and_may_have_one():
    sweep = LRA_SWEEPS["lra_controls"]("small", SCRIPTS)
    with pytest.raises(SweepError, match="Text"):
        with_data(sweep, [])
    named = with_data(sweep, ["text=/t", "listops=/l"])
    assert [setting.flags[-2:] for setting in named.settings] == [("--data_dir", "/l"), ("--data_dir", "/t")]
    assert [setting.flags[-2:] for setting in with_data(sweep, ["text=/t"]).settings] == [
        ("--spectral_monitor_every", "100"),
        ("--data_dir", "/t"),
    ]


def test_the_scale_is_tuned_on_no_test_part_also_at_the_published_protocol(tmp_path):
    sweep = with_data(LRA_SWEEPS["lra_controls"]("paper", SCRIPTS), DATA)
    (tuning,) = sweep.tunings
    for setting in sweep.settings:
        (tried, *_), *_ = sweep.tuning_runs(setting, tuning, {}).values()
        measured = sweep.runs(setting, sweep.reference, {})[0]
        protocols = [parse_arguments(run.arguments(tmp_path), "a run")[0].protocol for run in (tried, measured)]
        assert protocols == ["clean", "lra"]


def arm_of(tmp_path, label, accuracies, facts):
    arguments = {"seed": 0}
    runs = {}
    for seed, accuracy in enumerate(accuracies):
        final = {"step": 4, "validation_accuracy": 0.9, "test_accuracy": accuracy, "validation_loss": 1.0}
        validation = [{"step": 2, "validation_accuracy": 0.9}]
        record = RunMetrics(arguments=arguments, facts=facts, validation=validation, final=final)
        runs[seed] = Run(tmp_path / label, seed, "stock", {}, record)
    return ArmResult(runs)


def test_the_report_sets_guessing_beside_the_scores_and_names_the_data_of_each_task(tmp_path):
    sweep = replace(with_data(LRA_SWEEPS["table3"]("small", SCRIPTS), DATA), variants=(STOCK,), published=None)
    sweep = replace(sweep, settings=sweep.settings[:2])
    common = {"examples_per_step": 8, "device": "cpu", "validation_fingerprint": "f"}
    guesses = {"majority": 0.155, "root_operator": 0.345}
    listops = common | {"classes": 10, "train_examples": 20000, "test_examples": 2000, "data": "ListOps (made)"}
    text = common | {"classes": 2, "train_examples": 22500, "test_examples": 400, "data": "Text (IMDb)"}
    arms = {
        ("ListOps", "stock"): arm_of(tmp_path, "l", (0.16, 0.36), listops | {"baselines": guesses}),
        # A standard error is 2.5 points: 57 is less than three above 50, 58 is more.
        ("Text", "stock"): arm_of(tmp_path, "t", (0.57, 0.58), text | {"baselines": {"majority": 0.5}}),
    }
    text = report(Results(sweep, METRICS["examples"]["accuracy"], {}, {}, arms), tmp_path, "sweep.py table3")
    data = "ListOps (made) (20,000 training examples), 4 steps; Text (IMDb) (22,500 training examples), 4 steps"
    assert f"Trained on {data}, 2 seeds, device: cpu." in text
    assert "Cells show the mean and the standard deviation (divisor n - 1) of the final test accuracy." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["stock", "26.00 ± 14.14", "57.50 ± 0.71"] in rows
    assert ["majority", "15.50", "50.00"] in rows
    assert ["root operator", "34.50", "–"] in rows
    header = rows[[row[0] for row in rows].index("model")]
    assert [
        row[header.index("at chance")] for row in rows if row[:2] in (["ListOps", "stock"], ["Text", "stock"])
    ] == list("11")
    assert "less than three standard errors above the most frequent class's" in text


def test_results_are_of_the_test_part_and_curves_of_the_validation_part(tmp_path):
    final = {"step": 4, "validation_accuracy": 0.9, "test_accuracy": 0.4, "validation_loss": 1.0}
    record = RunMetrics(
        arguments={}, facts={"examples_per_step": 8}, validation=[{"step": 2, "validation_accuracy": 0.9}], final=final
    )
    run = Run(tmp_path, 0, "stock", {}, record)
    metric = Metric("validation_accuracy", "accuracy", "%", 100.0, final_key="test_accuracy")
    assert metric.final_name == "final test accuracy"
    assert run.unit == "examples"
    assert run.value(metric) == 40
    assert run.curve(metric.key) == [(2, 0.9)]
