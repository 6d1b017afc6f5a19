"""Every row of the table beside those that all tests go through: the flag or `condition`, against NumPy's W + C."""

import re

import numpy as np
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    PROJECTIONS,
    add_correction,
    assert_bit_equal,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
)
from more_models import CONDITION_ONLY, FLAGGED, ConditionOnly
from scripts_loading import REPOSITORY
from torch import Tensor, nn
from transformers import AutoConfig

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold
from hf_specattn.architectures import ARCHITECTURES as TABLE
from hf_specattn.architectures import MORE_ARCHITECTURES
from hf_specattn.layers import spectral_layers

pytestmark = pytest.mark.integration

SURVEY = REPOSITORY / "docs" / "survey.md"
SETTINGS = {"identity": {"lambda_": 10.0}, "svd": {"spectral_method": "svd"}}
# Small numbers too: with 10 the softmax saturates, and its output barely depends on the rest of query and key.
LAMBDAS = {"query": 0.5, "key": 0.25, "value": 2.0}

each_flagged = pytest.mark.parametrize("tiny", FLAGGED, ids=str)
# As `each_head_once`.
each_flagged_head = pytest.mark.parametrize(
    ("tiny", "auto_name", "method"),
    [
        pytest.param(tiny, name, method, id=f"{tiny}-{name}-{method}")
        for tiny in FLAGGED
        for name in tiny.classes
        for method in ("identity", "svd")
        if method == "svd" or name == "AutoModel"
    ],
)
each_row = pytest.mark.parametrize("row", CONDITION_ONLY, ids=str)


def load(path, auto_name="AutoModel", **kwargs):
    return getattr(transformers, auto_name).from_pretrained(path, **kwargs)


def test_every_row_of_the_table_is_tested():
    assert {tiny.model_type for tiny in (*ARCHITECTURES.values(), *FLAGGED)} == set(TABLE)
    seen = {type(module).__name__ for row in CONDITION_ONLY for module in row.model().modules()}
    # Every other one is a row of the survey, which compares all of them in the same way.
    surveyed = set(MORE_ARCHITECTURES) - {
        name
        for name, specs in MORE_ARCHITECTURES.items()
        if seen & {class_name for spec in specs for class_name in spec.class_names}
    }
    exact = set(re.findall(r"^\| `([^`]+)` \| exact \|", SURVEY.read_text(), re.MULTILINE))
    assert surveyed - {"usual names"} <= exact


# --- the flag --------------------------------------------------------------------------------------------------------


@each_flagged_head
def test_flag_gives_w_plus_c_and_fold_the_stock_model(tiny, auto_name, method, stock_checkpoint, tmp_path):
    path = stock_checkpoint(tiny, auto_name)
    model = load(path, auto_name, spectral_conditioning=True, **SETTINGS[method])
    assert type(model).__name__ == f"Spec{tiny.stock_class(auto_name).__name__}"
    batch = tiny.batch(auto_name)
    outputs = outputs_of(model, batch)
    expected = outputs_of(add_correction(tiny, tiny.model(auto_name), CORRECTIONS[method]), batch)
    assert relative_difference(outputs, expected) < 1e-10
    # saved and loaded
    model.save_pretrained(tmp_path / "conditioned")
    again, info = load(tmp_path / "conditioned", auto_name, output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_bit_equal(again.state_dict(), model.state_dict())
    assert_bit_equal(outputs_of(again, batch), outputs)
    # folded, saved and loaded without the flag
    fold(model)
    assert type(model) is tiny.stock_class(auto_name)
    assert_bit_equal(outputs_of(model, batch), outputs)
    model.save_pretrained(tmp_path / "folded")
    stock = load(tmp_path / "folded", auto_name)
    assert type(stock) is tiny.stock_class(auto_name)
    assert_bit_equal(outputs_of(stock, batch), outputs)


@each_flagged
@each_method
def test_each_projection_by_itself(tiny, method, stock_checkpoint):
    plain = outputs_of(tiny.model(), tiny.batch())
    lambda_ = {"query": 1.0, "key": 1.5, "value": 2.0}
    for target in PROJECTIONS:
        numbers = {"lambda_": {target: lambda_[target]}} if method == "identity" else {}
        kwargs = {"spectral_targets": [target], **SETTINGS[method], **numbers}
        model = load(stock_checkpoint(tiny), spectral_conditioning=True, **kwargs)
        correction = identity_by_numpy(lambda_) if method == "identity" else CORRECTIONS["svd"]
        expected = outputs_of(add_correction(tiny, tiny.model(), correction, targets=[target]), tiny.batch())
        assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
        # and the projection matters, or the line above says nothing
        assert relative_difference(expected, plain) > 1e-4


@each_flagged
@each_method
def test_per_head(tiny, method, stock_checkpoint):
    kwargs = {"spectral_granularity": "head", **SETTINGS[method]}
    model = load(stock_checkpoint(tiny), spectral_conditioning=True, **kwargs)
    expected = add_correction(tiny, tiny.model(), CORRECTIONS[method], per_head=True)
    assert relative_difference(outputs_of(model, tiny.batch()), outputs_of(expected, tiny.batch())) < 1e-10


@pytest.mark.parametrize(
    ("tiny", "auto_name"), [pytest.param(tiny, name, id=f"{tiny}-{name}") for tiny in FLAGGED for name in tiny.classes]
)
def test_without_the_flag_the_stock_model(tiny, auto_name, stock_checkpoint):
    path = stock_checkpoint(tiny, auto_name)
    model = load(path, auto_name)
    assert type(model) is tiny.stock_class(auto_name)
    assert type(model.config) is tiny.config_class
    assert_bit_equal(model.state_dict(), tiny.model(auto_name).state_dict())


@each_flagged
@each_method
def test_from_config_starts_from_the_same_w(tiny, method):
    torch.manual_seed(7)
    stock = transformers.AutoModel.from_config(tiny.config()).eval()
    config = AutoConfig.for_model(f"specattn_{tiny.model_type}", **tiny.settings, **SETTINGS[method])
    torch.manual_seed(7)
    model = transformers.AutoModel.from_config(config).eval()
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith(".correction")}
    assert_bit_equal(weights, stock.state_dict())
    batch = tiny.batch(dtype=torch.float32)
    expected = outputs_of(add_correction(tiny, stock, CORRECTIONS[method]), batch)
    assert relative_difference(outputs_of(model, batch), expected) < 1e-5


@each_flagged
@each_method
def test_preserve_keeps_the_function(tiny, method, stock_checkpoint):
    kwargs = {"spectral_init": "preserve", **SETTINGS[method]}
    model = load(stock_checkpoint(tiny), spectral_conditioning=True, **kwargs)
    assert list(spectral_layers(model))
    expected = outputs_of(tiny.model(), tiny.batch())
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10


@each_flagged
def test_condition_in_place_takes_the_class_that_the_flag_gives(tiny, stock_checkpoint, tmp_path):
    model = tiny.model()
    condition(model, SpectralConfig("svd"))
    flagged = load(stock_checkpoint(tiny), spectral_conditioning=True, spectral_method="svd")
    assert type(model) is type(flagged)
    assert_bit_equal(model.state_dict(), flagged.state_dict())
    model.save_pretrained(tmp_path)
    assert_bit_equal(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("teacher", [False, True])
def test_of_several_classes_for_one_auto_class_the_checkpoint_decides(teacher, tmp_path):
    # transformers keeps a DeiT with and one without a teacher's head under AutoModelForImageClassification.
    tiny = next(tiny for tiny in FLAGGED if tiny.model_type == "deit")
    name = "DeiTForImageClassificationWithTeacher" if teacher else "DeiTForImageClassification"
    stock = getattr(transformers, name)(tiny.config()).double().eval()
    stock.save_pretrained(tmp_path / "stock")
    auto_name = "AutoModelForImageClassification"
    model, info = load(tmp_path / "stock", auto_name, spectral_conditioning=True, output_loading_info=True)
    assert type(model).__name__ == f"Spec{name}"
    assert not info["unexpected_keys"]
    expected = outputs_of(add_correction(tiny, stock, identity_by_numpy()), tiny.batch())
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
    model.save_pretrained(tmp_path / "conditioned")
    again = load(tmp_path / "conditioned", auto_name)
    assert type(again) is type(model)
    assert_bit_equal(outputs_of(again, tiny.batch()), outputs_of(model, tiny.batch()))


# --- condition alone -------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, row: ConditionOnly, dtype=torch.float64) -> dict[str, Tensor]:
    inputs = {k: value.to(dtype) if value.is_floating_point() else value for k, value in row.inputs().items()}
    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, (tuple, list)):
        return {str(index): value for index, value in enumerate(result)}
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


@each_row
@each_method
def test_condition_equals_w_plus_c_and_fold_keeps_it(row, method):
    model = row.model()
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    reports = condition(model, SpectralConfig(method))
    assert len(reports) == 3 * row.attentions
    expected = outputs(row.add_correction(CORRECTIONS[method]), row)
    conditioned = outputs(model, row)
    assert relative_difference(conditioned, expected) < 1e-10
    fold(model)
    assert_bit_equal(outputs(model, row), conditioned)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names


@each_row
@each_method
def test_in_float32(row, method):
    model = row.model(torch.float32)
    condition(model, SpectralConfig(method, lambda_=LAMBDAS if method == "identity" else None))
    conditioned = outputs(model, row, torch.float32)
    if method == "identity":  # two float32 SVDs differ by more
        expected = row.add_correction(identity_by_numpy(LAMBDAS), dtype=torch.float32)
        assert relative_difference(conditioned, outputs(expected, row, torch.float32)) < 1e-5
    assert relative_difference(outputs(fold(model), row, torch.float32), conditioned) < 1e-5


@each_row
@pytest.mark.parametrize("target", PROJECTIONS)
def test_on_each_projection_by_itself(row, target):
    plain = outputs(row.model(), row)
    model = row.model()
    condition(model, SpectralConfig(lambda_=1.5, targets=(target,)))
    expected = outputs(row.add_correction(identity_by_numpy(1.5), targets=[target]), row)
    assert relative_difference(outputs(model, row), expected) < 1e-10
    assert relative_difference(expected, plain) > 1e-4


@each_row
@each_method
def test_on_each_head_by_itself(row, method):
    model = row.model()
    condition(model, SpectralConfig(method, granularity="head", lambda_=LAMBDAS if method == "identity" else None))
    correction = identity_by_numpy(LAMBDAS) if method == "identity" else CORRECTIONS["svd"]
    expected = outputs(row.add_correction(correction, per_head=True), row)
    assert relative_difference(outputs(model, row), expected) < 1e-10


@each_row
def test_gradients_equal_those_of_w_plus_c(row):
    # C is a constant: the gradient to W is the one that a stock model has at W + C.
    models = [row.model(), row.add_correction(identity_by_numpy(LAMBDAS))]
    condition(models[0], SpectralConfig(lambda_=LAMBDAS))
    for model in models:
        result = model(**row.inputs())
        values = (
            result
            if isinstance(result, (tuple, list))
            else [result]
            if isinstance(result, Tensor)
            else result.values()
        )
        sum((value**2).sum() for value in values if isinstance(value, Tensor)).backward()
    parameters, expected = (dict(model.named_parameters()) for model in models)
    assert parameters.keys() == expected.keys()
    assert any(value.grad is not None for value in expected.values())
    for name, value in expected.items():
        if value.grad is not None:
            np.testing.assert_allclose(parameters[name].grad, value.grad, atol=1e-9 * (1 + value.grad.abs().max()))


@each_row
def test_its_checkpoints_are_refused_until_it_is_folded(row, tmp_path):
    model = row.model()
    condition(model, SpectralConfig())
    if isinstance(model, transformers.PreTrainedModel):
        with pytest.raises(ValueError, match="fold"):
            model.save_pretrained(tmp_path)
        fold(model).save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").is_file()


def test_classes_that_only_share_a_name_are_not_taken():
    # timm's SwinV2 has a WindowAttention too, which reads its weight past the module.
    import timm

    settings = {"img_size": 32, "embed_dim": 16, "depths": (1,), "num_heads": (2,), "window_size": 4}
    model = timm.create_model("swinv2_tiny_window8_256", pretrained=False, **settings)
    assert "WindowAttention" in {type(module).__name__ for module in model.modules()}
    with pytest.raises(ValueError, match="No query, key or value projection"):
        condition(model, SpectralConfig())


def test_defined_in_takes_a_module_or_what_lies_in_a_package():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    spec = AttentionSpec("Attention", {"qkv": PROJECTIONS}, query_heads=2, defined_in=("some.package", "other"))
    for place, expected in {
        "some.package": True,
        "some.package.module": True,
        "some.package_v2": False,
        "some": False,
        "other": True,
    }.items():
        Attention.__module__ = place
        assert spec.matches(Attention()) is expected


def test_heads_by_the_first_name_that_is_there():
    attention = nn.Module()
    attention.heads, attention.qkv = 2, nn.Linear(8, 24)
    spec = AttentionSpec("Module", {"qkv": PROJECTIONS}, query_heads=("num_heads", "heads"))
    assert spec.layout(attention, "qkv", 24, None).heads == (2, 2, 2)
    missing = AttentionSpec("Module", {"qkv": PROJECTIONS}, query_heads=("num_heads", "n_heads"))
    with pytest.raises(ValueError, match=r"num_heads.*n_heads"):
        missing.layout(attention, "qkv", 24, None)
