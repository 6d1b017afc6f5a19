"""Data sets of the Hub, and folders in their layout, through the `datasets` library, which is imported on the first use."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .messages import one_line

logger = logging.get_logger(__name__)

# Beside the data in every data set.
NO_DATA = ("readme", "license", "licence", "dataset_infos", "dataset_info", "metadata")


@contextmanager
def datasets_library(what: str, error_class: type[ValueError], flag: str, instead: str) -> Iterator[Any]:
    """Give the `datasets` library, and turn whatever it raises into one line of `error_class`.

    Args:
        what: The data set, in words.
        flag: What asked for it.
        instead: What there is without the library.
    """
    try:
        import datasets
    except ImportError as error:
        raise error_class(
            f"{flag} needs the `datasets` library, which is not installed: pip install 'hf_specattn[train]', or {instead}."
        ) from error
    try:
        yield datasets
    except error_class:
        raise
    except Exception as error:  # of whatever kind a reader of files raises
        raise error_class(
            f"{what} cannot be loaded: {one_line(error)}. Check {flag}, the files or the network and your access to them, or "
            f"{instead}."
        ) from error


def warn_of_unread_files(name: str, builder: Any) -> None:
    """Say which files of a local folder `datasets` leaves out: it reads those of one kind. Nothing of the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        return
    used = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    files = [path for path in folder.rglob("*") if path.is_file() and path.resolve() not in used]
    left_out = [
        path
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.stem.lower() not in NO_DATA
    ]
    if left_out:
        kinds = Counter(path.suffix.lower() or "without an ending" for path in left_out)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        logger.warning(
            f"{folder}: `datasets` reads {len(used):,} files of it and leaves out {len(left_out):,} ({counts}; the first is "
            f"{min(left_out)}). One data set is files of one kind; give the others as another."
        )
