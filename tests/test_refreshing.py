"""Dynamic corrections: recomputed on call, and an error where nobody calls."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold, refresh
from hf_specattn.refreshing import MISSED_INTERVALS, refresh_interval, steps_since_refresh


class TwoProjectionAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads = 2
        self.q = nn.Linear(6, 6, dtype=torch.float64)
        self.k = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, inputs):
        return self.q(inputs) * self.k(inputs)


SPEC = AttentionSpec("TwoProjectionAttention", {"q": "query", "k": "key"})


def dynamic_model(every=2, **settings):
    model = TwoProjectionAttention()
    condition(
        model, SpectralConfig("svd", targets=("query", "key"), refresh_every=every, **settings), architecture=SPEC
    )
    return model


def take_steps(model, count, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def numpy_svd_correction(weight):
    left, sigma, right = np.linalg.svd(weight.detach().numpy())
    return torch.from_numpy(sigma[0] * left @ right)


def test_refresh_follows_the_weight():
    model = dynamic_model()
    before = model.q.correction.clone()
    take_steps(model, 2)
    assert torch.equal(model.q.correction, before)  # nothing moves by itself
    refresh(model)
    for layer in (model.q, model.k):
        torch.testing.assert_close(layer.correction, numpy_svd_correction(layer.weight), rtol=0, atol=1e-12)
        assert np.linalg.cond(layer.effective_weight().detach().numpy()) <= 2 * (1 + 1e-9)
        assert not layer.correction.requires_grad
    assert not torch.equal(model.q.correction, before)


def test_static_correction_decays_as_the_method_says():
    """kappa <= (2 s_1 + |D|) / (s_1 + s_k - |D|) for a drift D of the weight."""
    model = TwoProjectionAttention()
    condition(model, SpectralConfig("svd", targets=("query", "key")), architecture=SPEC)
    sigma = torch.linalg.svdvals(model.q.weight.detach())
    drift = torch.randn(6, 6, dtype=torch.float64)
    drift *= 0.5 * sigma[0] / torch.linalg.matrix_norm(drift, 2)
    with torch.no_grad():
        model.q.weight += drift
    kappa = np.linalg.cond(model.q.effective_weight().detach().numpy())
    assert 2.0 < kappa <= (2.5 * sigma[0] / (0.5 * sigma[0] + sigma[-1])).item()


def test_refresh_of_a_model_without_dynamic_corrections_is_refused():
    model = TwoProjectionAttention()
    with pytest.raises(ValueError, match="no dynamic correction"):
        refresh(model)
    condition(model, SpectralConfig("svd", targets=("query", "key")), architecture=SPEC)
    with pytest.raises(ValueError, match="refresh_every"):
        refresh(model)


def test_refresh_interval():
    assert refresh_interval(dynamic_model(every=7)) == 7
    assert refresh_interval(TwoProjectionAttention()) is None


def test_nobody_refreshing_is_an_error():
    model = dynamic_model(every=2)
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, 2 * MISSED_INTERVALS - 1, optimizer)
    assert steps_since_refresh(model) == 2 * MISSED_INTERVALS - 1
    with pytest.raises(RuntimeError, match=r"refresh_every=2 was asked for, but 20 optimizer steps.*SpectralCallback"):
        take_steps(model, 1, optimizer)


def test_refreshing_in_time_is_no_error():
    model = dynamic_model(every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3 * MISSED_INTERVALS):
        take_steps(model, 1, optimizer)
        refresh(model)
    assert steps_since_refresh(model) == 0


def test_frozen_weights_need_no_refresh():
    model = dynamic_model(every=1)
    other = nn.Linear(2, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3 * MISSED_INTERVALS):
        optimizer.step()
    assert steps_since_refresh(model) == 0


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_too(twin_of):
    twin = twin_of(dynamic_model(every=1))
    with pytest.raises(RuntimeError, match="refresh_every=1"):
        take_steps(twin, MISSED_INTERVALS)


def test_a_folded_model_is_left_in_peace():
    model = fold(dynamic_model(every=1))
    take_steps(model, 2 * MISSED_INTERVALS)
    assert type(model.q) is nn.Linear
