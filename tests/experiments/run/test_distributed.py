import pytest
from accelerate import Accelerator

from recipes.run.distributed import run_on_main_process


def test_the_main_process_gets_its_own_result_and_errors():
    accelerator = Accelerator(cpu=True)
    assert run_on_main_process(accelerator, lambda: [1, "two"]) == [1, "two"]

    def fail():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        run_on_main_process(accelerator, fail)
