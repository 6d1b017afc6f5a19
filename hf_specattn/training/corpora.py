"""The corpus of a run: where its documents come from and which of them are held out for validation."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from .documents import CorpusError, Document
from .embedded_corpus import EMBEDDED_CORPUS_NAME, embedded_documents
from .text_files import file_documents


@dataclass(frozen=True)
class Corpora:
    """Training and validation documents with a sentence about where the validation part comes from."""

    train: list[Document]
    validation: list[Document]
    origin: str


def load_corpora(
    train_file: str | None = None,
    validation_file: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.1,
) -> Corpora:
    """Read the documents of a run.

    Args:
        train_file: A corpus file; None is the embedded corpus.
        validation_file: A second file; None holds out `validation_fraction` of the training documents.
        text_column: The key or column with the text, for JSON and Parquet.
        validation_fraction: The expected share of documents held out, in (0, 1).

    Raises:
        CorpusError: for a corpus that cannot be read or split, or a validation file beside the embedded corpus.
    """
    if train_file is None:
        if validation_file is not None:
            raise CorpusError("A validation file without a training file: give --train_file as well, or neither.")
        documents, source = list(embedded_documents()), EMBEDDED_CORPUS_NAME
    else:
        documents, source = list(file_documents(train_file, text_column)), train_file
    if validation_file is not None:
        validation = list(file_documents(validation_file, text_column))
        return Corpora(documents, validation, f"{source}; validation on {validation_file}")
    train, validation = split_documents(documents, validation_fraction, source)
    held_out = f"{len(validation)} of {len(documents)} documents held out for validation by the hash of their names"
    return Corpora(train, validation, f"{source}; {held_out}")


def split_documents(
    documents: Iterable[Document], validation_fraction: float, source: str = "the corpus"
) -> tuple[list[Document], list[Document]]:
    """Hold out the documents whose name hashes below `validation_fraction`; at least one, never all.

    The decision looks at one name at a time, so it stays the same when other documents come or go. Only where it would
    leave a side empty, the document with the smallest hash is held out (or the largest kept).

    Returns:
        The training documents and the validation documents, each in the order given.

    Raises:
        CorpusError: for fewer than two documents.
    """
    documents = list(documents)
    if len(documents) < 2:
        raise CorpusError(
            f"{source} is a single document, so none can be held out for validation. Give a --validation_file, or mark "
            "documents (in .txt: two blank lines or a form feed between them; in .jsonl: one line each)."
        )
    ranked = sorted(documents, key=lambda document: (name_hash(document.name), document.name))
    below = sum(name_hash(document.name) < validation_fraction for document in documents)
    held_out = {document.name for document in ranked[: min(max(below, 1), len(documents) - 1)]}
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def name_hash(name: str) -> float:
    """Map a name to [0, 1) by its SHA-256: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
