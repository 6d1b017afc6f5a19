import pytest
import torch

from hf_specattn.training.schedules import linear_schedule


def factors(warmup_steps: int, total_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = linear_schedule(optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_linear_up_then_linear_down_to_zero():
    assert factors(2, 6) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])
    assert factors(0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_schedules_are_refused(warmup_steps, total_steps):
    with pytest.raises(ValueError, match=f"{total_steps} steps with {warmup_steps} of warmup is impossible"):
        factors(warmup_steps, total_steps)
