"""Which examples a step of fine-tuning reads: a pure function of (seed, epoch)."""

import numpy as np
from numpy.typing import NDArray

from ..run.randomness import Purpose, random_words

# Batches that are sorted by length together, as in transformers: many enough to save padding, few enough that examples keep
# meeting different ones.
BATCHES_PER_GROUP = 50

# Both permutations of an epoch, by their place in its stream of random numbers.
EXAMPLE_ORDER, BATCH_ORDER = 0, 1


def epoch_batches(
    lengths: NDArray[np.integer], batch_size: int, *, seed: int, epoch: int, group_by_length: bool = True
) -> list[NDArray[np.int64]]:
    """Return the batches of an epoch, each the indices of its examples; every example is in exactly one of them.

    `lengths` are in tokens, `(examples,)`; seed and epoch decide the order together with the rest. One batch is smaller where
    the size does not divide the examples.

    With `group_by_length` examples of similar length come together: some 50 batches are drawn at random, sorted by length and
    cut; the order of the batches is random again. Otherwise batches are drawn at random.
    """
    order = _permutation(seed, epoch, EXAMPLE_ORDER, len(lengths))
    if not group_by_length:
        return _cut(order, batch_size)
    batches: list[NDArray[np.int64]] = []
    for group in _cut(order, batch_size * BATCHES_PER_GROUP):
        batches += _cut(group[np.argsort(-lengths[group], kind="stable")], batch_size)
    return [batches[place] for place in _permutation(seed, epoch, BATCH_ORDER, len(batches))]


def _cut(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _permutation(seed: int, epoch: int, stream: int, count: int) -> NDArray[np.int64]:
    return np.argsort(random_words(seed, epoch, Purpose.BATCH_ORDER, stream, count), kind="stable")
