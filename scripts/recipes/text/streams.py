"""Corpora as streams: documents that can be read again and again without being held, and what identifies them.

A stream is made from files here, or from a dataset (see `hub_datasets`), and divided, cut short or sampled as a stream.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .documents import CorpusError, Document
from .text_files import file_documents

logger = logging.get_logger(__name__)

# Enough for 32,768 word pieces; more text only moves the rarest of them.
SAMPLE_CHARACTERS = 100_000_000

# For estimates before the work: gzip and Parquet hold text at about a third of its size.
COMPRESSION = 3

# Files up to this size are hashed whole; of larger ones this many bytes, in blocks spread evenly, with the time of the
# last change.
WHOLE_DIGEST_BYTES = 64 * 2**20
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 256, 2**16

PART_CHARACTERS = 2**20  # longer documents of plain text files come in parts


@dataclass(frozen=True)
class CorpusStream:
    """Documents that can be read again and again without being held.

    Attributes:
        documents: Starts a new reading. A long document may come in parts: neighbors of one name are one document.
        ingredients: What decides the documents, as JSON values; equal ingredients promise equal documents.
        origin: Where they come from, for messages.
        characters: About how many there are; None if nothing is known before reading.
    """

    documents: Callable[[], Iterator[Document]]
    ingredients: Mapping[str, Any]
    origin: str
    characters: int | None = None


def file_stream(
    paths: Iterable[str | Path], text_column: str = "text", max_documents: int | None = None
) -> CorpusStream:
    """Stream the documents of one or several files as `file_documents` reads them, in the order given.

    Documents are named by their file; where several files share a name, those after the first are told apart by their place
    in the list. None of `max_documents` reads all.

    Raises:
        CorpusError: for a file that does not exist, here; for other faults, while the stream is read.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            next(file_documents(path, text_column))  # says what is wrong with it
    if repeated := [str(path) for path, count in Counter(path.resolve() for path in files).items() if count > 1]:
        logger.warning(
            f"{', '.join(repeated)} is named more than once (perhaps through a link), and is read each time."
        )

    def documents() -> Iterator[Document]:
        seen: set[str] = set()
        for number, path in enumerate(files):
            prefix = f"{number}/" if path.name in seen else ""
            seen.add(path.name)
            for document in file_documents(path, text_column, part_characters=PART_CHARACTERS):
                yield Document(prefix + document.name, document.text) if prefix else document

    return CorpusStream(
        lambda: limit_documents(documents(), max_documents),
        {
            "files": [[path.name, _digest(path)] for path in files],
            "text_column": text_column,
            "max_documents": max_documents,
        },
        ", ".join(map(str, files)),
        sum(estimated_characters(path) for path in files) if max_documents is None else None,
    )


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}. Check its permissions, or fetch it again.") from error


def file_digest(path: str | Path) -> str:
    """Return a hash of a file's content: of all of it up to 64 MB, else of its size, time of change and 256 blocks."""
    size, changed = os.stat(path).st_size, os.stat(path).st_mtime_ns
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as stream:
        if size <= WHOLE_DIGEST_BYTES:
            while block := stream.read(2**20):
                digest.update(block)
        else:
            digest.update(str(changed).encode())
            for number in range(DIGEST_BLOCKS):
                stream.seek((size - DIGEST_BLOCK_BYTES) * number // (DIGEST_BLOCKS - 1))
                digest.update(stream.read(DIGEST_BLOCK_BYTES))
    return digest.hexdigest()


def estimated_characters(path: str | Path) -> int:
    """Return about how many characters a corpus file holds, by its size and kind."""
    compressed = Path(path).suffix.lower() in (".gz", ".parquet")
    return os.stat(path).st_size * (COMPRESSION if compressed else 1)


def limit_documents(documents: Iterable[Document], max_documents: int | None) -> Iterator[Document]:
    """Yield the first `max_documents` documents, each with all its parts; None yields all."""
    count, name = 0, None
    for document in documents:
        count += document.name != name
        if max_documents is not None and count > max_documents:
            return
        name = document.name
        yield document


def split_stream(stream: CorpusStream, validation_fraction: float) -> tuple[CorpusStream, CorpusStream]:
    """Hold out the documents whose name hashes below `validation_fraction`, in (0, 1); at least one, never all.

    The decision looks at one name at a time, so it stays the same when other documents come or go. Only where it would
    leave a side empty, the document with the smallest hash is held out (or the largest kept).

    Returns:
        The training stream and the validation stream; each reads the whole corpus and passes on its documents.

    Raises:
        CorpusError: while being read, if the corpus is a single document.
    """

    @cache
    def exception() -> tuple[str, bool] | None:
        return _split_exception(stream, validation_fraction)

    def part(held_out: bool) -> CorpusStream:
        def documents() -> Iterator[Document]:
            exceptional = exception()
            for document in stream.documents():
                side = name_hash(document.name) < validation_fraction
                if exceptional is not None and document.name == exceptional[0]:
                    side = exceptional[1]
                if side == held_out:
                    yield document

        share = validation_fraction if held_out else 1 - validation_fraction
        return CorpusStream(
            documents,
            {"part_of": stream.ingredients, "validation_fraction": validation_fraction, "held_out": held_out},
            f"the {'validation' if held_out else 'training'} part of {stream.origin}",
            None if stream.characters is None else round(stream.characters * share),
        )

    return part(False), part(True)


def name_hash(name: str) -> float:
    """Map a name to [0, 1) by its SHA-256: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_first(stream: CorpusStream, validation_documents: int) -> tuple[CorpusStream, CorpusStream]:
    """Hold out the first documents: where reading is a download, the validation part then costs no second one.

    Returns:
        The training stream, without them, and the validation stream, which reads one document further than them.

    Raises:
        CorpusError: while the training stream is read, if nothing is left for it.
    """

    def training() -> Iterator[Document]:
        count, name, left = 0, None, False
        for document in stream.documents():
            count += document.name != name
            name = document.name
            if count > validation_documents:
                left = True
                yield document
        if not left:
            raise CorpusError(
                f"{stream.origin} has {count} documents, all of which --validation_documents {validation_documents} "
                "holds out. Hold out fewer, or use a larger corpus."
            )

    ingredients = {"part_of": stream.ingredients, "validation_documents": validation_documents}
    return (
        CorpusStream(
            training,
            {**ingredients, "held_out": False},
            f"the training part of {stream.origin}",
            stream.characters,
        ),
        CorpusStream(
            lambda: limit_documents(stream.documents(), validation_documents),
            {**ingredients, "held_out": True},
            f"the validation part of {stream.origin}",
        ),
    )


def training_sample(stream: CorpusStream, max_characters: int = SAMPLE_CHARACTERS) -> Iterator[Document]:
    """Yield documents (or parts of them) of at most about `max_characters` in all, spread evenly over the corpus.

    If the size of the corpus is not known in advance, they are the first ones.
    """
    share = 1.0 if stream.characters is None else max_characters / max(stream.characters, 1)
    read = taken = 0
    for document in stream.documents():
        if taken <= share * read:
            yield document
            taken += len(document.text)
            if taken >= max_characters:
                return
        read += len(document.text)


def _split_exception(stream: CorpusStream, validation_fraction: float) -> tuple[str, bool] | None:
    """Return the document, with its side, that keeps a side from being empty; None if neither would be."""
    smallest = largest = None
    for document in stream.documents():
        ranked = (name_hash(document.name), document.name)
        smallest = ranked if smallest is None else min(smallest, ranked)
        largest = ranked if largest is None else max(largest, ranked)
        if smallest[0] < validation_fraction <= largest[0]:
            return None
    if smallest is None or largest is None or smallest == largest:
        raise CorpusError(
            f"{stream.origin} is a single document, so none can be held out for validation. Give a --validation_file, "
            "or mark documents (in .txt: two blank lines or a form feed between them; in .jsonl: one line each)."
        )
    return (smallest[1], True) if smallest[0] >= validation_fraction else (largest[1], False)
