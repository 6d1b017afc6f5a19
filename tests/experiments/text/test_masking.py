import numpy as np
import pytest
import torch

from recipes.text.pretrain_task import IGNORED_LABEL, MaskingRule

MASK = 4
RULE = MaskingRule(mask_token_id=MASK, vocab_size=1000)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(5, 1000, size=(400, 128), dtype=np.uint16)


@pytest.mark.parametrize(
    ("probability", "length", "count"),
    [(0.25, 128, 32), (0.25, 50, 12), (0.25, 54, 14), (0.15, 128, 19), (1.0, 7, 7)],
)
def test_exactly_the_rounded_share_is_predicted(probability, length, count):
    rows = np.random.default_rng(1).integers(5, 1000, size=(20, length), dtype=np.int32)
    rule = MaskingRule(MASK, 1000, probability)
    batch = rule.apply(rows, np.arange(20), seed=0, epoch=0)
    assert rule.predictions(length) == count
    assert batch.masked_positions.shape == (20, count)
    assert (batch.labels != IGNORED_LABEL).sum(dim=1).tolist() == [count] * 20


def test_labels_positions_and_inputs_agree(tokens):
    batch = RULE.apply(tokens, np.arange(len(tokens)), seed=5, epoch=2)
    original = torch.from_numpy(tokens.astype(np.int64))
    assert batch.input_ids.dtype == batch.labels.dtype == batch.masked_positions.dtype == torch.int64
    assert (batch.masked_positions.diff(dim=1) > 0).all()
    chosen = torch.zeros(original.shape, dtype=torch.bool).scatter_(1, batch.masked_positions, True)
    assert torch.equal(batch.labels, original.where(chosen, torch.tensor(IGNORED_LABEL)))
    assert torch.equal(batch.input_ids[~chosen], original[~chosen])


def test_corruption_of_a_row_depends_on_seed_epoch_and_index_alone(tokens):
    whole = RULE.apply(tokens, np.arange(len(tokens)), seed=5, epoch=2)
    order = np.random.default_rng(2).permutation(len(tokens))[:37]
    some = RULE.apply(tokens[order], order, seed=5, epoch=2)
    for name in ("input_ids", "labels", "masked_positions"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[torch.from_numpy(order)])
    for seed, epoch, shift in ((6, 2, 0), (5, 3, 0), (5, 2, 1)):
        other = RULE.apply(tokens, np.arange(len(tokens)) + shift, seed=seed, epoch=epoch)
        assert not (other.masked_positions == whole.masked_positions).all(dim=1).any()


def test_rows_of_one_batch_may_be_read_in_different_passes(tokens):
    mixed = RULE.apply(tokens[:6], np.arange(6), seed=5, epoch=np.array([2, 2, 2, 3, 3, 3]))
    for epoch, rows in ((2, slice(0, 3)), (3, slice(3, 6))):
        alone = RULE.apply(tokens[rows], np.arange(6)[rows], seed=5, epoch=epoch)
        for name in ("input_ids", "labels", "masked_positions"):
            assert torch.equal(getattr(mixed, name)[rows], getattr(alone, name))


def test_eighty_ten_ten(tokens):
    shown, labels = [], []
    for epoch in range(4):
        batch = RULE.apply(tokens, np.arange(len(tokens)), seed=0, epoch=epoch)
        shown.append(batch.input_ids.gather(1, batch.masked_positions).flatten())
        labels.append(batch.labels.gather(1, batch.masked_positions).flatten())
    shown, labels = torch.cat(shown), torch.cat(labels)
    masked, kept = (shown == MASK).double().mean(), (shown == labels).double().mean()
    number = len(shown)  # 51,200 predictions
    # A random token equals the mask or the original in 1 of 1,000 cases each.
    for share, expected in ((masked, 0.8 + 0.1 / 1000), (kept, 0.1 + 0.1 / 1000)):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / number) ** 0.5
    replaced = shown[(shown != MASK) & (shown != labels)].double()
    # Uniform over [0, 1000): mean 499.5, standard deviation 288.7.
    assert abs(replaced.mean() - 499.5) < 4 * 288.7 / len(replaced) ** 0.5
    assert 0 <= replaced.min() < 10
    assert 990 <= replaced.max() < 1000


def test_positions_are_uniform(tokens):
    counts = sum(
        torch.bincount(
            RULE.apply(tokens, np.arange(400), seed=1, epoch=epoch).masked_positions.flatten(), minlength=128
        )
        for epoch in range(5)
    )
    expected, variance = 2000 * 0.25, 2000 * 0.25 * 0.75
    # The sum over 128 positions of squared standardized deviations has about 127 degrees of freedom.
    chi_squared = ((counts - expected) ** 2 / variance).sum().item()
    assert abs(chi_squared - 127) < 4 * (2 * 127) ** 0.5


def test_special_tokens_are_chosen_like_any_other():
    rows = np.full((50, 40), 3, dtype=np.uint16)  # [SEP] only
    batch = RULE.apply(rows, np.arange(50), seed=0, epoch=0)
    assert (batch.labels == 3).sum(dim=1).tolist() == [10] * 50


def test_the_packed_corpus_stays_as_it_is(tokens):
    copy = tokens.copy()
    RULE.apply(tokens, np.arange(len(tokens)), seed=0, epoch=0)
    assert np.array_equal(tokens, copy)


def test_model_inputs_name_the_positions_only_where_wanted(tokens):
    batch = RULE.apply(tokens[:2], [0, 1], seed=0, epoch=0)
    assert set(batch.model_inputs(torch.device("cpu"), sparse=False)) == {"input_ids", "labels"}
    assert batch.model_inputs(torch.device("cpu"), sparse=True)["masked_positions"] is batch.masked_positions
