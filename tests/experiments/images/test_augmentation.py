import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from transformers import AutoImageProcessor

from recipes.images.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    evaluation_transform,
    normalization,
    restored_generators,
    seed_generators,
    training_transform,
)
from recipes.images.image_models import image_processor
from recipes.run.randomness import Purpose

STRONG = Augmentation(0.3, 0, 0.5, "rand-m9-mstd0.5-inc1", 0.9)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))


def prepared(transform, image, epoch=0, index=0):
    with restored_generators():
        seed_generators(7, epoch, Purpose.AUGMENTATION, index)
        return transform(image)


def test_augmentation_is_a_function_of_seed_epoch_and_index(image):
    transform = training_transform(STRONG, 32, IMAGENET_MEAN, IMAGENET_STD)
    first = prepared(transform, image, 3, 5)
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002  what others draw does not matter
    assert torch.equal(prepared(transform, image, 3, 5), first)
    assert not torch.equal(prepared(transform, image, 3, 6), first)
    assert not torch.equal(prepared(transform, image, 4, 5), first)


def test_the_global_generators_are_put_back(image):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    transform = training_transform(STRONG, 32, IMAGENET_MEAN, IMAGENET_STD)
    with restored_generators():
        expected = draws()
    prepared(transform, image)
    assert draws() == expected


def test_validation_is_timms(image):
    ours = evaluation_transform(24, IMAGENET_MEAN, IMAGENET_STD, 0.875)(image)
    theirs = create_transform(
        (3, 24, 24), interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=0.875
    )
    assert torch.equal(ours, theirs(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_saved_processor_prepares_images_of_the_right_size_as_validation_does(image, tmp_path, channels):
    mean, std = normalization(channels)
    picture = image.resize((16, 16)).convert("L" if channels == 1 else "RGB")
    image_processor(16, mean, std, 1.0).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(picture, return_tensors="pt", input_data_format="channels_last" if channels == 3 else None)
    torch.testing.assert_close(
        pixels["pixel_values"][0], evaluation_transform(16, mean, std)(picture), atol=1e-5, rtol=1e-5
    )


def test_shifts_move_the_image_and_bring_in_black():
    gray = Image.fromarray(np.full((8, 8), 255, np.uint8))
    transform = training_transform(Augmentation(random_shift=1), 8, (0.0,), (1.0,))
    seen = {tuple(transform(gray)[0].sum(0).tolist()) + tuple(transform(gray)[0].sum(1).tolist()) for _ in range(60)}
    columns = [transform(gray)[0] for _ in range(60)]
    assert {int(8 - column.amax(0).sum()) for column in columns} == {0, 1}
    assert len(seen) > 4
    assert all(set(column.unique().tolist()) <= {0.0, 1.0} for column in columns)


def test_erasing_and_mirroring_happen_as_often_as_asked(image):
    square = image.resize((16, 16))
    plain = training_transform(Augmentation(), 16, IMAGENET_MEAN, IMAGENET_STD)(square)
    always = training_transform(Augmentation(horizontal_flip=1.0), 16, IMAGENET_MEAN, IMAGENET_STD)(square)
    assert torch.equal(always, plain.flip(-1))
    erase = training_transform(Augmentation(random_erasing=0.25), 16, IMAGENET_MEAN, IMAGENET_STD)
    changed = sum(not torch.equal(erase(square), plain) for _ in range(400))
    assert 60 < changed < 140  # 100 expected, deviation 9


def test_gray_images_take_rand_augment():
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    transform = training_transform(Augmentation(rand_augment="rand-m9-mstd0.5-inc1"), 8, *normalization(1))
    tensors = [transform(gray) for _ in range(40)]
    assert all(tensor.shape == (1, 8, 8) and tensor.isfinite().all() for tensor in tensors)
    assert len({tensor.sum().item() for tensor in tensors}) > 5


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="--rand_augment 'autumn'"):
        training_transform(Augmentation(rand_augment="autumn"), 8, *normalization(3))
