import os
import signal
import threading
import time

import pytest

from recipes.run.interruption import StopRequest, stop_on_signals

WATCHED = (signal.SIGTERM, signal.SIGINT)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between instructions


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_becomes_a_request(number, warning_log):
    before = [signal.getsignal(each) for each in WATCHED]
    with stop_on_signals() as stop:
        assert not stop.requested()
        send(number)
        assert stop.requested()
        assert stop.requested()
    assert [signal.getsignal(each) for each in WATCHED] == before
    (message,) = warning_log.messages
    assert message == f"{number.name} asks to stop: the run ends after this step."


def test_further_sigterms_do_no_more():
    with stop_on_signals() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.requested()


def test_the_second_interrupt_is_not_caught():
    with stop_on_signals():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_handlers_return_after_an_error():
    before = [signal.getsignal(each) for each in WATCHED]

    def fail():
        with stop_on_signals():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [signal.getsignal(each) for each in WATCHED] == before


def test_other_threads_leave_signals_alone():
    before = [signal.getsignal(each) for each in WATCHED]
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append((stop.requested(), [signal.getsignal(each) for each in WATCHED]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


class TwoProcesses:
    """As an accelerator of two processes, the other of which says `other`."""

    num_processes = 2
    device = "cpu"

    def __init__(self, other: float) -> None:
        self.other = other

    def reduce(self, flag, reduction):
        assert reduction == "sum"
        return flag + self.other


def test_processes_agree(warning_log):
    assert not StopRequest(TwoProcesses(0.0)).requested()
    assert StopRequest(TwoProcesses(1.0)).requested()
    assert warning_log.messages == ["A signal to another process asks to stop: the run ends after this step."]
    own = StopRequest(TwoProcesses(0.0))
    own.receive(signal.SIGTERM)
    assert own.requested()


def start_loop(work) -> tuple[int, int]:
    """Run `work(say)` in a forked process; return its number and the reading end of what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:
        work(lambda text: os.write(writing, text))
        status = 0
    finally:
        os._exit(status)


def loop_until_asked(say) -> None:
    with stop_on_signals() as stop:
        say(b"ready")
        while not stop.requested():
            time.sleep(0.01)
    say(b"saved")


def loop_that_hangs(say) -> None:
    with stop_on_signals() as stop:
        say(b"ready")
        while not stop.requested():
            time.sleep(0.01)
        say(b"asked")
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_program_ends_well_after_sigterm():
    process, output = start_loop(loop_until_asked)
    assert os.read(output, 100) == b"ready"
    os.kill(process, signal.SIGTERM)
    assert os.read(output, 100) == b"saved"
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_second_interrupt_kills():
    process, output = start_loop(loop_that_hangs)
    assert os.read(output, 100) == b"ready"
    os.kill(process, signal.SIGINT)
    assert os.read(output, 100) == b"asked"
    os.kill(process, signal.SIGINT)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGINT
