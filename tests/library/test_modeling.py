"""The conditioned classes and configurations: saving, loading, refusing, adopting a model and giving it back."""

import copy
import inspect
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    LAYERS,
    add_correction,
    assert_bit_equal,
    each_architecture,
    each_head,
    each_head_once,
    each_init,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
    svd_by_numpy,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold, refresh
from hf_specattn.conditioning import conditioned_counterpart
from hf_specattn.config_fields import SPECTRAL_FIELDS
from hf_specattn.layers import SpectralLayer, spectral_layers
from hf_specattn.modeling import SpecBertConfig, SpecBertForMaskedLM, SpecBertModel

pytestmark = pytest.mark.integration

SETTINGS = {"identity": {"lambda_": 10.0}, "svd": {"spectral_method": "svd"}}
BERT = ARCHITECTURES["bert"]


def conditioned(tiny, path, auto_name="AutoModel", method="svd", **kwargs):
    settings = {"spectral_conditioning": True, **SETTINGS[method], **kwargs}
    return getattr(transformers, auto_name).from_pretrained(path, **settings)


def config_fields(folder):
    return json.loads((folder / "config.json").read_text())


def corrections(state):
    return {name: value for name, value in state.items() if name.endswith(".correction")}


# --- saving and loading ----------------------------------------------------------------------------------------------


@each_architecture
@each_method
@each_init
def test_round_trip_is_bit_exact(tiny, method, init, stock_checkpoint, tmp_path):
    model = conditioned(tiny, stock_checkpoint(tiny), method=method, spectral_init=init)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(outputs_of(loaded, tiny.batch()), outputs_of(model, tiny.batch()))


@each_head
def test_every_head_saves_and_loads(tiny, auto_name, stock_checkpoint, tmp_path):
    model = conditioned(tiny, stock_checkpoint(tiny, auto_name), auto_name, lambda_=None)
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, auto_name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    batch = tiny.batch(auto_name)
    assert_bit_equal(outputs_of(loaded, batch), outputs_of(model, batch))


@each_architecture
@each_method
def test_names_and_tensors_are_the_stock_ones(tiny, method, stock_checkpoint, tmp_path):
    conditioned(tiny, stock_checkpoint(tiny), method=method).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stock = load_file(stock_checkpoint(tiny) / "model.safetensors")
    extra = stored.keys() - stock.keys()
    assert stock.keys() <= stored.keys()
    # Identity stores no tensor; svd one for each conditioned weight, of its shape.
    weights = LAYERS * (1 if tiny.fused else 3)
    assert len(extra) == (weights if method == "svd" else 0)
    for name in extra:
        assert name.endswith(".correction")
        assert stored[name].shape == stock[name.replace(".correction", ".weight")].shape
    # Additive loading leaves the weights as they were.
    assert_bit_equal({name: stored[name] for name in stock}, stock)


@each_architecture
@each_init
def test_config_json(tiny, init, stock_checkpoint, tmp_path):
    lambdas = {"query": 1.0, "value": 2.5}
    model = conditioned(
        tiny,
        stock_checkpoint(tiny),
        "AutoModel",
        "identity",
        lambda_=lambdas,
        spectral_targets=("query", "value"),
        spectral_granularity="head",
        spectral_init=init,
    )
    model.save_pretrained(tmp_path)
    fields = config_fields(tmp_path)
    assert fields["model_type"] == f"specattn_{tiny.model_type}"
    assert fields["architectures"] == [f"Spec{tiny.stock_class().__name__}"]
    assert {name: fields.get(name) for name in SPECTRAL_FIELDS} == {
        "spectral_conditioning": True,
        "lambda_": lambdas,
        "spectral_method": "identity",
        "spectral_targets": ["query", "value"],
        "spectral_granularity": "head",
        "spectral_refresh_every": None,
    }
    assert "spectral_init" not in (tmp_path / "config.json").read_text()
    # and nothing that the stock file says is lost
    stock = config_fields(stock_checkpoint(tiny))
    for name in stock.keys() - {"model_type", "architectures"}:
        assert fields[name] == stock[name]


@each_method
def test_sharded_checkpoint(method, stock_checkpoint, tmp_path):
    model = conditioned(BERT, stock_checkpoint(BERT), method=method)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(outputs_of(loaded, BERT.batch()), outputs_of(model, BERT.batch()))


def test_sharded_checkpoint_without_one_correction_is_refused(stock_checkpoint, tmp_path):
    conditioned(BERT, stock_checkpoint(BERT)).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = next(key for key in index["weight_map"] if key.endswith(".correction"))
    file = tmp_path / index["weight_map"].pop(name)
    state = load_file(file)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="correction"):
        AutoModel.from_pretrained(tmp_path)


@each_architecture
@each_method
@pytest.mark.parametrize("source", ["stock", "conditioned"])
def test_loading_in_bfloat16(tiny, method, source, stock_checkpoint, tmp_path):
    kwargs = {"spectral_conditioning": True, **SETTINGS[method]}
    path = stock_checkpoint(tiny)
    if source == "conditioned":
        AutoModel.from_pretrained(path, **kwargs).save_pretrained(tmp_path)
        path, kwargs = tmp_path, {}
    model = AutoModel.from_pretrained(path, dtype=torch.bfloat16, **kwargs)
    # The weights are rounded once, and the number lambda not at all.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = tiny.model().bfloat16()
    assert_bit_equal(dict(model.named_parameters()), dict(rounded.named_parameters()))
    if method == "identity":
        assert model.config.lambda_ == 10.0
    else:
        for layer, exact in zip(layers_of(model), layers_of(conditioned(tiny, stock_checkpoint(tiny)))):
            assert layer.correction.dtype == torch.bfloat16
            error = (layer.correction.double() - exact.correction).abs().max() / exact.correction.abs().max()
            assert error < 2**-6
    # Against NumPy's W + C of the rounded W, with the size of an error of bf16 (8 bits) through two layers.
    expected = outputs_of(add_correction(tiny, rounded.double(), CORRECTIONS[method]), tiny.batch())
    outputs = outputs_of(model, tiny.batch(dtype=torch.bfloat16))
    assert outputs["last_hidden_state"].dtype == torch.bfloat16
    mean_error = (outputs["last_hidden_state"].double() - expected["last_hidden_state"]).abs().mean()
    assert mean_error < 0.05 * expected["last_hidden_state"].abs().mean()


def layers_of(model):
    return [layer for _, layer in spectral_layers(model)]


@each_architecture
@each_method
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=["cpu", "map"])
def test_device_map(tiny, method, device_map, stock_checkpoint, tmp_path):
    expected = conditioned(tiny, stock_checkpoint(tiny), method=method)
    model = conditioned(tiny, stock_checkpoint(tiny), method=method, device_map=device_map)
    assert_bit_equal(model.state_dict(), expected.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    assert_bit_equal(outputs_of(loaded, tiny.batch()), outputs_of(expected, tiny.batch()))


def test_subfolder(stock_checkpoint, tmp_path):
    model = conditioned(BERT, stock_checkpoint(BERT))
    model.save_pretrained(tmp_path / "inner")
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="inner")
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    fold(loaded).save_pretrained(tmp_path / "stock")
    preserved = conditioned(BERT, tmp_path, subfolder="stock", spectral_init="preserve")
    assert relative_difference(outputs_of(preserved, BERT.batch()), outputs_of(model, BERT.batch())) < 1e-12


@each_method
def test_from_a_state_dict_in_memory(method, stock_checkpoint):
    model = conditioned(BERT, stock_checkpoint(BERT), method=method)
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(outputs_of(loaded, BERT.batch()), outputs_of(model, BERT.batch()))


def test_a_state_dict_in_memory_without_its_corrections_is_refused(stock_checkpoint):
    model = conditioned(BERT, stock_checkpoint(BERT))
    stock_state = {name: value for name, value in model.state_dict().items() if not name.endswith(".correction")}
    with pytest.raises(ValueError, match="correction"):
        type(model).from_pretrained(None, config=model.config, state_dict=stock_state)
    # unless the caller says that these are stock weights
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=stock_state, spectral_init="additive")
    assert_bit_equal(loaded.state_dict(), model.state_dict())


def test_a_state_dict_without_corrections_is_not_saved(stock_checkpoint, tmp_path):
    model = conditioned(BERT, stock_checkpoint(BERT))
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith(".correction")}
    with pytest.raises(ValueError, match=r"weight of encoder.layer.0.attention.self.query and not its correction"):
        model.save_pretrained(tmp_path, state_dict=weights)
    assert not list(tmp_path.iterdir())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, state)
    assert_bit_equal(AutoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


@each_method
def test_classes_by_name(method, stock_checkpoint, tmp_path):
    path = stock_checkpoint(BERT, "AutoModelForMaskedLM")
    model = SpecBertForMaskedLM.from_pretrained(path, **SETTINGS[method])
    expected = add_correction(BERT, BERT.model("AutoModelForMaskedLM"), CORRECTIONS[method])
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-10
    model.save_pretrained(tmp_path)
    loaded = SpecBertForMaskedLM.from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="spectral_init='preserve'"):
        SpecBertForMaskedLM.from_pretrained(tmp_path, spectral_init="preserve")


@each_method
def test_constructed_from_a_config(method):
    model = SpecBertModel(SpecBertConfig(**BERT.settings, **SETTINGS[method])).double().eval()
    stock = transformers.BertModel(BERT.config()).double().eval()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".correction")})
    expected = add_correction(BERT, stock, CORRECTIONS[method])
    # float32 corrections
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-5


def test_a_stock_configuration_makes_no_conditioned_model(stock_checkpoint):
    message = r"SpecBertModel was given a BertConfig.*SpecBertConfig.from_stock"
    with pytest.raises(ValueError, match=message):
        SpecBertModel(BERT.config())
    with pytest.raises(ValueError, match=message):
        SpecBertModel.from_pretrained(stock_checkpoint(BERT), config=BERT.config())
    model = SpecBertModel.from_pretrained(
        stock_checkpoint(BERT), config=SpecBertConfig.from_stock(BERT.config(), SpectralConfig(lambda_=2.0))
    )
    expected = add_correction(BERT, BERT.model(), identity_by_numpy(2.0))
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-10


@each_method
def test_loading_info(method, stock_checkpoint):
    # What is missing from a stock checkpoint is what the stock class too would miss.
    path = stock_checkpoint(BERT, "AutoModelForMaskedLM")
    settings = {"spectral_conditioning": True, **SETTINGS[method]}
    _, info = AutoModel.from_pretrained(path, output_loading_info=True, **settings)
    _, stock_info = AutoModel.from_pretrained(path, output_loading_info=True)
    assert info["missing_keys"] == stock_info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert info["unexpected_keys"] == stock_info["unexpected_keys"]


@each_method
def test_offloading_to_disk(method, stock_checkpoint, tmp_path):
    model = conditioned(BERT, stock_checkpoint(BERT), method=method)
    model.save_pretrained(tmp_path)
    device_map = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    kwargs = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    loaded = AutoModel.from_pretrained(tmp_path, **kwargs)
    assert_bit_equal(outputs_of(loaded, BERT.batch()), outputs_of(model, BERT.batch()))
    # Of stock weights the corrections are computed first.
    with pytest.raises(ValueError, match=r"offloaded.*save_pretrained"):
        conditioned(BERT, stock_checkpoint(BERT), method=method, **kwargs)


# --- a checkpoint of one head loaded into another --------------------------------------------------------------------


@each_architecture
@each_method
@pytest.mark.parametrize("direction", ["base to head", "head to base"])
def test_between_base_and_heads(tiny, method, direction, stock_checkpoint, tmp_path):
    heads = [name for name in tiny.classes if "Classification" in name]
    source, target = ("AutoModel", heads[0]) if direction == "base to head" else (heads[0], "AutoModel")
    model = conditioned(tiny, stock_checkpoint(tiny, source), source, method)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, target).from_pretrained(tmp_path)
    assert type(loaded).__name__ == f"Spec{tiny.classes[target]}"
    source_base, target_base = (
        m if name == "AutoModel" else m.base_model for m, name in ((model, source), (loaded, target))
    )
    common = source_base.state_dict().keys() & target_base.state_dict().keys()
    assert corrections(source_base.state_dict()).keys() <= common
    assert_bit_equal(*({name: base.state_dict()[name] for name in common} for base in (target_base, source_base)))
    batch = tiny.batch()
    output, expected = (outputs_of(base, batch)["last_hidden_state"] for base in (target_base, source_base))
    assert torch.equal(output, expected)


@each_architecture
@each_method
def test_stock_base_into_a_conditioned_head(tiny, method, stock_checkpoint):
    head = next(name for name in tiny.classes if "Classification" in name)
    model = conditioned(tiny, stock_checkpoint(tiny), head, method)
    expected = add_correction(tiny, tiny.model(), CORRECTIONS[method])
    output, expected = (outputs_of(base, tiny.batch()) for base in (model.base_model, expected))
    assert relative_difference(*({"output": o["last_hidden_state"]} for o in (output, expected))) < 1e-10


# --- a conditioned checkpoint loads as it was trained ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(stock_checkpoint, tmp_path_factory):
    """A conditioned checkpoint of each method."""
    folders = {}
    for method, settings in (("identity", {"lambda_": 2.0}), ("svd", {"lambda_": None})):
        folders[method] = tmp_path_factory.mktemp(method)
        conditioned(BERT, stock_checkpoint(BERT), method=method, **settings).save_pretrained(folders[method])
    return folders


OTHER_SETTINGS = {
    "identity": [
        {"lambda_": 3.0},
        {"lambda_": None},
        {"lambda_": {"query": 2.0, "key": 2.0, "value": 1.0}},
        {"spectral_method": "svd"},
        {"spectral_method": "svd", "lambda_": None},
        {"spectral_targets": ["query"]},
        {"spectral_granularity": "head"},
        {"spectral_conditioning": False},
    ],
    "svd": [
        {"lambda_": 2.0},
        {"spectral_method": "identity"},
        {"spectral_method": "identity", "lambda_": 2.0},
        {"spectral_targets": ["query", "key"]},
        {"spectral_granularity": "head"},
        {"spectral_conditioning": False},
    ],
}


@pytest.mark.parametrize(
    ("method", "other"), [(method, other) for method, others in OTHER_SETTINGS.items() for other in others], ids=str
)
@pytest.mark.parametrize("how", ["AutoModel", "AutoConfig", "class by name"])
def test_other_settings_are_refused(method, other, how, trained):
    load = {"AutoModel": AutoModel, "AutoConfig": AutoConfig, "class by name": SpecBertModel}[how].from_pretrained
    with pytest.raises(ValueError, match="fold"):
        load(trained[method], **other)


@each_method
@each_init
def test_spectral_init_of_a_conditioned_checkpoint_is_refused(method, init, trained):
    with pytest.raises(ValueError, match=f"spectral_init='{init}': this checkpoint is already conditioned"):
        AutoModel.from_pretrained(trained[method], spectral_init=init)


@each_method
def test_other_settings_in_a_config_are_refused(method, trained):
    config = AutoConfig.from_pretrained(trained[method])
    config.spectral_granularity = "head"
    with pytest.raises(ValueError, match=r"granularity.*fold"):
        AutoModel.from_pretrained(trained[method], config=config)


def test_another_lambda_in_a_config_is_refused(trained):
    config = AutoConfig.from_pretrained(trained["identity"])
    config.lambda_ = 5.0
    with pytest.raises(ValueError, match=r"lambda_=.*fold"):
        AutoModel.from_pretrained(trained["identity"], config=config)


@pytest.mark.parametrize(("checkpoint", "other"), [("svd", "identity"), ("identity", "svd")])
def test_the_configuration_of_another_checkpoint_is_refused(checkpoint, other, trained):
    with pytest.raises(ValueError, match=r"spectral_method=|lambda_="):
        SpecBertModel.from_pretrained(trained[checkpoint], config=str(trained[other]))


@pytest.mark.parametrize(
    ("method", "same"),
    [
        ("identity", {"spectral_conditioning": True}),
        ("identity", {"spectral_conditioning": True, "lambda_": 2.0}),
        ("identity", {"lambda_": 2}),
        ("identity", {"lambda_": {"query": 2.0, "key": 2.0, "value": 2.0}}),
        ("identity", {"spectral_method": "identity"}),
        ("identity", {"spectral_targets": ("value", "key", "query")}),
        ("identity", {"spectral_granularity": "projection"}),
        ("identity", {"spectral_refresh_every": None}),
        ("svd", {"spectral_conditioning": True, "spectral_method": "svd"}),
        ("svd", {"lambda_": None}),
        ("svd", {"spectral_targets": ["query", "key", "value"]}),
        ("svd", {"hidden_dropout_prob": 0.5}),
    ],
    ids=str,
)
def test_the_same_settings_again_are_fine(method, same, trained):
    loaded = AutoModel.from_pretrained(trained[method], **same)
    expected = AutoModel.from_pretrained(trained[method])
    assert_bit_equal(loaded.state_dict(), expected.state_dict())
    output, expected = (m(**BERT.batch()).last_hidden_state for m in (loaded, expected))
    assert torch.equal(output, expected)


def test_training_may_go_on_with_another_interval(trained, stock_checkpoint, tmp_path):
    model = AutoModel.from_pretrained(trained["svd"], spectral_refresh_every=5)
    assert model.config.spectral_refresh_every == 5
    assert all(layer.spectral.refresh_every == 5 for layer in layers_of(model))
    expected = AutoModel.from_pretrained(trained["svd"])
    # The stored corrections stay in force until somebody refreshes.
    assert_bit_equal(model.state_dict(), expected.state_dict())
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.mul_(2)
    refresh(model)
    for layer, before in zip(layers_of(model), layers_of(expected)):
        torch.testing.assert_close(layer.correction, 2 * before.correction)
    model.save_pretrained(tmp_path)
    assert config_fields(tmp_path)["spectral_refresh_every"] == 5
    static = AutoModel.from_pretrained(tmp_path, spectral_refresh_every=None)
    assert static.config.spectral_refresh_every is None
    assert_bit_equal(static.state_dict(), model.state_dict())


def test_stock_weights_without_a_correction_are_refused(tmp_path):
    model = BERT.model()
    model.encoder.layer[1].attention.self.key.weight.data[8:16].zero_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer.1.attention.self.key is zero in key \(head 1\)"):
        conditioned(BERT, tmp_path, spectral_granularity="head")
    key = conditioned(BERT, tmp_path).encoder.layer[1].attention.self.key
    assert np.linalg.cond(key.effective_weight().detach().numpy()) == pytest.approx(2)
    model.encoder.layer[1].attention.self.key.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer.1.attention.self.key has nan or inf"):
        conditioned(BERT, tmp_path)


# --- corrections that were lost --------------------------------------------------------------------------------------


def damaged_checkpoint(folder, trained, damage):
    model = AutoModel.from_pretrained(trained["svd"])
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.key.correction"
    state.update({name: {"missing": None, "misshapen": state[name][:16].clone()}[damage]})
    state = {key: value for key, value in state.items() if value is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
@pytest.mark.parametrize("ignore", [False, True], ids=["strict", "ignore_mismatched_sizes"])
@pytest.mark.parametrize(
    "load", [AutoModel, SpecBertModel, AutoModelForSequenceClassification], ids=lambda c: c.__name__
)
def test_a_lost_correction_is_an_error(damage, ignore, load, trained, tmp_path):
    name = damaged_checkpoint(tmp_path, trained, damage)
    # transformers itself raises a RuntimeError for a mismatch that it was not told to ignore
    with pytest.raises((ValueError, RuntimeError), match=r"correction|ignore_mismatched_sizes") as raised:
        load.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
    if damage == "missing" or ignore:
        assert isinstance(raised.value, ValueError)
        assert name in str(raised.value)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_stock_weights_load_where_a_conditioned_checkpoint_was_refused(damage, trained, stock_checkpoint, tmp_path):
    # The leniency towards stock checkpoints is that of one call: neither the refusal nor the success leaves a trace.
    damaged_checkpoint(tmp_path, trained, damage)
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=r"correction|mismatch"):
            AutoModel.from_pretrained(tmp_path)
        model = conditioned(BERT, stock_checkpoint(BERT))
        expected = add_correction(BERT, BERT.model(), svd_by_numpy)
        assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-10


# --- condition() in place --------------------------------------------------------------------------------------------


@each_head_once
def test_condition_in_place_saves_a_conditioned_checkpoint(tiny, auto_name, method, tmp_path):
    model = tiny.model(auto_name)
    condition(model, SpectralConfig(method))
    assert type(model).__name__ == f"Spec{tiny.classes[auto_name]}"
    batch = tiny.batch(auto_name)
    outputs = outputs_of(model, batch)
    expected = outputs_of(add_correction(tiny, tiny.model(auto_name), CORRECTIONS[method]), batch)
    assert relative_difference(outputs, expected) < 1e-10
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto_name).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(outputs_of(loaded, batch), outputs)


@each_architecture
@each_init
def test_condition_equals_loading_with_the_flag(tiny, init, stock_checkpoint):
    for method in ("identity", "svd"):
        model = tiny.model()
        condition(model, SpectralConfig(method, granularity="head"), init=init)
        kwargs = {"spectral_granularity": "head", "spectral_init": init}
        loaded = conditioned(tiny, stock_checkpoint(tiny), method=method, **kwargs)
        assert type(model) is type(loaded)
        assert model.config.spectral_config == loaded.config.spectral_config
        assert_bit_equal(model.state_dict(), loaded.state_dict())
        assert_bit_equal(outputs_of(model, tiny.batch()), outputs_of(loaded, tiny.batch()))


@each_head
def test_condition_does_not_change_the_given_configuration(tiny, auto_name):
    config = tiny.config()
    before = copy.deepcopy(config)
    model, sibling = (tiny.stock_class(auto_name)(config) for _ in range(2))
    implementation = model.config._attn_implementation
    condition(model, SpectralConfig("svd"))
    assert type(config) is tiny.config_class
    assert config.to_dict() == before.to_dict()
    assert type(sibling) is tiny.stock_class(auto_name)
    assert type(sibling.config) is tiny.config_class
    # Every part of the model sees the new one, which still runs the attention that the stock one ran.
    assert {type(m.config).__name__ for m in model.modules() if hasattr(m, "config")} == {
        f"Spec{tiny.config_class.__name__}"
    }
    assert model.config._attn_implementation == implementation
    fold(model)
    assert {type(m.config) for m in model.modules() if hasattr(m, "config")} == {tiny.config_class}
    assert model.config.to_dict() == sibling.config.to_dict()
    assert model.config._attn_implementation == implementation


@each_architecture
def test_saving_part_of_a_conditioned_model(tiny, tmp_path):
    head = next(name for name in tiny.classes if "Classification" in name)
    model = tiny.model(head)
    condition(model, SpectralConfig("svd"))
    model.base_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    expected = outputs_of(model.base_model, tiny.batch())["last_hidden_state"]
    assert torch.equal(outputs_of(loaded, tiny.batch())["last_hidden_state"], expected)


class RenamedSelfAttention(transformers.models.bert.modeling_bert.BertSelfAttention):
    pass


class OtherBert(transformers.BertModel):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.encoder.layer:
            layer.attention.self.__class__ = RenamedSelfAttention


def test_a_class_without_conditioned_counterpart_refuses_to_be_saved(tmp_path):
    model = OtherBert(BERT.config()).double().eval()
    stock = copy.deepcopy(model)
    with pytest.raises(ValueError, match="AttentionSpec"):
        condition(model, SpectralConfig())
    spec = AttentionSpec("RenamedSelfAttention", {"query": "query", "key": "key", "value": "value"})
    condition(model, SpectralConfig(), architecture=spec)
    expected = outputs_of(add_correction(BERT, stock, identity_by_numpy()), BERT.batch())
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < 1e-10
    assert type(model) is OtherBert
    for duplicate in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"OtherBert.*fold\(model\)"):
            duplicate.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    fold(model).save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert relative_difference(outputs_of(loaded, BERT.batch()), expected) < 1e-10


def test_an_overridden_architecture_of_a_known_class_loads_conditioned_alike(tmp_path):
    # The classes of a checkpoint follow the table, so an override must not make it load as something else.
    spec = AttentionSpec("BertSelfAttention", {"query": "query", "key": "key"})
    model = BERT.model()
    condition(model, SpectralConfig(targets=("query", "key")), architecture=spec)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_bit_equal(outputs_of(loaded, BERT.batch()), outputs_of(model, BERT.batch()))


def test_an_override_that_the_table_contradicts_is_not_saved_as_the_table_reads_it(tmp_path):
    # Query and key in each other's place: the same function only with each other's lambda.
    spec = AttentionSpec("BertSelfAttention", {"query": "key", "key": "query", "value": "value"})
    model = BERT.model()
    condition(model, SpectralConfig(lambda_={"query": 1.0, "key": 2.0, "value": 3.0}), architecture=spec)
    outputs = outputs_of(model, BERT.batch())
    try:
        model.save_pretrained(tmp_path)
    except ValueError:
        return
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path), BERT.batch()), outputs)


# --- fold ------------------------------------------------------------------------------------------------------------


@each_head_once
def test_fold_gives_a_stock_model(tiny, auto_name, method, stock_checkpoint, tmp_path):
    path = stock_checkpoint(tiny, auto_name)
    stock = tiny.model(auto_name)
    model = conditioned(tiny, path, auto_name, method)
    batch = tiny.batch(auto_name)
    outputs = outputs_of(model, batch)
    assert fold(model) is model
    assert type(model) is tiny.stock_class(auto_name)
    assert type(model.config) is tiny.config_class
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert_bit_equal(outputs_of(model, batch), outputs)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "spectral" not in text
    assert "lambda_" not in text
    ignored = ("_name_or_path", "transformers_version", "architectures")
    fields, stock_fields = config_fields(tmp_path), config_fields(path)
    assert fields["architectures"] == [tiny.classes[auto_name]]
    assert {k: v for k, v in fields.items() if k not in ignored} == {
        k: v for k, v in stock_fields.items() if k not in ignored
    }
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()
    loaded = getattr(transformers, auto_name).from_pretrained(tmp_path)
    assert type(loaded) is tiny.stock_class(auto_name)
    assert_bit_equal(outputs_of(loaded, batch), outputs)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.save_pretrained(tmp_path / "part")


@each_architecture
def test_fold_and_condition_anew(tiny, stock_checkpoint, tmp_path):
    model = conditioned(tiny, stock_checkpoint(tiny), method="svd")
    outputs = outputs_of(model, tiny.batch())
    fold(model)
    condition(model, SpectralConfig(lambda_=3.0), init="preserve")
    assert model.config.lambda_ == 3.0
    assert relative_difference(outputs_of(model, tiny.batch()), outputs) < 1e-10
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.spectral_method == "identity"
    assert_bit_equal(outputs_of(loaded, tiny.batch()), outputs_of(model, tiny.batch()))


# --- composites ------------------------------------------------------------------------------------------------------


def composite():
    encoder, decoder = ARCHITECTURES["vit"].config(), BERT.config(is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    torch.manual_seed(5)
    return transformers.VisionEncoderDecoderModel(config).double().eval()


def composite_logits(model):
    batch = {**ARCHITECTURES["vit"].batch(), "decoder_input_ids": BERT.batch()["input_ids"]}
    return {"logits": outputs_of(model, batch)["logits"]}


@each_method
def test_condition_finds_both_parts_of_a_composite(method, tmp_path):
    model, expected = composite(), composite()
    reports = condition(model, SpectralConfig(method))
    # ViT, and self- and cross-attention of BERT
    assert len(reports) == 3 * LAYERS * 3
    # NumPy's rows of the tiny table know both parts by their names, cross-attention included.
    for tiny, part, count in ((ARCHITECTURES["vit"], expected.encoder, 1), (BERT, expected.decoder, 2)):
        found = tiny.projections(part)
        assert len(found) == 3 * LAYERS * count
        for _, projection, matrix in found:
            matrix += CORRECTIONS[method](matrix, projection)
    assert relative_difference(composite_logits(model), composite_logits(expected)) < 1e-10
    with pytest.raises(ValueError, match="fold"):
        model.save_pretrained(tmp_path)
    fold(model).save_pretrained(tmp_path)
    loaded = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert relative_difference(composite_logits(loaded), composite_logits(expected)) < 1e-10


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_of_a_conditioned_composite_is_not_saved_without_its_corrections(part, tmp_path):
    model = composite()
    condition(model, SpectralConfig())
    submodel = getattr(model, part)
    try:
        submodel.save_pretrained(tmp_path)
    except ValueError:
        return
    loaded = type(submodel).from_pretrained(tmp_path)
    assert any(isinstance(module, SpectralLayer) for module in loaded.modules())


@pytest.mark.parametrize("method", [None, "identity", "svd"])
def test_composite_of_conditioned_parts(method, tmp_path):
    """A composite whose parts were loaded with the flag: saved, loaded, folded."""
    vit = ARCHITECTURES["vit"]
    vit.model().save_pretrained(tmp_path / "vit")
    decoder_settings = {"is_decoder": True, "add_cross_attention": True}
    BERT.model("AutoModelForCausalLM", **decoder_settings).save_pretrained(tmp_path / "bert")
    settings = {"spectral_conditioning": True, "spectral_method": method} if method else {}
    model = transformers.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "vit",
        tmp_path / "bert",
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in settings.items()},
    ).eval()
    logits = composite_logits(model)
    model.save_pretrained(tmp_path / "composite")
    loaded = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "composite")
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(composite_logits(loaded), logits)
    if method is None:
        return
    assert len(list(spectral_layers(loaded))) == 3 * LAYERS * 3
    fold(loaded)
    assert_bit_equal(composite_logits(loaded), logits)
    for part, stock in ((loaded.encoder, transformers.ViTModel), (loaded.decoder, transformers.BertLMHeadModel)):
        assert type(part) is stock
        assert type(part.config) is stock.config_class
    loaded.save_pretrained(tmp_path / "folded")
    assert "spec" not in (tmp_path / "folded" / "config.json").read_text()
    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "folded")
    assert not list(spectral_layers(again))
    assert_bit_equal(composite_logits(again), logits)


def test_folding_a_composite_leaves_another_of_the_same_configuration_alone(tmp_path):
    encoder = AutoConfig.for_model("specattn_vit", **ARCHITECTURES["vit"].settings)
    decoder = AutoConfig.for_model("specattn_bert", **BERT.settings, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    model, sibling = (transformers.VisionEncoderDecoderModel(config).double().eval() for _ in range(2))
    logits = composite_logits(sibling)
    fold(model)
    sibling.save_pretrained(tmp_path)
    loaded = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert len(list(spectral_layers(loaded))) == 3 * LAYERS * 3
    assert_bit_equal(composite_logits(loaded), logits)


# --- the configuration itself ----------------------------------------------------------------------------------------


@each_architecture
def test_configuration_round_trips(tiny, tmp_path):
    config = AutoConfig.for_model(
        f"specattn_{tiny.model_type}",
        **tiny.settings,
        lambda_={"query": 1.0, "key": 0.5},
        spectral_targets=("key", "query"),
        spectral_granularity="head",
    )
    assert config.spectral_config == SpectralConfig("identity", {"query": 1.0, "key": 0.5}, ("query", "key"), "head")
    config.save_pretrained(tmp_path)
    for copied in (
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_pretrained(tmp_path),
        type(config).from_json_file(tmp_path / "config.json"),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(copied) is type(config)
        assert copied.spectral_config == config.spectral_config
        expected, fields = config.to_dict(), copied.to_dict()
        assert {**fields, "_name_or_path": ""} == {**expected, "_name_or_path": ""}
    stock = config.to_stock()
    assert type(stock) is tiny.config_class
    assert stock.to_dict() == tiny.config().to_dict()
    assert config.spectral_config.targets == ("query", "key")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spectral_conditioning": False}, "BertConfig"),
        ({"lambda_": 0}, "lambda_=0"),
        ({"lambda_": {"query": 1.0}}, "lambda_ has the keys"),
        ({"spectral_method": "SVD"}, "method='SVD'"),
        ({"spectral_targets": "query"}, "targets='query'"),
        ({"spectral_refresh_every": 0, "spectral_method": "svd"}, "refresh_every=0"),
    ],
    ids=str,
)
def test_configuration_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        SpecBertConfig(**wrong)


# --- duplicates ------------------------------------------------------------------------------------------------------


@each_architecture
@each_method
def test_deepcopy_and_pickle(tiny, method, stock_checkpoint):
    auto_name = next(name for name in tiny.classes if "Classification" in name)
    model = conditioned(tiny, stock_checkpoint(tiny, auto_name), auto_name, method)
    batch = tiny.batch(auto_name)
    outputs = outputs_of(model, batch)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(duplicate) is type(model)
        assert_bit_equal(duplicate.state_dict(), model.state_dict())
        assert_bit_equal(outputs_of(duplicate, batch), outputs)
        fold(duplicate)
        assert_bit_equal(outputs_of(duplicate, batch), outputs)
    assert_bit_equal(outputs_of(model, batch), outputs)


@each_architecture
def test_output_attentions_and_hidden_states(tiny, stock_checkpoint):
    # Conditioned by the flag, in place, and stock with NumPy's W + C: all record the same.
    stock = tiny.stock_class().from_pretrained(stock_checkpoint(tiny), attn_implementation="eager")
    in_place = copy.deepcopy(stock)
    condition(in_place, SpectralConfig(lambda_=0.5))
    flagged = conditioned(tiny, stock_checkpoint(tiny), method="identity", lambda_=0.5, attn_implementation="eager")
    add_correction(tiny, stock, identity_by_numpy(0.5))
    expected = stock(**tiny.batch(), output_attentions=True, output_hidden_states=True)
    for model in (in_place, flagged):
        outputs = model(**tiny.batch(), output_attentions=True, output_hidden_states=True)
        assert len(outputs.attentions) == LAYERS
        for name in ("attentions", "hidden_states"):
            for value, expected_value in zip(outputs[name], expected[name], strict=True):
                torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-10)


CONDITION_AND_RECORD = """
import torch
import transformers
import hf_specattn
config = transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
model = transformers.BertModel._from_config(config, attn_implementation="eager")
hf_specattn.condition(model, hf_specattn.SpectralConfig())
outputs = model(input_ids=torch.ones(1, 3).long(), output_attentions=True)
assert len(outputs.attentions) == 2, outputs.attentions
"""


@pytest.mark.slow
def test_output_attentions_of_the_first_conditioned_model_in_a_process(tmp_path):
    # transformers notes what a class records when one is constructed; here none has been, the class came by `condition`.
    command = [sys.executable, "-c", CONDITION_AND_RECORD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_saving_stale_corrections_warns(stock_checkpoint, tmp_path, warning_log):
    model = conditioned(BERT, stock_checkpoint(BERT), spectral_refresh_every=2)
    warning_log.messages.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for steps in range(1, 4):
        optimizer.step()
        warning_log.messages.clear()
        model.save_pretrained(tmp_path)
        stale = [message for message in warning_log.messages if "optimizer steps old" in message]
        assert len(stale) == (1 if steps > 2 else 0)
    refresh(model)
    warning_log.messages.clear()
    model.save_pretrained(tmp_path)
    assert warning_log.messages == []


def test_masked_lm_checkpoint_fine_tunes_as_a_classifier(stock_checkpoint, tmp_path):
    # The usual path: pretrain conditioned, then load the same folder under another head with its own number of labels.
    pretrained = conditioned(BERT, stock_checkpoint(BERT, "AutoModelForMaskedLM"), "AutoModelForMaskedLM")
    pretrained.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.classifier.out_features == 5
    names = corrections(model.state_dict())
    assert len(names) == 3 * LAYERS
    assert_bit_equal(names, corrections(pretrained.state_dict()))
    model(**BERT.batch(), labels=torch.tensor([0, 4])).loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers_of(model))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_bit_equal(outputs_of(again, BERT.batch()), outputs_of(pretrained, BERT.batch()))


@each_head
def test_a_conditioned_class_takes_what_its_stock_class_takes(tiny, auto_name):
    """Others (transformers' own tests among them) read from the signature what to pass."""
    stock = tiny.stock_class(auto_name)
    conditioned = conditioned_counterpart(stock)
    assert inspect.signature(conditioned.__init__) == inspect.signature(stock.__init__)


def test_weights_of_another_type_are_no_conditioned_checkpoint(tmp_path):
    model = ARCHITECTURES["bert"].model()
    condition(model, SpectralConfig())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("specattn_bert", "specattn_gpt2"))
    with pytest.raises(
        ValueError, match=r"is one of SpecGPT2Model by its configuration, but holds embeddings.*random numbers"
    ):
        AutoModel.from_pretrained(tmp_path)
