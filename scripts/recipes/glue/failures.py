"""What kind of failure an error is that ended a run."""

import torch

from ..run.run_metrics import NonFiniteLossError
from .glue_scores import UndefinedScoreError

# In the texts of the plain RuntimeErrors by which CPUs and some other devices say so.
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory")

DIVERGED, OUT_OF_MEMORY, UNDEFINED, ERROR = "diverged", "out of memory", "undefined score", "error"
NOT_WRITTEN = "not written"  # scored, and what was asked for beside the scores is missing


def kind_of(error: BaseException) -> str:
    """Return what kind of failure an error is, in two or three words, for tables."""
    if isinstance(error, NonFiniteLossError):
        return DIVERGED
    if isinstance(error, UndefinedScoreError):
        return UNDEFINED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return OUT_OF_MEMORY
    plain = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return OUT_OF_MEMORY if plain else ERROR


def describe_error(error: BaseException) -> str:
    """Return an error in one line, with its type where the text was not written for users."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, (ArithmeticError, ValueError)) else f"{type(error).__name__}: {text}"
