import numpy as np
import pytest

from recipes.glue.glue_batches import BATCHES_PER_GROUP, epoch_batches

LENGTHS = np.random.default_rng(0).integers(3, 129, 1003)


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize(("count", "size"), [(1003, 16), (1003, 1), (1, 16), (16, 16), (17, 16), (1003, 2000)])
def test_every_example_is_in_exactly_one_batch(group_by_length, count, size):
    batches = epoch_batches(LENGTHS[:count], size, seed=0, epoch=0, group_by_length=group_by_length)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = sorted(map(len, batches))
    assert sizes[1:] == [min(size, count)] * (len(batches) - 1)
    assert sizes[0] == (count - 1) % size + 1


@pytest.mark.parametrize("group_by_length", [True, False])
def test_the_order_is_a_pure_function_of_seed_and_epoch(group_by_length):
    def order(seed, epoch):
        batches = epoch_batches(LENGTHS, 16, seed=seed, epoch=epoch, group_by_length=group_by_length)
        return [batch.tolist() for batch in batches]

    assert order(3, 1) == order(3, 1)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def padded_share(batches):
    longest = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - LENGTHS.sum() / longest


def test_grouping_saves_padding_and_keeps_the_order_random():
    grouped = epoch_batches(LENGTHS, 16, seed=0, epoch=0)
    random = epoch_batches(LENGTHS, 16, seed=0, epoch=0, group_by_length=False)
    assert padded_share(grouped) < 0.05 < 0.3 < padded_share(random)
    # Neither lengths nor examples follow their order: correlations of 63 batches and 1003 examples with it.
    longest = [LENGTHS[batch].max() for batch in grouped]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4
    assert abs(np.corrcoef(np.concatenate(grouped), np.arange(1003))[0, 1]) < 0.15


def test_groups_are_drawn_anew_in_every_epoch():
    """An example of one length meets other neighbors: sorted over the whole set it would always meet the same."""
    lengths = np.arange(16 * BATCHES_PER_GROUP * 3)
    neighbors = []
    for epoch in (0, 1):
        batches = epoch_batches(lengths, 16, seed=0, epoch=epoch)
        neighbors.append(next(set(batch.tolist()) for batch in batches if 100 in batch))
    assert len(neighbors[0] & neighbors[1]) < 14
