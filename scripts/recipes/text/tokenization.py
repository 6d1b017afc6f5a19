"""The tokenizer of a run: trained on its corpus and kept, or loaded."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .cleaning import NO_CLEANING, Cleaning
from .documents import CorpusError, Document
from .prepared_folders import DamagedFolderError, key, load_or_make, require_undamaged, write_manifest
from .streams import SAMPLE_CHARACTERS, CorpusStream, training_sample

logger = logging.get_logger(__name__)

FORMAT = 2  # raise it when the files of a kept tokenizer change: older ones are then rebuilt

# In BERT's names; [PAD] has id 0, as the model's padding_idx expects.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

CONTINUATION = "##"

# More characters without space or punctuation are not words (beyond 100, WordPiece reads [UNK]), and the trainer's time grows
# with their square.
LONGEST_WORD = 1000

# The trainer's own limit: rarer characters become [UNK] instead of filling the vocabulary.
MAX_ALPHABET = 1000

# Pre-tokenizers that drop whitespace and look at one word at a time, and normalizers that look at one character at a
# time: text may be cut after any space or line end. Others (ByteLevel, Metaspace) put spaces into tokens.
WORDWISE_PRE_TOKENIZERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
CHARACTERWISE_NORMALIZERS = frozenset({"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"})


def prepare_tokenizer(
    stream: CorpusStream,
    vocab_size: int,
    *,
    cache_dir: str | Path,
    cleaning: Cleaning = NO_CLEANING,
    max_seq_length: int = 512,
    sample_characters: int = SAMPLE_CHARACTERS,
    show_progress: bool = False,
) -> PreTrainedTokenizerBase:
    """Return a WordPiece tokenizer trained on (a sample of) a corpus, from the cache if it is in it.

    Args:
        stream: The training documents; read only if the cache does not hold the tokenizer.
        vocab_size: The largest size of the vocabulary.
        cleaning: Its normalization is applied before; nothing is filtered, which would need the tokenizer.
        max_seq_length: Stored as the tokenizer's `model_max_length`, in tokens.
        sample_characters: Train on at most this many characters, picked by `training_sample`.

    Raises:
        CorpusError: as in `prepare_tokens` and `train_wordpiece`.
    """
    ingredients = {
        "format": FORMAT,
        "corpus": stream.ingredients,
        "cleaning": cleaning.ingredients(),
        "tokenizers": tokenizers.__version__,
        "vocab_size": vocab_size,
        "sample_characters": sample_characters,
    }

    def make(folder: Path) -> None:
        read = 0

        def documents() -> Iterator[Document]:
            nonlocal read
            for document in training_sample(stream, sample_characters):
                read += len(document.text)
                yield replace(document, text=cleaning.apply(document.text))

        tokenizer = train_wordpiece(documents(), vocab_size, show_progress=show_progress)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, sorted(path.name for path in folder.iterdir()), {"ingredients": ingredients})
        logger.info(
            f"Trained a tokenizer of {len(tokenizer):,} tokens on {read:,} characters, spread over the corpus (at most "
            f"{sample_characters:,})."
        )

    def load(folder: Path) -> PreTrainedTokenizerBase:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        require_undamaged(folder)
        try:
            tokenizer = load_tokenizer(str(folder))
        except Exception as error:  # of whatever kind: `tokenizers` raises bare ones for a file it cannot parse
            raise DamagedFolderError(str(error)) from error
        tokenizer.model_max_length = max_seq_length
        return tokenizer

    folder = Path(cache_dir) / f"tokenizer-{key(ingredients)}"
    return load_or_make(folder, make, load, f"the tokenizer of {stream.origin}")


def train_wordpiece(
    documents: Iterable[Document],
    vocab_size: int,
    *,
    max_seq_length: int = 512,
    show_progress: bool = False,
) -> PreTrainedTokenizerBase:
    """Train an uncased BERT tokenizer: WordPiece over lowercased text without accents, split at punctuation.

    The same documents, which are read once, give the same vocabulary with the same ids. (The `tokenizers` trainer alone does
    not: it numbers the characters in the order of a hash table seeded per process, and breaks ties among merges by those
    numbers. Here both alphabets are counted first and handed to it in a fixed order.) A small corpus may give fewer tokens
    than `vocab_size`; `max_seq_length` is stored as the tokenizer's `model_max_length`.

    Raises:
        CorpusError: if the vocabulary is too small to hold the special tokens and the characters of the corpus.
    """
    normalizer = normalizers.BertNormalizer(clean_text=True, lowercase=True, strip_accents=True)
    words: Counter[str] = Counter()
    for document in tqdm(documents, desc="Counting words", unit="doc", disable=not show_progress):
        words.update(_words(normalizer.normalize_str(document.text)))
    alphabet, continuations = _alphabets(words)
    needed = len(SPECIAL_TOKENS) + len(alphabet) + len(continuations)
    if vocab_size < needed:
        raise CorpusError(
            f"--vocab_size {vocab_size} is too small: the special tokens and the characters of this corpus alone take "
            f"{needed}. Give at least {needed}; some thousands are usual."
        )

    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    # The trainer sees each word as often as it occurs, from the counts: the corpus is read and normalized once.
    tokenizer.train_from_iterator(_repeated(words), trainer)
    return BertTokenizer(
        vocab=tokenizer.get_vocab(with_added_tokens=True),
        do_lower_case=True,
        strip_accents=True,
        model_max_length=max_seq_length,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by its folder or Hub name.

    Raises:
        CorpusError: if it cannot be loaded, or lacks a mask, separator or padding token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise CorpusError(f"No tokenizer can be loaded from {name_or_path!r}: {error}") from error
    if not tokenizer.is_fast:
        raise CorpusError(
            f"The tokenizer of {name_or_path!r} is not a fast one; packing needs the `tokenizers` backend."
        )
    for role in ("mask_token", "sep_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise CorpusError(
                f"The tokenizer of {name_or_path!r} has no {role}, which masked-language modeling needs. "
                "Name another --tokenizer_name, or leave it out to train one."
            )
    return tokenizer


def _words(text: str) -> Iterator[str]:
    """Split at spaces; of longer runs, the words between their punctuation."""
    for word in text.split():
        if len(word) <= LONGEST_WORD:
            yield word
        else:
            pieces = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(word)
            yield from (piece for piece, _ in pieces if len(piece) <= LONGEST_WORD)


def _alphabets(words: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the characters that occur, and `##` with those that occur within a word, each in the order of code points."""
    characters: Counter[str] = Counter()
    within: set[str] = set()
    splitter = pre_tokenizers.BertPreTokenizer()
    for word, count in words.items():
        for character in word:
            characters[character] += count
        # Only words with punctuation are split further; asking the splitter for each word would take long.
        pieces = [word] if word.isalnum() else [piece for piece, _ in splitter.pre_tokenize_str(word)]
        within.update(character for piece in pieces for character in piece[1:])
    kept = sorted(characters, key=lambda character: (-characters[character], character))[:MAX_ALPHABET]
    return sorted(kept), [CONTINUATION + character for character in sorted(within.intersection(kept))]


def _repeated(words: Counter[str]) -> Iterator[str]:
    """Yield each word as often as it occurs, some thousands at a time."""
    at_once = 10_000
    for word, count in words.items():
        for start in range(0, count, at_once):
            yield f"{word} " * min(at_once, count - start)


def works_wordwise(encoder: Tokenizer) -> bool:
    """Say whether text that is cut after whitespace gives the tokens of the whole, for any text."""
    state = json.loads(encoder.to_str())
    splitting = _steps(state["pre_tokenizer"], "pretokenizers")
    normalizing = _steps(state["normalizer"], "normalizers")
    return bool(splitting) and splitting[0] in WORDWISE_PRE_TOKENIZERS and {*normalizing} <= CHARACTERWISE_NORMALIZERS


def _steps(component: dict | None, members: str) -> list[str]:
    """Return the kinds of a component's steps, of a sequence one by one."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component["type"]]
    return [kind for member in component[members] for kind in _steps(member, members)]


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the fast tokenizer's backend that neither truncates, pads nor recognizes special tokens."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # read "[MASK]" as text
    return encoder
