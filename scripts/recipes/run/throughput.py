"""Mean loss and speed between two log entries."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LossWindow:
    """Collect the losses of steps since the last entry, what they read (tokens, images), and the time they took."""

    def __init__(self) -> None:
        self._restart()

    def add(self, loss: float, units: int) -> None:
        """Count one optimizer step with its loss, and the tokens or images that it read over all processes."""
        self._losses.append(loss)
        self._units += units

    def take(self) -> tuple[float, float]:
        """Return the mean loss and the units per second of the steps since the last call, of which there are some."""
        # A clock may stand still between two fast steps.
        seconds = max(time.perf_counter() - self._started, 1e-9)
        loss = sum(self._losses) / len(self._losses)
        speed = self._units / seconds
        self._restart()
        return loss, speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, such as validation, out of the time."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - begun

    def state(self) -> dict[str, Any]:
        """Return what was collected since the last entry, in values that JSON holds, for `restore`."""
        return {"losses": list(self._losses), "units": self._units, "seconds": time.perf_counter() - self._started}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned, in this process or an earlier one; None starts over."""
        self._restart()
        if state is not None:
            self._losses.extend(state["losses"])
            self._units = state["units"] if "units" in state else state["tokens"]  # of an earlier version
            self._started -= state["seconds"]

    def _restart(self) -> None:
        self._losses: list[float] = []
        self._units = 0
        self._started = time.perf_counter()
