"""The warnings before training, and the lambda they name."""

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, assert_bit_equal, each_architecture
from transformers import BertModel, ViTConfig, ViTModel

from hf_specattn import SpectralConfig, condition, initialize
from hf_specattn.diagnostics import advise, saturation, spectra
from hf_specattn.diagnostics.residuals import lacks_residual

INPUTS = {"input_ids": torch.arange(12)[None]}


def bert(spectral=None, **settings):
    torch.manual_seed(0)
    model = BertModel(ARCHITECTURES["bert"].config(**settings)).double().eval()
    if spectral is not None:
        condition(model, spectral)
    return model


def largest_share(model):
    return max(row.saturated_share.mean().item() for row in saturation(model, INPUTS))


def test_a_fine_model_has_no_warnings():
    for model in (bert(), bert(SpectralConfig(lambda_=1.0)), bert(SpectralConfig("svd"))):
        advice = advise(model, INPUTS)
        assert (advice.saturated_layers, advice.unbounded, advice.warnings()) == ((), (), [])


@pytest.mark.parametrize("lambda_", [10.0, {"query": 12.0, "key": 7.0, "value": 3.0}])
def test_names_the_largest_lambda_that_does_not_saturate(lambda_):
    model = bert(SpectralConfig(lambda_=lambda_))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    advice = advise(model, INPUTS)
    assert largest_share(model) > 0.5
    assert advice.saturated_layers
    (warning,) = advice.warnings()
    assert f"lambda_={advice.unsaturated_lambda:g} on query and key instead of {advice.lambda_:g}" in warning
    assert_bit_equal(model.state_dict(), before)
    assert all(
        layer.spectral.lambda_ == lambda_ for layer in model.modules() if hasattr(layer, "spectral")
    )  # as it was

    # Taken, it is fine; a tenth more, and it is not.
    def with_query_key(number):
        numbers = dict(lambda_) if isinstance(lambda_, dict) else dict.fromkeys(("query", "key", "value"), lambda_)
        scale = number / advice.lambda_
        return bert(
            SpectralConfig(
                lambda_={name: value * (1 if name == "value" else scale) for name, value in numbers.items()}
            )
        )

    assert largest_share(with_query_key(advice.unsaturated_lambda)) <= 0.5
    assert largest_share(with_query_key(1.15 * advice.unsaturated_lambda)) > 0.5


def test_lambda_below_sigma_max():
    model = bert(SpectralConfig(lambda_=0.5, targets=("query", "value")), initializer_range=0.2)
    advice = advise(model, INPUTS)
    rows = [row for row in spectra(model) if row.projection != "key"]
    assert len(advice.unbounded) == sum(row.raw.sigma_max >= 0.5 for row in rows) == 4
    largest = 2 * max(row.raw.sigma_max for row in rows)
    assert largest <= advice.bounded_lambda < 1.1 * largest
    text = advice.warnings()[-1]
    assert f"lambda_={advice.bounded_lambda:g} would give at most 3" in text
    conditioned = bert(
        SpectralConfig(lambda_=advice.bounded_lambda, targets=("query", "value")), initializer_range=0.2
    )
    assert all(row.effective.kappa <= 3 for row in spectra(conditioned) if row.projection != "key")


def test_a_bounding_lambda_that_saturates_is_said_to():
    model = bert(SpectralConfig(lambda_=0.5), initializer_range=0.5)
    advice = advise(model, INPUTS)
    condition(other := bert(initializer_range=0.5), SpectralConfig(lambda_=advice.bounded_lambda))
    assert advice.bounded_saturates is (largest_share(other) > 0.5)
    assert ("method='svd'" in advice.warnings()[-1]) is advice.bounded_saturates


def test_saturated_without_a_lambda():
    model = bert(initializer_range=3.0)
    (warning,) = advise(model, INPUTS).warnings()
    assert "No lambda is in use" in warning
    condition(model, SpectralConfig(lambda_=0.1))
    advice = advise(model, INPUTS)
    assert advice.unsaturated_lambda is None
    assert "No smaller lambda" in advice.warnings()[0]


# --- attention without a residual connection


@each_architecture
def test_no_stock_model_lacks_its_residuals(tiny):
    model = tiny.model()
    assert lacks_residual(model, tiny.batch()) is False
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def vit_without_residuals(layers=(0, 1, 2)):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **sizes)).double().eval()

    for place in layers:
        before, block = {}, model.layers[place]
        block.register_forward_pre_hook(lambda module, args, before=before: before.__setitem__("input", args[0]))
        block.attention.register_forward_hook(
            lambda module, args, output, before=before: (output[0] - before["input"], *output[1:])
        )
    return model


def test_value_and_output_are_named_where_attention_has_no_residual():
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    model = vit_without_residuals()
    path = np.linalg.multi_dot(
        [
            np.sum([np.outer(o, v) for o, v in zip(block.attention.o_proj.weight.detach().numpy().T, value)], axis=0)
            for block in model.layers[::-1]
            for value in [block.attention.v_proj.weight.detach().numpy()]
        ]
    )
    shares = np.linalg.svd(path, compute_uv=False)
    shares = shares / shares.sum()
    expected = np.exp(-(shares * np.log(shares)).sum()) / 16
    advice = advise(model, pixels)
    assert advice.path_rank == pytest.approx(expected, rel=1e-9)
    assert expected < 0.5
    (warning,) = advice.warnings()
    assert f"passes {expected:.0%} of the directions" in warning
    assert "targets=('value', 'output')" in warning

    initialize(model, "orthogonal", targets=("value", "output"))
    advice = advise(model, pixels)
    assert (advice.path_rank, advice.warnings()) == (pytest.approx(1.0), [])


def test_one_layer_without_is_found_and_one_layer_alone_says_nothing():
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    assert [lacks_residual(vit_without_residuals(layers), pixels) for layers in ((0,), (1,), ())] == [
        True,
        True,
        False,
    ]
    model = vit_without_residuals()
    model.layers = model.layers[:1]
    assert lacks_residual(model, pixels) is None
