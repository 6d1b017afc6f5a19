"""condition and fold on any module: what is found, what is refused, and that a refusal changes nothing."""

import copy
import logging as python_logging

import numpy as np
import pytest
import torch
from models import ToyAttention, toy_spec
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_specattn import (
    AttentionSpec,
    PreconditionerConfig,
    SpectralConfig,
    balance,
    condition,
    conditioning,
    fold,
    initialize,
    precondition,
    refresh,
)
from hf_specattn.layers import SpectralLinear, spectral_layers
from hf_specattn.projections import find_projections

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 30,
}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(spectral_layers(model))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_an_unknown_model_through_the_override(interleaved, granularity):
    model = nn.Sequential(ToyAttention(interleaved=interleaved))
    # Rows of query, key and value, by head, written out by hand: 4 query heads and 2 groups of 4 rows each.
    heads = (
        {"query": [(0, 4), (4, 8), (16, 20), (20, 24)], "key": [(8, 12), (24, 28)], "value": [(12, 16), (28, 32)]}
        if interleaved
        else {"query": [(0, 4), (4, 8), (8, 12), (12, 16)], "key": [(16, 20), (20, 24)], "value": [(24, 28), (28, 32)]}
    )
    expected = copy.deepcopy(model)
    with torch.no_grad():
        weight = expected[0].in_proj.weight.numpy()
        for runs in heads.values():
            rows = [np.arange(*run) for run in runs]
            for block in rows if granularity == "head" else [np.concatenate(rows)]:
                weight[block] += 2.5 * np.eye(len(block), 16)
    config = SpectralConfig(lambda_=2.5, granularity=granularity)
    reports = condition(model, config, architecture=toy_spec(interleaved))
    assert [(r.name, r.projection, r.shape) for r in reports] == [
        ("0.in_proj", "query", (16, 16)),
        ("0.in_proj", "key", (8, 16)),
        ("0.in_proj", "value", (8, 16)),
    ]
    assert {r.layout for r in reports} == {"qkv_interleaved" if interleaved else "qkv_blocked"}
    inputs = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(model(inputs), expected(inputs), rtol=0, atol=1e-12)
    fold(model)
    torch.testing.assert_close(model(inputs), expected(inputs), rtol=0, atol=1e-12)
    assert type(model[0].in_proj) is nn.Linear


def test_gpt_neox_through_the_override_is_interleaved_per_head():
    model = GPTNeoXModel(GPTNeoXConfig(**SMALL)).double().eval()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer in expected.layers:
            # transformers views the fused tensor as (heads, 3 * head_dim).
            weight = layer.attention.query_key_value.weight.view(4, 3, 8, 32)
            for index in range(3):
                block = weight[:, index].reshape(32, 32) + 4.0 * torch.eye(32)
                weight[:, index] = block.view(4, 8, 32)
    spec = AttentionSpec("GPTNeoXAttention", {"query_key_value": ("query", "key", "value")}, interleaved=True)
    condition(model, SpectralConfig(lambda_=4.0), architecture=spec)
    ids = torch.randint(0, 30, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, expected(ids).last_hidden_state, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="fold"):  # its checkpoints would lose the corrections
        model.save_pretrained("nowhere")
    assert "save_pretrained" not in vars(fold(model))


def test_grouped_key_value_heads_of_llama_are_rectangular():
    model = LlamaModel(LlamaConfig(num_key_value_heads=2, **SMALL))
    shapes = {(r.projection, r.shape) for r in condition(model, SpectralConfig("svd", granularity="head"))}
    assert shapes == {("query", (32, 32)), ("key", (16, 32)), ("value", (16, 32))}
    assert {len(layer.layout.heads) for _, layer in spectral_layers(model)} == {1}
    assert model.layers[0].self_attn.k_proj.layout.heads == (2,)


def test_gpt2_cross_attention_keeps_query_apart_from_key_and_value():
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=20, n_positions=8, add_cross_attention=True)
    )
    found = {item.name: item.layout.projections for item in find_projections(model)}
    assert found == {
        "transformer.h.0.attn.c_attn": ("query", "key", "value"),
        "transformer.h.0.crossattention.q_attn": ("query",),
        "transformer.h.0.crossattention.c_attn": ("key", "value"),
    }
    assert all(type(item.module) is Conv1D for item in find_projections(model))


def test_only_targets_become_conditioned():
    model = BertModel(BertConfig(**SMALL))
    reports = condition(model, SpectralConfig(lambda_=1.0, targets=("key",)))
    assert {report.projection for report in reports} == {"key"}
    attention = model.encoder.layer[0].attention.self
    assert type(attention.query) is nn.Linear
    assert type(attention.key) is SpectralLinear


def test_fold_then_condition_anew():
    model = BertModel(BertConfig(**SMALL)).double()
    weight = model.encoder.layer[1].attention.self.value.weight.detach().clone()
    condition(model, SpectralConfig(lambda_=1.0))
    fold(model)
    condition(model, SpectralConfig(lambda_=0.5))
    layer = model.encoder.layer[1].attention.self.value
    torch.testing.assert_close(layer.effective_weight(), weight + 1.5 * torch.eye(32).double(), rtol=0, atol=1e-14)


def test_fold_in_half_precision_says_what_it_costs(caplog):
    model = BertModel(BertConfig(**SMALL)).bfloat16()
    condition(model, SpectralConfig())
    logging.enable_propagation()
    try:
        with caplog.at_level(python_logging.WARNING):
            fold(model)
    finally:
        logging.disable_propagation()
    message = next(record.getMessage() for record in caplog.records if "diagonal" in record.getMessage())
    assert 0.3 < float(message.split("error of ")[1].split(". Fold")[0]) < 2.0


def test_part_of_a_model():
    model = BertModel(BertConfig(**SMALL))
    condition(model.encoder.layer[0], SpectralConfig("svd"), architecture=AttentionSpec(
        "BertSelfAttention", {"query": "query", "key": "key", "value": "value"}))  # fmt: skip
    condition(model.encoder.layer[1], SpectralConfig(lambda_=1.0))
    assert len(list(spectral_layers(model))) == 6
    assert len(list(spectral_layers(fold(model)))) == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def bert():
    return BertModel(BertConfig(**SMALL))


def test_conditioning_twice_is_refused():
    model = bert()
    condition(model, SpectralConfig(lambda_=2.0))
    with pytest.raises(ValueError, match=r"already conditioned with identity\(lambda_=2.0\).*fold"):
        condition(model, SpectralConfig(lambda_=2.0))


def test_fold_of_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="found no conditioned projection"):
        fold(bert())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4), "No query, key or value projection found in Linear"),
        (nn.Sequential(ToyAttention()), r"Attention-like modules in it: 0 \(ToyAttention\).*AttentionSpec"),
        (nn.TransformerEncoderLayer(8, 2), r"self_attn is a torch.nn.MultiheadAttention.*Linear projections"),
        (nn.MultiheadAttention(8, 2), r"The model is a torch.nn.MultiheadAttention"),
    ],
)
def test_models_without_projections_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        condition(model, SpectralConfig())


def test_unmatched_attention_beside_a_known_one_is_announced(caplog):
    model = nn.ModuleDict({"known": bert(), "unknown": ToyAttention()})
    logging.enable_propagation()
    try:
        with caplog.at_level(python_logging.WARNING):
            condition(model, SpectralConfig())
    finally:
        logging.disable_propagation()
    assert any("unknown (ToyAttention)" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "identity"}, "must be a SpectralConfig"),
        ({"config": None}, "must be a SpectralConfig"),
        ({"init": "keep"}, r"init='keep' is unknown; choose one of 'additive', 'preserve'"),
        (
            {"config": SpectralConfig("svd", refresh_every=2), "init": "preserve"},
            r"init='preserve' with refresh_every=2 is not possible.*additive",
        ),
        ({"architecture": "bert"}, "must be an AttentionSpec"),
        ({"architecture": ()}, "must be an AttentionSpec"),
        (
            {"architecture": AttentionSpec("Nothing", {"q": "query"})},
            "matches no module",
        ),
        (
            {"architecture": AttentionSpec("BertSelfAttention", {"query": "query"})},
            r"no module of this model holds key, value \(found: \['query'\]\)",
        ),
        (
            {"architecture": AttentionSpec("BertSelfAttention", {"query": "query"}, query_heads=5)},
            "do not divide",
        ),
        (
            {"architecture": AttentionSpec("BertSelfAttention", {"query": "query"}, query_heads="nheads")},
            "query_heads='nheads' is an attribute neither of BertSelfAttention nor of its config",
        ),
        (
            {"architecture": AttentionSpec("BertSelfAttention", {"dropout": "query"})},
            r"dropout is a torch.nn.modules.dropout.Dropout; only exact torch.nn.Linear",
        ),
    ],
)
def test_refused_arguments_leave_the_model_alone(arguments, message):
    model = bert()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        condition(model, **({"config": SpectralConfig()} | arguments))
    assert_unchanged(model, before)


@pytest.mark.parametrize("modules", [{}, {"q": ()}, {"q": "output"}, {"q": ("query", "out")}])
def test_a_bad_attention_spec_is_refused(modules):
    with pytest.raises(ValueError, match=r"AttentionSpec\.modules"):
        AttentionSpec("ToyAttention", modules)


def quantized(module):
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


def subclassed(module):
    module.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "somewhere"})


def with_nan(module):
    module.weight.data[0, 0] = float("nan")


def on_meta(module):
    module.to("meta")


def zeroed(module):
    module.weight.data.zero_()


def huge(module):
    module.weight.data.fill_(3e38)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantized, r"layer.1.attention.self.key is quantized .*int8.*before quantizing"),
        (subclassed, r"layer.1.attention.self.key is a somewhere.Linear4bit; only exact"),
        (with_nan, "layer.1.attention.self.key has nan or inf"),
        (on_meta, "layer.1.attention.self.key is on the meta device"),
        (zeroed, "layer.1.attention.self.key is zero in key, and"),
        (huge, r"W \+ C of .*layer.1.attention.self.key is beyond torch.float32: .*3e\+38"),
    ],
)
def test_unfit_weights_are_refused(spoil, message):
    model = bert()
    spoil(model.encoder.layer[1].attention.self.key)
    with pytest.raises(ValueError, match=message):
        condition(model, SpectralConfig("svd"))
    assert not list(spectral_layers(model))


def test_a_part_that_is_zero_has_no_svd_correction():
    model = nn.Sequential(ToyAttention())
    model[0].in_proj.weight.data[8:12].zero_()  # the third of four query heads; then the only two of the key
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0.in_proj is zero in query \(head 2\).*granularity='projection'"):
        condition(model, SpectralConfig("svd", granularity="head"), architecture=toy_spec(False))
    model[0].in_proj.weight.data[16:24].zero_()
    with pytest.raises(ValueError, match=r"0.in_proj is zero in key, and"):
        condition(model, SpectralConfig("svd"), architecture=toy_spec(False))
    before |= {"0.in_proj.weight": model[0].in_proj.weight.clone()}
    assert_unchanged(model, before)
    # What is no target needs none, and a head has one within its projection.
    report = condition(model, SpectralConfig("svd", targets=("query",)), architecture=toy_spec(False))[0]
    assert report.kappa_after == pytest.approx(2)
    assert np.linalg.cond(model[0].in_proj.effective_weight()[:16].detach().numpy()) == pytest.approx(2)


def test_a_tied_projection_is_refused():
    model = bert()
    attention = model.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    with pytest.raises(ValueError, match="is tied"):
        condition(model, SpectralConfig())
    assert not list(spectral_layers(model))


def test_one_module_as_query_and_key_is_refused():
    model = bert()
    attention = model.encoder.layer[0].attention.self
    attention.key = attention.query
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"self\.key and .*self\.query are one module"):
        condition(model, SpectralConfig())
    assert_unchanged(model, before)


# --- what fails leaves the model as it was ----------------------------------------------------------------------------


def state_of(model):
    classes = {name: type(module) for name, module in model.named_modules()}
    return classes, {name: value.clone() for name, value in model.state_dict().items()}, model.config


def is_as_it_was(model, before):
    classes, weights, config = before
    now = state_of(model)
    return (
        now[0] == classes
        and now[2] is config
        and now[1].keys() == weights.keys()
        and all(torch.equal(value, weights[name]) for name, value in now[1].items())
    )


@pytest.mark.parametrize("number", ["bert", None, {"model": 1}, SpectralConfig()], ids=str)
def test_what_is_no_model_is_named(number):
    for verb, use in {
        "condition": lambda: condition(number, SpectralConfig()),
        "fold": lambda: fold(number),
        "refresh": lambda: refresh(number),
        "balance": lambda: balance(number),
        "precondition": lambda: precondition(number, PreconditionerConfig()),
        "initialize": lambda: initialize(number, "orthogonal"),
    }.items():
        with pytest.raises(
            ValueError, match=rf"^{verb}\(.*a model \(a torch.nn.Module\) is needed. Load it first: AutoModel"
        ):
            use()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["additive", "preserve"])
def test_a_lambda_beside_which_nothing_of_w_is_left_is_refused(dtype, init):
    model = BertModel(BertConfig(**SMALL)).to(dtype)
    greatest = max(item.module.weight.abs().max().item() for item in find_projections(model))
    before = state_of(model)
    limit = min(
        torch.finfo(dtype).max,
        2 * greatest / torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps,
    )
    for lambda_ in (1e39, 1.01 * limit):
        with pytest.raises(ValueError, match=r"lambda_=.* is too large for encoder.layer.0.attention.self.query"):
            condition(model, SpectralConfig(lambda_=lambda_), init)
        assert is_as_it_was(model, before)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.mul_(1e-10)  # a start near zero is no weight that is lost
    condition(model, SpectralConfig(lambda_=0.1 * min(limit, 1e4)), "additive")
    with pytest.raises(ValueError, match=r"10\*\*400|must|not allowed"):
        SpectralConfig(lambda_=10**400)


def test_lambda_is_checked_by_the_flag_too(tmp_path):
    model = BertModel(BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    flag = {"spectral_conditioning": True, "lambda_": 1e39}
    for use in (
        lambda: AutoModel.from_pretrained(tmp_path, **flag),
        lambda: AutoModel.from_config(BertConfig(**SMALL, **flag)),
    ):
        with pytest.raises(ValueError, match=r"lambda_=1e\+39 is too large"):
            use()


@pytest.mark.parametrize("init", ["additive", "preserve"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_changes_nothing(init, error, monkeypatch):
    model = BertModel(BertConfig(**SMALL))
    before = state_of(model)
    recompute, calls = conditioning.recompute, []

    def fail_at_the_third(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise error("linalg.svd: the algorithm failed to converge")
        recompute(layer)

    monkeypatch.setattr(conditioning, "recompute", fail_at_the_third)
    with pytest.raises(error):
        condition(model, SpectralConfig("svd"), init)
    assert is_as_it_was(model, before)
    monkeypatch.undo()
    condition(model, SpectralConfig("svd"), init)
    assert len(list(spectral_layers(model))) == 6
