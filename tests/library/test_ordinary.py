"""Modules that are not ordinary, and libraries that replace every Linear: they work, or are refused with nothing changed."""

import copy
import functools
import sys
import types
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from models import ARCHITECTURES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModel, GPT2Config, GPT2Model

from hf_specattn import AttentionSpec, SpectralConfig, balance, condition, fold, refresh
from hf_specattn.layers import SpectralLayer, spectral_layers

pytestmark = pytest.mark.integration  # transformers saves, loads and dispatches

BERT = ARCHITECTURES["bert"]
IDENTITY, SVD = SpectralConfig(lambda_=2.0), SpectralConfig("svd")
DYNAMIC = SpectralConfig("svd", refresh_every=1)


def first_query(model):
    return model.get_submodule("encoder.layer.0.attention.self.query")


def outputs(model):
    with torch.no_grad():
        return model.eval()(**BERT.batch()).last_hidden_state


def state_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return type(model), {name: (type(m), vars(m).get("forward")) for name, m in model.named_modules()}, {
        name: None if tensor.is_meta else tensor.clone() for name, tensor in tensors.items()
    }  # fmt: skip


def assert_untouched(model, before):
    after = state_of(model)
    assert before[0] is after[0]
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, tensor in before[2].items():
        assert tensor is None or torch.equal(tensor, after[2][name]), name


# --- what is hung on a module ----------------------------------------------------------------------------------------


def own_forward(layer):
    forward = layer.forward
    layer.forward = lambda inputs: forward(inputs)


def compiled_forward(layer):
    layer.forward = torch.compile(layer.forward)


def over_a_hook(layer):
    add_hook_to_module(layer, ModelHook())
    layer.forward = functools.partial(layer.forward)


def foreign_under_a_hook(layer):
    own_forward(layer)
    add_hook_to_module(layer, ModelHook())


def plain_weight_norm(layer):
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still what older models carry
        torch.nn.utils.weight_norm(layer)


def to_meta(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.3)


def scaled(layer):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())


HUNG_ON = {
    own_forward: "its own forward method.*del module.forward",
    compiled_forward: "its own forward method",
    over_a_hook: "over a hook of accelerate.*remove_hook_from_submodules",
    foreign_under_a_hook: "its own forward method over a hook",
    scaled: "parametrization of weight.*remove_parametrizations",
    parametrizations.weight_norm: "parametrization of weight",
    parametrizations.spectral_norm: "parametrization of weight",
    parametrizations.orthogonal: "parametrization of weight",
    plain_weight_norm: r"normalized by weight_norm \(computed from weight_g, weight_v\).*remove_weight_norm",
    torch.nn.utils.spectral_norm: "normalized by spectral_norm.*remove_spectral_norm",
    pruned: r"pruned \(computed from weight_orig, weight_mask\).*prune.remove",
    to_meta: "on the meta device.*device_map='cpu'",
}
each_hung_on = pytest.mark.parametrize("hang", HUNG_ON, ids=lambda hang: hang.__name__)


@each_hung_on
@pytest.mark.parametrize(
    "work", [lambda model: condition(model, IDENTITY), lambda model: condition(model, SVD), balance]
)
def test_stock_projections_that_are_not_ordinary_are_refused(hang, work):
    model = BERT.model().eval()
    hang(first_query(model))
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"query (has|is).*{HUNG_ON[hang]}"):
        work(model)
    assert_untouched(model, before)


@each_hung_on
@pytest.mark.parametrize("work", [fold, refresh])
def test_conditioned_projections_that_are_not_ordinary_are_refused(hang, work):
    model = BERT.model()
    condition(model, DYNAMIC)
    hang(first_query(model))
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"query (has|is).*{HUNG_ON[hang]}"):
        work(model)
    assert_untouched(model, before)


def test_the_way_out_of_a_parametrization_works():
    model = BERT.model()
    condition(model, IDENTITY)
    scaled(first_query(model))
    expected = outputs(model)
    parametrize.remove_parametrizations(first_query(model), "weight")
    torch.testing.assert_close(outputs(fold(model)), expected, rtol=0, atol=1e-12)
    assert type(first_query(model)) is nn.Linear


def test_weights_that_came_to_be_shared_are_not_folded_twice():
    model = BERT.model()
    condition(model, IDENTITY)
    attention = model.get_submodule("encoder.layer.0.attention.self")
    attention.key.weight = attention.query.weight
    before = state_of(model)
    with pytest.raises(ValueError, match=r"tied.*query.*key"):
        fold(model)
    assert_untouched(model, before)


def test_weights_of_inference_mode():
    with torch.inference_mode():
        model = BERT.model()
    with pytest.raises(ValueError, match="inference_mode"):
        condition(model, SpectralConfig("svd"), init="preserve")
    assert not list(spectral_layers(model))


# --- hooks of accelerate ---------------------------------------------------------------------------------------------


def hooked(model, **settings):
    for _, module in list(model.named_modules()):
        add_hook_to_module(module, AlignDevicesHook("cpu", **settings), append=True)
    return model


@pytest.mark.parametrize("config", [IDENTITY, SVD], ids=["identity", "svd"])
@pytest.mark.parametrize("twice", [False, True], ids=["one", "sequential"])
def test_hooked_models_are_conditioned_and_folded(config, twice):
    expected = BERT.model()
    condition(expected, config)
    model = hooked(hooked(BERT.model()) if twice else BERT.model())
    condition(model, config)
    assert torch.equal(outputs(model), outputs(expected))
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(expected))
    fold(model)
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=0, atol=1e-12)
    assert torch.equal(outputs(fold(copy.deepcopy(expected))), outputs(model))
    remove_hook_from_submodules(model)
    assert torch.equal(outputs(fold(expected)), outputs(model))


def test_hooked_models_are_balanced():
    model, expected = hooked(BERT.model().eval()), BERT.model().eval()
    balance(model)
    balance(expected)
    assert torch.equal(first_query(model).weight, first_query(expected).weight)
    assert torch.equal(outputs(model), outputs(expected))


def test_gpt2_under_hooks():
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model, tokens = hooked(GPT2Model(config).eval()), torch.arange(8)[None]
    stock = model(tokens)[0]
    condition(model, IDENTITY)
    conditioned = model(tokens)[0]
    assert (conditioned - stock).abs().max() > 0.1
    torch.testing.assert_close(fold(model)(tokens)[0], conditioned, rtol=0, atol=1e-5)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, "cpu"),
    "cpu, buffers too": lambda model, folder: cpu_offload(model, "cpu", offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, str(folder), "cpu"),
    "disk, buffers too": lambda model, folder: disk_offload(model, str(folder), "cpu", offload_buffers=True),
    "one layer on the disk": lambda model, folder: dispatch_model(
        model,
        {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"},
        main_device="cpu",
        offload_dir=str(folder),
    ),
}
each_offload = pytest.mark.parametrize("offload", OFFLOADS)


@each_offload
@pytest.mark.parametrize("config", [IDENTITY, SVD], ids=["identity", "svd"])
def test_offloaded_models_are_folded_and_saved(offload, config, tmp_path):
    model = BERT.model()
    condition(model, config)
    expected = fold(copy.deepcopy(model))
    OFFLOADS[offload](model, tmp_path / "offload")
    fold(model)
    assert torch.equal(outputs(model), outputs(expected))
    if hasattr(model, "hf_device_map"):  # transformers asks for it
        model.save_pretrained(tmp_path / "plain")
        assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "plain")), outputs(expected))
    remove_hook_from_submodules(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@each_offload
def test_offloaded_weights_are_not_conditioned_balanced_or_refreshed(offload, tmp_path):
    for index, (config, work) in enumerate(
        [(None, lambda model: condition(model, IDENTITY)), (None, balance), (DYNAMIC, refresh)]
    ):
        model = BERT.model().eval()
        if config is not None:
            condition(model, config)
        OFFLOADS[offload](model, tmp_path / str(index))
        before = state_of(model)
        with pytest.raises(ValueError, match=r"on the meta device.*device_map='cpu'"):
            work(model)
        assert_untouched(model, before)


def test_a_checkpoint_is_not_written_to_by_folding_it_offloaded(tmp_path):
    model = BERT.model(dtype=torch.float32)
    condition(model, IDENTITY)
    model.save_pretrained(tmp_path / "conditioned")
    content = (tmp_path / "conditioned" / "model.safetensors").read_bytes()
    expected = fold(model)
    devices = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    loaded = AutoModel.from_pretrained(tmp_path / "conditioned", device_map=devices, offload_folder=tmp_path / "off")
    fold(loaded).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "conditioned" / "model.safetensors").read_bytes() == content
    plain = AutoModel.from_pretrained(tmp_path / "plain")
    assert not isinstance(first_query(plain), SpectralLayer)
    torch.testing.assert_close(outputs(plain), outputs(expected), rtol=0, atol=1e-6)


# --- libraries that replace every nn.Linear --------------------------------------------------------------------------


class OtherLinear(nn.Linear):
    """As quantizers and fp8 converters have one."""


def replacement_of(linear):
    other = OtherLinear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    other.weight, other.bias = linear.weight, linear.bias
    return other


def replace_all(model, put):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                put(model, parent, name, replacement_of(child))


def by_path(model, parent, name, new):
    path = next(path for path, module in model.named_modules() if module is parent)
    model.set_submodule(f"{path}.{name}" if path else name, new)


WAYS = {
    "setattr (quanto, torchao, Transformer Engine)": lambda model, parent, name, new: setattr(parent, name, new),
    "_modules (bitsandbytes through accelerate)": lambda model, parent, name, new: parent._modules.__setitem__(
        name, new
    ),
    "register_module": lambda model, parent, name, new: parent.register_module(name, new),
    "set_submodule (transformers)": by_path,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["condition", "load", "copy", "no transformers"])
def test_conditioned_projections_are_not_replaced(way, how, tmp_path):
    model = BERT.model()
    if how == "no transformers":
        model = nn.ModuleDict({"attention": copy.deepcopy(model.get_submodule("encoder.layer.0.attention.self"))})
        spec = AttentionSpec(
            "BertSelfAttention",
            {"query": "query", "key": "key", "value": "value"},
            query_heads="num_attention_heads",
        )
        condition(model, IDENTITY, architecture=spec)
    else:
        condition(model, IDENTITY)
    if how == "load":
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
    elif how == "copy":
        model = copy.deepcopy(model)
    names = [name for name, _ in spectral_layers(model)]
    with pytest.raises(
        ValueError, match=r"OtherLinear in the place of the conditioned projection \w+ .*fold\(model\)"
    ):
        replace_all(model, WAYS[way])
    assert [name for name, _ in spectral_layers(model)] == names
    fold(model)
    replace_all(model, WAYS[way])
    assert not [m for m in model.modules() if type(m) is nn.Linear]


def test_what_was_replaced_behind_the_back_is_not_saved_folded_or_refreshed(tmp_path):
    model = BERT.model()
    condition(model, DYNAMIC)
    attention = model.get_submodule("encoder.layer.1.attention.self")
    dict.__setitem__(attention._modules, "value", replacement_of(attention.value))
    for work in (fold, refresh, lambda model: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(
            ValueError, match=r"encoder\.layer\.1\.attention\.self\.value would compute with W instead"
        ):
            work(model)
    assert not (tmp_path / "x").exists()
    assert len(list(spectral_layers(model))) == 5


def test_wrappers_and_new_projections_of_the_same_kind_go_through():
    model = BERT.model()
    condition(model, IDENTITY)
    attention = model.get_submodule("encoder.layer.0.attention.self")
    expected = outputs(model)
    layer = attention.query
    attention.query = nn.Sequential(layer)
    assert torch.equal(outputs(model), expected)
    attention.query = layer  # and back
    attention.query = copy.deepcopy(layer)
    assert torch.equal(outputs(model), expected)
    attention.query = None


class PackedTensor(torch.Tensor):
    """As torchao keeps quantized weights."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        raise NotImplementedError(func)


def test_packed_weights_are_refused():
    model = BERT.model()
    packed = nn.Parameter(PackedTensor(first_query(model).weight.detach()), requires_grad=False)
    condition(model, SVD)
    layer, weight = first_query(model), first_query(model).weight
    with pytest.raises(
        ValueError, match=r"PackedTensor would become the weight of a conditioned projection.*fold\(model\)"
    ):
        layer.weight = packed
    assert layer.weight is weight
    fold(model)
    first_query(model).weight = packed
    with pytest.raises(ValueError, match=r"query is quantized.*PackedTensor"):
        condition(model, SVD)


def test_bitsandbytes_through_accelerate(monkeypatch):
    bnb = types.ModuleType("bitsandbytes")
    bnb.nn = types.SimpleNamespace(Linear8bitLt=lambda *args, **kwargs: OtherLinear(*args, dtype=torch.float64))
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    from accelerate.utils import bnb as accelerate_bnb

    settings = types.SimpleNamespace(load_in_8bit=True, load_in_4bit=False, llm_int8_threshold=6.0)
    model = BERT.model()
    condition(model, IDENTITY)
    with pytest.raises(ValueError, match=r"fold\(model\) before quantizing"):
        accelerate_bnb._replace_with_bnb_layers(model, settings, modules_to_not_convert=[])
    assert len(list(spectral_layers(model))) == 6
