"""The published schedule against torch's own."""

import pytest
import torch

from recipes.lra.one_cycle import beta1, learning_rate_factor


@pytest.mark.parametrize(("warmup", "steps"), [(1000, 5000), (2, 7), (60, 61), (0, 9)])
def test_learning_rate_and_beta1_are_those_of_torch(warmup, steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-4, pct_start=warmup / steps, anneal_strategy="linear", total_steps=steps
    )
    for step in range(steps):
        (group,) = optimizer.param_groups
        assert 1e-4 * learning_rate_factor(step, warmup, steps) == pytest.approx(group["lr"], rel=1e-9, abs=1e-15)
        assert beta1(step, warmup, steps) == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step + 1 < steps:
            schedule.step()


def test_a_warmup_of_one_step_begins_at_the_peak():
    assert learning_rate_factor(0, 1, 5) == 1
    assert beta1(0, 1, 5) == 0.85
    assert learning_rate_factor(4, 5, 5) == 1
