"""What a step trains on: images, augmented and mixed, with soft targets; a pure function of (seed, position).

Training reads one endless stream of images, pass after pass over the data, as in `..batching`. The image at a position, how
it is augmented, and with which neighbor it is mixed depend on the seed and the position alone, so that a resumed run, one
with other workers, and one on several processes see the same batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..run.batching import BatchOrder
from ..run.command_line import flag
from ..run.randomness import Purpose
from .augmentation import Transform, restored_generators, seed_generators
from .image_sources import ImageSplit


@dataclass
class Mixing:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), through timm, and label smoothing, by flags.

    Each image is mixed with its neighbor in the stream, both with one share (timm's mode "pair", whose partners are the
    ends of a batch instead): so no process needs another one's images.
    """

    mixup: float = flag(0.0, "Alpha of mixup; 0: none.")
    cutmix: float = flag(0.0, "Alpha of CutMix; 0: none. With mixup, either per pair.")
    label_smoothing: float = flag(0.0, "Share of the target spread over all classes.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


def smooth_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return `(rows, classes)` target probabilities: `1 - smoothing` for the label, the rest spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


class TrainingImages(Dataset):
    """Batches by the places in the stream that they hold: positions in, `(images, targets)` out.

    Args:
        mode: PIL's, "L" or "RGB".
        transform: Of one image; it may draw from the global generators, and does if `is_random`.
        mixing: Of neighbors.
    """

    def __init__(
        self,
        split: ImageSplit,
        order: BatchOrder,
        mode: str,
        transform: Transform,
        is_random: bool,
        mixing: Mixing,
        classes: int,
    ) -> None:
        self.split, self.order, self.mode, self.transform, self.is_random = split, order, mode, transform, is_random
        self.smoothing, self.classes = mixing.label_smoothing, classes
        self.mixer = None
        if mixing.mixes:
            self.mixer = Mixup(
                mixing.mixup, mixing.cutmix, label_smoothing=mixing.label_smoothing, num_classes=classes
            )

    def __getitem__(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return images, `(rows, channels, height, width)`, and target probabilities, `(rows, classes)`."""
        images, epochs, repeats = self.order.rows(positions)
        with restored_generators():
            batch = torch.stack([self._image(*row) for row in zip(images.tolist(), epochs.tolist(), repeats.tolist())])
            labels = torch.from_numpy(self.split.labels[images])
            if self.mixer is None:
                return batch, smooth_targets(labels, self.classes, self.smoothing)
            return self._mix(batch, labels, positions)

    def _image(self, image: int, epoch: int, repeat: int) -> Tensor:
        if self.is_random:
            seed_generators(self.order.seed, epoch, Purpose.AUGMENTATION, image + repeat * self.order.sequences)
        return self.transform(self.split.load(image, self.mode))

    def _mix(self, batch: Tensor, labels: Tensor, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        assert self.mixer is not None
        targets = []
        for row in range(0, len(batch), 2):  # a batch begins at an even place and has an even length
            seed_generators(self.order.seed, 0, Purpose.IMAGE_MIXING, int(positions[row]) // 2)
            batch[row : row + 2], mixed = self.mixer(batch[row : row + 2], labels[row : row + 2])
            targets.append(mixed)
        return batch, torch.cat(targets)


class ValidationImages(Dataset):
    """Batches by the images that they hold: indices in, `(images, labels)` out."""

    def __init__(self, split: ImageSplit, mode: str, transform: Transform) -> None:
        self.split, self.mode, self.transform = split, mode, transform

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return images, `(rows, channels, height, width)`, and labels, `(rows,)`."""
        images = torch.stack([self.transform(self.split.load(index, self.mode)) for index in indices.tolist()])
        return images, torch.from_numpy(self.split.labels[indices])


class Batches(Sampler):
    """The places of each batch that one process reads, in order, from one optimizer step to before another.

    A step has `micro_steps` batches, one after another, each of which the processes share.
    """

    def __init__(self, begin: int, end: int, micro_steps: int, rank: int, processes: int, batch_size: int) -> None:
        self.micro_batches = range(begin * micro_steps, end * micro_steps)
        self.rank, self.processes, self.batch_size = rank, processes, batch_size

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for micro_batch in self.micro_batches:
            start = (micro_batch * self.processes + self.rank) * self.batch_size
            yield np.arange(start, start + self.batch_size)


def load_batches(dataset: Dataset, keys: Any, workers: int, pin_memory: bool = False) -> DataLoader:
    """Return a loader of the batches that `keys` name, read ahead in `workers` processes; 0 reads in this one.

    It draws nothing from the global generators.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
