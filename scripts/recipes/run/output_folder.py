"""The folder of a run: it belongs to one run only, from before its first step."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from hf_specattn.files import FolderLock

from .distributed import run_on_main_process


@contextlib.contextmanager
def sole_use(directory: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; the main process of this run holds it for all.

    Raises:
        CannotWriteError: on every process, if another run works in it, or it cannot be made.
    """
    lock = FolderLock(directory, "--output_dir")
    run_on_main_process(accelerator, lock.acquire)
    try:
        yield
    finally:
        lock.release()
