"""The published schedule, torch's `OneCycleLR` with linear annealing, as functions of the step: they have no state.

Beside the learning rate it moves AdamW's beta1, the other way.
"""

START_DIVISOR, END_DIVISOR = 25.0, 1e4
LOW_BETA1, HIGH_BETA1 = 0.85, 0.95


def one_cycle(step: float, warmup: int, steps: int, start: float, middle: float, end: float) -> float:
    """From `start` to `middle` until step `warmup - 1`, then to `end` at the last one, along straight lines.

    Args:
        step: From 0 to `steps - 1`.
    """
    turn = warmup - 1
    if step < turn:
        return start + (middle - start) * step / turn
    return middle + (end - middle) * min(1.0, (step - turn) / max(1, steps - 1 - turn))


def learning_rate_factor(step: float, warmup: int, steps: int) -> float:
    """The share of the peak learning rate at a step."""
    return one_cycle(step, warmup, steps, 1 / START_DIVISOR, 1.0, 1 / START_DIVISOR / END_DIVISOR)


def beta1(step: float, warmup: int, steps: int) -> float:
    """AdamW's beta1 at a step."""
    return one_cycle(step, warmup, steps, HIGH_BETA1, LOW_BETA1, HIGH_BETA1)
