"""From an image to the tensor a model reads, for training and for validation, from the parts of timm and torchvision.

The transforms draw from the global random number generators of Python, NumPy and torch. `reproducible` sets all three
from the words of our own generator while an image is prepared, so that what is drawn is a function of (seed, epoch, image)
alone, and puts them back.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from ..run.command_line import flag
from ..run.randomness import Purpose, random_words

Transform = Callable[[Image.Image], Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = (0.5,), (0.5,)


@dataclass
class Augmentation:
    """What training does to an image, by flags; nothing by default, for the digits fill their eight pixels."""

    random_resized_crop: float | None = flag(
        None, "Random crops of at least this share of the area, resized. None: no crops."
    )
    random_shift: int = flag(0, "Shift by up to this many pixels in each direction.")
    horizontal_flip: float = flag(0.0, "Probability of mirroring an image.")
    rand_augment: str | None = flag(None, "RandAugment, in timm's notation: rand-m9-mstd0.5-inc1. None: none.")
    random_erasing: float = flag(0.0, "Probability of erasing a rectangle.")
    repeated_augmentation: int = flag(
        1, "Read each image of a pass this many times, with new augmentation each time; a pass then has fewer images."
    )

    @property
    def is_random(self) -> bool:
        """Whether the same image comes out differently each time."""
        chances = self.random_shift or self.horizontal_flip or self.random_erasing
        return bool(chances or self.rand_augment or self.random_resized_crop is not None)


def normalization(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that pixel values in [0, 1] are normalized by: ImageNet's, or 0.5 for gray."""
    return (GRAY_MEAN, GRAY_STD) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)


def training_transform(
    augmentation: Augmentation, size: int, mean: Sequence[float], std: Sequence[float], crop_share: float = 1.0
) -> Transform:
    """Return the function from an image to a `(channels, size, size)` tensor, augmented.

    In the order of timm's training: crop, mirror, RandAugment, normalize (by a mean and deviation for each channel), erase.
    Without a random crop the middle is taken as in `evaluation_transform`.

    Raises:
        ValueError: for a policy that timm does not know.
    """
    steps: list[Callable] = []
    if augmentation.random_resized_crop is None:
        steps += resizing(size, len(mean), crop_share)
    else:
        scale = (augmentation.random_resized_crop, 1.0)
        steps.append(RandomResizedCropAndInterpolation(size, scale=scale, interpolation="bicubic"))
    if augmentation.random_shift:
        steps.append(transforms.RandomCrop(size, padding=augmentation.random_shift))
    if augmentation.horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip(augmentation.horizontal_flip))
    if augmentation.rand_augment is not None:
        steps.append(_rand_augment(augmentation.rand_augment, size, mean))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augmentation.random_erasing:
        steps.append(RandomErasing(augmentation.random_erasing, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def evaluation_transform(size: int, mean: Sequence[float], std: Sequence[float], crop_share: float = 1.0) -> Transform:
    """Return the function from an image to a `(channels, size, size)` tensor, without chance.

    The shorter side is resized to `size / crop_share`, then the middle is taken.
    """
    return transforms.Compose(
        [*resizing(size, len(mean), crop_share), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


def resizing(size: int, channels: int, crop_share: float) -> list[Callable]:
    """Return timm's steps that resize an image and take its middle; one of the right size they leave as it is."""
    whole = create_transform((channels, size, size), interpolation="bicubic", crop_pct=crop_share)
    return [step for step in whole.transforms if isinstance(step, (transforms.Resize, transforms.CenterCrop))]


def _rand_augment(policy: str, size: int, mean: Sequence[float]) -> Callable:
    # As timm's `create_transform` sets them: shifts up to 0.45 of the size, holes filled with the mean.
    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams = {"translate_const": int(size * 0.45), "img_mean": fill if len(fill) == 3 else fill[0]}
    try:
        if not policy.startswith("rand"):
            raise ValueError("its name does not begin with 'rand'")
        return rand_augment_transform(policy, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"--rand_augment {policy!r} is not a RandAugment policy of timm ({error}); give one such as rand-m9-mstd0.5-inc1."
        ) from error


@contextmanager
def restored_generators() -> Iterator[None]:
    """Put the global random number generators of Python, NumPy and torch (CPU) back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  transforms draw from it
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_generators(seed: int, epoch: int, purpose: Purpose, index: int) -> None:
    """Set the global generators from the place where they are used; call it within `restored_generators`."""
    first, second, third = random_words(seed, epoch, purpose, index, 3).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)  # noqa: NPY002
    # Not torch.manual_seed, which would set the GPU's generators too.
    torch.default_generator.manual_seed(third % 2**63)
