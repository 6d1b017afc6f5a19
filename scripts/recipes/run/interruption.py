"""Stopping a training at a step's end when a signal asks for it, so that it can save first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from accelerate import Accelerator
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StopRequest:
    """Whether a signal has asked this run to stop. Made by `stop_on_signals`."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self._received: signal.Signals | None = None
        self._agreed = False

    def receive(self, number: int) -> None:
        """Note a signal. Safe inside a signal handler: it neither logs nor waits."""
        self._received = signal.Signals(number)

    def requested(self) -> bool:
        """Whether any process of the run got a signal. Every process calls it once per step; all get the same answer.

        One number is summed over the processes, where there are several.
        """
        if self._agreed:
            return True
        self._agreed = self._received is not None
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            flag = torch.tensor(float(self._agreed), device=self._accelerator.device)
            self._agreed = self._accelerator.reduce(flag, reduction="sum").item() > 0
        if self._agreed:
            name = "A signal to another process" if self._received is None else self._received.name
            logger.warning(f"{name} asks to stop: the run ends after this step.")
        return self._agreed


@contextlib.contextmanager
def stop_on_signals(accelerator: Accelerator | None = None) -> Iterator[StopRequest]:
    """Turn SIGTERM and the first SIGINT (Ctrl-C) into a request that the loop checks; a second SIGINT kills.

    The handlers that were there before return at the end. Outside the main thread, where Python allows no handlers,
    signals stay as they are.

    Args:
        accelerator: Of the run; with several processes they agree through it.
    """
    request = StopRequest(accelerator)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        request.receive(number)
        if number == signal.SIGINT:
            # Not KeyboardInterrupt: that would wait for whatever native code hangs.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            # None: a handler that was not installed by Python, and cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
