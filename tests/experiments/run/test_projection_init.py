import pytest

from hf_specattn import SpectralConfig
from recipes.run.projection_init import (
    InitializationArguments,
    check_initialization,
    describe_initialization,
    parse_norm_reference,
)
from recipes.run.spectral_arguments import SpectralArguments


def test_the_flags_become_settings():
    assert InitializationArguments().initialization().is_default
    start = InitializationArguments(projection_init="conditioned", initialization_scale="2").initialization()
    assert (start.kind, start.scale, start.norm_reference) == ("conditioned", 2.0, None)
    flags = {"initialization_scale": "query=2, output=3", "projection_init_targets": ["output", "value"]}
    start = InitializationArguments(projection_init="orthogonal", **flags).initialization()
    assert (start.scale, start.targets) == ({"query": 2.0, "output": 3.0}, ("value", "output"))
    start = InitializationArguments(match_norm_of="identity=1.5").initialization()
    assert start.norm_reference == SpectralConfig(lambda_=1.5)


def test_a_start_in_words():
    assert describe_initialization(InitializationArguments().initialization()) is None
    flags = {"projection_init": "orthogonal", "match_norm_of": "svd"}
    text = describe_initialization(InitializationArguments(**flags).initialization())
    assert text == "query, key and value weights orthogonal of the norm of W + C under svd()"
    text = describe_initialization(InitializationArguments(initialization_scale="3").initialization())
    assert text == "query, key and value weights times 3"
    flags = {"projection_init": "orthogonal", "projection_init_targets": ["value", "output"]}
    flags["initialization_scale"] = "query=14,output=20"
    text = describe_initialization(InitializationArguments(**flags).initialization())
    assert text == "value, output weights orthogonal times 14 (query), 20 (output)"


def test_what_cannot_be_is_refused():
    for text in ("identity", "identity=0", "svd=3", "norm", "identity=x"):
        with pytest.raises(ValueError, match="--match_norm_of"):
            parse_norm_reference(text)
    for scale in ("0", "nan", "inf", "query=0"):
        with pytest.raises(ValueError, match=r"--initialization_scale.* finite number above 0"):
            InitializationArguments(initialization_scale=scale).initialization()
    with pytest.raises(ValueError, match="pass only one of the two"):
        InitializationArguments(match_norm_of="svd", initialization_scale="2").initialization()
    with pytest.raises(ValueError, match="--initialization_scale 'much' is neither a number"):
        InitializationArguments(initialization_scale="much").initialization()
    with pytest.raises(ValueError, match="initializes all projections; leave targets out"):
        InitializationArguments(projection_init="mimetic", projection_init_targets=["value"]).initialization()
    with pytest.raises(ValueError, match=r"--match_norm_of makes the control.*leave out --spectral_conditioning"):
        check_initialization(InitializationArguments(match_norm_of="svd"), SpectralArguments(True))
