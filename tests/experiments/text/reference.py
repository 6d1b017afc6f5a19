"""What the streaming code must equal: a corpus read whole, split and packed in memory by the shortest code that does it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from recipes.text.documents import Document
from recipes.text.embedded_corpus import embedded_documents
from recipes.text.streams import name_hash
from recipes.text.text_files import file_documents


@dataclass(frozen=True)
class Corpora:
    """The documents of a run."""

    train: list[Document]
    validation: list[Document]


def load_corpora(
    train_file: str | None = None,
    validation_file: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.1,
) -> Corpora:
    """Read a corpus file (None: the embedded corpus), and a second one or the documents held out from the first."""
    documents = list(embedded_documents() if train_file is None else file_documents(train_file, text_column))
    if validation_file is not None:
        return Corpora(documents, list(file_documents(validation_file, text_column)))
    return Corpora(*split_documents(documents, validation_fraction))


def split_documents(
    documents: Iterable[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Hold out the documents whose names hash below the fraction: at least that of the smallest hash, and never all."""
    documents = list(documents)
    ranked = sorted(documents, key=lambda document: (name_hash(document.name), document.name))
    below = sum(name_hash(document.name) < validation_fraction for document in documents)
    held_out = {document.name for document in ranked[: min(max(below, 1), len(documents) - 1)]}
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def sequences_fingerprint(sequences: np.ndarray) -> str:
    """A hash of shape and tokens, `(rows, length)`; the width of the integers does not count."""
    content = repr(sequences.shape).encode() + np.ascontiguousarray(sequences, "<i4").tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def pack_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> np.ndarray:
    """Encode each document whole, a separator after each; token ids `(sequences, max_seq_length)`, remainder dropped."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True  # read "[MASK]" as text
    ids: list[int] = []
    for document in documents:
        ids += [*encoder.encode(document.text, add_special_tokens=False).ids, tokenizer.sep_token_id]
    rows = len(ids) // max_seq_length
    packed = np.array(ids[: rows * max_seq_length], np.uint16 if len(tokenizer) <= 65536 else np.int32)
    return packed.reshape(rows, max_seq_length)
