"""GLUE's examples as token ids: made once, kept in a cache, and read as padded batches."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_specattn.files import write_bytes

from ..run.messages import one_line
from .glue_files import Examples, GlueDataError

logger = logging.get_logger(__name__)

FORMAT = 2  # raise it when the files of the cache change: older ones are then rebuilt
EXAMPLES_PER_CALL = 1000
LEAST_LENGTH = 8  # three special tokens, and something of each text

# Tensor cores want multiples of this; on a CPU padding is work like any other.
CUDA_MULTIPLE = 8


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples as flat arrays of token ids.

    Attributes:
        columns: Input name (`input_ids`, perhaps `token_type_ids`) -> `(tokens,)`, the examples one behind the other.
        offsets: `(examples + 1,)`, int64: example i is `columns[name][offsets[i] : offsets[i + 1]]`.
        labels, indices: As in `Examples`.
    """

    columns: dict[str, NDArray[np.integer]]
    offsets: NDArray[np.int64]
    labels: NDArray[Any] | None
    indices: Sequence[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, special ones included, `(examples,)`."""
        return np.diff(self.offsets)

    def rows(self, indices: Iterable[int]) -> dict[str, list[list[int]]]:
        """Return the inputs of some examples, by name, not padded."""
        spans = [(self.offsets[index], self.offsets[index + 1]) for index in indices]
        return {name: [values[start:end].tolist() for start, end in spans] for name, values in self.columns.items()}


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    empty_second: bool = False,
    show_progress: bool = False,
) -> TokenizedExamples:
    """Turn texts into token ids with special tokens, cut to `max_length` tokens (the longer text of a pair first).

    With `empty_second` a single text is fed as a pair with an empty second one, as Crammed BERT does:
    `[CLS] text [SEP] [SEP]`.

    Raises:
        GlueDataError: if the tokenizer drops an empty second text.
    """
    pairs = len(examples.texts[0]) == 2
    as_pairs = pairs or empty_second
    if empty_second and not pairs:
        _require_empty_seconds(tokenizer)
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    parts: dict[str, list[NDArray[np.integer]]] = {name: [] for name in names}
    lengths: list[int] = []
    with tqdm(total=len(examples), desc="Tokenizing", unit=" examples", disable=not show_progress, leave=False) as bar:
        for start in range(0, len(examples), EXAMPLES_PER_CALL):
            texts = examples.texts[start : start + EXAMPLES_PER_CALL]
            first = [text[0] for text in texts]
            second = [text[1] if pairs else "" for text in texts] if as_pairs else None
            # Always in batches: for one text, tokenizers of transformers take an empty second one for none.
            encoded = tokenizer(first, second, truncation=True, max_length=max_length, return_attention_mask=False)
            lengths += map(len, encoded["input_ids"])
            for name in names:
                parts[name].append(np.concatenate([np.asarray(row, dtype=np.int32) for row in encoded[name]]))
            bar.update(len(texts))
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    return TokenizedExamples(columns, np.cumsum([0, *lengths], dtype=np.int64), examples.labels, examples.indices)


def _require_empty_seconds(tokenizer: PreTrainedTokenizerBase) -> None:
    alone = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    pair = tokenizer(["a"], [""])["input_ids"][0]
    expected = len(alone) + tokenizer.num_special_tokens_to_add(pair=True)
    if len(pair) != expected:
        raise GlueDataError(
            f"{type(tokenizer).__name__} makes {len(pair)} tokens of a text with an empty second one, and a pair should have "
            f"{expected}. Give --protocol bert, which feeds single texts alone, or another tokenizer."
        )


def prepare_tokens(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: str | Path,
    name: str,
    *,
    empty_second: bool = False,
    show_progress: bool = False,
) -> Path:
    """Tokenize into the cache unless it is there already; returns the file for `load_tokens`.

    The arguments are those of `tokenize`. The file's name, which begins with `name`, says what made it, so that one folder
    serves all models and runs.

    Raises:
        GlueDataError: as `tokenize`, and if the cache cannot be written.
    """
    ingredients = [
        FORMAT,
        examples.fingerprint(),
        list(examples.indices),
        tokenizer_fingerprint(tokenizer),
        max_length,
        empty_second,
    ]
    key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{name}-{key}.npz"
    try:
        load_tokens(path)
        return path
    except FileNotFoundError:
        pass
    except GlueDataError:
        logger.warning(f"{path} is damaged and is rebuilt.")
    tokens = tokenize(examples, tokenizer, max_length, empty_second=empty_second, show_progress=show_progress)
    arrays: dict[str, NDArray[Any]] = {f"column.{name}": values for name, values in tokens.columns.items()}
    arrays |= {"offsets": tokens.offsets, "indices": np.asarray(tokens.indices, dtype=np.str_)}
    if tokens.labels is not None:
        arrays["labels"] = tokens.labels
    arrays["digest"] = _digest(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise GlueDataError(
            f"{path} cannot be written: {error}. Free some space, or choose another --cache_dir."
        ) from error
    return path


def load_tokens(path: str | Path) -> TokenizedExamples:
    """Read a file that `prepare_tokens` wrote.

    Raises:
        FileNotFoundError: where there is none.
        GlueDataError: for a damaged one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not np.array_equal(arrays.pop("digest"), _digest(arrays)):
            raise ValueError("it does not hold what was written")
        columns = {
            name.removeprefix("column."): values for name, values in arrays.items() if name.startswith("column.")
        }
        return TokenizedExamples(columns, arrays["offsets"], arrays.get("labels"), arrays["indices"].tolist())
    except FileNotFoundError:
        raise
    except Exception as error:  # of whatever kind an archive leads to
        raise GlueDataError(f"{path} is damaged: {one_line(error)}. Remove it; it is made again.") from error


def _digest(arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """A hash of names and contents: the archive's own checksums cover each array, and not which there are."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype.str}\0{arrays[name].shape}\0".encode() + arrays[name].tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides which ids a tokenizer makes of a text."""
    state: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "inputs": list(tokenizer.model_input_names),
        "truncation_side": tokenizer.truncation_side,
        "special": {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
        "tokenizers": tokenizers.__version__,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call.
        state["backend"] = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    else:
        state["vocabulary"] = sorted(tokenizer.get_vocab().items())
        state["arguments"] = sorted((name, str(value)) for name, value in tokenizer.init_kwargs.items())
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


class Collator:
    """Pads examples to the longest of their batch, with what and on which side the tokenizer says, on a device.

    Inputs that are not `accepted` by the model, such as token types, are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, accepted: Iterable[str], device: torch.device) -> None:
        self._pad = DataCollatorWithPadding(
            tokenizer, pad_to_multiple_of=CUDA_MULTIPLE if device.type == "cuda" else None
        )
        self._accepted = frozenset(accepted)
        self._device = device

    def __call__(self, examples: TokenizedExamples, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for some examples, each `(batch, longest)`, without labels."""
        columns = examples.rows(indices)
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        batch = self._pad(rows)
        return {name: values.to(self._device) for name, values in batch.items() if name in self._accepted}
