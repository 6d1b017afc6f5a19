import pytest
import torch
from accelerate import Accelerator

from recipes.glue.failures import RunFailedError, SharedFailure, describe, kind_of
from recipes.glue.metrics import UndefinedScoreError
from recipes.run.metrics import NonFiniteLossError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteLossError("the loss is nan"), "diverged"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            "out of memory",
        ),
        (MemoryError(), "out of memory"),
        (UndefinedScoreError("all 3 predictions are 2.5"), "undefined score"),
        (RunFailedError("diverged", "as told"), "diverged"),
        (KeyError("x"), "error"),
        (RuntimeError("shapes do not fit"), "error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_kinds(error, kind):
    assert kind_of(error) == kind


def test_an_allocation_that_fails_on_a_cpu_is_out_of_memory():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**62, dtype=torch.int8)
    assert kind_of(failed.value) == "out of memory"


def test_descriptions_are_one_line():
    assert describe(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert describe(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert describe(NonFiniteLossError("the loss is nan")) == "the loss is nan"
    assert describe(MemoryError()) == "MemoryError: no message"


def test_a_failure_is_kept_and_raised_later():
    failure = SharedFailure(Accelerator(cpu=True))
    failure.raise_together()
    reached = []
    with failure.collected():
        reached.append(1)
        raise MemoryError("no room")
    assert failure.happened
    with failure.collected():  # the first error is the cause; later ones follow from it
        raise KeyError("later")
    with pytest.raises(RunFailedError, match=r"^MemoryError: no room$") as raised:
        failure.raise_together()
    assert raised.value.kind == "out of memory"
    assert isinstance(raised.value.__cause__, MemoryError)
    assert reached == [1]


def test_what_asks_to_stop_is_no_failure():
    failure = SharedFailure(Accelerator(cpu=True))
    with pytest.raises(KeyboardInterrupt), failure.collected():
        raise KeyboardInterrupt
    assert not failure.happened
