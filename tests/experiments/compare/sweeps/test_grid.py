"""The product of a user's values, without combinations that mean nothing."""

from pathlib import Path

import pytest

from recipes.compare.sweeps.design import SweepError
from recipes.compare.sweeps.grid import GridValues, grid_sweep

SCRIPT = Path("train_image_classification.py")


def variants_of(**values):
    return {item.label: item for item in grid_sweep(GridValues(**values), SCRIPT, (0,), ()).variants}


def test_lambda_is_of_identity_and_refreshing_of_svd():
    found = variants_of(methods=("stock", "identity", "svd"), lambdas=("1", "query=2,key=0.5"), refresh_every=(0, 20))
    assert list(found) == [
        "stock",
        "identity, lambda 1",
        "identity, lambda query=2,key=0.5",
        "svd",
        "svd, every 20 steps",
    ]
    conditioned = ("--spectral_conditioning", "True", "--spectral_method")
    assert found["stock"].flags == ()
    assert found["identity, lambda 1"].flags == (*conditioned, "identity", "--lambda_", "1")
    assert found["identity, lambda 1"].strength == 1.0
    assert found["identity, lambda query=2,key=0.5"].strength is None
    assert found["svd, every 20 steps"].flags == (*conditioned, "svd", "--spectral_refresh_every", "20")


def test_targets_granularities_and_starts():
    found = variants_of(
        methods=("stock", "svd"),
        targets=("query,key,value", "value"),
        granularities=("projection", "head"),
        layer_norm=("with", "without"),
        initialization_scales=(1.0, 6.0),
    )
    assert len(found) == (1 + 2 * 2) * 2 * 2
    flags = found["svd, on value, per head, no layer norm, scale 6"].flags
    assert flags == (
        *("--spectral_conditioning", "True", "--spectral_method", "svd"),
        *("--spectral_targets", "value", "--spectral_granularity", "head"),
        *("--no_layer_norm", "True", "--initialization_scale", "6"),
    )
    assert found["stock, scale 6"].start == "scale 6"
    assert found["stock, scale 6"].flags == ("--initialization_scale", "6")


def test_models_are_flags():
    values = GridValues(models=("", "--timm_model 'a b' --image_size 32"))
    settings = grid_sweep(values, SCRIPT, (0,), ("--num_train_epochs", "2")).settings
    assert [item.flags for item in settings] == [(), ("--timm_model", "a b", "--image_size", "32")]
    assert settings[0].label == "default model"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("stok",)}, "methods.*'stok'.*stock"),
        ({"granularities": ("heads",)}, "granularities.*'heads'.*head"),
        ({"layer_norm": ("off",)}, "layer_norm.*'off'.*without"),
        ({"projection_inits": ("ortho",)}, "projection_inits.*'ortho'.*orthogonal"),
        ({"targets": ("query,out",)}, "--targets query,out: names of query, key, value"),
        ({"lambdas": ()}, "--lambdas has no value"),
        ({"lambdas": ("1", "1")}, "--lambdas 1 1: a value stands twice"),
        ({"models": ("--timm_model 'deit",)}, "--models .*No closing quotation"),
    ],
)
def test_values_that_do_not_exist(values, message):
    with pytest.raises(SweepError, match=message):
        variants_of(**values)


def test_a_lambda_that_is_not_one_number_is_for_the_script_to_judge():
    found = variants_of(methods=("identity",), lambdas=("auto", "0.5", "query=1,key=2,value=3", "ten"))
    variants = list(found.values())
    assert [variant.strength for variant in variants] == [None, 0.5, None, None]
    assert [variant.flags[-1] for variant in variants] == ["auto", "0.5", "query=1,key=2,value=3", "ten"]
