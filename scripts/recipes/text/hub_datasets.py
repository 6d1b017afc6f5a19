"""Documents from a dataset of the Hub, or from a folder in the same layout, through the `datasets` library."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..run.hub_loading import datasets_library, warn_of_unread_files
from .documents import CorpusError, Document
from .streams import PART_CHARACTERS, CorpusStream, estimated_characters, file_digest, limit_documents
from .text_files import parts_of

ROWS_PER_BATCH = 100  # of some kilobytes to some megabytes each


def hub_stream(
    dataset_name: str,
    config_name: str | None = None,
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    revision: str | None = None,
    max_documents: int | None = None,
    show_progress: bool = False,
) -> CorpusStream:
    """Stream one whole split of a dataset; each row whose text is not empty is a document, `<dataset>:<split>:<row>`.

    Long ones come in parts. The revision is resolved here, once: a reading sees the files that the ingredients name. Without
    `streaming` all of it is downloaded and converted first.

    Raises:
        CorpusError: if `datasets` is missing, or the dataset, configuration or split does not exist; while the
            documents are read, for a missing column, one that is not text, or data that cannot be read.
    """
    what = f"The dataset {dataset_name!r} (configuration {config_name!r})"
    errors = (what, CorpusError, "--dataset_name, --dataset_config_name", "give files with --train_file")
    with datasets_library(*errors) as datasets:
        builder = datasets.load_dataset_builder(dataset_name, config_name, revision=revision)
        warn_of_unread_files(dataset_name, builder)
    files = _split_files(builder, dataset_name, split)
    local = all(Path(file).is_file() for file in files)
    name = Path(dataset_name).name if Path(dataset_name).is_dir() else dataset_name

    def documents() -> Iterator[Document]:
        with datasets_library(*errors) as datasets:
            rows = _rows(datasets, builder, split, streaming, show_progress)
            for index, text in enumerate(_texts(rows, dataset_name, text_column)):
                for part in parts_of(text, PART_CHARACTERS) if text is not None and text.strip() else ():
                    yield Document(f"{name}:{split}:{index}", part)

    return CorpusStream(
        lambda: limit_documents(documents(), max_documents),
        {
            "dataset": name,
            "config": builder.config.name,
            "split": split,
            "text_column": text_column,
            "max_documents": max_documents,
            "files": _identity(files, local),
        },
        f"{dataset_name} ({builder.config.name}, {split})",
        sum(map(estimated_characters, files)) if local and max_documents is None else None,
    )


def _split_files(builder: Any, dataset_name: str, split: str) -> list[str]:
    """Return the files of a split: paths, or addresses that name the commit."""
    by_split = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in by_split:
        raise CorpusError(
            f"The dataset {dataset_name!r} has no split {split!r}; it has {', '.join(map(repr, by_split)) or 'none'}. "
            "Name a whole split; --max_documents takes the first documents of it."
        )
    return by_split[split]


def _identity(files: list[str], local: bool) -> Any:
    """Return what tells these files from others: their content's hashes, or a hash of their pinned addresses."""
    if local:
        return [[Path(file).name, file_digest(file)] for file in files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _rows(datasets: Any, builder: Any, split: str, streaming: bool, show_progress: bool) -> Any:
    if streaming:
        return builder.as_streaming_dataset(split=split)
    silence = not show_progress and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        builder.download_and_prepare()
    finally:
        if silence:
            datasets.enable_progress_bars()
    return builder.as_dataset(split=split)


def _texts(rows: Any, dataset_name: str, text_column: str) -> Iterator[str | None]:
    if rows.features is not None:  # a stream may not know them before it is read
        _require_column(dataset_name, text_column, list(rows.features))
        kind = getattr(rows.features[text_column], "dtype", "a nested type")
        if kind not in ("string", "large_string", "string_view"):
            raise _not_text(dataset_name, text_column, kind)
        rows = rows.select_columns([text_column])
    for batch in rows.iter(batch_size=ROWS_PER_BATCH):
        _require_column(dataset_name, text_column, list(batch))
        for text in batch[text_column]:
            if text is not None and not isinstance(text, str):
                raise _not_text(dataset_name, text_column, f"{type(text).__name__} {text!r:.60}")
            yield text


def _require_column(dataset_name: str, text_column: str, present: list[str]) -> None:
    if text_column not in present:
        raise CorpusError(
            f"{dataset_name}: there is no column {text_column!r}; the columns are "
            f"{', '.join(map(repr, sorted(present))) or 'none'}. Name the one with the text by --text_column."
        )


def _not_text(dataset_name: str, text_column: str, found: str) -> CorpusError:
    return CorpusError(
        f"{dataset_name}: the column {text_column!r} holds {found}, not text. Name a column of text with --text_column."
    )
