"""Folders in the layout of the `datasets` library, which reads files of one kind and passes over the others in silence."""

from collections import Counter
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Beside the data in every data set.
NO_DATA = ("readme", "license", "licence", "dataset_infos", "dataset_info", "metadata")


def warn_of_unread_files(name: str, builder: Any) -> None:
    """Say which files of a local folder `datasets` leaves out; of a data set of the Hub nothing.

    Args:
        name: What the data set was called by.
        builder: Its `DatasetBuilder`.
    """
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
