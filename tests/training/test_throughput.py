import time

import pytest

from hf_specattn.training.throughput import LossWindow


def test_means_speed_and_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    window = LossWindow(tokens_per_step=1000)
    for loss in (3.0, 2.0, 1.0):
        clock[0] += 0.5
        window.add(loss)
    with window.paused():
        clock[0] += 60
    assert window.take() == (2.0, 2000.0)
    window.add(7.0)
    clock[0] += 0.1
    assert window.take() == (7.0, pytest.approx(10_000.0))


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="No step was added"):
        LossWindow(1).take()
