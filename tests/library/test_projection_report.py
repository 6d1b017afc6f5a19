"""ProjectionReport: every number against NumPy, and what the table says."""

import copy
import math

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, HEADS, WIDTH
from transformers import BertModel

from hf_specattn import SpectralConfig, condition, format_reports


def bert(scale=1.0):
    model = BertModel(ARCHITECTURES["bert"].config(num_hidden_layers=1)).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "value.weight")):
                weight.copy_(scale * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_values(granularity, scale):
    model = bert(scale)
    stock = copy.deepcopy(model)
    config = SpectralConfig(lambda_={"query": 2.0, "key": 4.0, "value": 8.0}, granularity=granularity)
    reports = condition(model, config)
    assert [report.projection for report in reports] == ["query", "key", "value"]
    for report in reports:
        weight = stock.get_submodule(report.name).weight.detach().numpy()
        blocks = np.split(weight, HEADS)
        lambda_ = config.lambda_for(report.projection)
        corrected = (
            np.concatenate([block + lambda_ * np.eye(WIDTH // HEADS, WIDTH) for block in blocks])
            if granularity == "head"
            else weight + lambda_ * np.eye(WIDTH)
        )
        sigma = np.linalg.svd(weight, compute_uv=False)
        assert (report.sigma_max, report.sigma_min) == pytest.approx((sigma[0], sigma[-1]), rel=1e-9)
        assert report.kappa_before == pytest.approx(np.linalg.cond(weight), rel=1e-9)
        assert report.kappa_after == pytest.approx(np.linalg.cond(corrected), rel=1e-9)
        assert report.before.head_kappa == pytest.approx([np.linalg.cond(block) for block in blocks], rel=1e-9)
        assert report.after.head_kappa == pytest.approx(
            [np.linalg.cond(block) for block in np.split(corrected, HEADS)], rel=1e-9
        )
        assert report.kappa_fell == (np.linalg.cond(corrected) < np.linalg.cond(weight))
        largest = max(np.linalg.norm(block, 2) for block in (blocks if granularity == "head" else [weight]))
        assert report.weyl_bound_holds == (lambda_ > largest)
        if report.weyl_bound_holds:
            assert report.weyl_bound == pytest.approx((lambda_ + largest) / (lambda_ - largest), rel=1e-9)
            assert max(report.after.head_kappa if granularity == "head" else [report.kappa_after]) <= report.weyl_bound
        else:
            assert report.weyl_bound is None
    assert {report.weyl_bound_holds for report in reports} <= ({True, False} if scale > 1 else {True})


def test_the_two_granularities_can_disagree():
    """Head-level identity gives each head the same slice of X, so the whole projection can become far worse."""
    report = condition(bert(0.02), SpectralConfig(lambda_=10.0, granularity="head"))[0]
    assert max(report.after.head_kappa) < 1.1
    assert report.kappa_after > report.kappa_before
    assert not report.kappa_fell
    assert "kappa GREW" in format_reports([report])


def test_svd_promises_no_weyl_bound():
    for report in condition(bert(), SpectralConfig("svd")):
        assert report.weyl_bound is None
        assert report.weyl_bound_holds is None
        assert report.kappa_after <= 2 * (1 + 1e-9)


def test_a_singular_weight_has_infinite_kappa():
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.zero_()
    report = condition(model, SpectralConfig(lambda_=1.0, targets=("query",)))[0]
    assert math.isinf(report.kappa_before)
    assert report.kappa_after == pytest.approx(1.0)


def test_table():
    reports = condition(bert(5.0), SpectralConfig(lambda_=1.0))
    lines = format_reports(reports).splitlines()
    assert len(lines) == 4
    assert "kappa(W+C)" in lines[0]
    assert "encoder.layer.0.attention.self.query query" in lines[1]
    assert f"{reports[0].kappa_after:.4g}" in lines[1]
    assert "lambda <= sigma_max: no bound" in lines[1]


@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_a_preserved_weight_is_the_one_that_was_there_and_no_bound_speaks_of_it(granularity):
    reports = condition(bert(5.0), SpectralConfig(lambda_=10.0, granularity=granularity), "preserve")
    for report in reports:
        assert report.preserved
        assert report.weyl_bound is None
        assert report.weyl_bound_holds is None
        assert report.kappa_after == pytest.approx(report.kappa_before, rel=1e-6)
    assert "no bound" not in format_reports(reports)
    additive = condition(bert(5.0), SpectralConfig(lambda_=1.0, granularity=granularity))
    assert not any(report.preserved for report in additive)
    assert "lambda <= sigma_max: no bound" in format_reports(additive)
