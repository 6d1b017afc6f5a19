import json
import os

import pytest

from hf_specattn.training import atomic_files


def test_content_and_permissions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    mask = os.umask(0o022)
    try:
        atomic_files.write_json(path, {"a": [1, None, "ü"]})
    finally:
        os.umask(mask)
    assert json.loads(path.read_text()) == {"a": [1, None, "ü"]}
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_files.write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused_before_writing(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_files.write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []
