"""What packing documents into sequences of equal length rests on: an encoder of plain text, and text in pieces for it.

As in cramming: each document's tokens are followed by [SEP], there is no [CLS], sequences run on across documents, and
the remainder shorter than one sequence is dropped. `token_cache` does it for corpora of any size.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .documents import CorpusError, Document

if TYPE_CHECKING:
    from .token_cache import TokenCache

# Long documents are encoded in pieces: threads share the work, and the encodings of one call (some 50 bytes for each
# character, before they become ids) stay within some 60 MB.
PIECE_CHARACTERS = 20_000
PIECES_PER_CALL = 64

# Pre-tokenizers that drop whitespace and look at one word at a time, and normalizers that look at one character at a
# time: text may be cut after any space or line end. Others (ByteLevel, Metaspace) put spaces into tokens.
WORDWISE_PRE_TOKENIZERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
CHARACTERWISE_NORMALIZERS = frozenset({"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"})


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and int32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def require_sequences(sequences: "NDArray[np.integer] | TokenCache", needed: int, source: str, purpose: str) -> None:
    """Raise `CorpusError` if there are fewer than `needed` packed sequences.

    Args:
        sequences: `(sequences, length)`.
        needed: How many rows the run needs at least.
        source: The corpus, for the message.
        purpose: What they are needed for, for the message, such as "one batch of 32 sequences".
    """
    rows, length = sequences.shape
    if rows < needed:
        raise CorpusError(
            f"{source} is too short: it has {rows * length} tokens in whole sequences ({rows} of {length} tokens), and "
            f"{purpose} needs {needed * length} ({needed} sequences). Give a larger corpus, or lower --max_seq_length, "
            "--per_device_train_batch_size or --gradient_accumulation_steps."
        )


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


def text_pieces(documents: Iterable[Document], cut: bool) -> Iterator[tuple[str, bool]]:
    """Cut long documents after whitespace; yields the text and whether it is the document's last piece.

    Args:
        documents: Read once.
        cut: False leaves documents whole, for a tokenizer that does not work word by word.
    """
    for document in documents:
        text, start = document.text, 0
        while cut and len(text) - start > PIECE_CHARACTERS:
            stop = start + PIECE_CHARACTERS
            end = (text.rfind("\n", start, stop) + 1) or (text.rfind(" ", start, stop) + 1)
            if end <= start:  # one word longer than a piece: take it whole
                found = [place + 1 for place in (text.find("\n", stop), text.find(" ", stop)) if place >= 0]
                end = min(found, default=len(text))
            if end == len(text):
                break
            yield text[start:end], False
            start = end
        yield text[start:], True


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the fast tokenizer's backend that neither truncates, pads nor recognizes special tokens."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # read "[MASK]" as text
    return encoder
