"""Documents from text, JSON and Parquet files, with errors that say where a file is bad.

| name ends in | what is one document |
|---|---|
| `.txt`, `.txt.gz` | what lies between two or more blank lines, or a form feed at the start of a line (a book's chapters) |
| `.jsonl`, `.jsonl.gz` | one line: an object whose text column holds a string |
| `.json`, `.json.gz` | the same, or one array of such objects |
| `.parquet` | one row |

Text is UTF-8. Empty documents and null values are skipped. Nothing here needs the `datasets` library. What else is done to
a file, and what is refused: docs/data_readers.md.
"""

import codecs
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..run.messages import one_line
from .documents import CorpusError, Document

# An array, and a line of JSON, is parsed as a whole, at some times its size in memory.
LARGEST_ARRAY_BYTES = 256 * 2**20

LINE_BYTES = 2**20  # longer lines are read in pieces

PARQUET_ROWS = 64  # at once: a row may be a whole book

# Half of a pair, which JSON can spell and UTF-8 cannot.
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

# What a file begins with that is no UTF-8 text -> what it is, and the way out.
SIGNATURES = {
    b"\x1f\x8b": "is gzipped: give its name the ending .gz",
    b"PAR1": "is a Parquet file: give its name the ending .parquet",
    b"PK\x03\x04": "is a ZIP archive: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard: unpack it (`zstd -d`)",
    b"\xfd7zXZ\x00": "is compressed by xz: unpack it (`xz -d`)",
    b"BZh91AY&SY": "is compressed by bzip2: unpack it (`bzip2 -d`)",
    b"%PDF-": "is a PDF: extract its text",
    b"version https://git-lfs.github.com/spec/": "only names one in Git LFS: fetch that (`git lfs pull`)",
    b"\xff\xfe\x00\x00": "is UTF-32: convert it (`iconv -f UTF-32 -t UTF-8`)",
    b"\xff\xfe": "is UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`)",
    b"\xfe\xff": "is UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`)",
}

EXTENSIONS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def file_documents(
    path: str | Path, text_column: str = "text", part_characters: int | None = None
) -> Iterator[Document]:
    """Yield the documents of one file in order, named `<file name>:<index>`.

    Args:
        path: A file with one of `EXTENSIONS`.
        text_column: The key or column with the text; plain text files have none and ignore it.
        part_characters: Longer documents come in parts of about this many characters, cut at line ends or else at spaces,
            as neighbors of one name. None gives each document whole.

    Raises:
        CorpusError: for a file that is missing, empty, damaged, not UTF-8, of another kind or without the column.
    """
    path = Path(path)
    if not path.name.lower().endswith(EXTENSIONS):
        raise CorpusError(
            f"{path}: unknown kind of corpus; allowed are {', '.join(EXTENSIONS)}. Convert or rename it."
        )
    try:
        yield from _checked_documents(path, text_column, part_characters)
    except CorpusError:
        raise
    except Exception as error:  # of whatever kind a reader raises for what stands in a file
        raise CorpusError(
            f"{path} cannot be read: {one_line(error)}. Check its permissions, or fetch or write it again."
        ) from error


def _checked_documents(path: Path, text_column: str, part_characters: int | None) -> Iterator[Document]:
    if not path.is_file():
        problem = (
            "does not exist" if not path.exists() else f"is a {'folder' if path.is_dir() else 'device'}, not a file"
        )
        problem = "is a broken link" if path.is_symlink() and not path.exists() else problem
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
        if text is None or not text.strip():
            continue
        found = True
        for part in [text] if part_characters is None or kind == ".txt" else parts_of(text, part_characters):
            yield Document(f"{path.name}:{index}", part)
    if not found:
        raise CorpusError(f"{path} holds no text: every document in it is empty. Give a file with text in it.")


def parts_of(text: str, characters: int) -> Iterator[str]:
    """Cut a text into parts of at most this many characters: after a line end, else after a space, else anywhere."""
    start = 0
    while len(text) - start > characters:
        stop = start + characters
        end = (text.rfind("\n", start, stop) + 1) or (text.rfind(" ", start, stop) + 1) or stop
        yield text[start:end]
        start = end
    yield text[start:]


def _kind(path: Path) -> str:
    """Return the extension without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Decode a (gzipped) file line by line, and lines longer than `LINE_BYTES` in pieces.

    Yields each piece with whether a line begins with it. A byte offset in an error counts within the decompressed content.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte-order mark at the start is not text
    zipped = path.suffix.lower() == ".gz"
    where = " of the decompressed content" if zipped else ""
    offset, held, begins = 0, "", True
    with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
        try:
            while raw := stream.readline(LINE_BYTES):
                if offset == 0:
                    _refuse_signatures(path, raw, where)
                offset += len(raw)
                text = held + decoder.decode(raw)
                if "\0" in text:
                    raise CorpusError(
                        f"{path} is not UTF-8 text: it contains NUL characters, before byte offset {offset}{where}. If it is "
                        "UTF-16 without a mark, convert it with `iconv -f UTF-16LE -t UTF-8`."
                    )
                goes_on = len(raw) == LINE_BYTES and not raw.endswith(b"\n")
                # A word stays whole, if there is a space before it.
                end = (text.rfind(" ") + 1 or len(text)) if goes_on else len(text)
                yield text[:end], begins
                held, begins = text[end:], not goes_on
            yield held + decoder.decode(b"", final=True), False
        except UnicodeDecodeError as error:
            at = offset - len(error.object) + error.start
            raise CorpusError(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {at}{where} cannot be decoded. "
                f"Find out its encoding (`file -i {path.name}` guesses it) and convert it with `iconv -f ENCODING -t UTF-8`; "
                "a wrong one gives wrong letters without an error."
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorpusError(
                f"{path} is not an intact gzip file: {error}, after {offset} decompressed bytes. Fetch or compress it again."
            ) from error


def _refuse_signatures(path: Path, content: bytes, where: str) -> None:
    for signature, what in SIGNATURES.items():
        if content.startswith(signature):
            raise CorpusError(f"{path} is not UTF-8 text; it begins{where} as a file that {what}.")


def _plain_texts(path: Path, part_characters: int | None) -> Iterator[tuple[int, str]]:
    """Cut at form feeds that start a line and at two or more blank lines; one blank line parts paragraphs only.

    Yields each document's index with its text, or, if that is longer than `part_characters`, with each of its parts.
    """
    index, begun = 0, False
    part: list[str] = []
    characters = blank_run = 0
    for line, begins in _lines(path):
        blank = begins and not line.strip()
        ends = begun and begins and (line.startswith("\f") or (blank_run >= 2 and not blank))
        if ends or (part_characters is not None and characters >= part_characters):
            yield index, "".join(part)
            part, characters = [], 0
        index += ends
        blank_run = blank_run + 1 if blank else 0
        begun = True
        part.append(line)
        characters += len(line)
    yield index, "".join(part)


def _lines(path: Path) -> Iterator[tuple[str, bool]]:
    """The pieces of a file; of one whose lines end in carriage returns alone, as on old Macintoshes, cut at these."""
    pieces = _pieces(path)
    first = next(pieces)
    alone = "\r" in first[0] and "\n" not in first[0]
    for text, begins in chain([first], pieces):
        if not alone:
            yield text, begins
            continue
        for line in re.split(r"(?<=\r)", text):
            yield line, begins
            begins = line.endswith("\r")


def _json_texts(path: Path, text_column: str) -> Iterator[str | None]:
    lines = _whole_lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if _begins_array(path, line):
            rows = _parse_json(path, number, _whole_array(path, line, lines))
            for index, row in enumerate(rows):
                yield _column(path, f"element {index}", row, text_column)
            return
        yield _column(path, f"line {number}", _parse_json(path, number, line.rstrip()), text_column)


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    number, parts, characters = 0, [""], 0
    for piece, begins in _pieces(path):
        if begins:
            if number:
                yield number, "".join(parts)
            number, parts, characters = number + 1, [], 0
        parts.append(piece)
        characters += len(piece)
        if characters > LARGEST_ARRAY_BYTES:
            if _begins_array(path, parts[0]):
                raise _large_array(path)
            raise CorpusError(
                f"{path}, line {number} is longer than {LARGEST_ARRAY_BYTES // 2**20} MiB, and a line of JSON is read as a "
                "whole. Divide its document into several."
            )
    yield number, "".join(parts)


def _begins_array(path: Path, line: str) -> bool:
    return line.lstrip().startswith("[") and _kind(path) == ".json"


def _whole_array(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> str:
    parts, characters = [first], len(first)
    for _, line in lines:
        parts.append(line)
        characters += len(line)
        if characters > LARGEST_ARRAY_BYTES:
            raise _large_array(path)
    return "".join(parts)


def _large_array(path: Path) -> CorpusError:
    return CorpusError(
        f"{path} is one JSON array, which has to be read as a whole, and larger than {LARGEST_ARRAY_BYTES // 2**20} MiB. "
        "Convert it to lines, for example with `jq -c '.[]'`."
    )


class _Row(dict):
    """A JSON object, with the keys that it has more than once."""

    repeated: frozenset[str] = frozenset()


def _row(pairs: list[tuple[str, Any]]) -> _Row:
    row = _Row(pairs)
    if len(row) != len(pairs):
        row.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return row


def _integer(digits: str) -> float:
    try:
        return int(digits)
    except ValueError:  # thousands of digits: in any field but the text's, of no concern here
        return math.inf


def _parse_json(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_row, parse_int=_integer)
    except RecursionError as error:
        raise CorpusError(
            f"{path}, line {first_line}: its JSON is nested too deeply to be read. Take the nested fields out."
        ) from error
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}). "
            "Each line must hold one JSON object (in a .json file, one array of objects is allowed too)."
        ) from error


def _column(path: Path, where: str, row: Any, text_column: str) -> str | None:
    if not isinstance(row, _Row):
        raise CorpusError(f"{path}, {where}: expected a JSON object with the key {text_column!r}, found {row!r:.60}.")
    if text_column not in row:
        raise _missing_column(path, text_column, sorted(row), where=f", {where}")
    if text_column in row.repeated:
        raise CorpusError(f"{path}, {where}: the key {text_column!r} occurs twice; it is unclear which one is meant.")
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
            f"{path}: reading Parquet needs the `pyarrow` package. Install it (`pip install 'hf_specattn[train]'`), or "
            "convert the corpus to .jsonl.gz."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if (count := schema.names.count(text_column)) > 1:
                raise CorpusError(f"{path} has {count} columns {text_column!r}; give the others another name.")
            if not count:
                raise _missing_column(path, text_column, list(schema.names))
            kind = schema.field(text_column).type
            if not _is_text(kind):
                raise CorpusError(
                    f"{path}: the column {text_column!r} holds {kind}, not text. Name a column of text with --text_column."
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_column]):
                # By its place: a name with a dot selects fields of structs beside the column.
                yield from batch.column(batch.schema.names.index(text_column)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"{path} is not an intact Parquet file: {one_line(error)}. Fetch or write it again."
        ) from error


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text, also as a dictionary: what pandas' categories are stored as."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
