import json
import time

import pytest

from recipes.run.throughput import LossWindow


def test_means_speed_and_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    window = LossWindow()
    for loss in (3.0, 2.0, 1.0):
        clock[0] += 0.5
        window.add(loss, 1000)
    with window.paused():
        clock[0] += 60
    assert window.take() == (2.0, 2000.0)
    window.add(7.0, 1000)
    clock[0] += 0.1
    assert window.take() == (7.0, pytest.approx(10_000.0))


def test_a_window_goes_on_in_another_process(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    first = LossWindow()
    first.add(3.0, 500)
    clock[0] += 0.5
    state = json.loads(json.dumps(first.state()))
    clock[0] = 7.0  # another process, another clock
    second = LossWindow()
    second.restore(state)
    second.add(2.0, 1500)
    clock[0] += 0.5
    assert second.take() == (2.5, 2000.0)
    second.restore(None)
    second.add(4.0, 1)
    assert second.take()[0] == 4.0
