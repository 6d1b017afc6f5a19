"""sweep.py as it is used: a grid from end to end, the named sweeps' plans, and what is refused before any run."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
from scripts_loading import REPOSITORY, load_script

from recipes.compare.sweeps.sweep_presets import SWEEPS
from recipes.images.image_arguments import parse_arguments

SCRIPT = REPOSITORY / "scripts" / "sweep.py"
# A ViT of one layer of width 16 on 40 digits.
TINY = [
    *("--max_train_samples", "40", "--max_validation_samples", "20", "--per_device_train_batch_size", "8"),
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
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
    assert "the same command goes on where this stopped" in errors
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


@pytest.mark.parametrize("name", SWEEPS)
def test_the_paper_scale_prints_commands_that_parse(sweep, name, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "training_operations", lambda arguments: 3.6e18 * arguments.num_train_epochs)
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
    assert "--learning_rat is no flag of this script; did you mean --learning_rate?" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --output_dir .* is a file, not a folder"):
        sweep.main(["grid", "--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "file"), "--", *TINY])
