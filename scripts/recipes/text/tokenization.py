"""The tokenizer of a run: trained on its corpus, or loaded."""

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from .documents import CorpusError, Document

# In BERT's names; [PAD] has id 0, as the model's padding_idx expects.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

CONTINUATION = "##"

# More characters without space or punctuation are no word (beyond 100, WordPiece reads [UNK]), and the trainer's time grows
# with their square.
LONGEST_WORD = 1000

# The trainer's own limit: rarer characters become [UNK] instead of filling the vocabulary.
MAX_ALPHABET = 1000


def train_wordpiece(
    documents: Iterable[Document],
    vocab_size: int,
    *,
    max_seq_length: int = 512,
    show_progress: bool = False,
) -> PreTrainedTokenizerBase:
    """Train an uncased BERT tokenizer: WordPiece over lowercased text without accents, split at punctuation.

    The same documents give the same vocabulary with the same ids. (The `tokenizers` trainer alone does not: it numbers
    the characters in the order of a hash table seeded per process, and breaks ties among merges by those numbers. Here
    both alphabets are counted first and handed to it in a fixed order.)

    Args:
        documents: Read once.
        vocab_size: The largest size of the vocabulary; a small corpus may give fewer tokens.
        max_seq_length: Stored as the tokenizer's `model_max_length`, in tokens.
        show_progress: Whether to draw a progress bar.

    Returns:
        transformers' BERT tokenizer, whose pairs are `[CLS] A [SEP] B [SEP]`.

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
                f"The tokenizer of {name_or_path!r} has no {role}, which masked-language modelling needs. "
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
