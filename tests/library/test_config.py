"""SpectralConfig: defaults, and every value it must refuse."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from hf_specattn import SpectralConfig


def test_defaults_are_the_papers():
    config = SpectralConfig()
    assert (config.method, config.lambda_, config.granularity) == ("identity", 10.0, "projection")
    assert config.targets == ("query", "key", "value")
    assert not config.dynamic


def test_svd_has_no_lambda():
    config = SpectralConfig(method="svd")
    assert config.lambda_ is None
    assert config.lambda_for("query") is None


def test_lambda_for_each_projection():
    config = SpectralConfig(lambda_={"key": 2, "query": np.float64(0.5)}, targets=["key", "query"])
    assert config.targets == ("query", "key")
    assert [config.lambda_for(name) for name in ("query", "key", "value")] == [0.5, 2.0, None]
    assert SpectralConfig(lambda_=3, targets=("value",)).lambda_for("value") == 3.0


@pytest.mark.parametrize(
    "config",
    [
        SpectralConfig(lambda_=0.3, granularity="head"),
        SpectralConfig(lambda_={"query": 1, "value": 4}, targets=("query", "value")),
        SpectralConfig(method="svd", refresh_every=7),
    ],
)
def test_round_trips(config):
    assert SpectralConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert isinstance(hash(config), int)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpectralConfig().lambda_ = 3.0


@pytest.mark.parametrize("value", [0, 0.0, -1, -1e-9, math.nan, math.inf, -math.inf, True, False, "10", [10], 1j])
def test_lambda_refused(value):
    with pytest.raises(ValueError, match=r"lambda_=.*finite number > 0"):
        SpectralConfig(lambda_=value)
    with pytest.raises(ValueError, match=r"lambda_\['key'\]=.*finite number > 0"):
        SpectralConfig(lambda_={"key": value}, targets=("key",))


@pytest.mark.parametrize("value", [{"query": 1.0}, {}, {"query": 1, "key": 1, "value": 1, "output": 1}])
def test_lambda_keys_must_equal_the_targets(value):
    with pytest.raises(ValueError, match=r"must equal the targets"):
        SpectralConfig(lambda_=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "polar"}, r"method='polar' is unknown; choose one of 'identity', 'svd'"),
        ({"method": None}, r"method=None is unknown"),
        ({"granularity": "layer"}, r"granularity='layer' is unknown; choose one of 'projection', 'head'"),
        ({"targets": ()}, r"non-empty subset"),
        ({"targets": ("query", "out")}, r"non-empty subset"),
        ({"targets": "query"}, r"sequence of names"),
        ({"targets": None}, r"sequence of names"),
        ({"targets": ("key", "key")}, r"twice"),
        ({"method": "svd", "lambda_": 10.0}, r"lambda_=10.0 means nothing to method='svd'"),
        ({"refresh_every": 5}, r"refresh_every=5 means nothing to method='identity'"),
        ({"method": "svd", "refresh_every": 0}, r"refresh_every=0 is not allowed; give an integer >= 1"),
        ({"method": "svd", "refresh_every": True}, r"refresh_every=True is not allowed"),
        ({"method": "svd", "refresh_every": 2.0}, r"refresh_every=2.0 is not allowed"),
    ],
)
def test_refused_settings_name_the_value_and_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        SpectralConfig(**settings)


def test_describe():
    assert SpectralConfig().describe() == "identity(lambda_=10.0)"
    assert SpectralConfig("svd", granularity="head", refresh_every=3).describe() == (
        "svd(granularity=head, refresh_every=3)"
    )
