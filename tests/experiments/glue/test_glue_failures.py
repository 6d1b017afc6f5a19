import pytest
import torch

from recipes.glue.failures import describe_error, kind_of
from recipes.glue.glue_scores import UndefinedScoreError
from recipes.run.run_metrics import NonFiniteLossError


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
    assert describe_error(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert describe_error(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert describe_error(NonFiniteLossError("the loss is nan")) == "the loss is nan"
    assert describe_error(MemoryError()) == "MemoryError: no message"
