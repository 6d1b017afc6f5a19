"""Detectors are known to the Auto classes during these tests alone."""

import pytest
from detection_files import unregister


@pytest.fixture(autouse=True)
def detectors_known_here_alone():
    yield
    unregister()
