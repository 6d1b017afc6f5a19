from collections import Counter

import numpy as np
import pytest
import torch

from recipes.images.augmentation import Augmentation, normalization, training_transform
from recipes.images.image_batches import (
    Batches,
    Mixing,
    TrainingImages,
    load_batches,
    smooth_targets,
)
from recipes.images.image_sources import ArrayImages, ImageSplit
from recipes.run.batching import REPEATED_BLOCK, BatchOrder, epoch_permutation


@pytest.fixture
def split():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 6)).astype(np.uint8)
    return ImageSplit(ArrayImages(pixels, "test"), np.arange(20) % 4, "abc")


def training_images(split, mixing=Mixing(), repeats=1, shift=1):  # noqa: B008  frozen
    augmentation = Augmentation(random_shift=shift)
    transform = training_transform(augmentation, 6, *normalization(1))
    order = BatchOrder(len(split), seed=3, repeats=repeats)
    return TrainingImages(split, order, "L", transform, augmentation.is_random, mixing, classes=4)


def test_each_pass_reads_each_image_once():
    order = BatchOrder(20, seed=3)
    images, epochs, repeats = order.rows(np.arange(50))
    assert sorted(images[:20]) == sorted(images[20:40]) == list(range(20))
    assert images[:20].tolist() == epoch_permutation(3, 0, 20).tolist() != images[20:40].tolist()
    assert epochs.tolist() == [0] * 20 + [1] * 20 + [2] * 10
    assert not repeats.any()
    assert order.epochs(50) == 2.5


@pytest.mark.parametrize("images", [50, 3000])
def test_repeated_augmentation_reads_a_share_of_the_images_several_times(images):
    order = BatchOrder(images, seed=3, repeats=3)
    read, epochs, repeats = order.rows(np.arange(images))
    counts = Counter(read.tolist())
    assert max(counts.values()) <= 3
    assert Counter(counts.values())[3] >= images // 3 - REPEATED_BLOCK
    assert len({*zip(read.tolist(), repeats.tolist())}) == images  # no augmentation twice
    assert (read[0:-1:2] != read[1::2]).all()  # partners in mixing are other images
    assert not epochs.any()


def test_batches_do_not_depend_on_how_they_are_cut(split):
    images = training_images(split, Mixing(mixup=0.8, cutmix=1.0, label_smoothing=0.1))
    whole = images[np.arange(8, 24)]
    parts = [images[np.arange(start, start + 4)] for start in range(8, 24, 4)]
    for side in (0, 1):
        assert torch.equal(torch.cat([part[side] for part in parts]), whole[side])
    assert not torch.equal(images[np.arange(28, 44)][0], whole[0])  # the next pass


@pytest.mark.parametrize(("processes", "micro_steps"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulation_share_the_same_batches(processes, micro_steps):
    batch_size = 16 // processes // micro_steps
    shares = [list(Batches(2, 4, micro_steps, rank, processes, batch_size)) for rank in range(processes)]
    for step in (0, 1):
        rows = [row for share in shares for row in share[step * micro_steps : (step + 1) * micro_steps]]
        assert sorted(np.concatenate(rows)) == list(range(32 + 16 * step, 48 + 16 * step))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_order_and_draws_nothing(split, workers):
    images = training_images(split)
    keys = Batches(1, 4, 1, 0, 1, 4)
    state = torch.get_rng_state()
    loaded = list(load_batches(images, keys, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loaded) == len(keys) == 3
    for (pixels, targets), positions in zip(loaded, keys):
        expected = images[positions]
        assert torch.equal(pixels, expected[0])
        assert torch.equal(targets, expected[1])


def test_unmixed_targets_are_smoothed_labels(split):
    _, targets = training_images(split, Mixing(label_smoothing=0.2))[np.arange(5)]
    labels = split.labels[BatchOrder(20, 3).rows(np.arange(5))[0]]
    expected = np.full((5, 4), 0.05)
    expected[np.arange(5), labels] += 0.8
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert torch.equal(smooth_targets(torch.tensor([1]), 4, 0.0), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_mixup_is_a_convex_combination_of_neighbors_with_targets_to_match(split):
    positions = np.arange(12)
    plain, labels = training_images(split, shift=0)[positions]
    mixed, targets = training_images(split, Mixing(mixup=0.8), shift=0)[positions]
    partners = np.arange(12) ^ 1
    for row in range(0, 12, 2):
        other = partners[row]
        difference = plain[row] - plain[other]
        share = ((mixed[row] - plain[other]) * difference).sum() / difference.square().sum()
        assert 0 <= share <= 1
        for one, two in ((row, other), (other, row)):  # both with one share
            torch.testing.assert_close(mixed[one], share * plain[one] + (1 - share) * plain[two], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                targets[one], share * labels[one] + (1 - share) * labels[two], atol=1e-5, rtol=0
            )


def test_cutmix_takes_each_pixel_from_one_of_two(split):
    positions = np.arange(12)
    plain, labels = training_images(split, shift=0)[positions]
    mixed, targets = training_images(split, Mixing(cutmix=1.0), shift=0)[positions]
    taken = 0
    for row in range(12):
        own = mixed[row] == plain[row]
        assert (own | (mixed[row] == plain[row ^ 1])).all()
        share = own.float().mean()
        taken += int(share < 1)
        if not torch.equal(labels[row], labels[row ^ 1]):
            expected = share * labels[row] + (1 - share) * labels[row ^ 1]
            torch.testing.assert_close(targets[row], expected, atol=0.06, rtol=0)  # equal pixels count as one's own
    assert taken >= 4
