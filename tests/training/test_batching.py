import numpy as np
import pytest

from hf_specattn.training.batching import BatchOrder, epoch_permutation


def test_an_epoch_passes_each_sequence_once_and_drops_the_incomplete_batch():
    order = BatchOrder(sequences=103, global_batch_size=8, seed=1)
    assert order.steps_per_epoch == 12
    for epoch in range(3):
        batches = [order.batch(step) for step in range(12 * epoch, 12 * (epoch + 1))]
        assert {passed for _, passed in batches} == {epoch}
        seen = np.concatenate([indices for indices, _ in batches])
        assert len(np.unique(seen)) == 96
        assert seen.min() >= 0
        assert seen.max() < 103


def test_batches_depend_on_seed_and_step_alone():
    forward = [BatchOrder(50, 5, seed=3).batch(step)[0].tolist() for step in range(25)]
    epoch_permutation.cache_clear()
    backward = [BatchOrder(50, 5, seed=3).batch(step)[0].tolist() for step in reversed(range(25))][::-1]
    assert forward == backward
    assert forward != [BatchOrder(50, 5, seed=4).batch(step)[0].tolist() for step in range(25)]
    assert forward[:10] != forward[10:20]


@pytest.mark.parametrize(("micro_steps", "processes"), [(1, 1), (1, 4), (4, 1), (2, 2), (3, 2), (12, 1)])
def test_the_global_batch_is_the_same_however_it_is_cut(micro_steps, processes):
    order = BatchOrder(100, 12, seed=0)
    for step in (0, 7, 8, 30):
        whole, epoch = order.batch(step)
        parts = [
            order.local_batch(step, micro_step, micro_steps, rank, processes)
            for micro_step in range(micro_steps)
            for rank in range(processes)
        ]
        assert all(passed == epoch for _, passed in parts)
        assert all(len(indices) == 12 // (micro_steps * processes) for indices, _ in parts)
        assert sorted(np.concatenate([indices for indices, _ in parts])) == sorted(whole)


def test_without_shuffling_the_corpus_is_read_in_order_every_epoch():
    order = BatchOrder(10, 4, seed=0, shuffle=False)
    assert [order.batch(step)[0].tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert [order.batch(step)[1] for step in range(3)] == [0, 0, 1]


def test_the_permutation_is_the_same_for_all_time():
    assert epoch_permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(("sequences", "batch"), [(7, 8), (0, 1), (5, 0), (5, -1)])
def test_a_corpus_below_one_batch_is_refused(sequences, batch):
    with pytest.raises(ValueError, match=f"{sequences} sequences do not fill one global batch of {batch}"):
        BatchOrder(sequences, batch, seed=0)
