"""What a step trains on: pure functions of seed and place; images, boxes and masks augmented together."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from recipes.detection.coco_files import DetectionSplit
from recipes.detection.detection_batches import (
    CROP_SIDES,
    SHORT_SIDES,
    RandomCrop,
    TrainingExamples,
    training_transform,
    transformed,
    validation_batches,
)
from recipes.detection.shapes import shapes
from recipes.run.batching import BatchOrder


def example(height=300, width=400):
    """A bright rectangle on black, as image, box and mask."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[:, 60:200, 100:180] = 255
    target = {
        "boxes": torch.tensor([[100.0, 60.0, 180.0, 200.0]]),
        "labels": torch.tensor([2]),
        "masks": (pixels[:1] > 0).to(torch.uint8),
    }
    return pixels, target


def assert_consistent(image, target):
    """The box is that of the mask, and the mask that of the bright pixels, up to the pixels of an edge."""
    (mask,) = target["masks"]
    rows, columns = mask.nonzero(as_tuple=True)
    corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    torch.testing.assert_close(target["boxes"][0], corners.float(), atol=3, rtol=0)
    differing = (image[0] > 0.5) != mask.bool()
    assert differing.float().mean() < 0.03


@pytest.mark.parametrize("kind", ["none", "flip", "multi_scale"])
def test_image_box_and_mask_stay_together(kind):
    transform = training_transform(kind, 150, 180)
    mirrored = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = transformed(example(), transform)
        if not len(target["labels"]):  # cut away
            continue
        assert target["labels"].tolist() == [2]
        assert image.min() >= 0
        assert image.max() <= 1
        assert_consistent(image, target)
        mirrored.add(bool(target["boxes"][0, 0] > image.shape[-1] / 2))
        if kind != "multi_scale":
            assert tuple(image.shape) == (3, 135, 180)  # the long side decides
    assert mirrored == ({False} if kind == "none" else {False, True})


def test_multi_scale_is_the_published_one():
    transform = training_transform("multi_scale", 800, 1333)
    short, sides = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, _ = transformed(example(480, 640), transform)
        height, width = image.shape[-2:]
        assert max(height, width) <= 1333
        short.add(min(height, width))
        sides.add(round(width / height, 2))
    assert short <= {*SHORT_SIDES, *range(480, 801)}
    assert len(short & set(SHORT_SIDES)) > 5
    assert 1.33 in sides  # whole images
    assert len(sides) > 5  # and windows
    assert SHORT_SIDES == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def test_a_window_lies_inside_and_has_sides_of_the_range():
    crop = RandomCrop(*CROP_SIDES)
    for size in ((500, 700), (300, 450)):
        for seed in range(10):
            torch.manual_seed(seed)
            found = crop.make_params([torch.zeros(3, *size)])
            for side, start, taken in zip(size, (found["top"], found["left"]), (found["height"], found["width"])):
                assert 0 <= start <= side - taken
                assert min(384, side) <= taken <= min(600, side)


def test_objects_that_are_cut_away_are_left_out():
    class Corner(v2.Transform):
        def transform(self, inpt, params):
            return self._call_kernel(v2.functional.crop, inpt, 0, 0, 50, 50)

    image, target = transformed(example(), Corner())
    assert image.shape == (3, 50, 50)
    assert [len(target[name]) for name in ("boxes", "labels", "masks")] == [0, 0, 0]


def test_batches_are_a_function_of_seed_and_place():
    split = shapes("train")

    def read(seed, positions):
        torch.manual_seed(np.random.randint(1000))  # noqa: NPY002  whatever was drawn before does not count
        examples = TrainingExamples(split, BatchOrder(len(split), seed), training_transform("flip", 128, 128))
        state = torch.get_rng_state()
        images, targets = examples[np.array(positions)]
        assert torch.equal(torch.get_rng_state(), state)
        return images, targets

    images, targets = read(3, [398, 399, 400, 401])  # across the end of a pass
    again, _ = read(3, [400, 401])
    assert all(torch.equal(*pair) for pair in zip(images[2:], again))
    other, _ = read(4, [400, 401])
    assert not torch.equal(again[0], other[0])
    assert [set(target) for target in targets] == [{"boxes", "labels", "masks"}] * 4
    # Each image of a pass is read once, and half of them are mirrored.
    order = BatchOrder(len(split), 3)
    assert sorted(order.batch(0, 400).indices) == list(range(400))
    plain = [split.load(int(index))[0].float() / 255 for index in order.batch(0, 40).indices]
    seen = read(3, range(40))[0]
    mirrored = [torch.equal(image.flip(-1), original) for image, original in zip(seen, plain)]
    assert all(torch.equal(i, o) or m for i, o, m in zip(seen, plain, mirrored))
    assert 8 < sum(mirrored) < 32


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_several_processes_read_each_image_once(processes):
    split: DetectionSplit = shapes("validation").take(7)
    shares = [list(validation_batches(split, 2, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1  # as many forward passes
    counted = [number for share in shares for numbers, _, counts in share if counts for number in numbers]
    assert sorted(counted) == list(range(7))
