import pytest
import torch
from timm.scheduler import CosineLRScheduler
from transformers import get_scheduler

from recipes.run.schedules import (
    Budget,
    BudgetSchedule,
    cosine_factor,
    learning_rate_factor,
    linear_factor,
    ramped_micro_steps,
    triangle_factor,
)


def make_optimizer(rate: float = 1.0) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}]
    groups[1]["lr"] = rate / 10
    return torch.optim.SGD(groups, lr=rate)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 4), (2, 6), (30, 300), (7, 7), (200, 2000)])
def test_linear_over_steps_is_that_of_transformers_bit_for_bit(warmup, steps):
    ours, theirs = make_optimizer(1e-3), make_optimizer(1e-3)
    schedule = BudgetSchedule(ours, learning_rate_factor("linear", Budget(steps=steps), warmup))
    reference = get_scheduler("linear", theirs, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        schedule.set(step)
        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]
        theirs.step()
        reference.step()


def test_linear_over_time():
    assert [linear_factor(used, 360.0, 3600.0) for used in (0, 180, 360, 1980, 3600, 4000)] == [0, 0.5, 1, 0.5, 0, 0]


def test_the_published_triangle():
    shares = (0, 0.25, 0.5, 0.75, 0.875, 1, 1.1)
    assert [triangle_factor(share) for share in shares] == [0.25, 0.5, 0.75, 1, 0.5, 0, 0]
    day = learning_rate_factor("triangle", Budget(seconds=86400.0), 0)
    assert day(64800.0) == 1
    assert learning_rate_factor("triangle", Budget(steps=8), 0)(7) == 0.5


def test_every_group_keeps_its_own_peak():
    optimizer = make_optimizer(1.0)
    schedule = BudgetSchedule(optimizer, triangle_factor)
    assert schedule.set(0.0) == 0.25
    assert schedule.set(0.75) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    # As after a resume, which replaces the groups.
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.set(0.875)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_the_batch_grows_linearly_to_the_full_one():
    assert [ramped_micro_steps(share / 10, 4, 0.6) for share in range(11)] == [1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    assert ramped_micro_steps(0, 16, 0) == 16
    counts = [ramped_micro_steps(step / 1000, 16, 0.6) for step in range(1000)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[599] == 16
    # Each size has an equal part of the ramp.
    assert {counts[:600].count(size) for size in range(1, 17)} <= {37, 38}


def test_shares_of_budgets():
    assert Budget(steps=8).share(2, 1e9) == 0.25
    assert Budget(seconds=10.0).share(10**9, 5.0) == 0.5
    assert Budget(seconds=10.0).used(3, 5.0) == 5.0


@pytest.mark.parametrize("values", [{}, {"steps": 5, "seconds": 1.0}, {"steps": 0}, {"seconds": float("nan")}])
def test_impossible_budgets_are_refused(values):
    with pytest.raises(ValueError, match=r"[Aa] budget of"):
        Budget(**values)


@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_is_timms(warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    scheduler = CosineLRScheduler(optimizer, 40, lr_min=0.04, warmup_t=warmup, warmup_lr_init=0.02, t_in_epochs=False)
    for step in range(40):
        scheduler.step_update(step)
        expected = optimizer.param_groups[0]["lr"]
        assert 0.4 * cosine_factor(step, warmup, 40, start=0.05, floor=0.1) == pytest.approx(expected, rel=1e-12)
    assert cosine_factor(40, warmup, 40, floor=0.1) == pytest.approx(0.1)
