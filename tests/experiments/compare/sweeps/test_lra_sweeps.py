"""The sweeps on Long Range Arena: every command parses, data of each task, costs, and tuning by the validation part."""

import shlex

import pytest
import torch
from scripts_loading import REPOSITORY, load_script

from recipes.compare.comparison import Metric, Run
from recipes.compare.sweeps.design import SweepError
from recipes.compare.sweeps.execution import planned_runs
from recipes.compare.sweeps.lra_sweeps import LRA_SWEEPS, TASKS, lra_operations, with_data
from recipes.compare.sweeps.sweep_presets import SCALES
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
    assert [setting.flags[-1] for setting in with_data(sweep, ["text=/t"]).settings] == ["small", "/t"]


def test_results_are_of_the_test_part_and_curves_of_the_validation_part(tmp_path):
    final = {"step": 4, "validation_accuracy": 0.9, "test_accuracy": 0.4, "validation_loss": 1.0}
    record = RunMetrics(
        arguments={}, facts={"examples_per_step": 8}, validation=[{"step": 2, "validation_accuracy": 0.9}], final=final
    )
    run = Run(tmp_path, 0, "stock", {}, record)
    metric = Metric("validation_accuracy", "accuracy", "%", 100.0, final_key="test_accuracy")
    assert run.unit == "examples"
    assert run.value(metric) == 40
    assert run.curve(metric.key) == [(2, 0.9)]
