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
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .documents import CorpusError, Document

# An array is parsed as a whole, at some times its size in memory.
LARGEST_ARRAY_BYTES = 256 * 2**20

PARQUET_ROWS = 64  # at once: a row may be a whole book

# Half of a pair, which JSON can spell and UTF-8 cannot.
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

EXTENSIONS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def file_documents(
    path: str | Path, text_column: str = "text", part_characters: int | None = None
) -> Iterator[Document]:
    """Yield the documents of one file in order, named `<file name>:<index>`.

    Args:
        path: A file with one of `EXTENSIONS`.
        text_column: The key or column with the text; plain text files have none and ignore it.
        part_characters: Documents of plain text files that are longer come in parts of about this many characters, cut at
            line ends, as neighbours of one name. None gives each document whole.

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
        texts: Iterator[tuple[int, str | None]] = enumerate(_parquet_texts(path, text_column))
    elif kind == ".txt":
        texts = _plain_texts(path, part_characters)
    else:
        texts = enumerate(_json_texts(path, text_column))
    found = False
    for index, text in texts:
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


def _plain_texts(path: Path, part_characters: int | None) -> Iterator[tuple[int, str]]:
    """Cut at form feeds that start a line and at two or more blank lines; one blank line parts paragraphs only.

    Yields each document's index with its text, or, if that is longer than `part_characters`, with each of its parts.
    """
    index, begun = 0, False
    part: list[str] = []
    characters = blank_run = 0
    for line in _lines(path):
        blank = not line.strip()
        ends = begun and (line.startswith("\f") or (blank_run >= 2 and not blank))
        if ends or (part_characters is not None and characters >= part_characters):
            yield index, "".join(part)
            part, characters = [], 0
        index += ends
        blank_run = blank_run + 1 if blank else 0
        begun = True
        part.append(line)
        characters += len(line)
    yield index, "".join(part)


def _json_texts(path: Path, text_column: str) -> Iterator[str | None]:
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("[") and _kind(path) == ".json":
            if path.stat().st_size > LARGEST_ARRAY_BYTES:
                raise CorpusError(
                    f"{path} is one JSON array, which has to be read as a whole, and larger than "
                    f"{LARGEST_ARRAY_BYTES // 2**20} MiB. Convert it to lines, for example with `jq -c '.[]'`."
                )
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
    return None if value is None else _LONE_SURROGATES.sub("\ufffd", value)


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
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is no intact Parquet file: {error}. Fetch or write it again.") from error
