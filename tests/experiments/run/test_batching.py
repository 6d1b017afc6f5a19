import numpy as np
import pytest

from recipes.run.batching import BatchOrder, epoch_permutation


def test_each_pass_reads_each_sequence_once_and_batches_run_on_across_passes():
    order = BatchOrder(sequences=103, seed=1)
    batches = [order.batch(start, 8) for start in range(0, 3 * 103, 8)]
    indices = np.concatenate([batch.indices for batch in batches])
    epochs = np.concatenate([batch.epochs for batch in batches])
    for epoch in range(3):
        passed = indices[103 * epoch : 103 * (epoch + 1)]
        assert sorted(passed) == list(range(103))
        assert passed.tolist() == epoch_permutation(1, epoch, 103).tolist()
        assert (epochs[103 * epoch : 103 * (epoch + 1)] == epoch).all()
    assert batches[12].epochs.tolist() == [0] * 7 + [1]  # positions 96 to 103


def test_the_stream_is_the_same_however_large_the_batches():
    order = BatchOrder(20, seed=5)
    whole = order.batch(0, 60)
    position, parts = 0, []
    for count in (1, 2, 3, 5, 8, 13, 28):  # as under a ramp
        parts.append(order.batch(position, count))
        position += count
    assert np.concatenate([part.indices for part in parts]).tolist() == whole.indices.tolist()
    assert np.concatenate([part.epochs for part in parts]).tolist() == whole.epochs.tolist()


def test_batches_depend_on_seed_and_position_alone():
    positions = range(0, 125, 5)
    forward = [BatchOrder(50, seed=3).batch(start, 5).indices.tolist() for start in positions]
    epoch_permutation.cache_clear()
    backward = [BatchOrder(50, seed=3).batch(start, 5).indices.tolist() for start in reversed(positions)][::-1]
    assert forward == backward
    assert forward != [BatchOrder(50, seed=4).batch(start, 5).indices.tolist() for start in positions]
    assert forward[:10] != forward[10:20]


@pytest.mark.parametrize(("micro_steps", "processes"), [(1, 1), (1, 4), (4, 1), (2, 2), (3, 2), (12, 1)])
def test_the_batch_is_the_same_however_it_is_shared(micro_steps, processes):
    order = BatchOrder(100, seed=0)
    for start in (0, 84, 96, 360):  # 96: across the end of a pass
        whole = order.batch(start, 12)
        shares = [
            whole.share(micro_step, micro_steps, rank, processes)
            for micro_step in range(micro_steps)
            for rank in range(processes)
        ]
        assert all(len(share.indices) == 12 // (micro_steps * processes) for share in shares)
        assert np.concatenate([share.indices for share in shares]).tolist() == whole.indices.tolist()
        assert np.concatenate([share.epochs for share in shares]).tolist() == whole.epochs.tolist()


def test_without_shuffling_the_corpus_is_read_in_order_in_every_pass():
    order = BatchOrder(10, seed=0, shuffle=False)
    batches = [order.batch(start, 4) for start in (0, 4, 8)]
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [batch.epochs.tolist() for batch in batches] == [[0] * 4, [0] * 4, [0, 0, 1, 1]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_batch_in_which_a_pass_begins_says_so(shuffle):
    order = BatchOrder(10, seed=0, shuffle=shuffle)
    starts = [order.batch(start, 4).begins_pass for start in range(0, 24, 4)]
    assert starts == [True, False, True, False, False, True]


def test_epochs_passed():
    assert BatchOrder(10, seed=0).epochs(25) == 2.5


def test_the_permutation_is_the_same_for_all_time():
    assert epoch_permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="no order of 0 sequences"):
        BatchOrder(0, seed=0)
