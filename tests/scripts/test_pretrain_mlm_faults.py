"""Runs of `pretrain_mlm.py` that are killed, stopped or find damage, and go on to the same result.

`make faults` kills each run 20 times instead of 5. Run as a program, this file is the server from which the killed
processes are forked, because importing everything takes longer than their whole run.
"""

import errno
import importlib.util
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
from scripts_loading import REPOSITORY, load_script
from test_pretrain_mlm import (  # noqa: F401  fixtures among them
    DYNAMIC,
    IDENTITY,
    MODEL,
    SCRIPT,
    corpus,
    fresh_accelerator_state,
    losses_of,
    metrics_of,
    pretrain,
    script,
)

from hf_specattn.files import LOCK_FILE, FolderLock
from recipes.run import loop, runs, saving
from recipes.run.checkpointing import list_checkpoints

# ruff: noqa: F811  the fixtures' names again, as parameters

MOMENTS = int(os.environ.get("SPECATTN_FAULT_MOMENTS", "5"))
# Nothing divides anything: checkpoints fall between log points and refreshes, and validations between both.
KILLED_STEPS = 200
SCHEDULE = ["--save_steps", "4", "--logging_steps", "3", "--eval_steps", "10", "--max_steps", str(KILLED_STEPS)]
RESUME = "--resume_from_checkpoint"
TIMING = {"tokens_per_second", "seconds"}
METHODS = {"stock": [], "identity": IDENTITY, "svd": [*DYNAMIC[:-1], "3"]}
STEP_LINE = re.compile(rb"step (\d+)/")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here to start processes quickly")


def without_timing(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMING} for record in records]


def assert_same_result(resumed: pathlib.Path, whole: pathlib.Path) -> None:
    """Weights, optimizer and every measured number; only times may differ."""
    checkpoint = list_checkpoints(whole)[-1].name if list_checkpoints(whole) else None
    files = ["model.safetensors", "config.json", "tokenizer.json"]
    files += [f"{checkpoint}/training_state.safetensors"] if checkpoint else []
    for name in files:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    first, second = metrics_of(resumed), metrics_of(whole)
    assert first["validation"] == second["validation"]
    assert without_timing(first["history"]) == without_timing(second["history"])
    assert without_timing([first["final"]]) == without_timing([second["final"]])
    assert first["facts"] == second["facts"]


# --- killed ----------------------------------------------------------------------------------------------------------


class Life(NamedTuple):
    """How one process went: its wait status, and the seconds before its first log line, until its last, and after that."""

    status: int
    starting: float
    training: float
    ending: float


class Moment(NamedTuple):
    """So many seconds after the log says that this step is done; step 0: after the start."""

    step: int
    delay: float


def users_environment() -> dict[str, str]:
    """Return the environment without the test suite's setting that makes products independent of where weights lie."""
    variables = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    # Where `recipes` is, too: the server is no script of that folder.
    paths = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "scripts", "tests"))
    return variables | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


class Server:
    """Forks processes that run the script; see `serve`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=users_environment(),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def run(self, flags: list[str], moment: Moment | None = None) -> Life:
        """Run the script to its end, or kill it at a moment."""
        self.log.write_bytes(b"")
        self._write({"log": str(self.log), "flags": flags})
        process = int(self.process.stdout.readline())
        times = [time.monotonic()]
        while not self._ended():
            step = self.last_step()
            if (len(times) == 1 and step > 0) or (len(times) == 2 and step == KILLED_STEPS):
                times.append(time.monotonic())
            if moment is not None and step >= moment.step:
                if not self._ended(moment.delay):
                    os.kill(process, signal.SIGKILL)
                break
        status = int(self.process.stdout.readline())
        times += [time.monotonic()] * (4 - len(times))
        return Life(status, *(end - begin for begin, end in pairwise(times)))

    def last_step(self) -> int:
        steps = STEP_LINE.findall(self.log.read_bytes())
        return int(steps[-1]) if steps else 0

    def _ended(self, timeout: float = 0.002) -> bool:
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def _write(self, order: dict) -> None:
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def serve() -> None:
    """For each line, an order in JSON, fork a process that runs the script; print its number, then its wait status."""
    module = load_script(SCRIPT)
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            module.main(order["flags"])
            sys.exit()
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def uninterrupted(server, corpus, tmp_path_factory):
    """A function: method -> the flags of a run without its folder, that run's folder, and how its process went."""
    runs: dict[str, tuple[list[str], pathlib.Path, Life]] = {}

    def run(method: str) -> tuple[list[str], pathlib.Path, Life]:
        if method not in runs:
            folder = tmp_path_factory.mktemp("whole") / method
            sizes = [*MODEL, "--vocab_size", "100", "--max_seq_length", "16", "--per_device_train_batch_size", "4"]
            flags = ["--train_file", corpus, *sizes, *SCHEDULE, *METHODS[method]]
            life = server.run([*flags, "--output_dir", str(folder)])
            assert life.status == 0, server.log.read_text()
            runs[method] = flags, folder, life
        return runs[method]

    return run


def draw_moments(life: Life, seed: str) -> list[Moment]:
    """Return random moments in the order in which the run gets there: in its start, in its training, in its end."""
    choose = random.Random(seed)
    steps = sorted(choose.sample(range(1, KILLED_STEPS), MOMENTS - 2))
    between = life.training * 12 / KILLED_STEPS  # training, saving three times, and validating at least once
    moments = [Moment(step, choose.uniform(0, between)) for step in steps]
    return [
        Moment(0, choose.uniform(0, life.starting)),
        *moments,
        Moment(KILLED_STEPS, choose.uniform(0, life.ending)),
    ]


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(server, uninterrupted, tmp_path, method):
    flags, whole, life = uninterrupted(method)
    runs, saving = [tmp_path / "run"], 0

    def go_on(moment: Moment | None = None) -> int:
        status = server.run([*flags, "--output_dir", str(runs[-1]), RESUME], moment).status
        assert status in (0, signal.SIGKILL), server.log.read_text()
        if status == 0:
            assert_same_result(runs[-1], whole)
            assert [path.name for path in list_checkpoints(runs[-1])] == ["checkpoint-000196", "checkpoint-000200"]
            assert not list(runs[-1].glob(".checkpoint-*"))
        return status

    for moment in draw_moments(life, method):
        while go_on(moment) == 0:  # it was faster than the run that the moments come from: another one, killed sooner
            runs.append(tmp_path / f"run-{len(runs)}")
            moment = Moment(moment.step, moment.delay / 2)
        saving += any(runs[-1].glob(".checkpoint-*"))
    assert go_on() == 0
    print(f"{MOMENTS} kills in {len(runs)} run(s), {saving} of them while a checkpoint was written")


@pytest.mark.slow
@needs_fork
def test_sigterm_saves_and_exits_0(server, uninterrupted, tmp_path):
    flags, whole, _ = uninterrupted("svd")
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, SCRIPT, *flags]
    with subprocess.Popen(command, env=users_environment(), stderr=subprocess.PIPE) as process:
        lines = [next(line for line in process.stderr if b"step 60/" in line)]
        process.send_signal(signal.SIGTERM)
        lines += process.stderr
    assert process.returncode == 0, b"".join(lines)
    assert re.search(rb"Stopped after step \d+ of 200, with a checkpoint in .*--resume_from_checkpoint", lines[-1])
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert server.run([*flags, RESUME]).status == 0, server.log.read_text()
    assert_same_result(tmp_path / "run", whole)


# --- stopped, in this process ----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(pretrain, monkeypatch):
    """A function: as `pretrain`, but a signal comes while the run takes a step."""

    def run(*flags: str, step: int, **settings) -> pathlib.Path:
        take = loop.train_step

        def interrupted(*arguments):
            if arguments[-2] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", interrupted)
            return pretrain(*flags, **settings)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_continues_to_the_same_result(pretrain, stopped, caplog, method):
    flags = [*METHODS[method], "--logging_steps", "4", "--save_steps", "0"]
    whole = pretrain(*flags, name="whole")
    folder = stopped(*flags, step=2, name="run")
    assert [path.name for path in folder.iterdir()] == ["checkpoint-000002"]
    assert "Stopped after step 2 of 6" in caplog.text
    stopped(*flags, RESUME, step=5, name="run")
    pretrain(*flags, RESUME, name="run")
    assert_same_result(folder, whole)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-000002", "checkpoint-000005"]
    assert not list_checkpoints(whole)


def test_a_signal_in_the_last_step_lets_the_run_end(pretrain, stopped):
    assert_same_result(stopped(step=6), pretrain(name="whole"))


def test_a_damaged_newest_checkpoint_is_skipped(pretrain, stopped, warning_log):
    flags = [*METHODS["svd"], "--save_steps", "2"]
    whole = pretrain(*flags, name="whole")
    folder = stopped(*flags, step=5)
    newest = folder / "checkpoint-000005"
    assert list_checkpoints(folder) == [folder / "checkpoint-000004", newest]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    pretrain(*flags, RESUME)
    assert any(f"{newest} is damaged and skipped" in message for message in warning_log.messages)
    assert_same_result(folder, whole)


def test_other_settings_are_refused_with_the_difference(pretrain, stopped, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n\n".join(f"the model reads word {number}" * 9 for number in range(80)))
    folder = stopped(*IDENTITY, step=3)
    before = (folder / "checkpoint-000003" / "training_state.json").read_bytes()
    for flags, difference in (
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--lambda_", "2"], "lambda_: 1.0 -> 2.0"),
        (["--spectral_init", "preserve"], 'spectral_init: "additive" -> "preserve"'),
        (["--spectral_targets", "query"], r'spectral_targets: \["query", "key", "value"\] -> \["query"\]'),
        (["--hidden_size", "32"], "hidden_size: 16 -> 32"),
        (["--max_steps", "8"], "max_steps: 6 -> 8"),
        (["--learning_rate", "1e-4"], "learning_rate: 0.001 -> 0.0001"),
        (["--warmup_steps", "2"], "warmup_steps: 0 -> 2"),
        (["--mlm_probability", "0.5"], "mlm_probability: 0.25 -> 0.5"),
        (["--per_device_train_batch_size", "8"], "global_batch_size: 4 -> 8"),
        (["--train_file", str(tmp_path / "other.txt")], 'train_fingerprint: "[0-9a-f]{16}" -> "[0-9a-f]{16}"'),
        (["--validation_fraction", "0.2"], "validation_fingerprint"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: .*other settings(?s:.*)\n  {difference}"):
            pretrain(*IDENTITY, RESUME, *flags)
    assert (folder / "checkpoint-000003" / "training_state.json").read_bytes() == before


def test_what_does_not_decide_the_result_may_change(pretrain, stopped):
    whole = pretrain(*METHODS["svd"], name="whole")
    folder = stopped(*METHODS["svd"], step=3)
    split = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    others = ["--logging_steps", "2", "--eval_steps", "0", "--save_steps", "1", "--save_total_limit", "1"]
    pretrain(*METHODS["svd"], RESUME, *split, *others)
    expected = losses_of(whole)
    assert losses_of(folder) == pytest.approx([*expected[:3], expected[3], sum(expected[4:]) / 2], rel=1e-5)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-000006"]


# --- beginning and ending --------------------------------------------------------------------------------------------


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_stays_as_it_is(pretrain, monkeypatch, caplog):
    folder = pretrain("--report_to", "tensorboard") if has_tensorboard() else pretrain()
    before = contents(folder)
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained"))
    pretrain(RESUME)
    assert f"The run in {folder} is finished" in caplog.text
    with pytest.raises(SystemExit, match="seed: 0 -> 1"):
        pretrain(RESUME, "--seed", "1")
    assert contents(folder) == before


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def test_resuming_begins_where_there_is_no_checkpoint_yet(pretrain, caplog, tmp_path):
    whole = pretrain(RESUME, name="absent")
    assert "There is no checkpoint in" in caplog.text
    (tmp_path / "run" / ".checkpoint-000001.tmp-99999999").mkdir(parents=True)  # killed while it wrote its first one
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert_same_result(pretrain(RESUME), whole)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_resuming_refuses_to_replace_a_model_without_checkpoints(pretrain, capsys):
    folder = pretrain("--save_steps", "0")
    before = contents(folder)
    with pytest.raises(SystemExit):
        pretrain(RESUME)
    assert "holds a saved model and no checkpoint to continue from" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_folder_with_a_run_names_both_ways_on(stopped, pretrain, capsys):
    stopped(step=2)
    with pytest.raises(SystemExit):
        pretrain()
    message = capsys.readouterr().err
    assert "is not empty" in message
    assert "--resume_from_checkpoint to continue" in message
    assert "--overwrite_output_dir to replace" in message


def test_overwriting_leaves_nothing_that_could_be_taken_for_the_new_run(pretrain, stopped, caplog):
    folder = pretrain("--save_steps", "3")
    stopped("--overwrite_output_dir", "--seed", "1", step=1)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-000001"]
    assert "--resume_from_checkpoint in place of --overwrite_output_dir continues" in caplog.text
    pretrain(RESUME, "--seed", "1")
    assert_same_result(folder, pretrain("--seed", "1", name="whole"))


# --- other ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "named"), [(["--save_steps", "1"], "checkpoint-000003"), ([], None)])
def test_a_non_finite_loss_names_the_last_checkpoint(pretrain, monkeypatch, flags, named):
    check = loop.require_finite_loss
    monkeypatch.setattr(
        loop,
        "require_finite_loss",
        lambda loss, step, *kind: check(float("nan") if step == 4 else loss, step, *kind),
    )
    expected = (
        rf"The last checkpoint before is \S+{named}; another run can" if named else "There is no checkpoint of it"
    )
    with pytest.raises(SystemExit, match=f"training loss is nan at step 4.*{expected}"):
        pretrain("--eval_steps", "0", *flags)


@pytest.fixture
def whole(pretrain):
    """A run that nothing disturbed; the cache of the data, with space of its own, exists from here on."""
    return pretrain("--save_steps", "2", name="whole")


def with_free(patch, free: Callable[[], int]) -> None:
    usage = shutil.disk_usage(".")
    patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free()))


def test_a_full_disk_is_said_before_the_first_step(pretrain, whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        with_free(patch, lambda: 1000)
        patch.setattr(loop, "train_step", lambda *_: pytest.fail("training started"))
        with pytest.raises(SystemExit, match=r"^error: --output_dir .* will need about .* for 2 checkpoints"):
            pretrain("--save_steps", "2")
    assert not list_checkpoints(tmp_path / "run")


def test_a_disk_that_fills_later_leaves_the_last_checkpoint(pretrain, whole, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        with_free(patch, lambda: 1000 if list_checkpoints(folder) else 10**12)
        with pytest.raises(SystemExit, match=r"^error: No space for .*checkpoint-000004.*Safe is checkpoint-000002"):
            pretrain("--save_steps", "2")
    assert_same_result(pretrain("--save_steps", "2", RESUME), whole)


@pytest.mark.parametrize("save_steps", ["0", "2"])
def test_a_model_that_cannot_be_saved_in_the_end_is_saved_elsewhere(
    pretrain, whole, monkeypatch, tmp_path, save_steps
):
    save = saving._save_whole

    def full(model, processor, directory, state_dict):
        if directory == tmp_path / "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, processor, directory, state_dict)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_save_whole", full)
        with pytest.raises(SystemExit, match=rf"^error: .*It is in {tmp_path}/rescued-model-\d+ instead"):
            pretrain("--save_steps", save_steps)
    (rescued,) = tmp_path.glob("rescued-model-*")
    assert (rescued / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    if save_steps != "0":
        assert_same_result(pretrain("--save_steps", save_steps, RESUME), whole)


def test_an_error_of_the_disk_while_training_is_one_line(pretrain, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "spectral_monitor.json")

    monkeypatch.setattr(loop, "report_training", fail)
    with pytest.raises(SystemExit, match=r"^error: .*Input/output error.* There is no checkpoint of it\.$"):
        pretrain()


def test_the_second_of_two_runs_in_a_folder_is_refused(pretrain, monkeypatch, tmp_path):
    lock = FolderLock(tmp_path / "run", "--output_dir")
    lock.acquire()
    for flags in ([], [RESUME], ["--overwrite_output_dir"]):
        with pytest.raises(SystemExit, match=r"^error: --output_dir .* is in use by another process"):
            pretrain(*flags)
    lock.release()
    folder = pretrain()
    assert not (folder / LOCK_FILE).exists()


def test_what_another_run_wrote_meanwhile_is_not_replaced(pretrain, monkeypatch, tmp_path):
    acquire = FolderLock.acquire

    def late(lock):
        lock.folder.mkdir()
        (lock.folder / "config.json").write_text("{}")
        acquire(lock)

    monkeypatch.setattr(FolderLock, "acquire", late)
    with pytest.raises(SystemExit, match=r"^error: --output_dir .* is not empty"):
        pretrain()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


if __name__ == "__main__":
    serve()
