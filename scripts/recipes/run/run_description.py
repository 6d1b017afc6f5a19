"""What must be the same when a run is resumed: values for the description that checkpoints are compared by."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ..text.token_cache import TokenCache

ROWS_AT_ONCE = 2**16

# Where a model came from and what wrote it, not what it is. The dtype, which only loaded models have here, is compared for
# each tensor of a checkpoint.
BOOKKEEPING = ("transformers_version", "architectures", "_name_or_path", "dtype")


def sequences_fingerprint(sequences: NDArray[np.integer] | TokenCache) -> str:
    """Return a hash that tells whether two runs read the same sequences, `(rows, length)`, by the same numbers.

    The width of the integers does not count. A cache has its own, which is the same unless its numbering is another one.
    """
    if isinstance(sequences, TokenCache):
        own_order = sequences.order == "shuffled"
        return sequences.fingerprint if own_order else f"{sequences.fingerprint} in {sequences.order} order"
    digest = hashlib.sha256(repr(sequences.shape).encode())
    for start in range(0, len(sequences), ROWS_AT_ONCE):
        digest.update(np.ascontiguousarray(sequences[start : start + ROWS_AT_ONCE], dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


def model_description(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration, spectral settings included, that say which function it computes."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in BOOKKEEPING}
