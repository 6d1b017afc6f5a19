"""Running many training runs, several at once, each in a process of its own; finished ones are not run again."""

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_specattn.files import write_bytes

from ...run.checkpointing import list_checkpoints
from .design import PlannedRun, SweepError

LOG_FILE = "log.txt"
COMMAND_FILE = "command.txt"

# What every run imports: a server imports it once, and each run is a fork of the server. Nothing here may start a thread.
# `recipes`, which is quick to import, is left out: before Python 3.12.8 the server does not look in the scripts' folder.
PRELOADED = [
    "torch",
    "accelerate",
    "timm",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "transformers.models.vit.modeling_vit",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "hf_specattn.conditioning",
    "hf_specattn.modeling",
    "hf_specattn.diagnostics",
]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Machine:
    """How many runs at once, and what each may use.

    Attributes:
        parallel: Runs at once.
        threads: Of each on the CPU.
        gpus: Each run has one of them, in turn; 0 trains on the CPU.
    """

    parallel: int
    threads: int
    gpus: int = 0

    @classmethod
    def whole(cls, parallel: int | None = None) -> "Machine":
        """Use all of this machine: a run for each GPU, or without one a run for each core.

        Raises:
            SweepError: for fewer than one run at once.
        """
        gpus = torch.cuda.device_count()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        parallel = (gpus or cores) if parallel is None else parallel
        if parallel < 1:
            raise SweepError(
                f"--num_parallel {parallel}: at least 1 run at once; leave it out to use the whole machine."
            )
        return cls(parallel, max(1, cores // parallel), gpus)


def failure(run: PlannedRun, runs_dir: Path) -> str:
    """Return the last line that a run which did not come to its end printed."""
    file = run.directory(runs_dir) / LOG_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def run_all(
    runs: Iterable[PlannedRun],
    runs_dir: Path,
    machine: Machine,
    *,
    description: str = "runs",
    disable_tqdm: bool = False,
    train: Callable[[PlannedRun, Path, int, int | None], None] | None = None,
) -> list[PlannedRun]:
    """Run what has not come to its end yet, in the order given, and return those that failed.

    A run that was interrupted goes on from its newest checkpoint; one that another sweep trains at the moment is waited for.
    An interruption of this function ends the runs by SIGTERM, at which they save a checkpoint.

    Args:
        runs: To run; repeated ones run once.
        runs_dir: The folder of all runs.
        machine: What may be used.
        description: For the progress bar.
        disable_tqdm: No bar; nor is there one if the output is not a terminal.
        train: For tests; called in a process of its own.
    """
    waiting = [run for run in dict.fromkeys(runs) if run.finished(runs_dir) is None]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    slots = list(range(machine.parallel))
    running: dict[Any, tuple[PlannedRun, int]] = {}
    failed: list[PlannedRun] = []
    bar = tqdm(total=len(waiting), desc=description, unit="run", disable=True if disable_tqdm else None)
    try:
        while waiting or running:
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                gpu = slot % machine.gpus if machine.gpus else None
                arguments = (run, runs_dir, machine.threads, gpu)
                process = context.Process(target=train or _train, args=arguments)
                process.start()
                running[process] = (run, slot)
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                process.join()
                run, slot = running.pop(process)
                slots.append(slot)
                bar.update()
                if process.exitcode != 0 or run.finished(runs_dir) is None:
                    failed.append(run)
                    logger.warning(f"{run.directory(runs_dir)} failed: {failure(run, runs_dir)}")
    finally:  # of an interruption: nothing is left running behind it
        for process in running:
            process.terminate()
        for process in running:
            process.join()
        bar.close()
    return failed


def _train(run: PlannedRun, runs_dir: Path, threads: int, gpu: int | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    directory = run.directory(runs_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _lock_held = _lock(directory)  # until this process ends
    if run.finished(runs_dir) is not None:  # by another sweep, since this one looked
        return
    # A run that was killed may leave a saved model and neither a checkpoint nor a record: it starts over.
    arguments = run.arguments(runs_dir, anew=not list_checkpoints(directory))
    write_bytes(directory / COMMAND_FILE, (shlex.join(["python", str(run.script), *arguments]) + "\n").encode())
    with open(directory / LOG_FILE, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else _device(gpu)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    sys.argv = [str(run.script), *arguments]
    runpy.run_path(str(run.script), run_name="__main__")


def _lock(directory: Path) -> FileLock:
    """Wait until no other sweep trains a run: its result is this one's, too."""
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another sweep trains {directory}; waiting for it.")
        lock.acquire()
    except NotImplementedError:  # of a file system without locks, where the script warns
        pass
    return lock


def _end_with_parent() -> None:
    """End this process, which saves a checkpoint then, when a sweep that could not end it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _device(gpu: int) -> str:
    """The name of the GPU of that number among those that this process may see."""
    visible: Sequence[str] = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[gpu] if visible else str(gpu)
