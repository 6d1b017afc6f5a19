"""Work that one process does for all."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .messages import one_line

Result = TypeVar("Result")

# While one process prepares something, such as a corpus, the others wait.
PREPARATION_TIMEOUT = timedelta(days=2)


def run_on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process alone and return its (picklable) result on every process.

    If it raises an error, every process raises it, so that none is left waiting.
    """
    outcome: list[Any] = [None, None]  # the result, and the error
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:  # whichever: the others wait for it
            if accelerator.num_processes == 1:
                raise
            outcome[1] = _as_sent(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _as_sent(error: Exception) -> Exception:
    """The error itself, where it survives being sent to another process; else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind that its class raises when it is recreated
        return RuntimeError(one_line(error))
    return error


@contextmanager
def answers_within(accelerator: Accelerator, seconds: int) -> Iterator[None]:
    """While within, what processes do together fails where one of them does not answer for so long: it hangs, or is gone.

    Older releases of torch have no public way to say so; there the timeout stays that of the preparation.
    """
    set_timeout = getattr(torch.distributed, "set_timeout", None)
    if accelerator.num_processes == 1 or set_timeout is None:
        yield
        return
    set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        set_timeout(PREPARATION_TIMEOUT)
