"""Documents from text, JSON and Parquet files, with errors that say where a file is bad.

| name ends in | what is one document |
|---|---|
| `.txt`, `.txt.gz` | what lies between two or more blank lines, or a form feed at the start of a line (a book's chapters) |
| `.jsonl`, `.jsonl.gz` | one line: an object whose text column holds a string |
| `.json`, `.json.gz` | the same, or one array of such objects |
| `.parquet` | one row |

Text is UTF-8. Empty documents and null values are skipped. Nothing here needs the `datasets` library.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .documents import CorpusError, Document

EXTENSIONS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def file_documents(path: str | Path, text_column: str = "text") -> Iterator[Document]:
    """Yield the documents of one file in order, named `<file name>:<index>`.

    Args:
        path: A file with one of `EXTENSIONS`.
        text_column: The key or column with the text; plain text files have none and ignore it.

    Raises:
        CorpusError: for a file that is missing, empty, damaged, not UTF-8, of another kind or without the column.
    """
    path = Path(path)
    if not path.name.lower().endswith(EXTENSIONS):
        raise CorpusError(
            f"{path}: unknown kind of corpus; allowed are {', '.join(EXTENSIONS)}. Convert or rename it."
        )
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CorpusError(f"{path} {problem}. Give the path of one corpus file ({', '.join(EXTENSIONS)}).")
    if path.stat().st_size == 0:
        raise CorpusError(f"{path} is empty (0 bytes). Give a file with text in it.")
    kind = _kind(path)
    if kind == ".parquet":
        texts = _parquet_texts(path, text_column)
    elif kind == ".txt":
        texts = _plain_texts(path)
    else:
        texts = _json_texts(path, text_column)
    found = False
    for index, text in enumerate(texts):
        if text is not None and text.strip():
            found = True
            yield Document(f"{path.name}:{index}", text)
    if not found:
        raise CorpusError(f"{path} holds no text: every document in it is empty. Give a file with text in it.")


def _kind(path: Path) -> str:
    """Return the extension without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[str]:
    """Decode a (gzipped) file line by line; a byte offset in an error counts within the decompressed content."""
    offset = 0
    zipped = path.suffix.lower() == ".gz"
    with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
        try:
            for line in stream:
                # A byte-order mark at the start is not text.
                yield line.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)
        except UnicodeDecodeError as error:
            where = " of the decompressed content" if zipped else ""
            raise CorpusError(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {offset + error.start}"
                f"{where} cannot be decoded. Convert the file, for example with `iconv -f LATIN1 -t UTF-8`."
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorpusError(
                f"{path} is no intact gzip file: {error}, after {offset} decompressed bytes. Fetch or compress it again."
            ) from error


def _plain_texts(path: Path) -> Iterator[str]:
    """Cut at form feeds that start a line and at two or more blank lines; one blank line parts paragraphs only."""
    document: list[str] = []
    blank_run = 0
    for line in _lines(path):
        blank = not line.strip()
        if document and (line.startswith("\f") or (blank_run >= 2 and not blank)):
            yield "".join(document)
            document = []
        blank_run = blank_run + 1 if blank else 0
        document.append(line)
    yield "".join(document)


def _json_texts(path: Path, text_column: str) -> Iterator[str | None]:
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("[") and _kind(path) == ".json":
            rows = _parse_json(path, number, line + "".join(lines))
            for index, row in enumerate(rows):
                yield _column(path, f"element {index}", row, text_column)
            return
        yield _column(path, f"line {number}", _parse_json(path, number, line.rstrip()), text_column)


def _parse_json(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}). "
            "Each line must hold one JSON object (in a .json file, one array of objects is allowed too)."
        ) from error


def _column(path: Path, where: str, row: Any, text_column: str) -> str | None:
    if not isinstance(row, dict):
        raise CorpusError(f"{path}, {where}: expected a JSON object with the key {text_column!r}, found {row!r:.60}.")
    if text_column not in row:
        raise _missing_column(path, text_column, sorted(row), where=f", {where}")
    value = row[text_column]
    if value is not None and not isinstance(value, str):
        raise CorpusError(
            f"{path}, {where}: the key {text_column!r} holds {type(value).__name__} {value!r:.60}, not text. "
            "Name a column of text with --text_column."
        )
    return value


def _missing_column(path: Path, text_column: str, present: list[str], where: str = "") -> CorpusError:
    return CorpusError(
        f"{path}{where}: there is no column {text_column!r}; the columns are {', '.join(map(repr, present)) or 'none'}. "
        "Name the one with the text by --text_column."
    )


def _parquet_texts(path: Path, text_column: str) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(
            f"{path}: reading Parquet needs the `pyarrow` package. Install it (`pip install pyarrow`), or convert the "
            "corpus to .jsonl.gz."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_column not in schema.names:
                raise _missing_column(path, text_column, list(schema.names))
            kind = schema.field(text_column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise CorpusError(
                    f"{path}: the column {text_column!r} holds {kind}, not text. Name a column of text with --text_column."
                )
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is no intact Parquet file: {error}. Fetch or write it again.") from error
