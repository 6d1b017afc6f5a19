"""Errors of a run that end this run and no other, on one process or on many."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..run.metrics import NonFiniteLossError
from .metrics import UndefinedScoreError

# In the texts of the plain RuntimeErrors by which CPUs and some other devices say so.
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory")

DIVERGED, OUT_OF_MEMORY, UNDEFINED, ERROR = "diverged", "out of memory", "undefined score", "error"


class RunFailedError(RuntimeError):
    """A run that came to no score.

    Args:
        kind: In two or three words, for tables.
        message: What happened.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def kind_of(error: BaseException) -> str:
    """Return what kind of failure an error is."""
    if isinstance(error, RunFailedError):
        return error.kind
    if isinstance(error, NonFiniteLossError):
        return DIVERGED
    if isinstance(error, UndefinedScoreError):
        return UNDEFINED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return OUT_OF_MEMORY
    plain = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return OUT_OF_MEMORY if plain else ERROR


class SharedFailure:
    """Errors of single processes, kept until all processes can raise them together.

    Were one process to leave a run while the others wait for it in a collective operation, they would wait for ever. So what
    a process does by itself stands inside `collected()`, and between such pieces all processes call `raise_together()`.

    Args:
        accelerator: Of the launch.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._error: Exception | None = None

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep an exception that is raised inside. After one, `happened` is true and the next pieces should do nothing."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    @property
    def happened(self) -> bool:
        """Whether this process has failed."""
        return self._error is not None

    def raise_together(self, any_failed: bool | None = None) -> None:
        """Raise a `RunFailedError` on every process if any of them has failed. Every process calls it alike.

        Args:
            any_failed: Where all processes know that already; None asks them.
        """
        several = self._accelerator.num_processes > 1
        if any_failed is None:
            flag = torch.tensor(float(self.happened), device=self._accelerator.device)
            any_failed = self._accelerator.reduce(flag, reduction="sum").item() > 0 if several else self.happened
        if not any_failed:
            return
        own = (
            []
            if self._error is None
            else [(self._accelerator.process_index, kind_of(self._error), describe(self._error))]
        )
        rank, kind, message = (gather_object(own) if several else own)[0]
        raise RunFailedError(kind, f"process {rank}: {message}" if several else message) from self._error


def describe(error: BaseException) -> str:
    """Return an error in one line, with its type where the text was not written for users."""
    text = " ".join(str(error).split()) or "no message"
    return (
        text if isinstance(error, (RunFailedError, ArithmeticError, ValueError)) else f"{type(error).__name__}: {text}"
    )
