"""Documents to one stream of tokens, cut into sequences of equal length.

As in cramming: each document's tokens are followed by [SEP], there is no [CLS], sequences run on across documents, and
the remainder shorter than one sequence is dropped.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .documents import CorpusError, Document

# Long documents are encoded in pieces: threads share the work, and the encodings of one call (some 50 bytes for each
# character, before they become ids) stay within some 60 MB.
PIECE_CHARACTERS = 20_000
PIECES_PER_CALL = 64


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and int32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def pack_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    description: str = "Tokenizing",
    show_progress: bool = False,
) -> NDArray[np.integer]:
    """Tokenize and pack documents.

    Text that spells a special token, such as "[MASK]", is tokenized as ordinary text.

    Args:
        documents: Read in order, once.
        tokenizer: A fast tokenizer with a separator token.
        max_seq_length: Tokens per sequence.
        description: The label of the progress bar.
        show_progress: Whether to draw a progress bar.

    Returns:
        Token ids, `(sequences, max_seq_length)`, of `token_dtype`; no row if the text is too short for one.
    """
    dtype = token_dtype(len(tokenizer))
    separator = np.array([tokenizer.sep_token_id], dtype=dtype)
    parts: list[NDArray] = []
    total = sum(len(document.text) for document in documents)
    with tqdm(total=total, desc=description, unit="char", unit_scale=True, disable=not show_progress) as progress:
        encoder = _plain_encoder(tokenizer)
        pieces = _pieces(documents)
        while chunk := list(islice(pieces, PIECES_PER_CALL)):
            encodings = encoder.encode_batch_fast([text for text, _ in chunk], add_special_tokens=False)
            for (text, last), encoding in zip(chunk, encodings):
                parts.append(np.array(encoding.ids, dtype=dtype))
                if last:
                    parts.append(separator)
                progress.update(len(text))
    stream = np.concatenate(parts) if parts else np.empty(0, dtype)
    rows = len(stream) // max_seq_length
    return stream[: rows * max_seq_length].reshape(rows, max_seq_length)


def require_sequences(sequences: NDArray[np.integer], needed: int, source: str, purpose: str) -> None:
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


def _pieces(documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """Cut long documents at line ends; yields the text and whether it is the document's last piece."""
    for document in documents:
        start = 0
        while len(document.text) - start > PIECE_CHARACTERS:
            cut = document.text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
            if cut <= start:  # one line longer than a piece: take it whole, a word must not be cut
                cut = document.text.find("\n", start) + 1 or len(document.text)
            if cut == len(document.text):
                break
            yield document.text[start:cut], False
            start = cut
        yield document.text[start:], True


def _plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the fast tokenizer's backend that neither truncates, pads nor recognizes special tokens."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # read "[MASK]" as text
    return encoder
