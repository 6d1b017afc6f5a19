"""Whether a folder can be written to, and whether another process works in it, asked before any work."""

import errno
import multiprocessing
import os
import shutil
import sys
import tempfile

import pytest

from hf_specattn import files
from hf_specattn.checkpoints.destinations import DestinationError, check_destination, whole_folder
from hf_specattn.files import LOCK_FILE, CannotWriteError, FolderLock, holds_files, require_writable


def refused(folder, message, **options):
    with pytest.raises(CannotWriteError, match=message) as caught:
        require_writable(folder, "--output_dir", **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--output_dir {folder} ")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path, "--output_dir")
    require_writable(tmp_path / "new" / "deeper", "--output_dir", needed=1000)
    assert list(tmp_path.iterdir()) == []


def test_files_and_links_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file, not a folder")
    refused(tmp_path / "file" / "run", "file is a file, not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link" / "run", "is a broken link")
    refused(tmp_path / ("n" * 300), "File name too long")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_where_even_root_may_not_write():
    refused("/proc/run", "cannot be written")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_what_only_writing_shows(tmp_path, monkeypatch, code):
    def refuse(**options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refused(tmp_path / "run", os.strerror(code))


def test_space_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**6, 5 * 10**6)
    )
    require_writable(tmp_path, "--output_dir", needed=5 * 10**6)
    refused(tmp_path, r"will need about 8\.0 MB, and 5\.0 MB are free.*Free at least 3\.0 MB", needed=8 * 10**6)


def test_errors_of_disks_are_told_from_others():
    assert files.cannot_be_written(OSError(errno.EROFS, "read-only"))
    assert files.cannot_be_written(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not files.cannot_be_written(FileNotFoundError(errno.ENOENT, "gone"))
    assert not files.cannot_be_written(ValueError("28"))


# --- one process at a time -------------------------------------------------------------------------------------------


def hold(folder, held, end):
    lock = FolderLock(folder, "--output_dir")
    lock.acquire()
    held.set()
    end.wait()
    os._exit(1)  # as killed: nothing is released


def test_the_second_is_refused_until_the_first_has_ended(tmp_path):
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, end), daemon=True)
    process.start()
    assert held.wait(60)
    lock = FolderLock(tmp_path / "run", "--output_dir")
    with pytest.raises(CannotWriteError, match="run is in use by another process"):
        lock.acquire()
    lock.release()  # takes nothing from the other
    assert (tmp_path / "run" / LOCK_FILE).exists()
    end.set()
    process.join(60)
    assert not holds_files(tmp_path / "run")
    lock.acquire()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    lock = FolderLock(tmp_path / "new", "--output_dir")
    lock.acquire()
    assert not holds_files(tmp_path / "new")
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    (tmp_path / "new" / "result").write_text("")
    assert holds_files(tmp_path / "new")
    lock.release()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_the_folder_of_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot be written"):
        FolderLock(tmp_path / "file" / "run", "--output_dir").acquire()


# --- destinations of `specattn` --------------------------------------------------------------------------------------


def test_what_came_into_a_destination_meanwhile_stays(tmp_path):
    destination = tmp_path / "model"
    check_destination(destination, None, overwrite=False)
    with pytest.raises(DestinationError, match="not empty"), whole_folder(destination) as folder:  # noqa: PT012
        (folder / "ours").write_text("")
        destination.mkdir()
        (destination / "theirs").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]
    with pytest.raises(DestinationError, match="changed in the meantime"), whole_folder(destination, True) as folder:  # noqa: PT012
        (folder / "ours").write_text("")
        (destination / "more").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "more", "theirs"]
    with whole_folder(destination, overwrite=True) as folder:
        (folder / "ours").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "ours"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_destination_that_cannot_be_written_is_refused_first():
    with pytest.raises(DestinationError, match="The folder of DST, /proc cannot be written"):
        check_destination(files.Path("/proc/model"), None, overwrite=False)
