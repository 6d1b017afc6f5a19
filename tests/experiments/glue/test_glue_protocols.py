import dataclasses
import math

import pytest
import torch

from recipes.glue.protocols import PROTOCOLS, build_schedule, total_steps

CRAMMED, BERT = PROTOCOLS["crammed"], PROTOCOLS["bert"]


def test_the_published_settings():
    assert (CRAMMED.learning_rate, CRAMMED.num_train_epochs, CRAMMED.train_batch_size) == (4e-5, 5, 16)
    assert (CRAMMED.adam_beta1, CRAMMED.adam_beta2, CRAMMED.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (CRAMMED.weight_decay, CRAMMED.max_grad_norm, CRAMMED.dropout) == (0, 0, 0.1)
    assert (CRAMMED.max_seq_length, CRAMMED.empty_second) == (128, True)
    assert (BERT.learning_rate, BERT.num_train_epochs, BERT.train_batch_size) == (2e-5, 3, 32)
    assert (BERT.max_seq_length, BERT.empty_second) == (128, False)


def rates(protocol, steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=protocol.learning_rate)
    schedule = build_schedule(protocol, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_schedules():
    steps = 40  # of which 4 are warmup
    warmup = [step / 4 for step in range(4)]
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 4) / 36)) for step in range(4, 40)]
    assert rates(CRAMMED, steps) == pytest.approx([4e-5 * factor for factor in warmup + cosine], abs=1e-12)
    linear = [(40 - step) / 36 for step in range(4, 40)]
    assert rates(BERT, steps) == pytest.approx([2e-5 * factor for factor in warmup + linear], abs=1e-12)
    constant = dataclasses.replace(BERT, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.0)
    assert rates(constant, 3) == [2e-5] * 3


def test_the_last_smaller_batch_is_a_step():
    assert total_steps(CRAMMED, 33) == 15
    assert total_steps(CRAMMED, 32) == 10
    assert total_steps(BERT, 1) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate 0.0 must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0 must be at least 1"),
        ({"train_batch_size": 0}, "--train_batch_size 0 must be at least 1"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5 must be at least 0 and at most 1"),
        ({"weight_decay": -1.0}, "--weight_decay -1.0"),
        ({"max_grad_norm": float("inf")}, "--max_grad_norm inf"),
        ({"dropout": 1.0}, "--dropout 1.0 must be at least 0 and below 1"),
        ({"lr_scheduler_type": "step"}, "--lr_scheduler_type 'step': choose one of cosine, linear"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CRAMMED, **change)
