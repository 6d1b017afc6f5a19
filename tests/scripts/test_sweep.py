"""sweep.py as it is used: a grid from end to end, the named sweeps' plans, and what is refused before any run."""

import json
import shlex
import signal
import subprocess
import sys
import time

import glue_files
import pytest
from scripts_loading import REPOSITORY, load_script

from recipes.compare.sweeps.sweep_plan import OPERATIONS
from recipes.compare.sweeps.sweep_presets import IMAGE_SCRIPT, SWEEPS
from recipes.images.image_arguments import parse_arguments

SCRIPT = REPOSITORY / "scripts" / "sweep.py"
# A ViT of one layer of width 16 on 40 digits.
TINY = [
    *("--max_train_samples", "40", "--max_validation_samples", "20", "--per_device_train_batch_size", "8"),
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
]
TINY_TEXT = [
    *("--max_steps", "2", "--vocab_size", "60", "--hidden_size", "16", "--num_hidden_layers", "1"),
    *("--num_attention_heads", "2", "--intermediate_size", "16", "--per_device_train_batch_size", "2"),
]
GRID = ["grid", "--methods", "stock", "svd", "--seeds", "0", "1", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def sweep():
    return load_script(SCRIPT)


def start(folder, *behind):
    command = [sys.executable, str(SCRIPT), *GRID, "--runs_dir", str(folder), "--", *TINY, *behind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_grid_and_its_repetition(tmp_path):
    length = ("--num_train_epochs", "2", "--save_steps", "0")
    process = start(tmp_path, *length)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    records = {file.parent: json.loads(file.read_text()) for file in tmp_path.glob("*/seed-*/metrics.json")}
    assert len(records) == 4
    content = json.loads((tmp_path / "reports" / "grid.json").read_text())
    for arm in content["arms"]:
        method = None if arm["variant"] == "stock" else "svd"
        finals = {
            str(record["arguments"]["seed"]): 100 * record["final"]["validation_accuracy"]
            for record in records.values()
            if record["arguments"]["spectral_method"] == method
        }
        assert arm["values"] == pytest.approx(finals)
    assert f"| stock | 2 of 2 | {sum(content['arms'][0]['values'].values()) / 2:.2f} ± " in output
    # One run as if it had been killed between the saving of its model and that of its record.
    killed, *others = sorted(records)
    (killed / "metrics.json").unlink()
    written = {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in others}
    again = start(tmp_path, *length)
    repeated, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert repeated == output
    assert json.loads((killed / "metrics.json").read_text())["validation"] == records[killed]["validation"]
    assert written == {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in others}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_result(tmp_path):
    length = ("--num_train_epochs", "100", "--save_steps", "0", "--eval_steps", "0")
    process = start(tmp_path / "a", *length)
    logs = []
    while not any("step " in log.read_text() for log in logs):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        logs = list((tmp_path / "a").glob("*/seed-*/log.txt"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command continues where this one stopped" in errors
    assert list((tmp_path / "a").glob("*/seed-*/checkpoint-*"))
    outputs = []
    for folder in ("a", "b"):
        process = start(tmp_path / folder, *length)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        content = json.loads((tmp_path / folder / "reports" / "grid.json").read_text())
        outputs.append([arm["values"] for arm in content["arms"]])
    assert any("Continuing after step" in log.read_text() for log in (tmp_path / "a").glob("*/seed-*/log.txt"))
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_table_4_from_pretraining_to_its_report(sweep, tmp_path, capsys):
    glue_files.write_all(tmp_path / "glue")
    text = "\n\n\n".join(f"Sentence {number} of CoLA, and its second {number} of RTE." for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    folders = ("--glue_data", str(tmp_path / "glue"), "--runs_dir", str(tmp_path / "runs"))
    argv = ["table4", "--num_seeds", "1", *folders, "--", *TINY_TEXT, "--train_file", str(tmp_path / "text.txt")]
    sweep.main(argv)
    output = capsys.readouterr().out
    content = json.loads((tmp_path / "runs" / "reports" / "table4.json").read_text())
    arms = {(arm["setting"], arm["variant"]): arm["values"] for arm in content["arms"]}
    pretrained = [json.loads(file.read_text()) for file in tmp_path.glob("runs/crammed-bert-*/seed-*/metrics.json")]
    assert len(pretrained) == 4
    scored = list(tmp_path.glob("runs/crammed-bert-*/seed-*/*/seed-*/results.json"))
    assert len(scored) == 4 * 3
    headings = {"cola": "CoLA (Matthews)", "rte": "RTE (accuracy)", "sst2": "SST-2 (accuracy)"}
    for file in scored:
        (run,) = json.loads(file.read_text())["runs"]
        ((score, *_),) = (scores.values() for scores in run["scores"].values())
        assert arms[headings[run["task"]], run["model"]][str(run["seed"])] == pytest.approx(100 * score)
        # The model keeps its conditioning.
        assert (run["settings"]["conditioning"] is not None) == (run["model"] == "identity, lambda 1")
        assert run["facts"]["model_name_or_path"] == str(file.parents[2])
    losses = {record["final"]["validation_loss"] for record in pretrained}
    assert {arms["Crammed BERT", name]["0"] for _, name in arms} == losses
    for line in ("identity, lambda 1 minus stock", "identity, lambda 1 minus stock, norm of identity, lambda 1"):
        assert f"| {line} | mean difference (seeds) |" in output
    assert (tmp_path / "runs" / "reports" / "table4-glue.png").stat().st_size > 10_000
    sweep.main(argv)  # everything is there already
    assert capsys.readouterr().out == output


def test_the_plan_of_table_4(sweep, capsys):
    sweep.main(["table4", "--scale", "paper", "--gpu_teraflops", "50"])
    output = capsys.readouterr().out
    commands = [shlex.split(line)[2:] for line in output.splitlines() if line.startswith("accelerate launch")]
    trained = [command[command.index("--output_dir") + 1] for command in commands if "--preset" in command]
    assert len(trained) == 3 * 5
    scored = [command[command.index("--model_name_or_path") + 1] for command in commands if "--tasks" in command]
    assert sorted(scored) == sorted(trained * 8)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| Crammed")]
    assert rows[0] == ["Crammed BERT", "15", "by the clock", "24.00", "360.0"]
    # Six operations for each weight of the layers, score and weighted value; five passes over 949,098 examples of 128 tokens.
    layer = 4 * 768**2 + 768 * 3072 + 1536 * 768 + 2 * 128 * 768
    assert float(rows[1][2]) == pytest.approx(6 * 12 * layer * 128 * 5 * 949_098, rel=0.01)
    assert float(rows[1][3]) == pytest.approx(float(rows[1][2]) / 5e13 / 3600, abs=0.01)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_paper_scale_prints_commands_that_parse(sweep, name, capsys, monkeypatch):
    monkeypatch.setitem(OPERATIONS, IMAGE_SCRIPT, lambda arguments: 3.6e18 * arguments.num_train_epochs)
    sweep.main([name, "--scale", "paper", "--num_seeds", "2", "--gpu_teraflops", "50"])
    output = capsys.readouterr().out
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("accelerate launch")]
    assert commands
    for command in {tuple(item[3:]): None for item in commands}:
        arguments, _ = parse_arguments([item.replace("SCALE", "1") for item in command], "a run")
        assert arguments.dataset_name == "ILSVRC/imagenet-1k"
    total = output.splitlines()[-3].strip("| ").split(" | ")
    hours = sum(20.0 * (400 if "xcit-medium" in command else 300) for command in commands)
    assert float(total[-1].replace(",", "")) == pytest.approx(hours)


@pytest.mark.slow
def test_the_costs_are_those_of_the_models(sweep, capsys):
    sweep.main(["table5", "--scale", "paper", "--gpu_teraflops", "100"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ViT-B |"))
    operations, hours = (float(row.strip("| ").split(" | ")[index]) for index in (2, 3))
    # 17.58 x 10^9 multiplications an image (timm's table of results), 300 passes over 1,281,167 images.
    assert operations == pytest.approx(3 * 2 * 17.58e9 * 300 * 1_281_167, rel=0.01)
    assert hours == pytest.approx(operations / 1e14 / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table5", "--lambdas", "1"], "--lambdas: of grid only; table5 has its own values"),
        (["table5", "--num_seeds", "6"], "--num_seeds 6: table5 has 5 seed"),
        (["grid", "--scale", "paper"], "--scale is of the sweeps that have a name"),
        (["grid", "--script", "missing.py"], "--script missing.py does not exist"),
        (["grid", "--methods", "svdd"], "svdd.*stock"),
        (["grid", "--num_parallel", "0"], "--num_parallel 0"),
        (["table5", "--glue_data", "glue"], "--glue_data: of table4; leave it out of table5"),
        (["table4", "--glue_data", "nowhere"], r"nowhere.*CoLA.*train\.tsv"),
        (["grid", "--seeds", "0", "1", "0"], "seeds 0 of grid stand twice"),
        (["table5", "--num_seeds", "0"], "--num_seeds 0: table5 has 5 seed"),
        (["grid", "--", "--seed", "3"], "--seed is for every run, but grid sets it.*--seeds"),
        (["table5", "--", "--output-dir=x"], "--output-dir=x is for every run, but table5 sets it"),
        (["table5", "--", "--spectral_conditioning"], "--spectral_conditioning is for every run, but table5 sets it"),
        (
            ["grid", "--methods", "stock", "--attention_preconditioner", "row"],
            "--attention_preconditioner is for every",
        ),
        (["grid", "--methods", "svd", "--", "--spectral_method", "identity"], "--spectral_method is for every run"),
        (["table5", "--", "--lambda", "3"], "--lambda is for every run, but table5 sets it"),
        (["residual_free", "--", "--num_hidden_layers", "2"], "--num_hidden_layers is for every run"),
    ],
)
def test_what_is_refused(sweep, argv, message, tmp_path):
    argv = [*argv[:1], "--runs_dir", str(tmp_path / "runs"), *argv[1:]]
    with pytest.raises(SystemExit, match=message):
        sweep.main(argv)
    assert not (tmp_path / "runs").exists()


def test_a_flag_that_the_script_refuses_ends_the_sweep_before_any_run(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(["grid", "--runs_dir", str(tmp_path / "runs"), "--lambdas", "-3", "--", *TINY])
    assert error.value.code == 2
    assert "-3" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_two_dashes_may_be_left_out(sweep):
    name, arguments, behind = sweep.parse_arguments(
        ["grid", "--seed", "3", "--methods", "svd", "stock", *TINY, "--", "--x"]
    )
    assert (name, arguments.seeds, arguments.methods) == ("grid", [3], ["svd", "stock"])
    assert behind == [*TINY, "--x"]


def test_what_is_no_flag_of_a_sweep_nor_of_its_runs(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(["grid", "--runs_dir", str(tmp_path / "runs"), "--learning_rat", "1", *TINY])
    assert error.value.code == 2
    assert "--learning_rat is not a flag of this script; did you mean --learning_rate?" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --output_dir .* is a file, not a folder"):
        sweep.main(["grid", "--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "file"), "--", *TINY])
