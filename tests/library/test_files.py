import json
import os
import signal
import time

import pytest

from hf_specattn import files


def test_content_and_permissions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    mask = os.umask(0o022)
    try:
        files.write_json(path, {"a": [1, None, "ü"]})
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
        files.write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused_before_writing(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


# --- what killed processes leave -------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_ended_processes_are_removed(tmp_path, ended_process):
    alive = os.getppid()
    gone = [f".a.json.tmp-{ended_process}-abcd_123", f".b.tmp-{os.getpid()}", f".c.tmp-{10**20}", f".d.tmp-{alive}"]
    stay = [f".a.json.tmp-{alive}-abcd_123", f"a.tmp-{ended_process}", f".a.tmp-{ended_process}-other", ".a.json.tmp"]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    two_hours_ago = time.time() - 7200
    os.utime(tmp_path / gone[3], (two_hours_ago, two_hours_ago))  # the number is another process's since
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(stay)


def test_folders_are_leftovers_too(tmp_path, ended_process):
    alive = os.getppid()
    dead, busy, abandoned = f".a.tmp-{ended_process}", f".a.tmp-{alive}", f".b.tmp-{alive}-replaced"
    two_hours_ago = time.time() - 7200
    for name in (dead, busy, abandoned):
        file = tmp_path / name / "folder" / "file"
        file.parent.mkdir(parents=True)
        file.touch()
        for path in (file, file.parent, tmp_path / name):
            os.utime(path, (two_hours_ago, two_hours_ago))
    (tmp_path / busy / "folder" / "file").touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [busy]
    files.remove_leftovers(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here to start a process quickly")
def test_a_killed_write_leaves_what_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    process = os.fork()
    if process == 0:
        try:
            files.write_json(tmp_path / "a.json", {"a": 1})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == []
