"""Prepared data in folders of a cache: made once, whole or not there, and checked whenever they are used.

A folder is made under another name and renamed when it is complete, behind a lock, so that a process finds a whole one or
none, and no two processes of a machine make the same one. What a killed process left behind is removed by the next. The
manifest of a folder has a checksum of every file; a folder that differs is made again.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from transformers.utils import logging

from hf_specattn.files import CannotWriteError, cannot_be_written, checksum, require_writable, write_json

from ..run.messages import one_line
from .documents import CorpusError

logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"

Loaded = TypeVar("Loaded")


class DamagedFolderError(ValueError):
    """A folder does not hold what its manifest says."""


def key(ingredients: Mapping[str, Any]) -> str:
    """Return a hash of everything that makes a folder what it is."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:24]


def write_manifest(folder: Path, names: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write what a folder holds, with the checksums of its files."""
    write_json(folder / MANIFEST_FILE, {"crc32": {name: checksum(folder / name) for name in names}, **content})


def require_undamaged(folder: Path) -> None:
    """Compare every file with its checksum in the manifest.

    Raises:
        DamagedFolderError: naming the first file that is not the one that was written.
    """
    try:
        expected = dict(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["crc32"])
        different = [name for name, value in expected.items() if checksum(folder / name) != value]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedFolderError(one_line(error)) from error
    if different or not expected:
        raise DamagedFolderError(f"{', '.join(different) or MANIFEST_FILE} is not what was written")


def load_or_make(folder: Path, make: Callable[[Path], None], load: Callable[[Path], Loaded], content: str) -> Loaded:
    """Return `load(folder)`, after `make` filled the folder where it does not exist or is damaged.

    Args:
        folder: Its name says what made it, as `key` does.
        make: Fills another folder, `write_manifest` last.
        load: Raises FileNotFoundError where there is no folder, and DamagedFolderError.
        content: In words.

    Raises:
        CorpusError: for a folder that cannot be written, or a full disk.
    """
    try:
        return load(folder)
    except (FileNotFoundError, DamagedFolderError):
        pass  # another process may be making it: look again behind the lock
    try:
        require_writable(folder.parent, "The folder of prepared data (--cache_dir, or below HF_HOME),")
    except CannotWriteError as error:
        raise CorpusError(str(error)) from error
    with _write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, content):
            try:
                return load(folder)
            except FileNotFoundError:
                pass
            except DamagedFolderError as error:
                logger.warning(f"{folder} is damaged ({error}); it is rebuilt.")
                shutil.rmtree(folder)
            _remove_leftovers(folder.parent)
            _make_whole(folder, make)
    return load(folder)


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path, content: str) -> Iterator[None]:
    lock = FileLock(_lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another process is preparing {content}; waiting until it is done.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what is half made and whose maker no longer holds its lock: it was killed."""
    for partial in cache_dir.glob(_partial(Path("*")).name):
        lock = FileLock(_lock_file(cache_dir / partial.stem.removeprefix(".")))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def _write_errors(cache_dir: Path) -> Iterator[None]:
    """Turn the system's errors that a user can mend into `CorpusError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorpusError(
                f"The disk of {cache_dir} is full ({error.strerror}); the incomplete data are removed. Free some "
                "space, or choose another cache folder."
            ) from error
        # Of the cache, whatever it is, or of a disk; and not of the corpus.
        if str(error.filename or "").startswith(str(cache_dir)) or cannot_be_written(error):
            raise CorpusError(f"{cache_dir} cannot be written: {error}. Name another cache folder.") from error
        raise
