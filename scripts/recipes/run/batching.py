"""Which sequences a step trains on: a pure function of (seed, position), whatever the number of processes.

Training reads one endless stream of sequences, pass after pass over the corpus; a step takes the next ones. So batches
may grow during training (the published ramp), runs with the same batch sizes see the same data on one process or on
many, and a resumed run continues from the position where it stopped without replaying anything.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .randomness import Purpose, random_words

# So far apart are the copies of a sample: images that are mixed are never copies of each other, and a batch that is larger by
# the repeats has them all.
REPEATED_BLOCK = 256


@dataclass(frozen=True)
class Batch:
    """Sequences of the stream, `(rows,)` each.

    Attributes:
        indices: Which sequences of the corpus, int64.
        epochs: In which pass over the corpus (from 0) each one is read, int64.
        begins_pass: Whether the first sequence of a pass is among them.
    """

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    begins_pass: bool = False

    def share(self, micro_step: int, micro_steps: int, rank: int, processes: int) -> "Batch":
        """Return one process's rows of one accumulation step; `micro_steps * processes` must divide the rows."""
        indices, epochs = (
            rows.reshape(micro_steps, processes, -1)[micro_step, rank] for rows in (self.indices, self.epochs)
        )
        return Batch(indices, epochs)


@dataclass(frozen=True)
class BatchOrder:
    """The endless stream of samples.

    With repeats a pass reads only that share of the samples, each one `repeats` times, `REPEATED_BLOCK` places apart.

    Attributes:
        sequences: The number of samples, sequences or images, at least 1.
        seed: With the pass it decides the permutation.
        shuffle: False reads them in their own order, in every pass.
        repeats: Of each sample within a pass, at least 1.
    """

    sequences: int
    seed: int
    shuffle: bool = True
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.repeats < 1:
            raise ValueError(
                f"There is no order of {self.sequences} sequences, each {self.repeats} times; both must be at least 1."
            )

    def epochs(self, position: int) -> float:
        """Return how many passes were made when `position` samples of the stream have been read."""
        return position / self.sequences

    def batch(self, position: int, count: int) -> Batch:
        """Return the `count` samples of the stream from `position` (from 0) on."""
        positions = np.arange(position, position + count)
        indices, epochs, _ = self.rows(positions)
        return Batch(indices, epochs, bool((positions % self.sequences == 0).any()))

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return `(indices, epochs, repeats)` of places in the stream, each `(rows,)`, int64, all counted from 0."""
        epochs, places = np.divmod(positions, self.sequences)
        block = min(REPEATED_BLOCK, self.sequences)
        blocks, within = np.divmod(places, block * self.repeats)
        repeats, ranks = np.divmod(within, block)
        ranks += blocks * block
        if not self.shuffle:
            return ranks, epochs, repeats
        indices = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = epoch_permutation(self.seed, int(epoch), self.sequences)[ranks[rows]]
        return indices, epochs, repeats


@lru_cache(maxsize=2)  # a batch may lie across the end of a pass, whose permutations are sorted once each
def epoch_permutation(seed: int, epoch: int, sequences: int) -> NDArray[np.int64]:
    """Return the (read-only) permutation of `range(sequences)` that a pass follows."""
    words = random_words(seed, epoch, Purpose.BATCH_ORDER, 0, sequences)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation
