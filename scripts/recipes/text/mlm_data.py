"""From a run's data settings to its tokenizer and packed sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..run.run_description import sequences_fingerprint
from .cleaning import Cleaning
from .corpora import corpus_streams
from .packing import require_sequences, token_dtype
from .token_cache import TokenCache, prepare_tokenizer, prepare_tokens
from .tokenization import load_tokenizer


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
        return sequences_fingerprint(self.validation)


@dataclass(frozen=True)
class MlmDataSettings:
    """Everything that decides the data of a run, and where it is kept.

    Attributes:
        train_file: Files to train on, read in this order; None with no `dataset_name` is the embedded corpus.
        validation_file: Files to validate on.
        dataset_name, dataset_config_name, dataset_revision: A dataset of the Hub or a folder, as in `hub_stream`.
        dataset_split, dataset_validation_split: Its splits to train and to validate on.
        streaming: Read the dataset while downloading it.
        max_documents: Train on the first so many documents (those held out count).
        text_column: The key or column with the text.
        validation_documents: Where there is no other validation corpus: hold out the first so many documents.
        validation_fraction: Else the share of documents to hold out by the hash of their names, in (0, 1).
        normalize_text, max_tokens_per_character: As in `Cleaning`, for both parts.
        tokenizer_name: A folder or Hub name; None trains a WordPiece tokenizer on the training documents.
        vocab_size: The largest vocabulary of a trained tokenizer.
        max_seq_length: Tokens per sequence.
        sequence_order: How the training sequences are numbered, as in `TokenCache`.
        cache_dir: The folder of the prepared data; None is `hf_specattn` in the home of the Hugging Face libraries
            (`HF_HOME`).
    """

    train_file: Sequence[str] | None = None
    validation_file: Sequence[str] | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    dataset_validation_split: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    text_column: str = "text"
    validation_documents: int | None = None
    validation_fraction: float = 0.1
    normalize_text: bool = False
    max_tokens_per_character: float | None = None
    tokenizer_name: str | None = None
    vocab_size: int = 4096
    max_seq_length: int = 128
    sequence_order: str = "shuffled"
    cache_dir: str | None = None

    def resolved_cache_dir(self) -> Path:
        """Return the folder of the prepared data."""
        return Path(HF_HOME) / "hf_specattn" if self.cache_dir is None else Path(self.cache_dir)


def prepare_mlm_data(settings: MlmDataSettings, *, training_sequences: int, show_progress: bool = False) -> MlmData:
    """Return the tokenizer and both packed parts, from the cache what it holds; every process may call it.

    Args:
        settings: What to read and how.
        training_sequences: How many training sequences are needed at least (one global batch); 0 packs no training
            part, for evaluation.
        show_progress: Whether to draw progress bars.

    Raises:
        CorpusError: for data that cannot be read, or is too short.
    """
    train, validation, origin = corpus_streams(settings, show_progress=show_progress)
    length = settings.max_seq_length
    common: dict[str, Any] = {
        "cache_dir": settings.resolved_cache_dir(),
        "cleaning": Cleaning(settings.normalize_text, settings.max_tokens_per_character),
        "show_progress": show_progress,
    }
    if settings.tokenizer_name is None:
        tokenizer = prepare_tokenizer(train, settings.vocab_size, max_seq_length=length, **common)
    else:
        tokenizer = load_tokenizer(settings.tokenizer_name)
    sequences: NDArray[np.integer] | TokenCache = np.empty((0, length), token_dtype(len(tokenizer)))
    if training_sequences:
        packed = prepare_tokens(train, tokenizer, length, description="Tokenizing training text", **common)
        require_sequences(packed, training_sequences, train.origin, f"one batch of {training_sequences} sequences")
        sequences = packed.in_order(settings.sequence_order)
    held_out = prepare_tokens(validation, tokenizer, length, description="Tokenizing validation text", **common)
    return MlmData(tokenizer, sequences, held_out, origin)
