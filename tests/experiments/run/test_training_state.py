"""The state of a training, collected, through JSON and back into other parts."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models import ARCHITECTURES, assert_bit_equal
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import get_linear_schedule_with_warmup

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition, refresh
from hf_specattn.refreshing import steps_since_refresh
from recipes.run.optimization import OptimizationArguments, build_adamw
from recipes.run.training_state import (
    CheckpointError,
    TrainingParts,
    from_json,
    gather_state,
    parameter_names,
    random_state,
    restore_state,
    tied_groups,
    to_json,
)

SVD = SpectralConfig(method="svd")
DYNAMIC_SVD = SpectralConfig(method="svd", refresh_every=3)


def make_model(spectral: SpectralConfig | None = None, seed: int = 0, **changes) -> CrammedBertForMaskedLM:
    torch.manual_seed(seed)
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config(**changes))
    if spectral is not None:
        condition(model, spectral)
    return model


def make_parts(model: nn.Module, **others) -> TrainingParts:
    optimizer = build_adamw(model, OptimizationArguments(), 1e-2, betas=(0.9, 0.98), eps=1e-12)
    return TrainingParts(model, optimizer, get_linear_schedule_with_warmup(optimizer, 3, 30), **others)


def train(parts: TrainingParts, steps: int) -> None:
    parts.model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(step))
        parts.model(input_ids=rows, labels=rows).loss.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.schedule.step()


def stored(parts: TrainingParts) -> tuple[dict[str, torch.Tensor], Any]:
    """What a checkpoint holds of the parts: it shares no memory with them."""
    weights, state = gather_state(parts, Accelerator(cpu=True))
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(to_json(state, tensors, ""))
    return clones(weights), from_json(json.loads(text), clones(tensors))


def restore(parts: TrainingParts, saved: tuple[dict[str, torch.Tensor], Any]) -> None:
    restore_state(parts, *saved, Accelerator(cpu=True))


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def draw() -> tuple:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1)  # noqa: NPY002


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectral", [None, DYNAMIC_SVD], ids=["stock", "dynamic-svd"])
def test_every_part_comes_back(spectral):
    parts = make_parts(make_model(spectral))
    train(parts, 2)
    if spectral is not None:
        refresh(parts.model)
    train(parts, 2)
    saved = stored(parts)
    restored = make_parts(make_model(spectral, seed=7))
    restore(restored, saved)
    assert_bit_equal(restored.model.state_dict(), parts.model.state_dict())
    assert steps_since_refresh(restored.model) == (0 if spectral is None else 2)
    assert restored.schedule.state_dict() == parts.schedule.state_dict()
    names = [name for name, _ in parts.model.named_parameters()]
    for name, found, expected in zip(names, restored.model.parameters(), parts.model.parameters()):
        moments = parts.optimizer.state[expected]
        assert moments["step"] == 4, name
        assert_bit_equal(restored.optimizer.state[found], moments)


def test_random_numbers_of_every_kind_go_on():
    saved = stored(make_parts(make_model()))
    drawn = draw()
    restore(make_parts(make_model()), saved)
    assert drawn == draw()


def test_other_processes_random_numbers_are_not_taken(warning_log):
    weights, state = stored(make_parts(make_model()))
    state["random"] *= 2
    parts = make_parts(make_model(seed=3))
    before = random_state(torch.device("cpu"))
    restore(parts, (weights, state))
    assert_bit_equal(parts.model.state_dict(), make_model().state_dict())
    after = random_state(torch.device("cpu"))
    assert (after["python"], after["numpy"]) == (before["python"], before["numpy"])
    (message,) = warning_log.messages
    assert "of 2 processes and this run has 1" in message


def test_the_loss_scaler_is_restored():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    parts = make_parts(make_model(), scaler=scaler)
    rows = torch.ones(1, 2, dtype=int)
    scaler.scale(parts.model(input_ids=rows, labels=rows).loss).backward()
    scaler.step(parts.optimizer)
    scaler.update()
    assert scaler.get_scale() == 16
    new_scaler = torch.amp.GradScaler("cpu")
    restore(make_parts(make_model(), scaler=new_scaler), stored(parts))
    assert new_scaler.state_dict() == scaler.state_dict()


def test_other_optimizers_and_parameters_that_were_never_stepped():
    def parts_of(model):
        rest = [parameter for parameter in model.parameters() if parameter is not model.decoder.weight]
        groups = [{"params": [model.decoder.weight], "lr": torch.tensor(0.3), "momentum": 0.5}, {"params": rest}]
        return TrainingParts(model, torch.optim.SGD(groups, lr=0.1))

    parts = parts_of(make_model())
    parts.model.decoder.weight.grad = torch.ones_like(parts.model.decoder.weight)
    parts.optimizer.step()
    restored = parts_of(make_model(seed=3))
    restore(restored, stored(parts))
    assert restored.optimizer.param_groups[0]["lr"] == torch.tensor(0.3)
    momentum = restored.optimizer.state[restored.model.decoder.weight]["momentum_buffer"]
    assert torch.equal(momentum, parts.optimizer.state[parts.model.decoder.weight]["momentum_buffer"])
    assert len(restored.optimizer.state) == len(parts.optimizer.state) == 1


def test_collecting_before_the_first_step_changes_nothing():
    # (Some ways to collect an optimizer's state make one where there is none.)
    reference, collected = make_parts(make_model()), make_parts(make_model())
    stored(collected)
    assert not collected.optimizer.state
    for parts in (reference, collected):
        torch.manual_seed(1)  # for dropout
        train(parts, 2)
    assert_bit_equal(collected.model.state_dict(), reference.model.state_dict())


# --- names -----------------------------------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor_with_all_its_names():
    model = make_model()
    groups = list(tied_groups(model))
    embeddings = model.get_input_embeddings().weight
    (tied,) = [names for names, tensor in groups if tensor is embeddings]
    assert len(tied) == 2
    assert "decoder.weight" in tied
    assert sorted(name for names, _ in groups for name in names) == sorted(model.state_dict())
    weights, _ = gather_state(make_parts(model), Accelerator(cpu=True))
    assert weights[tied[0]] is weights[tied[1]]


def test_names_do_not_know_activation_checkpointing():
    model = make_model()
    plain = list(parameter_names(model).values())
    assert set(plain) <= set(model.state_dict())
    for name, module in list(model.named_modules()):
        if name.endswith(".layers.0"):
            model.set_submodule(name, checkpoint_wrapper(module))
    assert list(dict(model.named_parameters())) != plain
    assert list(parameter_names(model).values()) == plain


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_keeps_kinds_and_keys():
    tree = {1: (True, None, [0.1, float("inf")]), "a": {}, "tuple": [], "t": torch.arange(2)}
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(to_json(tree, tensors, ""))
    restored = from_json(json.loads(text), tensors)
    assert torch.equal(restored.pop("t"), tree.pop("t"))
    assert restored == tree
    assert isinstance(restored[1], tuple)
    assert list(tensors) == ["t"]


def test_json_has_numbers_text_and_tensors_only():
    with pytest.raises(TypeError, match="groups/1/note/a is a object"):
        to_json({"groups": [{}, {"note": {"a": object()}}]}, {}, "")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
        make_parts(nn.Sequential(make_model()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_parts(make_model(hidden_size=24)),
            r"another one: for \S*embed\S*, \(48, 24\) torch\.float32, it has \(48, 32\) torch\.float32\.",
        ),
        (lambda: make_parts(make_model().half()), r"torch\.float16, it has \(.*\) torch\.float32\."),
        (lambda: make_parts(make_model(SVD)), r"correction, .* it has nothing\."),
        (
            lambda: TrainingParts(model := make_model(), torch.optim.AdamW(model.parameters())),
            "groups its parameters otherwise",
        ),
    ],
    ids=["width", "dtype", "corrections", "groups"],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    saved = stored(make_parts(make_model()))
    with pytest.raises(CheckpointError, match=message):
        restore(make(), saved)


def test_a_state_with_more_than_the_model_is_refused():
    saved = stored(make_parts(make_model(SVD)))
    with pytest.raises(CheckpointError, match=r"this model has no .*correction"):
        restore(make_parts(make_model()), saved)
