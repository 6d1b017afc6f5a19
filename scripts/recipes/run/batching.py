"""Which sequences a step trains on: a pure function of (seed, position), whatever the number of processes.

Training reads one endless stream of sequences, pass after pass over the corpus; a step takes the next so many of it. So
batches may grow while training (the published ramp), runs with the same batch sizes see the same data on one process or on
many, and a resumed run continues from the position where it stopped without replaying anything.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .randomness import Purpose, random_words


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
    """The endless stream of sequences.

    Attributes:
        sequences: The number of sequences in the corpus, at least 1.
        seed: With the pass it decides the permutation.
        shuffle: False reads the corpus in its own order, in every pass.
    """

    sequences: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"A corpus of {self.sequences} sequences has no batches; it must have one or more.")

    def epochs(self, position: int) -> float:
        """Return how often the corpus has been read when `position` sequences of the stream have been."""
        return position / self.sequences

    def batch(self, position: int, count: int) -> Batch:
        """Return the `count` sequences of the stream from `position` (from 0) on."""
        epochs, places = np.divmod(np.arange(position, position + count), self.sequences)
        begins_pass = bool((places == 0).any())
        if not self.shuffle:
            return Batch(places, epochs, begins_pass)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = epoch_permutation(self.seed, int(epoch), self.sequences)[places[rows]]
        return Batch(indices, epochs, begins_pass)


@lru_cache(maxsize=2)  # a batch may lie across the end of a pass, whose permutations are sorted once each
def epoch_permutation(seed: int, epoch: int, sequences: int) -> NDArray[np.int64]:
    """Return the (read-only) permutation of `range(sequences)` that a pass follows."""
    words = random_words(seed, epoch, Purpose.BATCH_ORDER, 0, sequences)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation
