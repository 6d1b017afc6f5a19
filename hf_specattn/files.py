"""Files and folders that are written completely or not at all.

They are written under a hidden temporary name with the id of the writing process, `.<name>.tmp-<process>`, and renamed.
The id distinguishes what killed processes left from what others are still writing.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The second group: eight characters of `tempfile`, or what a folder that is being replaced bears.
TEMPORARY_NAME = re.compile(r"\..+\.tmp-(\d+)(-[a-z0-9_]{8})?")

# Work under the id of a living process is another run's, unless nothing in it has changed for this long: then the id
# has been reused by another process.
ABANDONED_AFTER_SECONDS = 3600

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Of a folder or a disk, and not of a program.
CANNOT_WRITE = (*NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR)

PROBE_BYTES = 2**12

# Locked for as long as something works in a folder; it stays when a process is killed, but is no longer locked.
LOCK_FILE = ".in-use.lock"


class CannotWriteError(ValueError):
    """A folder cannot be written to, or another process is using it; the message says what to do."""


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, flush it to disk and rename it to `path`."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{temporary_name(path.name)}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for the owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON as `write_bytes` does.

    Raises:
        ValueError: for nan and infinities, which JSON does not have.
    """
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def temporary_name(name: str) -> str:
    """Return the hidden name under which this process writes `name`; a hyphen and eight characters may follow."""
    return f".{name}.tmp-{os.getpid()}"


def remove_leftovers(directory: str | Path) -> None:
    """Remove the temporary files and folders in `directory` that ended processes left.

    Those with this process's own id count as left, too, because ids recur, in containers at every start. So call it before
    anything is written. Only this machine may use the folder, because processes on other machines are not seen.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and not is_being_written(path, int(match[1])):
            logger.info(f"Removing {path}, which an interrupted run left.")
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def is_being_written(temporary: Path, process: int) -> bool:
    """Whether another living process seems to be at work on a temporary file or in a temporary folder."""
    if process == os.getpid() or not is_alive(process):
        return False
    try:
        changed = max(path.stat().st_mtime for path in [temporary, *temporary.rglob("*")])
    except FileNotFoundError:  # it changes while we look
        return True
    return time.time() - changed < ABANDONED_AFTER_SECONDS


def is_alive(process: int) -> bool:
    """Whether a process with that id exists on this machine; assumed where there is no harmless way to ask."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process can have that id
        return False
    except OSError:  # it exists, but is another user's
        return True
    return True


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file, in hexadecimal.

    It has to detect accidental damage, not forgery, and it is the fastest checksum in Python: several times as fast as
    SHA-256 and BLAKE2, whose time would be noticeable for checkpoints of gigabytes.
    """
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename the complete `temporary` to its final name, durably."""
    aside = temporary.with_name(f"{temporary.name}-replaced")
    if folder.exists():  # a damaged one, or of an earlier run
        os.rename(folder, aside)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def require_writable(folder: str | Path, flag: str, needed: int = 0) -> None:
    """Before any work, refuse a folder that cannot be written to; it need not exist yet, and nothing is left in it.

    A file without a name is written: permissions do not reveal read-only or full disks, and mean nothing to root.

    Args:
        folder: Where something will be written.
        flag: The flag that names it, for the message.
        needed: Bytes that must be free there.

    Raises:
        CannotWriteError: saying why.
    """
    existing = Path(folder)
    try:
        while not existing.exists() and existing != existing.parent:
            if existing.is_symlink():
                raise FileExistsError(f"{existing} is a broken link")
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file, not a folder")
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise CannotWriteError(
            f"{flag} {folder} cannot be written: {error.strerror or error} ({existing}). Choose another folder, or "
            "make this one writable."
        ) from error
    if free < needed:
        raise CannotWriteError(
            f"{flag} {folder} will need about {megabytes(needed)}, and {megabytes(free)} are free on that disk. Free "
            f"at least {megabytes(needed - free)}, or choose a folder on another disk."
        )


def holds_files(folder: str | Path) -> bool:
    """Whether there is anything in a folder, except for a leftover lock."""
    folder = Path(folder)
    return folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())


class FolderLock:
    """A lock that lets only one process at a time work in a folder. The system releases it however the process ends.

    Args:
        folder: Created when the lock is taken.
        flag: The flag that names it, for the message.
    """

    def __init__(self, folder: str | Path, flag: str) -> None:
        from filelock import FileLock  # which not everything that imports this module needs

        self.folder, self.flag = Path(folder), flag
        self._lock = FileLock(self.folder / LOCK_FILE)
        self._made = False

    def acquire(self) -> None:
        """Take the lock, or refuse at once.

        Raises:
            CannotWriteError: if another process has it, or the folder cannot be made.
        """
        from filelock import Timeout

        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CannotWriteError(
                f"{self.flag} {self.folder} is in use by another process. Choose another folder, or wait until that "
                "process ends."
            ) from None
        except NotImplementedError:
            logger.warning(f"{self.folder} lies on a file system without locks: nothing keeps a second run out of it.")
        except OSError as error:
            raise CannotWriteError(
                f"{self.flag} {self.folder} cannot be written: {error}. Choose another folder, or make this one "
                "writable."
            ) from error

    def release(self) -> None:
        """Release the lock, if it was taken; a folder that it created is removed if it is empty."""
        if not self._lock.is_locked:
            return
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()
        if self._made:
            with contextlib.suppress(OSError):  # not empty
                self.folder.rmdir()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, also one of safetensors' writer, which is no OSError, says that the disk or quota is full."""
    return getattr(error, "errno", None) in NO_SPACE or any(f"(os error {code})" in str(error) for code in NO_SPACE)


def cannot_be_written(error: BaseException) -> bool:
    """Whether an error says that a disk is full, read-only or gone, or that the user may not write to a folder."""
    return is_disk_full(error) or getattr(error, "errno", None) in CANNOT_WRITE


def bytes_of(tensors: Collection[Tensor]) -> int:
    """Return the bytes of all tensors, the same one counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def megabytes(count: int) -> str:
    """Return a number of bytes as text in MB."""
    return f"{count / 1e6:,.1f} MB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
