"""Checkpoints: continuing bit for bit, in this process, in a new one and on two; damage, full disks, kills, refusals.

Run as a program, `test_checkpointing.py STOCK SVD`, it continues the runs in two folders: a test's new process.
"""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from models import ARCHITECTURES, assert_bit_equal
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    ViTForImageClassification,
    get_linear_schedule_with_warmup,
)

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition, refresh
from hf_specattn.conditioning import refresh_interval
from hf_specattn.refreshing import steps_since_refresh
from recipes.run import checkpointing
from recipes.run.checkpointing import (
    MANIFEST_FILE,
    STATE_FILE,
    STATE_TENSORS_FILE,
    CheckpointError,
    Checkpoints,
    DifferentRunError,
    DiskFullError,
    Progress,
    TrainingParts,
    list_checkpoints,
)
from recipes.run.optimization import OptimizationArguments, build_adamw

DESCRIPTION = {"seed": 0, "data": "1f3a", "lambda_": None, "betas": (0.9, 0.98), "logging_steps": 10}
STEPS = 30
DYNAMIC_SVD = SpectralConfig(method="svd", refresh_every=3)
# Processes are forked from a server that has the imports done. Not from this process: autograd's threads, which other
# tests may have started, do not survive a fork.
needs_fork = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="there is no fork here to start processes quickly",
)
each_conditioning = pytest.mark.parametrize("spectral", [None, DYNAMIC_SVD], ids=["stock", "dynamic-svd"])


def make_model(spectral: SpectralConfig | None = None, seed: int = 0, **changes) -> CrammedBertForMaskedLM:
    torch.manual_seed(seed)
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config(**changes))
    if spectral is not None:
        condition(model, spectral)
    return model


def make_parts(model: nn.Module, **others) -> TrainingParts:
    optimizer = build_adamw(model, OptimizationArguments(), 1e-2, betas=(0.9, 0.98), eps=1e-12)
    return TrainingParts(model, optimizer, get_linear_schedule_with_warmup(optimizer, 3, STEPS), **others)


def make_checkpoints(folder: Path, spectral: SpectralConfig | None = None, seed: int = 0, **settings) -> Checkpoints:
    return Checkpoints(folder, Accelerator(cpu=True), make_parts(make_model(spectral, seed)), DESCRIPTION, **settings)


def train(checkpoints: Checkpoints, start: Progress, last_step: int, wrapped: nn.Module | None = None) -> Progress:
    """A loop like the scripts': data by the step alone, dropout, clipping, refreshing."""
    parts, accelerator = checkpoints.parts, checkpoints.accelerator
    model = parts.model if wrapped is None else wrapped
    interval = refresh_interval(parts.model)
    losses = list(start.record.get("losses", []))
    model.train()
    for step in range(start.step + 1, last_step + 1):
        generator = torch.Generator().manual_seed(1000 * step + accelerator.process_index)
        rows = torch.randint(5, 40, (4, 12), generator=generator)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.schedule.step()
        if interval is not None and step % interval == 0:
            refresh(parts.model, exact=step % 2 == 1)  # in turns by an SVD and by matrix products
        losses.append(loss.item())
    return Progress(last_step, start.seconds + 1.5, {"losses": losses})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- continuing ------------------------------------------------------------------------------------------------------


@each_conditioning
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, spectral):
    original = make_checkpoints(tmp_path / "a", spectral)
    middle = train(original, Progress(), 5)
    shutil.copytree(original.save(middle), tmp_path / "b" / "checkpoint-000005")
    uninterrupted = original.save(train(original, middle, 15))

    resumed = make_checkpoints(tmp_path / "b", spectral, seed=7)  # other weights, until they are restored
    torch.rand(3)
    progress = resumed.resume()
    assert progress == middle
    assert steps_since_refresh(resumed.parts.model) == (0 if spectral is None else 2)
    # Every file: weights, moments and steps, schedule, random number generators, losses.
    assert contents(resumed.save(train(resumed, progress, 15))) == contents(uninterrupted)


@pytest.mark.slow  # starts a process
def test_a_new_process_continues_bit_for_bit(tmp_path):
    uninterrupted = {}
    for name, spectral in (("stock", None), ("svd", DYNAMIC_SVD)):
        original = make_checkpoints(tmp_path / name, spectral)
        middle = train(original, Progress(), 5)
        shutil.copytree(original.save(middle), tmp_path / f"{name}-resumed" / "checkpoint-000005")
        uninterrupted[name] = original.save(train(original, middle, 15))
    command = [sys.executable, __file__, str(tmp_path / "stock-resumed"), str(tmp_path / "svd-resumed")]
    paths = os.pathsep.join(sys.path)  # among them that of `models`
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    for name, folder in uninterrupted.items():
        assert contents(tmp_path / f"{name}-resumed" / "checkpoint-000015") == contents(folder)


@pytest.mark.slow
@needs_fork
def test_two_processes_continue_bit_for_bit_sharded_or_not(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_process(two_processes, tmp_path, rank, port) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for kind in ("ddp", "fsdp"):
        # What two processes wrote loads in one, except for the second one's random numbers.
        alone = make_checkpoints(tmp_path / kind, DYNAMIC_SVD, seed=9)
        progress = alone.resume()
        assert progress is not None
        assert progress.step == 8
        assert_bit_equal(weights(alone.parts.model), load_whole(tmp_path / kind / "checkpoint-000008"))


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    return weights(AutoModelForMaskedLM.from_pretrained(folder))


def test_a_checkpoint_is_a_model_for_the_auto_classes(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    checkpoints = Checkpoints(
        tmp_path, Accelerator(cpu=True), make_parts(make_model(DYNAMIC_SVD), processor=tokenizer), DESCRIPTION
    )
    folder = checkpoints.save(train(checkpoints, Progress(), 3))
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(loaded) is type(checkpoints.parts.model)
    assert_bit_equal(weights(loaded), weights(checkpoints.parts.model))
    assert loaded.decoder.weight is loaded.get_input_embeddings().weight
    assert len(AutoTokenizer.from_pretrained(folder)) == 6
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == len({tensor.data_ptr() for tensor in checkpoints.parts.model.state_dict().values()})


def test_a_vision_transformer_whose_checkpoints_have_other_names_comes_back(tmp_path):
    first, second = (conditioned_vit(seed) for seed in (0, 1))
    make = [Checkpoints(tmp_path, Accelerator(cpu=True), make_parts(model), {}) for model in (first, second)]
    folder = make[0].save(Progress(1))
    assert make[1].resume() == Progress(1)
    assert_bit_equal(weights(second), weights(first))
    assert_bit_equal(weights(AutoModelForImageClassification.from_pretrained(folder)), weights(first))


def conditioned_vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    model = ViTForImageClassification(ARCHITECTURES["vit"].config())
    condition(model, SpectralConfig(method="svd"))
    return model


def test_nothing_else_than_numbers_text_and_tensors_is_saved(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.parts.optimizer.param_groups[1]["note"] = {"a": object()}
    with pytest.raises(TypeError, match="optimizer/groups/1/note/a is a object"):
        checkpoints.save(Progress(1))
    assert names(tmp_path) == []


# --- keeping the last ones -------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path):
    checkpoints = make_checkpoints(tmp_path, keep_last=2)
    for step in (5, 10, 999999, 1000000):
        checkpoints.save(Progress(step))
    assert names(tmp_path) == ["checkpoint-1000000", "checkpoint-999999"]


def test_old_ones_are_removed_only_after_the_new_one_has_its_name(tmp_path, monkeypatch):
    checkpoints = make_checkpoints(tmp_path, keep_last=1)
    checkpoints.save(Progress(1))
    monkeypatch.setattr(checkpointing, "replace_folder", failing(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        checkpoints.save(Progress(2))
    assert names(tmp_path) == ["checkpoint-000001"]
    assert make_checkpoints(tmp_path).resume() == Progress(1)


def test_saving_the_same_step_again_writes_nothing(tmp_path, monkeypatch):
    checkpoints = make_checkpoints(tmp_path)
    folder = checkpoints.save(Progress(3))
    monkeypatch.setattr(checkpointing, "write_manifest", failing(AssertionError("written again")))
    assert checkpoints.save(Progress(3)) == folder
    resumed = make_checkpoints(tmp_path)
    resumed.resume()
    assert resumed.save(Progress(3)) == folder


def test_starting_over_removes_checkpoints_and_nothing_else(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(Progress(step))
    (tmp_path / "metrics.json").touch()
    (tmp_path / "checkpoint-best").mkdir()
    make_checkpoints(tmp_path).start_over()
    assert names(tmp_path) == ["checkpoint-best", "metrics.json"]


def test_leftovers_of_dead_runs_are_removed(tmp_path, ended_process):
    dead, own, alive = (f".checkpoint-000001.tmp-{number}" for number in (ended_process, os.getpid(), os.getppid()))
    for name in (dead, own, alive, f"{dead}-replaced", f".saving.tmp-{ended_process}-abcd_123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / f".metrics.json.tmp-{ended_process}-abcd_123").touch()
    make_checkpoints(tmp_path)
    assert names(tmp_path) == [alive]


def test_temporary_names_are_those_that_are_looked_for(tmp_path, monkeypatch):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(Progress(1))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    (tmp_path / "checkpoint-000002").mkdir()
    checkpoints.save(Progress(2))
    checkpoints.start_over()
    monkeypatch.undo()
    assert len(names(tmp_path)) == 3  # replaced by step 2, and removed by starting over
    make_checkpoints(tmp_path)
    assert names(tmp_path) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = [
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("model.safetensors", flip_a_bit, "model.safetensors has another checksum"),
    (STATE_TENSORS_FILE, truncate, f"{STATE_TENSORS_FILE} has .* of .* bytes"),
    (STATE_FILE, flip_a_bit, f"{STATE_FILE} has another checksum"),
    ("config.json", Path.unlink, "config.json is missing"),
    (MANIFEST_FILE, Path.unlink, f"{MANIFEST_FILE} is missing"),
    (MANIFEST_FILE, truncate, None),  # only the newline is lost
    (MANIFEST_FILE, lambda file: file.write_bytes(b"\xff\x00"), f"{MANIFEST_FILE} is unreadable"),
    (MANIFEST_FILE, lambda file: file.write_text("[]"), f"{MANIFEST_FILE} is unreadable"),
    (MANIFEST_FILE, lambda file: file.write_text('{"format": 9, "files": {}}'), "of format 9"),
    (MANIFEST_FILE, lambda file: file.write_text('{"format": 1, "files": {}}'), "does not list"),
]


@pytest.mark.parametrize(("name", "harm", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, warning_log, name, harm, reason):
    checkpoints = make_checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save(Progress(step))
    harm(tmp_path / "checkpoint-000002" / name)
    resumed = make_checkpoints(tmp_path, seed=1, keep_last=3)
    progress = resumed.resume()
    if reason is None:
        assert progress == Progress(2)
        return
    assert progress == Progress(1)
    (message,) = warning_log.messages
    assert re.search(rf"checkpoint-000002 is damaged and skipped: .*{reason}", message)
    # The damaged one goes when a sound one has taken its place, under its name or another.
    resumed.save(Progress(2) if name == STATE_FILE else Progress(3))
    assert [checkpointing.damage(folder) for folder in list_checkpoints(tmp_path)] == [None, None]


def test_without_a_sound_checkpoint_all_are_named(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    for step in (1, 2):
        truncate(checkpoints.save(Progress(step)) / "model.safetensors")
    pattern = r"(?s)000002: model.safetensors has.*000001: model.safetensors has.*start the run again"
    with pytest.raises(CheckpointError, match=pattern):
        make_checkpoints(tmp_path).resume()
    assert len(list_checkpoints(tmp_path)) == 2


def test_no_checkpoint_at_all(tmp_path):
    assert make_checkpoints(tmp_path / "missing").resume() is None
    assert make_checkpoints(tmp_path).resume() is None
    assert names(tmp_path) == []


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_the_differences(tmp_path):
    make_checkpoints(tmp_path).save(Progress(1))
    parts = make_parts(make_model(seed=5))
    before = weights(parts.model)
    description = {**DESCRIPTION, "seed": 1, "lambda_": {"query": 2.0}, "new": True}
    del description["data"]
    changed = Checkpoints(tmp_path, Accelerator(cpu=True), parts, description)
    with pytest.raises(DifferentRunError) as refusal:
        changed.resume()
    assert isinstance(refusal.value, ValueError)
    assert str(refusal.value).splitlines() == [
        f"{tmp_path / 'checkpoint-000001'} is of a run with other settings (the checkpoint's value -> this run's value):",
        "  seed: 0 -> 1",
        '  data: "1f3a" -> "(not recorded)"',
        '  lambda_: null -> {"query": 2.0}',
        '  new: "(not recorded)" -> true',
        "To continue that run, give its settings; to train with these, start a new run in another folder.",
    ]
    assert_bit_equal(weights(parts.model), before)


def test_a_tuple_equals_a_list(tmp_path):
    make_checkpoints(tmp_path).save(Progress(1))
    description = {**DESCRIPTION, "betas": [0.9, 0.98]}
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), make_parts(make_model()), description)
    assert checkpoints.resume() == Progress(1)


# --- full disks ------------------------------------------------------------------------------------------------------


def failing(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "safetensors"],
)
@pytest.mark.parametrize("where", ["save_file", "write_manifest", "sync"])
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch, where, error):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(Progress(1))
    with monkeypatch.context() as context:
        context.setattr(checkpointing, where, failing(error))
        with pytest.raises(
            DiskFullError, match=r"needs about [\d.,]+ MB, .* are free .* Safe is checkpoint-000001\. Free"
        ):
            checkpoints.save(Progress(2))
    assert names(tmp_path) == ["checkpoint-000001"]
    assert make_checkpoints(tmp_path).resume() == Progress(1)
    assert checkpoints.save(Progress(2)).is_dir()  # once there is space


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpoints = make_checkpoints(tmp_path)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(
        DiskFullError, match=r"1\.0 MB are free on that disk\. There is no earlier checkpoint\. Free at least 3"
    ):
        checkpoints.save(Progress(1))
    assert names(tmp_path) == []


@pytest.mark.parametrize("estimate", [True, False], ids=["noticed-before", "noticed-while-writing"])
def test_a_small_disk(tmp_path, monkeypatch, estimate):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small disk with")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    try:
        if not estimate:
            monkeypatch.setattr(checkpointing, "bytes_of", lambda _: 0)
            monkeypatch.setattr(checkpointing, "SMALL_FILES_BYTES", 0)
        width = {"hidden_size": 128, "intermediate_size": 256}
        checkpoints = Checkpoints(disk, Accelerator(cpu=True), make_parts(make_model(**width)), {}, keep_last=5)
        progress = train(checkpoints, Progress(), 1)  # so that there are moments to save
        saved = []
        with pytest.raises(DiskFullError, match="Free at least") as refusal:  # noqa: PT012  how many fit is the disk's affair
            for step in range(1, 9):
                checkpoints.save(Progress(step, 0.0, progress.record))
                saved.append(step)
        assert isinstance(refusal.value.__cause__, Exception) is not estimate
        assert [checkpointing.step_of(folder) for folder in list_checkpoints(disk)] == saved
        assert names(disk) == [checkpointing.checkpoint_name(step) for step in saved]
        if not estimate:
            assert saved
            resumed = Checkpoints(disk, Accelerator(cpu=True), make_parts(make_model(**width)), {})
            assert resumed.resume().step == saved[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- kills -----------------------------------------------------------------------------------------------------------


@needs_fork
def test_kills_at_random_moments_leave_only_whole_checkpoints(tmp_path):
    randomness, interrupted, reached, lives = random.Random(0), 0, 0, 0
    folder = tmp_path / "killed"
    while lives < 12 or (lives < 60 and not (interrupted and reached > 1)):  # on a busy machine more are needed
        lives += 1
        process = start_process(train_and_save_until_killed, folder)
        deadline = time.monotonic() + 60
        # The moment is random among those at which something is being written.
        while not list(folder.glob(".*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(randomness.uniform(0, 0.08 * max(1, lives / 12)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        interrupted += bool(list(folder.glob(".*")))

        resumed = make_checkpoints(folder, DYNAMIC_SVD, keep_last=2)
        assert all(checkpointing.CHECKPOINT_NAME.fullmatch(name) for name in names(folder))
        # (More than two where a kill came before the removal of old ones.)
        assert {checkpointing.damage(checkpoint) for checkpoint in list_checkpoints(folder)} <= {None}
        progress = resumed.resume()
        assert (progress.step if progress else 0) >= reached
        reached = progress.step if progress else 0
    assert reached > 1
    assert interrupted
    # Every life continued where the one before had been saved.
    reference = make_checkpoints(tmp_path / "reference", DYNAMIC_SVD)
    train(reference, Progress(), reached)
    assert_bit_equal(weights(resumed.parts.model), weights(reference.parts.model))
    assert (
        progress.record["losses"]
        == train(make_checkpoints(tmp_path / "b", DYNAMIC_SVD), Progress(), reached).record["losses"]
    )


def train_and_save_until_killed(folder: Path) -> None:
    torch.set_num_threads(1)
    checkpoints = make_checkpoints(folder, DYNAMIC_SVD, keep_last=2)
    progress = checkpoints.resume() or Progress()
    while True:
        progress = train(checkpoints, progress, progress.step + 1)
        checkpoints.save(progress)


# --- the jobs of other processes -------------------------------------------------------------------------------------


def start_process(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Run `work`, a function of this module, in another process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["accelerate", "pytest", "recipes.run.checkpointing"])
    process = server.Process(target=work, args=arguments)
    process.start()
    return process


def continue_to_step_15(stock: Path, svd: Path) -> None:
    for folder, spectral in ((stock, None), (svd, DYNAMIC_SVD)):
        checkpoints = make_checkpoints(folder, spectral, seed=7)
        progress = checkpoints.resume()
        assert progress is not None
        checkpoints.save(train(checkpoints, progress, 15))


def two_processes(folder: Path, rank: int, port: int) -> None:
    """Of each of two processes: continue from step 4 to 8, and refuse, both sharded and replicated."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    for kind in ("ddp", "fsdp"):
        continue_on_two(folder, kind, accelerator)
        refuse_on_two(folder, kind, accelerator)
    accelerator.wait_for_everyone()


def make_on_two(folder: Path, kind: str, seed: int, accelerator: Accelerator) -> tuple[Checkpoints, nn.Module]:
    """The checkpoints and the wrapped model. (On CPUs accelerate itself only does DDP.)"""
    model = make_model(DYNAMIC_SVD, seed)
    if kind == "fsdp":
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(100 + seed + accelerator.process_index)  # each process drops other units
    return Checkpoints(folder, accelerator, make_parts(model), DESCRIPTION), wrapped


def continue_on_two(folder: Path, kind: str, accelerator: Accelerator) -> None:
    original, wrapped = make_on_two(folder / kind, kind, 0, accelerator)
    middle = train(original, Progress(), 4, wrapped)
    saved = original.save(middle)
    if accelerator.is_main_process:
        shutil.copytree(saved, folder / f"{kind}-resumed" / saved.name)
    uninterrupted = original.save(train(original, middle, 8, wrapped))
    corrections = {name: value for name, value in original.parts.model.named_buffers() if name.endswith("correction")}
    first, second = gather_object([{name: value.tolist() for name, value in corrections.items()}])
    assert corrections
    assert first == second

    resumed, wrapped = make_on_two(folder / f"{kind}-resumed", kind, 7, accelerator)
    progress = resumed.resume()
    assert progress is not None
    final = resumed.save(train(resumed, progress, 8, wrapped))
    sharded = any(isinstance(tensor, DTensor) for tensor in resumed.parts.model.state_dict().values())
    assert sharded == (kind == "fsdp")
    if accelerator.is_main_process:
        assert contents(final) == contents(uninterrupted)


def refuse_on_two(folder: Path, kind: str, accelerator: Accelerator) -> None:
    """An error of the main process is raised in both."""
    checkpoints, _ = make_on_two(folder / kind, kind, 0, accelerator)
    checkpoints.description["seed"] = 1
    with pytest.raises(DifferentRunError, match="seed: 0 -> 1"):
        checkpoints.resume()
    with pytest.MonkeyPatch.context() as context:
        if accelerator.is_main_process:
            context.setattr(checkpointing, "save_file", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskFullError, match="Safe is checkpoint-000004, checkpoint-000008"):
            checkpoints.save(Progress(9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    continue_to_step_15(*map(Path, sys.argv[1:]))
