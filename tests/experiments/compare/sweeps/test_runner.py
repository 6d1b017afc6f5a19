"""Runs in processes of their own: what is finished stays, what failed is returned, an interruption leaves nothing running."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from image_records import write_image_record

from recipes.compare.sweeps import runner
from recipes.compare.sweeps.design import PlannedRun, SweepError
from recipes.compare.sweeps.runner import LOG_FILE, Machine, failure, run_all

ONE = Machine(parallel=1, threads=1)
PRELOADED = tuple(runner.PRELOADED)


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.setattr(runner, "PRELOADED", [])


@pytest.mark.parametrize("name", PRELOADED)
def test_what_is_preloaded_is_there(name):
    """The fork server passes over what it does not find, and `recipes` it may not find."""
    assert importlib.util.find_spec(name) is not None
    assert not name.startswith("recipes")


def planned(name: str, seed: int = 0) -> PlannedRun:
    return PlannedRun(Path("train.py"), name, ("--name", name), seed)


def train(run: PlannedRun, runs_dir: Path, threads: int, gpu: int | None) -> None:
    """Stands in for a training script: writes its record, or fails as its name says."""
    folder = run.directory(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (runs_dir / "order.txt").open("a") as order:
        order.write(f"{run.name} {run.seed} {threads} {gpu}\n")
    (folder / LOG_FILE).write_text(f"working\n{run.name} is the last line\n\n")
    if run.name == "failing":
        raise SystemExit(1)
    if run.name == "waiting":
        (runs_dir / f"pid-{run.seed}").write_text(str(os.getpid()))
        time.sleep(60)
    if run.name != "recordless":
        write_image_record(folder, run.seed, [0.5])


def test_finished_runs_are_not_run_again(tmp_path):
    runs = [planned("a"), planned("b"), planned("a"), planned("a", seed=1)]
    assert run_all(runs[:1], tmp_path, ONE, train=train) == []
    assert run_all(runs, tmp_path, Machine(1, 3), train=train) == []
    assert (tmp_path / "order.txt").read_text().splitlines() == ["a 0 1 None", "b 0 3 None", "a 1 3 None"]
    record = planned("a", seed=1).finished(tmp_path)
    assert record is not None
    assert record.seed == 1


SCRIPT = """
import shutil, sys, time
folder = sys.argv[sys.argv.index("--output_dir") + 1]
open("{root}/trained.txt", "a").write("once\\n")
time.sleep(1)
shutil.copy("{root}/metrics.json", folder)
"""


def test_two_sweeps_at_once_train_a_run_once(tmp_path):
    write_image_record(tmp_path, 0, [0.5])
    (tmp_path / "train.py").write_text(SCRIPT.format(root=tmp_path))
    run = PlannedRun(tmp_path / "train.py", "a", (), 0)
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=runner._train, args=(run, tmp_path / "runs", 1, None)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "trained.txt").read_text() == "once\n"
    assert run.finished(tmp_path / "runs") is not None


def test_failures_are_returned_and_the_others_run(tmp_path):
    runs = [planned("failing"), planned("a"), planned("recordless")]
    assert run_all(runs, tmp_path, ONE, train=train) == [planned("failing"), planned("recordless")]
    assert planned("a").finished(tmp_path) is not None
    assert failure(planned("failing"), tmp_path) == "failing is the last line"
    assert failure(planned("never run"), tmp_path) == "it printed nothing"


def test_each_run_at_once_has_its_own_gpu(tmp_path):
    runs = [planned("a", seed) for seed in range(6)]
    assert run_all(runs, tmp_path, Machine(parallel=2, threads=1, gpus=2), train=train) == []
    used = {line.split()[-1] for line in (tmp_path / "order.txt").read_text().splitlines()}
    assert used == {"0", "1"}


def test_the_gpu_is_one_that_the_sweep_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert runner._device(1) == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runner._device(1) == "1"


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also under a shell that started the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_ends_the_runs(tmp_path, interruptible):
    def interrupt_when_both_run() -> None:
        while len(list(tmp_path.glob("pid-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_both_run, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_all([planned("waiting", seed) for seed in range(3)], tmp_path, Machine(2, 1), train=train)
    assert not multiprocessing.active_children()
    for file in tmp_path.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_the_machine(monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert Machine.whole() == Machine(parallel=8, threads=1, gpus=0)
    assert Machine.whole(3) == Machine(parallel=3, threads=2, gpus=0)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    assert Machine.whole() == Machine(parallel=2, threads=4, gpus=2)
    with pytest.raises(SweepError, match="--num_parallel 0"):
        Machine.whole(0)
