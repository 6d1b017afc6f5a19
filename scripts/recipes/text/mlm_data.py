"""The data of a masked language modeling run, chosen by flags, and turned into a tokenizer and packed sequences."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from ..run.command_line import flag
from .cleaning import Cleaning
from .corpora import corpus_streams
from .documents import CorpusError
from .token_cache import ORDERS, TokenCache, prepare_tokens
from .tokenization import load_tokenizer, prepare_tokenizer

OF_DATASET = (
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "dataset_split",
    "dataset_validation_split",
    "streaming",
)
OF_VALIDATION = ("validation_file", "dataset_validation_split", "validation_documents")


@dataclass
class MlmDataSettings:
    """Everything that determines the data of a run, and where they are kept: flags."""

    train_file: list[str] | None = flag(
        None, "Corpus: .txt, .jsonl, .json (each also .gz) or .parquet, one or several. None: embedded text."
    )
    validation_file: list[str] | None = flag(
        None, "Validation corpus, in the same formats. None: documents held out from the training corpus."
    )
    dataset_name: str | None = flag(None, "Corpus: a dataset on the Hub, or a folder in its layout, instead of files.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of the dataset.")
    dataset_split: str = flag("train", "Split of the dataset to train on.")
    dataset_validation_split: str | None = flag(
        None, "Split to validate on. None: documents held out from the training split."
    )
    streaming: bool = flag(False, "Read the dataset while downloading it, without keeping a copy.")
    max_documents: int | None = flag(None, "Number of documents to read, from the start. None: all.")
    text_column: str = flag("text", "Key or column with the text (JSON, Parquet, Hub).")
    validation_documents: int | None = flag(
        None, "Hold out this many documents, the first ones, for validation instead of a share."
    )
    # A tenth of the embedded corpus is some 440 sequences, 14,000 predictions; of a large corpus take less.
    validation_fraction: float = flag(0.1, "Share of documents held out for validation, by the hash of their names.")
    normalize_text: bool = flag(
        False, "Lowercase, strip accents, drop non-ASCII characters, collapse spaces (published recipe)."
    )
    max_tokens_per_character: float | None = flag(
        None, "Leave out documents with more tokens per character than this (published: 0.25)."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer to load. None: train WordPiece.")
    vocab_size: int = flag(4096, "Largest vocabulary of a trained tokenizer.")
    max_seq_length: int = flag(128, "Tokens per packed sequence.")  # as in cramming
    sequence_order: str = flag(
        "shuffled",
        "shuffled: in a new order in each pass; published: by their number of '.' tokens, most first, in every pass.",
        ORDERS,
    )
    cache_dir: str | None = flag(None, "Folder for prepared data. None: hf_specattn in the folder of HF_HOME.")

    def resolved_cache_dir(self) -> Path:
        """Return the folder of the prepared data."""
        return Path(HF_HOME) / "hf_specattn" if self.cache_dir is None else Path(self.cache_dir)

    def cleaning(self) -> Cleaning:
        """What happens to the text of both parts."""
        return Cleaning(self.normalize_text, self.max_tokens_per_character)

    def check_data(self) -> None:
        """Raise ValueError for invalid values, and for flags that do not go together."""
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction} must be between 0 and 1.")
        self.cleaning()  # refuses a bad limit
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError(
                f"--train_file {' '.join(self.train_file)} and --dataset_name {self.dataset_name}: give one of the two."
            )
        if self.dataset_name is None:
            if given := self._given(OF_DATASET):
                raise ValueError(f"{', '.join(given)}: for a dataset only; also give --dataset_name.")
            if self.train_file is None and (given := self._given(("validation_file", "max_documents"))):
                raise ValueError(f"{', '.join(given)} without a corpus: give --train_file or --dataset_name as well.")
        if len(given := self._given(OF_VALIDATION)) > 1:
            raise ValueError(f"{', '.join(given)}: one of them says what to validate on.")
        if self.max_documents is not None and (self.validation_documents or 0) >= self.max_documents:
            raise ValueError(
                f"--validation_documents {self.validation_documents} of --max_documents {self.max_documents} leaves none "
                "to train on; hold out fewer."
            )

    def _given(self, names: tuple[str, ...]) -> list[str]:
        """Those of the flags that have another value than their default."""
        return [f"--{name}" for name in names if getattr(self, name) != getattr(MlmDataSettings, name)]


# What decides the validation data of a run: all but what follows from its model, and where they are kept.
VALIDATION_SETTINGS = tuple(
    item.name
    for item in fields(MlmDataSettings)
    if item.name not in ("tokenizer_name", "vocab_size", "sequence_order", "cache_dir")
)


@dataclass(frozen=True)
class MlmData:
    """What a masked language model is trained and evaluated on.

    Attributes:
        tokenizer: Trained on the training documents, or loaded.
        train: Packed sequences; None where only validation was asked for.
        validation: Packed sequences in the order of the corpus.
        origin: Where the documents came from, in words.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenCache | None
    validation: TokenCache
    origin: str


def prepare_mlm_data(settings: MlmDataSettings, *, training_sequences: int, show_progress: bool = False) -> MlmData:
    """Return the tokenizer and both packed parts, from the cache what it holds; every process may call it.

    At least `training_sequences` are needed to train on (one global batch); 0 packs no training part, for evaluation.

    Raises:
        CorpusError: for data that cannot be read, or is too short.
    """
    train, validation, origin = corpus_streams(settings, show_progress=show_progress)
    length = settings.max_seq_length
    common: dict[str, Any] = {
        "cache_dir": settings.resolved_cache_dir(),
        "cleaning": settings.cleaning(),
        "show_progress": show_progress,
    }
    if settings.tokenizer_name is None:
        tokenizer = prepare_tokenizer(train, settings.vocab_size, max_seq_length=length, **common)
    else:
        tokenizer = load_tokenizer(settings.tokenizer_name)
    sequences = None
    if training_sequences:
        packed = prepare_tokens(train, tokenizer, length, description="Tokenizing training text", **common)
        _require_sequences(len(packed), training_sequences, length, train.origin)
        sequences = packed.in_order(settings.sequence_order)
    held_out = prepare_tokens(validation, tokenizer, length, description="Tokenizing validation text", **common)
    return MlmData(tokenizer, sequences, held_out, origin)


def _require_sequences(found: int, needed: int, length: int, origin: str) -> None:
    if found < needed:
        raise CorpusError(
            f"{origin} is too short: it has {found * length} tokens in whole sequences ({found} of {length} tokens), and "
            f"one batch of {needed} sequences needs {needed * length} ({needed} sequences). Give a larger corpus, or lower "
            "--max_seq_length, --per_device_train_batch_size or --gradient_accumulation_steps."
        )
