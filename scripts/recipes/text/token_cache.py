"""A corpus of any size as packed sequences in a file, made once and read through a memory map.

Documents are streamed through normalization, the tokenizer and the filter into one flat file of token ids; nothing
grows with the corpus but that file. The folder of a cache is named by a hash of everything that made it. It is made
under another name and renamed when it is complete, behind a lock, so that a process finds a whole cache or none, and no
two processes of a machine make the same one. What a killed process left behind is removed by the next.

    <cache folder>/tokens-<key>/     tokens.bin, order.npy, manifest.json
    <cache folder>/tokenizer-<key>/  a tokenizer trained on a corpus, manifest.json

The manifest has a checksum of every file. They are compared whenever a run asks for what is cached; what differs is made
again.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_specattn.files import CannotWriteError, cannot_be_written, checksum, require_writable, write_json

from ..run.messages import one_line
from .cleaning import NO_CLEANING, Cleaning
from .documents import CorpusError, Document
from .packing import PIECE_CHARACTERS, PIECES_PER_CALL, plain_encoder, text_pieces, token_dtype, works_wordwise
from .streams import SAMPLE_CHARACTERS, CorpusStream, training_sample
from .tokenization import load_tokenizer, train_wordpiece

logger = logging.get_logger(__name__)

FORMAT = 2  # raise it when packed files or their manifest change: older caches are then made anew
TOKENS_FILE, ORDER_FILE, MANIFEST_FILE = "tokens.bin", "order.npy", "manifest.json"
ORDERS = ("published", "shuffled")

# For an estimate before the work: English in WordPiece has 0.2 to 0.25 tokens per character.
TOKENS_PER_CHARACTER = 0.25

SCAN_TOKENS = 2**20  # tokens per read in the pass over the finished file

Loaded = TypeVar("Loaded")


class DamagedCacheError(ValueError):
    """A folder of the cache does not hold what its manifest says."""


# ------------------------------------------------------------------------------------------------- packed sequences


class TokenCache:
    """Packed sequences in a file. Rows are read on demand; a pickled copy is only the name of the folder.

    Args:
        folder: As `prepare_tokens` made it.
        order: "published" numbers the sequences by their count of "." tokens, most first, ties as in the corpus;
            "shuffled" numbers them as they stand in the corpus, for a batch order that shuffles.

    Attributes:
        tokens: Token ids, `(sequences, length)`, a read-only memory map, in the corpus's order.
        manifest: What made the cache and what it holds.

    Raises:
        FileNotFoundError: if the folder does not exist.
        DamagedCacheError: if a file is missing, unreadable or of the wrong size.
        CorpusError: for the published order where the tokenizer has no ".".
        ValueError: for an unknown order.
    """

    def __init__(self, folder: str | Path, order: str = "shuffled") -> None:
        if order not in ORDERS:
            raise ValueError(f"The order {order!r} is unknown; allowed are {', '.join(ORDERS)}.")
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
        """A hash of shape and tokens in the corpus's order, computed when they were written: 16 hexadecimal digits."""
        return self.manifest["fingerprint"]

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
    """Return the packed sequences of a corpus, from the cache if they are in it.

    They are those of `pack_documents` on the same (cleaned) documents, token for token.

    Args:
        stream: The documents; read only if the cache does not hold them.
        tokenizer: A fast tokenizer with a separator token.
        max_seq_length: Tokens per sequence.
        cache_dir: The folder of all caches; made if it does not exist.
        cleaning: Normalization and filter.
        description: The label of the progress bar.
        show_progress: Whether to draw it.

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

    folder = Path(cache_dir) / f"tokens-{_key(ingredients)}"
    return _load_or_make(folder, make, _load_sequences, f"the sequences of {stream.origin}")


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
        cache_dir: The folder of all caches; made if it does not exist.
        cleaning: Its normalization is applied before; nothing is filtered, which would need the tokenizer.
        max_seq_length: Stored as the tokenizer's `model_max_length`, in tokens.
        sample_characters: Train on so many characters at most, as `training_sample` picks them.
        show_progress: Whether to draw a progress bar.

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
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / MANIFEST_FILE, {"crc32": _checksums(folder, files), "ingredients": ingredients})
        logger.info(
            f"Trained a tokenizer of {len(tokenizer):,} tokens on {read:,} characters, spread over the corpus (at most "
            f"{sample_characters:,})."
        )

    def load(folder: Path) -> PreTrainedTokenizerBase:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        _require_undamaged(folder)
        try:
            tokenizer = load_tokenizer(str(folder))
        except Exception as error:  # of whatever kind: `tokenizers` raises bare ones for a file it cannot parse
            raise DamagedCacheError(str(error)) from error
        tokenizer.model_max_length = max_seq_length
        return tokenizer

    folder = Path(cache_dir) / f"tokenizer-{_key(ingredients)}"
    return _load_or_make(folder, make, load, f"the tokenizer of {stream.origin}")


# --------------------------------------------------------------------------------------------------------- writing


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
            for text, last in text_pieces([replace(part, text=self.cleaning.apply(part.text))], wordwise):
                yield _Piece(text, characters, last and final)
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
        _write_order(folder / ORDER_FILE, periods)
    files = [TOKENS_FILE] if periods is None else [TOKENS_FILE, ORDER_FILE]
    manifest = {
        "sequences": rows,
        "length": length,
        "dtype": packer.dtype.str,
        "fingerprint": fingerprint,
        "bytes": {name: (folder / name).stat().st_size for name in files},
        "crc32": _checksums(folder, files),
        "documents": counts.documents,
        "documents_kept": counts.kept,
        "characters": counts.characters,
        "tokens": counts.tokens,
        "ingredients": ingredients,
    }
    write_json(folder / MANIFEST_FILE, manifest)
    logger.info(
        f"Packed {rows:,} sequences of {length} tokens from {counts.kept:,} of {counts.documents:,} documents "
        f"({counts.characters:,} characters) in {time.perf_counter() - begun:.0f} s."
    )


def _scan(
    path: Path, dtype: np.dtype, rows: int, length: int, period: int | None
) -> tuple[str, NDArray[np.unsignedinteger] | None]:
    """Return the fingerprint and each sequence's count of `period`, `(rows,)`, reading the file some rows at a time."""
    # The same hash as of sequences in memory, so that losses compare whichever way the data was prepared.
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


def _write_order(path: Path, counts: NDArray[np.unsignedinteger]) -> None:
    """Write the indices that sort `counts`, largest first and ties in order: a counting sort, some at a time."""
    blocks = [(start, counts[start : start + SCAN_TOKENS]) for start in range(0, len(counts), SCAN_TOKENS)]
    values = int(counts.max()) + 1
    histogram = sum(np.bincount(block, minlength=values) for _, block in blocks)
    following = len(counts) - np.cumsum(histogram)  # where the next sequence with each count goes
    order = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=counts.shape)
    for start, block in blocks:
        ranked = np.argsort(block, kind="stable")
        ranked_counts, sizes = block[ranked], np.bincount(block, minlength=values)
        within = np.arange(len(block)) - (np.cumsum(sizes) - sizes)[ranked_counts]
        order[following[ranked_counts] + within] = start + ranked
        following += sizes
    order.flush()


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
            f"Too little disk space in {folder.parent}: the packed sequences of {stream.origin} need about "
            f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Free some, or name another cache folder."
        )


# ------------------------------------------------------------------------------------------------- the cache folder


def _key(ingredients: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:24]


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
        raise DamagedCacheError(f"{type(error).__name__}: {error}") from error
    if found != expected or found.get(TOKENS_FILE) != tokens:
        raise DamagedCacheError(f"the files have {found} bytes instead of {expected}")
    return manifest


def _load_sequences(folder: Path) -> TokenCache:
    cache = TokenCache(folder)
    _require_undamaged(folder)
    return cache


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: checksum(folder / name) for name in names}


def _require_undamaged(folder: Path) -> None:
    """Compare every file with its checksum in the manifest; a copy to a worker process does not.

    Raises:
        DamagedCacheError: naming the first file that is not the one that was written.
    """
    try:
        expected = dict(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["crc32"])
        different = [name for name, value in expected.items() if checksum(folder / name) != value]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCacheError(one_line(error)) from error
    if different or not expected:
        raise DamagedCacheError(f"{', '.join(different) or MANIFEST_FILE} is not what was written")


def _load_or_make(folder: Path, make: Callable[[Path], None], load: Callable[[Path], Loaded], content: str) -> Loaded:
    """Return `load(folder)`, after `make` filled the folder where it does not exist or is damaged."""
    try:
        return load(folder)
    except (FileNotFoundError, DamagedCacheError):
        pass  # another process may be making it: look again behind the lock
    try:
        require_writable(folder.parent, "The folder of prepared data (--cache_dir, or below HF_HOME),")
    except CannotWriteError as error:
        raise CorpusError(str(error)) from error
    with _write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, content):
            try:
                return load(folder)
            except FileNotFoundError:
                pass
            except DamagedCacheError as error:
                logger.warning(f"{folder} is damaged ({error}); it is made again.")
                shutil.rmtree(folder)
            _remove_leftovers(folder.parent)
            _make_whole(folder, make)
    return load(folder)


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path, content: str) -> Iterator[None]:
    lock = FileLock(_lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another process prepares {content}; waiting until it is done.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what is half made and whose maker no longer holds its lock: it was killed."""
    for partial in cache_dir.glob(_partial(Path("*")).name):
        lock = FileLock(_lock_file(cache_dir / partial.stem.removeprefix(".")))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def _write_errors(cache_dir: Path) -> Iterator[None]:
    """Turn the system's errors that a user can mend into `CorpusError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorpusError(
                f"The disk of {cache_dir} is full ({error.strerror}); what was half made is removed. Free some space, or "
                "name another cache folder."
            ) from error
        # Of the cache, whatever it is, or of a disk; and not of the corpus.
        if str(error.filename or "").startswith(str(cache_dir)) or cannot_be_written(error):
            raise CorpusError(f"{cache_dir} cannot be written: {error}. Name another cache folder.") from error
        raise
