"""Whether a disk has space for a run's checkpoints, asked before the first step."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from models import ARCHITECTURES

from hf_specattn import CrammedBertForMaskedLM
from recipes.run.checkpointing import Checkpoints, DiskFullError, Progress, TrainingParts
from recipes.run.optimization import OptimizationArguments, build_adamw


@pytest.fixture
def checkpoints(tmp_path):
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config())
    parts = TrainingParts(model, build_adamw(model, OptimizationArguments(), 1e-2))
    return Checkpoints(tmp_path / "run", Accelerator(cpu=True), parts, {}, keep_last=2)


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))


def test_space_is_that_of_the_checkpoints_that_are_kept(checkpoints, tmp_path, monkeypatch):
    model = checkpoints.parts.model
    weights = 4 * sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    trained = 4 * sum(parameter.numel() for parameter in model.parameters())
    one = weights + 2 * trained + 4 * 2**20
    with_free(monkeypatch, 3 * one + weights + 10**5)
    checkpoints.require_space()
    with_free(monkeypatch, 3 * one)
    with pytest.raises(DiskFullError, match=r"will need about .* That is for 2 checkpoints and the model"):
        checkpoints.require_space()
    assert not (tmp_path / "run").exists()
    checkpoints.require_space(with_checkpoints=False)
    with_free(monkeypatch, weights - 1)
    with pytest.raises(DiskFullError, match=r"That is for the model\.$"):
        checkpoints.require_space(with_checkpoints=False)

    # What a run has written already needs no place again, and the estimate holds for what was written.
    monkeypatch.undo()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    checkpoints.parts.optimizer.step()
    folder = checkpoints.save(Progress(1))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert one - 4 * 2**20 <= size <= one
    with_free(monkeypatch, 2 * one + weights + 10**5)
    checkpoints.require_space()
    with_free(monkeypatch, 2 * one)
    with pytest.raises(DiskFullError):
        checkpoints.require_space()
