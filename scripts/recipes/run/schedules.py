"""How far a run has come in its budget of steps or time, and what follows from it: learning rate and batch size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

SCHEDULES = ("linear", "triangle")


@dataclass(frozen=True)
class Budget:
    """What a run may use up: optimizer steps, or seconds of wall-clock time. One of the two is given.

    Attributes:
        steps: Optimizer steps, at least 1.
        seconds: Time from the first step on, over all lives of a run, above 0.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"A budget of steps or of seconds is needed, one of them; got steps={self.steps}, seconds={self.seconds}."
            )
        if not self.size > 0:
            raise ValueError(f"A budget of {self.size} lets no step be taken; it must be above 0.")

    @property
    def size(self) -> float:
        """The budget in its own unit: steps or seconds."""
        size = self.steps if self.steps is not None else self.seconds
        assert size is not None
        return size

    def used(self, steps: int, seconds: float) -> float:
        """Return how much of it is used up, in its own unit, after these steps and seconds."""
        return steps if self.steps is not None else seconds

    def share(self, steps: int, seconds: float) -> float:
        """Return which share of it is used up; 1 or more is the end."""
        return self.used(steps, seconds) / self.size


def linear_factor(used: float, warmup: float, size: float) -> float:
    """Rise linearly from 0 to 1 while `warmup` of the budget is used, then fall linearly to 0 at its end.

    All in the same unit, steps or seconds. Of steps the values are those of transformers' linear schedule, bit for bit.
    """
    if used < warmup:
        return used / max(1, warmup)
    return max(0.0, (size - used) / max(1, size - warmup))


def cosine_factor(used: float, warmup: float, size: float, start: float = 0.0, floor: float = 0.0) -> float:
    """Rise linearly from `start` to 1 while `warmup` of the budget is used, then fall along a cosine to `floor` at its end.

    As timm has it: the cosine spans the whole budget, and its first part is replaced by the warmup.
    """
    if used < warmup:
        return start + (1 - start) * used / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(used / size, 1.0))) / 2


def triangle_factor(share: float) -> float:
    """Rise from 1/4 to 1 at three quarters of the budget, then fall to 0 at its end: cramming's schedule."""
    return max(0.0, min(0.25 + share, 4 * (1 - share)))


def learning_rate_factor(kind: str, budget: Budget, warmup: float) -> Callable[[float], float]:
    """Return the function from what is used of the budget, in its own unit, to the factor of the peak learning rate.

    Args:
        kind: One of `SCHEDULES`.
        warmup: Of the linear schedule, in the budget's unit; the triangle has its own.
    """
    if kind == "triangle":
        return lambda used: triangle_factor(used / budget.size)
    return lambda used: linear_factor(used, warmup, budget.size)


class BudgetSchedule:
    """Sets the learning rates of an optimizer, whose groups hold the peaks now, before each step.

    It has no state of its own, so a resumed run needs none: what is used of the budget is part of its progress.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[float], float]) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, used: float) -> float:
        """Set the learning rates, and return that of the first group."""
        factor = self.factor(used)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.optimizer.param_groups[0]["lr"]


def ramped_micro_steps(share: float, micro_steps: int, ramp: float) -> int:
    """Return how many micro-batches the next step accumulates, from 1 at the start to all of them: cramming's ramp.

    Args:
        share: What is used up of the budget.
        micro_steps: Of the full batch, at least 1.
        ramp: The share of the budget over which the batch grows linearly, in [0, 1]; 0 starts with the full batch.
    """
    if share >= ramp:
        return micro_steps
    return min(micro_steps, 1 + int(share / ramp * micro_steps))
