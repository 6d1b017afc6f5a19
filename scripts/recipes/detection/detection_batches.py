"""What a step trains on: images with boxes and masks, augmented; a pure function of (seed, place in the stream)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..images.augmentation import restored_generators, seed_generators
from ..run.batching import BatchOrder
from ..run.randomness import Purpose
from .coco_files import DetectionSplit, Example

AUGMENTATIONS = ("none", "flip", "multi_scale")
# Of the published detectors (XCiT's and Swin's configuration for mmdetection, after DETR), in pixels.
SHORT_SIDES = tuple(range(480, 801, 32))
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class RandomCrop(v2.Transform):
    """Cut out a window whose sides are drawn from a range; at most the image."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.query_size(flat_inputs)
        window = [_draw(min(side, self.least), min(side, self.most)) for side in sides]
        top, left = (_draw(0, side - taken) for side, taken in zip(sides, window))
        return {"top": top, "left": left, "height": window[0], "width": window[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


def _draw(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def training_transform(kind: str, min_size: int, max_size: int) -> v2.Transform:
    """Return the augmentation of images with boxes and masks; it draws from torch's global generator.

    Args:
        kind: "none" resizes as evaluation does; "flip" mirrors half of the images, too; "multi_scale" is the published one:
            mirror, then either resize to a random short side, or resize, cut out a window, and resize again.
        min_size, max_size: Of the short and the long side; multi_scale has its own short sides.
    """
    if kind != "multi_scale":
        resize = v2.RandomShortestSize([min_size], max_size=max_size)
        return resize if kind == "none" else v2.Compose([v2.RandomHorizontalFlip(), resize])
    resize = v2.RandomShortestSize(list(SHORT_SIDES), max_size=max_size)
    cropped = v2.Compose([v2.RandomShortestSize(list(SHORT_SIDES_BEFORE_CROP)), RandomCrop(*CROP_SIDES), resize])
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, cropped])])


def transformed(example: Example, transform: v2.Transform) -> Example:
    """Apply a transform; objects of which less than a pixel each way is left are left out."""
    pixels, target = example
    size = (pixels.shape[-2], pixels.shape[-1])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    image, boxes, masks = transform(tv_tensors.Image(pixels), boxes, tv_tensors.Mask(target["masks"]))
    boxes = F.clamp_bounding_boxes(boxes).as_subclass(Tensor)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    masks = masks.as_subclass(Tensor)[kept]
    return as_input(image.as_subclass(Tensor)), {
        "boxes": boxes[kept],
        "labels": target["labels"][kept],
        "masks": masks,
    }


def as_input(pixels: Tensor) -> Tensor:
    """Bytes as the numbers in [0, 1] that a detector reads."""
    return pixels.float() / 255


class TrainingExamples(Dataset):
    """Batches by the places in the stream that they hold."""

    def __init__(self, split: DetectionSplit, order: BatchOrder, transform: v2.Transform) -> None:
        self.split, self.order, self.transform = split, order, transform

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        rows = self.order.batch(int(positions[0]), len(positions))
        with restored_generators():
            examples = [self._example(*row) for row in zip(rows.indices.tolist(), rows.epochs.tolist())]
        return [image for image, _ in examples], [target for _, target in examples]

    def _example(self, index: int, epoch: int) -> Example:
        seed_generators(self.order.seed, epoch, Purpose.AUGMENTATION, index)
        return transformed(self.split.load(index), self.transform)


def validation_batches(
    split: DetectionSplit, batch_size: int, rank: int, processes: int
) -> Iterator[tuple[list[int], Batch, bool]]:
    """This process's share of the images: their numbers, the images with their objects, and whether they count.

    A process without a batch joins in with another one's, uncounted, because a wrapped model may communicate.
    """
    starts = list(range(0, len(split), batch_size))
    for turn in range(0, len(starts), processes):
        counts = turn + rank < len(starts)
        start = starts[turn + rank if counts else 0]
        numbers = list(range(start, min(start + batch_size, len(split))))
        examples = [split.load(number) for number in numbers]
        yield numbers, ([as_input(image) for image, _ in examples], [target for _, target in examples]), counts
