"""Learning-rate schedules, as functions of the optimizer step."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def linear_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Rise linearly from 0 over `warmup_steps`, then fall linearly to 0 at `total_steps`.

    Call its `step()` once after each optimizer step. (Not through `accelerator.prepare`, which would step it once per
    process.)

    Raises:
        ValueError: unless 0 <= warmup_steps <= total_steps and total_steps >= 1.
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"A schedule of {total_steps} steps with {warmup_steps} of warmup is impossible; warmup must lie between 0 "
            "and the number of steps, of which there must be one or more."
        )
    return get_scheduler("linear", optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
