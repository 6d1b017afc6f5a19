import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_specattn import SpectralConfig, condition
from recipes.run.projection_init import (
    InitializationArguments,
    check_initialization,
    describe_initialization,
    parse_norm_reference,
    remove_layer_norms,
)
from recipes.run.spectral_arguments import SpectralArguments

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_the_flags_become_settings():
    assert InitializationArguments().initialization().is_default
    start = InitializationArguments(projection_init="conditioned", initialization_scale=2.0).initialization()
    assert (start.kind, start.scale, start.norm_reference) == ("conditioned", 2.0, None)
    start = InitializationArguments(match_norm_of="identity=1.5").initialization()
    assert start.norm_reference == SpectralConfig(lambda_=1.5)


def test_a_start_in_words():
    assert describe_initialization(InitializationArguments().initialization()) is None
    flags = {"projection_init": "orthogonal", "match_norm_of": "svd"}
    text = describe_initialization(InitializationArguments(**flags).initialization())
    assert text == "query, key and value weights orthogonal of the norm of W + C under svd()"
    text = describe_initialization(InitializationArguments(initialization_scale=3.0).initialization())
    assert text == "query, key and value weights times 3"


def test_what_cannot_be_is_refused():
    for text in ("identity", "identity=0", "svd=3", "norm", "identity=x"):
        with pytest.raises(ValueError, match="--match_norm_of"):
            parse_norm_reference(text)
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--initialization_scale .* finite number above 0"):
            InitializationArguments(initialization_scale=scale).initialization()
    with pytest.raises(ValueError, match="give one of the two"):
        InitializationArguments(match_norm_of="svd", initialization_scale=2.0).initialization()
    with pytest.raises(ValueError, match=r"--match_norm_of makes the control.*leave out --spectral_conditioning"):
        check_initialization(InitializationArguments(match_norm_of="svd"), SpectralArguments(True))


def test_layer_norms_are_taken_out_and_the_model_refuses_to_be_saved(tmp_path):
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES))
    assert remove_layer_norms(model) == 5
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    condition(model, SpectralConfig(lambda_=1.0))
    assert model(pixel_values=torch.randn(1, 3, 8, 8)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="no layer norm any more"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--no_layer_norm: .* has no torch\.nn\.LayerNorm"):
        remove_layer_norms(model)
