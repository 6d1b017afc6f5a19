"""Which sequences form which batch: a pure function of (seed, step), whatever the number of processes.

A step's global batch is cut among micro-batches and processes afterwards, so runs with the same global batch size see the
same data on one process or on many, and a resumed run continues where it stopped without replaying anything.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .randomness import Purpose, random_words


@dataclass(frozen=True)
class BatchOrder:
    """The order of batches over a corpus; the incomplete last batch of each epoch is left out.

    Attributes:
        sequences: The number of sequences in the corpus.
        global_batch_size: Sequences per optimizer step, over all processes and accumulation steps.
        seed: With the epoch it decides the permutation.
        shuffle: False reads the corpus in its own order, every epoch.
    """

    sequences: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.sequences < self.global_batch_size:
            raise ValueError(
                f"{self.sequences} sequences do not fill one global batch of {self.global_batch_size}; the batch must "
                "be at least 1 and at most the corpus."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Return how many whole batches an epoch has."""
        return self.sequences // self.global_batch_size

    def batch(self, step: int) -> tuple[NDArray[np.int64], int]:
        """Return the sequence indices, `(global_batch_size,)`, of optimizer step `step` (from 0), and its epoch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        stop = start + self.global_batch_size
        if not self.shuffle:
            return np.arange(start, stop), epoch
        return epoch_permutation(self.seed, epoch, self.sequences)[start:stop], epoch

    def local_batch(
        self, step: int, micro_step: int, micro_steps: int, rank: int, processes: int
    ) -> tuple[NDArray[np.int64], int]:
        """Return one process's share of one accumulation step: indices, `(per_device,)`, and the epoch."""
        indices, epoch = self.batch(step)
        return indices.reshape(micro_steps, processes, -1)[micro_step, rank], epoch


@lru_cache(maxsize=2)  # consecutive steps share an epoch, whose permutation is sorted once
def epoch_permutation(seed: int, epoch: int, sequences: int) -> NDArray[np.int64]:
    """Return the (read-only) permutation of `range(sequences)` that an epoch follows."""
    words = random_words(seed, epoch, Purpose.BATCH_ORDER, 0, sequences)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation
