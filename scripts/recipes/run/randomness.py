"""Random numbers that are a pure function of where they are used: (seed, epoch, purpose, index).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): any point of
its stream is reached at once, so no state is kept, saved or restored, and nothing depends on what was drawn before. Only
raw 64-bit words are drawn: NumPy guarantees the stream of a bit generator for good, but not how `Generator` turns it into
permutations and floats.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """One number per use of randomness, so that two uses never read the same part of the stream."""

    BATCH_ORDER = 0
    MASKING = 1
    AUGMENTATION = 2
    IMAGE_MIXING = 3
    DATA_SPLIT = 4


def random_words(seed: int, epoch: int, purpose: Purpose, index: int, count: int) -> NDArray[np.uint64]:
    """Return `count` uniform 64-bit words, a function of the arguments before it; a longer draw begins with a shorter."""
    key = np.array([seed, epoch], dtype=np.uint64)
    # The generator counts up in the first word; with the others fixed, streams cannot meet within 2**64 blocks.
    counter = np.array([0, 0, purpose, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
