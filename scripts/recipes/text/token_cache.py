"""A corpus of any size as packed sequences in a file, made once and read through a memory map.

As in cramming: each document's tokens are followed by [SEP], there is no [CLS], sequences run on across documents, and the
remainder shorter than one sequence is dropped. Documents are streamed through normalization, the tokenizer and the filter
into one flat file of token ids; nothing else grows with the corpus but one number for each sequence.

    <cache folder>/tokens-<key>/     tokens.bin, order.npy, manifest.json (see `prepared_folders`)
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .cleaning import NO_CLEANING, Cleaning, normalize_text
from .documents import CorpusError, Document
from .prepared_folders import MANIFEST_FILE, DamagedFolderError, key, load_or_make, require_undamaged, write_manifest
from .streams import CorpusStream
from .tokenization import plain_encoder, works_wordwise

logger = logging.get_logger(__name__)

FORMAT = 2  # raise it when packed files or their manifest change: older caches are then rebuilt
TOKENS_FILE, ORDER_FILE = "tokens.bin", "order.npy"
ORDERS = ("published", "shuffled")

# For an estimate before the work: English in WordPiece has 0.2 to 0.25 tokens per character.
TOKENS_PER_CHARACTER = 0.25

SCAN_TOKENS = 2**20  # tokens per read in the pass over the finished file

# Long documents are encoded in pieces: threads share the work, and the encodings of one call (some 50 bytes for each
# character, before they become ids) stay within some 60 MB.
PIECE_CHARACTERS = 20_000
PIECES_PER_CALL = 64


class TokenCache:
    """Packed sequences in a file. Rows are read on demand; a pickled copy is only the name of the folder.

    Args:
        folder: As `prepare_tokens` made it.
        order: One of `ORDERS`. "published" numbers the sequences by their count of "." tokens, most first, ties as in the
            corpus; "shuffled" numbers them in the order of the corpus, for a batch order that shuffles.

    Attributes:
        tokens: Token ids, `(sequences, length)`, a read-only memory map, in the corpus's order.
        manifest: What made the cache and what it holds.

    Raises:
        FileNotFoundError: if the folder does not exist.
        DamagedFolderError: if a file is missing, unreadable or of the wrong size.
        CorpusError: for the published order where the tokenizer has no ".".
    """

    def __init__(self, folder: str | Path, order: str = "shuffled") -> None:
        self.folder, self.order = Path(folder), order
        self.manifest = _read_manifest(self.folder)
        shape = (self.manifest["sequences"], self.manifest["length"])
        self.tokens = np.memmap(self.folder / TOKENS_FILE, dtype=self.manifest["dtype"], mode="r", shape=shape)
        self._rows: NDArray[np.int64] | None = None
        if order == "published":
            if ORDER_FILE not in self.manifest["bytes"]:
                raise CorpusError(
                    'The published order counts "." tokens, and this tokenizer has none. Shuffle the sequences instead.'
                )
            self._rows = np.load(self.folder / ORDER_FILE, mmap_mode="r")

    @property
    def shape(self) -> tuple[int, int]:
        """`(sequences, length)`."""
        return self.tokens.shape

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.tokens.size

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs read the same sequences by the same numbers: a hash of shape and tokens, and the order."""
        return self.manifest["fingerprint"] + (f" in {self.order} order" if self.order != "shuffled" else "")

    def in_order(self, order: str) -> "TokenCache":
        """Return the same sequences numbered in another order."""
        return TokenCache(self.folder, order)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: ArrayLike | slice) -> NDArray[np.integer]:
        """Return a copy of the rows at `indices`, `(rows,)` integers or a slice, in this order: `(rows, length)`."""
        rows = np.arange(len(self))[indices] if isinstance(indices, slice) else np.asarray(indices)
        return np.array(self.tokens[rows if self._rows is None else self._rows[rows]])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.folder, self.order)


def prepare_tokens(
    stream: CorpusStream,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    cache_dir: str | Path,
    cleaning: Cleaning = NO_CLEANING,
    description: str = "Tokenizing",
    show_progress: bool = False,
) -> TokenCache:
    """Return the packed sequences of a corpus, from the cache if they are in it; only otherwise the stream is read.

    Args:
        tokenizer: A fast one with a separator token.
        max_seq_length: Tokens per sequence.
        cache_dir: The folder of all caches; made if it does not exist.
        description: The label of the progress bar.

    Raises:
        CorpusError: for a corpus that cannot be read or gives no sequence, too little disk space, or a folder that
            cannot be written.
    """
    encoder = plain_encoder(tokenizer)
    ingredients = {
        "format": FORMAT,
        "corpus": stream.ingredients,
        "cleaning": cleaning.ingredients(),
        "tokenizer": hashlib.sha256(encoder.to_str().encode()).hexdigest(),
        "tokenizers": tokenizers.__version__,
        "separator": tokenizer.sep_token_id,
        "max_seq_length": max_seq_length,
    }
    packer = _Packer(
        stream, encoder, tokenizer.sep_token_id, token_dtype(len(tokenizer)), cleaning, description, show_progress
    )

    def make(folder: Path) -> None:
        _require_space(folder, stream, packer.dtype.itemsize, max_seq_length)
        _write_cache(folder, packer, max_seq_length, _period(tokenizer), ingredients)

    folder = Path(cache_dir) / f"tokens-{key(ingredients)}"
    return load_or_make(folder, make, _load_sequences, f"the sequences of {stream.origin}")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and int32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        expected = manifest["bytes"]
        found = {name: (folder / name).stat().st_size for name in expected}
        tokens = manifest["sequences"] * manifest["length"] * np.dtype(manifest["dtype"]).itemsize
        str(manifest["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFolderError(f"{type(error).__name__}: {error}") from error
    if found != expected or found.get(TOKENS_FILE) != tokens:
        raise DamagedFolderError(f"the files have {found} bytes instead of {expected}")
    return manifest


def _load_sequences(folder: Path) -> TokenCache:
    cache = TokenCache(folder)
    require_undamaged(folder)
    return cache


# --- writing -----------------------------------------------------------------------------------------------------------


def text_pieces(text: str, cut: bool) -> Iterator[tuple[str, bool]]:
    """Cut a text, if it is long, after whitespace; yields each piece and whether it is the last one.

    Without `cut` it stays whole, for a tokenizer that does not work word by word.
    """
    start = 0
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


class _Piece(NamedTuple):
    text: str
    characters: int  # of the raw text, counted at a part's first piece
    last: bool  # of its document


class _Counts(NamedTuple):
    documents: int
    kept: int
    characters: int
    tokens: int


@dataclass(frozen=True)
class _Packer:
    """Writes a stream's tokens; holds no more than a few pieces of it at a time."""

    stream: CorpusStream
    encoder: tokenizers.Tokenizer
    separator: int
    dtype: np.dtype
    cleaning: Cleaning
    description: str
    show_progress: bool

    def write(self, file: BinaryIO) -> _Counts:
        """Write the token ids of all documents that are kept, each followed by the separator."""
        documents = kept = characters = 0
        start = position = 0  # in tokens: where the document begins, where the file ends
        raw = 0  # characters of the document so far
        separator = np.array([self.separator], self.dtype).tobytes()
        begun = time.perf_counter()
        with self._progress() as progress:
            for piece, ids in self._encoded():
                file.write(np.array(ids, self.dtype).tobytes())
                position += len(ids)
                raw += piece.characters
                characters += piece.characters
                if piece.last:
                    documents += 1
                    if self.cleaning.keeps(position - start, raw):
                        kept += 1
                        file.write(separator)
                        position += 1
                    else:  # how many tokens a document has shows only at its end: take it back
                        position = start
                        file.seek(start * self.dtype.itemsize)
                        file.truncate()
                    start, raw = position, 0
                    if not progress.disable:
                        speed = position / max(time.perf_counter() - begun, 1e-9)
                        progress.set_postfix_str(f"{documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
                progress.update(piece.characters)
        return _Counts(documents, kept, characters, position)

    def _progress(self) -> tqdm:
        total, disable = self.stream.characters, not self.show_progress
        return tqdm(total=total, desc=self.description, unit="char", unit_scale=True, disable=disable)

    def _encoded(self) -> Iterator[tuple[_Piece, list[int]]]:
        for chunk in _chunks(self._cleaned_pieces()):
            encodings = self.encoder.encode_batch_fast([piece.text for piece in chunk], add_special_tokens=False)
            yield from ((piece, encoding.ids) for piece, encoding in zip(chunk, encodings))

    def _cleaned_pieces(self) -> Iterator[_Piece]:
        wordwise = works_wordwise(self.encoder)
        documents = self.stream.documents()
        for part, final in _parts(documents if wordwise else _whole(documents)):
            characters = len(part.text)
            text = normalize_text(part.text) if self.cleaning.normalize else part.text
            for piece, last in text_pieces(text, wordwise):
                yield _Piece(piece, characters, last and final)
                characters = 0


def _chunks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Put pieces together for one call of the encoder, which bounds its memory: by their characters, for some are long."""
    chunk: list[_Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text)
        if len(chunk) >= PIECES_PER_CALL or characters >= PIECES_PER_CALL * PIECE_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _parts(documents: Iterator[Document]) -> Iterator[tuple[Document, bool]]:
    """Yield each part with whether it is its document's last: whether the next one bears another name."""
    part = next(documents, None)
    while part is not None:
        following = next(documents, None)
        yield part, following is None or following.name != part.name
        part = following


def _whole(documents: Iterable[Document]) -> Iterator[Document]:
    """Join the parts of each document, for a tokenizer that must see it whole."""
    for name, parts in groupby(documents, key=lambda document: document.name):
        yield Document(name, "".join(part.text for part in parts))


def _write_cache(
    folder: Path, packer: _Packer, length: int, period: int | None, ingredients: Mapping[str, Any]
) -> None:
    begun = time.perf_counter()
    with open(folder / TOKENS_FILE, "wb") as file:
        counts = packer.write(file)
        rows = counts.tokens // length
        file.truncate(rows * length * packer.dtype.itemsize)
        file.flush()
        os.fsync(file.fileno())
    if rows == 0:
        raise CorpusError(
            f"{packer.stream.origin} is too short: {counts.tokens} tokens in {counts.kept} documents kept of "
            f"{counts.documents}, less than one sequence of {length}. Give a larger corpus, or lower --max_seq_length."
        )
    fingerprint, periods = _scan(folder / TOKENS_FILE, packer.dtype, rows, length, period)
    if periods is not None:
        np.save(folder / ORDER_FILE, np.argsort(periods.max() - periods, kind="stable"))
    files = [TOKENS_FILE] if periods is None else [TOKENS_FILE, ORDER_FILE]
    content = {
        "sequences": rows,
        "length": length,
        "dtype": packer.dtype.str,
        "fingerprint": fingerprint,
        "bytes": {name: (folder / name).stat().st_size for name in files},
        "documents": counts.documents,
        "documents_kept": counts.kept,
        "characters": counts.characters,
        "tokens": counts.tokens,
        "ingredients": ingredients,
    }
    write_manifest(folder, files, content)
    logger.info(
        f"Packed {rows:,} sequences of {length} tokens from {counts.kept:,} of {counts.documents:,} documents "
        f"({counts.characters:,} characters) in {time.perf_counter() - begun:.0f} s."
    )


def _scan(
    path: Path, dtype: np.dtype, rows: int, length: int, period: int | None
) -> tuple[str, NDArray[np.unsignedinteger] | None]:
    """Return the fingerprint and each sequence's count of `period`, `(rows,)`, reading the file some rows at a time."""
    digest = hashlib.sha256(repr((rows, length)).encode())
    counts = None if period is None else np.empty(rows, np.min_scalar_type(length))
    step = max(SCAN_TOKENS // length, 1)
    with open(path, "rb") as file:
        for start in range(0, rows, step):
            block = np.fromfile(file, dtype, min(step, rows - start) * length).reshape(-1, length)
            digest.update(block.astype("<i4").tobytes())
            if counts is not None:
                counts[start : start + len(block)] = (block == period).sum(axis=1)
    return digest.hexdigest()[:16], counts


def _period(tokenizer: PreTrainedTokenizerBase) -> int | None:
    identifier = tokenizer.get_vocab().get(".")
    return None if identifier == tokenizer.unk_token_id else identifier


def _require_space(folder: Path, stream: CorpusStream, itemsize: int, length: int) -> None:
    if stream.characters is None:
        return
    order_bytes = np.dtype(np.int64).itemsize / length  # per token
    needed = stream.characters * TOKENS_PER_CHARACTER * (itemsize + order_bytes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CorpusError(
            f"Not enough disk space in {folder.parent}: the packed sequences of {stream.origin} need about "
            f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Free some, or choose another cache folder."
        )
