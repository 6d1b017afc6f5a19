import pytest
from accelerate import Accelerator

from hf_specattn.files import CannotWriteError, FolderLock
from recipes.run.distributed import _as_sent, run_on_main_process
from recipes.run.output_folder import sole_use


def test_the_main_process_gets_its_own_result_and_errors():
    accelerator = Accelerator(cpu=True)
    assert run_on_main_process(accelerator, lambda: [1, "two"]) == [1, "two"]

    def fail():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        run_on_main_process(accelerator, fail)


class NeedsTwo(OSError):
    def __init__(self, first, second):
        super().__init__(first)


def test_every_error_can_be_sent_to_the_others():
    error = OSError(28, "No space left on device")
    assert _as_sent(error) is error
    sent = _as_sent(NeedsTwo("one", "two"))
    assert (type(sent), str(sent)) == (RuntimeError, "one")


def test_a_folder_is_one_runs_alone(tmp_path):
    accelerator = Accelerator(cpu=True)
    other = FolderLock(tmp_path / "run", "--output_dir")
    with sole_use(tmp_path / "run", accelerator):
        with pytest.raises(CannotWriteError, match=r"--output_dir .*run is in use"):
            other.acquire()
        (tmp_path / "run" / "result").write_text("")
    other.acquire()
    with pytest.raises(CannotWriteError, match="is in use"), sole_use(tmp_path / "run", accelerator):
        pass
    other.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
