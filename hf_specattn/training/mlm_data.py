"""From a run's data settings to its tokenizer and packed sequences."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .cleaning import NO_CLEANING, Cleaning
from .corpora import load_corpora
from .packing import pack_documents, require_sequences
from .streams import CorpusStream, split_stream
from .token_cache import TokenCache, prepare_tokenizer, prepare_tokens
from .tokenization import load_tokenizer, train_wordpiece


@dataclass(frozen=True)
class MlmData:
    """What a masked language model is trained and evaluated on.

    Attributes:
        tokenizer: Trained on the training documents, or loaded.
        train: Token ids, `(sequences, length)`; no row where only validation was asked for.
        validation: Token ids, `(sequences, length)`.
        origin: Where the documents came from, in words.
    """

    tokenizer: PreTrainedTokenizerBase
    train: NDArray[np.integer] | TokenCache
    validation: NDArray[np.integer] | TokenCache
    origin: str

    @property
    def validation_fingerprint(self) -> str:
        """Return a hash that tells whether two runs are evaluated on the same tokens."""
        if isinstance(self.validation, TokenCache):
            return self.validation.fingerprint
        content = np.ascontiguousarray(self.validation.astype("<i4"))
        return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class MlmDataSettings:
    """Everything that decides the data of a run.

    Attributes:
        train_file, validation_file, text_column, validation_fraction: As in `load_corpora`.
        tokenizer_name: A folder or Hub name; None trains a WordPiece tokenizer on the training documents.
        vocab_size: The largest vocabulary of a trained tokenizer.
        max_seq_length: Tokens per sequence.
    """

    train_file: str | None = None
    validation_file: str | None = None
    text_column: str = "text"
    validation_fraction: float = 0.1
    tokenizer_name: str | None = None
    vocab_size: int = 4096
    max_seq_length: int = 128


def prepare_mlm_data(
    settings: MlmDataSettings,
    *,
    training_sequences: int,
    show_progress: bool = False,
) -> MlmData:
    """Read the documents, train or load the tokenizer, and pack both parts.

    Args:
        settings: What to read and how.
        training_sequences: How many training sequences are needed at least (one global batch); 0 packs no training
            part, for evaluation.
        show_progress: Whether to draw progress bars.

    Raises:
        CorpusError: for data that cannot be read, or is too short.
    """
    corpora = load_corpora(
        settings.train_file, settings.validation_file, settings.text_column, settings.validation_fraction
    )
    if settings.tokenizer_name is None:
        tokenizer = train_wordpiece(
            corpora.train,
            settings.vocab_size,
            max_seq_length=settings.max_seq_length,
            show_progress=show_progress,
        )
    else:
        tokenizer = load_tokenizer(settings.tokenizer_name)

    def pack(documents: list, part: str) -> NDArray[np.integer]:
        return pack_documents(
            documents,
            tokenizer,
            settings.max_seq_length,
            description=f"Tokenizing {part}",
            show_progress=show_progress,
        )

    train = pack(corpora.train if training_sequences else [], "training text")
    source = settings.train_file or "the embedded corpus"
    require_sequences(train, training_sequences, source, f"one batch of {training_sequences} sequences")
    validation = pack(corpora.validation, "validation text")
    held_out = settings.validation_file or f"the part of {source} held out for validation"
    require_sequences(validation, 1, held_out, "validation")
    return MlmData(tokenizer, train, validation, corpora.origin)


def prepare_cached_mlm_data(
    settings: MlmDataSettings,
    train: CorpusStream,
    validation: CorpusStream | None,
    *,
    cache_dir: str | Path,
    training_sequences: int,
    cleaning: Cleaning = NO_CLEANING,
    order: str = "shuffled",
    show_progress: bool = False,
) -> MlmData:
    """Do what `prepare_mlm_data` does for a corpus of any size, through the cache; every process may call it.

    Args:
        settings: Of these the tokenizer, its size, the length and the held-out fraction count.
        train: The training corpus.
        validation: The validation corpus; None holds documents of the training corpus out.
        cache_dir: The folder of all caches.
        training_sequences: How many training sequences are needed at least (one global batch); with 0 the training
            part is empty, for evaluation.
        cleaning: Normalization and filter of both parts.
        order: How the training sequences are numbered, as in `TokenCache`.
        show_progress: Whether to draw progress bars.

    Raises:
        CorpusError: for data that cannot be read, or is too short.
    """
    origin = (
        f"{train.origin}; validation on {validation.origin}" if validation else f"{train.origin}; held out by name"
    )
    if validation is None:
        train, validation = split_stream(train, settings.validation_fraction)
    length = settings.max_seq_length
    common: dict[str, Any] = {"cache_dir": cache_dir, "cleaning": cleaning, "show_progress": show_progress}
    if settings.tokenizer_name is None:
        tokenizer = prepare_tokenizer(train, settings.vocab_size, max_seq_length=length, **common)
    else:
        tokenizer = load_tokenizer(settings.tokenizer_name)
    sequences: NDArray[np.integer] | TokenCache = np.empty((0, length), dtype=np.uint16)
    if training_sequences:
        packed = prepare_tokens(train, tokenizer, length, description="Tokenizing training text", **common)
        sequences = packed.in_order(order)
        require_sequences(packed, training_sequences, train.origin, f"one batch of {training_sequences} sequences")
    held_out = prepare_tokens(validation, tokenizer, length, description="Tokenizing validation text", **common)
    return MlmData(tokenizer, sequences, held_out, origin)
