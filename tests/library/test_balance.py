"""balance: outputs kept, condition numbers and products against NumPy, what is left alone, what is refused."""

import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import (
    ARCHITECTURES,
    HEADS,
    LAYERS,
    PROJECTIONS,
    ToyAttention,
    assert_bit_equal,
    each_architecture,
    each_head,
    outputs_of,
    relative_difference,
    toy_spec,
)
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_specattn import AttentionSpec, OutputChangedError, SpectralConfig, balance, condition, fold, format_balance
from hf_specattn.architectures import ARCHITECTURES as TABLE
from hf_specattn.architectures import UNSTATED
from hf_specattn.balance import (
    OutputChange,
    balance_query_key,
    balance_value_output,
    output_change,
    probe_batch,
    probe_outputs,
)

pytestmark = pytest.mark.integration

BERT = ARCHITECTURES["bert"]
GROUPS = 2  # key/value heads of the toy


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def toy(interleaved=False):
    """An attention with grouped heads and biases that a free Q/K gauge suits, and how to tell `balance`."""
    model = nn.Sequential(ToyAttention(groups=GROUPS, interleaved=interleaved))
    spec = replace(toy_spec(interleaved), output="out_proj", query_key_barrier=None, value_output_barrier=None)
    return model, spec, {"input": torch.randn(2, 7, 16, dtype=torch.float64)}


# --- heads with NumPy alone ------------------------------------------------------------------------------------------


def heads_of(tiny, model):
    """Per layer: projection -> `(heads, in_features, head_dim)` of the paper's W_Q, W_K, W_V, and `(heads, head_dim,
    out_features)` of W_O; and projection + "_bias" -> `(heads, head_dim)` where there is one."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    layers = []
    for index, (name, projection, matrix) in enumerate(tiny.projections(model.double())):
        if index % 3 == 0:
            layers.append({})
        count = tiny.heads_of(projection)
        layers[-1][projection] = np.stack(np.split(matrix.T, count, axis=1))
        bias = state.get(name.removesuffix("weight") + "bias")
        if bias is not None:
            part = np.split(bias, 3)[PROJECTIONS.index(projection)] if tiny.fused else bias
            layers[-1][projection + "_bias"] = part.reshape(count, -1).copy()
    outputs = [value for name, value in state.items() if re.search(tiny.outputs, name)]
    assert len(layers) == len(outputs)
    for layer, matrix in zip(layers, outputs):
        layer["output"] = np.stack(np.split(matrix if tiny.fused else matrix.T, HEADS))
    return layers


def kappas(blocks):
    return [np.linalg.cond(block) for block in blocks]


def whole(projection, blocks):
    return np.vstack(blocks) if projection == "output" else np.hstack(blocks)


# --- every architecture ----------------------------------------------------------------------------------------------


@each_head
def test_outputs_are_kept(tiny, auto_name):
    model = tiny.model(auto_name)
    batch = tiny.batch(auto_name)
    expected, weights, parameters = outputs_of(model, batch), snapshot(model), dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    probe = batch if auto_name == "AutoModelForMultipleChoice" else None
    reports = balance(model, probe=probe)
    assert relative_difference(outputs_of(model, batch), expected) < 1e-10
    assert reports.output_change.relative < 1e-12
    assert reports.tolerance == 1e-10
    assert reports.dtype_error is None
    # in place, and stock: the same parameters of the same classes
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(v) for n, v in parameters.items()}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    holders = {report.name for report in reports if report.left_alone is None}
    assert {name.rpartition(".")[0] for name in changed} == holders
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@each_architecture
def test_condition_numbers_and_products_equal_numpy(tiny):
    model = tiny.model()
    before = heads_of(tiny, model)
    reports = balance(model)
    after = heads_of(tiny, model)
    assert len(reports) == 4 * LAYERS
    group = HEADS // tiny.key_value_heads
    for index, (old, new) in enumerate(zip(before, after)):
        for report in reports[4 * index : 4 * index + 4]:
            name = report.projection
            assert report.before.head_kappa == pytest.approx(kappas(old[name]), rel=1e-9)
            assert report.after.head_kappa == pytest.approx(kappas(new[name]), rel=1e-9)
            assert report.before.kappa == pytest.approx(np.linalg.cond(whole(name, old[name])), rel=1e-8)
            assert report.after.kappa == pytest.approx(np.linalg.cond(whole(name, new[name])), rel=1e-8)
            columns = old[name].shape[2 if name == "output" else 1]
            assert report.shape == (old[name].shape[0] * new[name].shape[1 if name == "output" else 2], columns)
            assert report.left_alone_heads == ()
            barred = tiny.rotary and name in ("query", "key")
            assert report.left_alone == ("rotary position embeddings" if barred else None)
        assert kappas(new["value"]) == pytest.approx([1] * tiny.key_value_heads, abs=1e-10)
        assert [np.linalg.norm(v) for v in new["value"]] == pytest.approx([np.linalg.norm(v) for v in old["value"]])
        for head in range(HEADS):
            value = head // group
            np.testing.assert_allclose(
                new["value"][value] @ new["output"][head], old["value"][value] @ old["output"][head], atol=1e-13
            )
            if "value_bias" in old:
                np.testing.assert_allclose(
                    new["value_bias"][value] @ new["output"][head],
                    old["value_bias"][value] @ old["output"][head],
                    atol=1e-13,
                )
            if tiny.rotary:
                np.testing.assert_array_equal(new["query"][head], old["query"][head])
                np.testing.assert_array_equal(new["key"][value], old["key"][value])
                continue
            product = old["query"][head] @ old["key"][head].T
            sigma = np.linalg.svd(product, compute_uv=False)[: old["key"].shape[2]]
            expected = math.sqrt(sigma[0] / sigma[-1])
            assert np.linalg.cond(new["query"][head]) == pytest.approx(expected, rel=1e-10)
            assert np.linalg.cond(new["key"][head]) == pytest.approx(expected, rel=1e-10)
            assert expected <= math.sqrt(np.linalg.cond(old["query"][head]) * np.linalg.cond(old["key"][head]))
            np.testing.assert_allclose(new["query"][head] @ new["key"][head].T, product, atol=1e-13)
            if "query_bias" in old:
                bias = {name: layer["query_bias"][head] for name, layer in (("old", old), ("new", new))}
                np.testing.assert_allclose(new["key"][head] @ bias["new"], old["key"][head] @ bias["old"], atol=1e-13)
                np.testing.assert_allclose(
                    new["query"][head] @ new["key_bias"][head], old["query"][head] @ old["key_bias"][head], atol=1e-13
                )
    assert {"value_bias" in old for old in before} == {tiny.model_type not in ("crammed_bert", "llama")}


@each_architecture
def test_the_first_loss_in_training_is_the_same(tiny):
    """Dropout included; the gradients are those of other coordinates, so the second one is not."""
    auto_name = "AutoModelForImageClassification" if tiny.model_type == "vit" else "AutoModelForSequenceClassification"
    model = tiny.model(auto_name).train()
    balanced = copy.deepcopy(model)
    balance(balanced)
    assert balanced.training
    losses = [[], []]
    for which, candidate in enumerate((model, balanced)):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1)
        for _ in range(2):
            torch.manual_seed(3)
            loss = candidate(**tiny.batch(auto_name), labels=torch.tensor([0, 1])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[which].append(loss.item())
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6 if tiny.model_type == "llama" else 1e-12)
    assert losses[0][1] != pytest.approx(losses[1][1], abs=1e-6)


def test_a_saved_balanced_model_is_a_stock_checkpoint(tmp_path, stock_checkpoint):
    model = BertModel.from_pretrained(stock_checkpoint(BERT), dtype=torch.float64).eval()
    assert model.name_or_path == str(stock_checkpoint(BERT))
    expected = outputs_of(model, BERT.batch())
    balance(model)
    assert model.name_or_path == ""  # an adapter trained from here does not fit the stock checkpoint
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    loaded = BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert relative_difference(outputs_of(loaded, BERT.batch()), expected) < 1e-10


def test_balancing_twice_changes_no_condition_number():
    model = BERT.model()
    first = balance(model)
    for report, again in zip(first, balance(model)):
        assert again.before == report.after
        assert again.after.head_kappa == pytest.approx(report.after.head_kappa, rel=1e-9)


@pytest.mark.parametrize("model_type", TABLE)
def test_a_row_of_the_table_says_all_that_balance_needs_or_nothing(model_type):
    for spec in TABLE[model_type]:
        unstated = [barrier == UNSTATED for barrier in (spec.query_key_barrier, spec.value_output_barrier)]
        assert unstated in ([False, False], [True, True])
        assert unstated[0] or spec.output is not None
        if model_type in ("bert", "roberta", "vit", "crammed_bert", "gpt2", "llama"):
            assert spec.output is not None


def test_the_row_for_vit_with_an_output_of_its_own():
    """No supported release has such a class; remote code may. BERT's attention has the same parts."""
    model = BERT.model()
    expected = outputs_of(model, BERT.batch())
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.__class__ = type("ViTSelfAttention", (type(attention),), {})
    reports = balance(model)
    assert {report.left_alone for report in reports} == {None}
    assert [report.name for report in reports[3::4]] == [f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)]
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < 1e-10


# --- layouts and gauges beyond the table -----------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_grouped_heads_share_their_gauge(interleaved):
    model, spec, probe = toy(interleaved)
    old, expected = copy.deepcopy(model), model(**probe)
    reports = {report.projection: report for report in balance(model, probe=probe, architecture=spec)}
    torch.testing.assert_close(model(**probe), expected, rtol=0, atol=1e-12)
    # Rows by hand: 4 query heads and 2 groups of 4 rows each.
    rows = (
        {"query": [(0, 4), (4, 8), (16, 20), (20, 24)], "key": [(8, 12), (24, 28)], "value": [(12, 16), (28, 32)]}
        if interleaved
        else {"query": [(0, 4), (4, 8), (8, 12), (12, 16)], "key": [(16, 20), (20, 24)], "value": [(24, 28), (28, 32)]}
    )
    blocks = {
        which: {
            name: [candidate[0].in_proj.weight.detach().numpy()[slice(*run)].T for run in runs]
            for name, runs in rows.items()
        }
        for which, candidate in (("old", old), ("new", model))
    }
    for group in range(GROUPS):
        stacked = {which: np.vstack(parts["query"][2 * group : 2 * group + 2]) for which, parts in blocks.items()}
        product = stacked["old"] @ blocks["old"]["key"][group].T
        sigma = np.linalg.svd(product, compute_uv=False)
        expected_kappa = math.sqrt(sigma[0] / sigma[3])
        assert np.linalg.cond(stacked["new"]) == pytest.approx(expected_kappa)
        assert np.linalg.cond(blocks["new"]["key"][group]) == pytest.approx(expected_kappa)
        np.testing.assert_allclose(stacked["new"] @ blocks["new"]["key"][group].T, product, atol=1e-13)
    assert reports["key"].after.head_kappa == pytest.approx(kappas(blocks["new"]["key"]))
    assert reports["query"].after.head_kappa == pytest.approx(kappas(blocks["new"]["query"]))
    assert reports["value"].after.head_kappa == pytest.approx([1, 1])
    assert {report.name for report in reports.values()} == {"0.in_proj", "0.out_proj"}


def test_gpt_neox_interleaved_behind_rotary_embeddings():
    model = GPTNeoXModel(
        GPTNeoXConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    )
    model = model.double().eval()
    spec = AttentionSpec(
        "GPTNeoXAttention",
        {"query_key_value": PROJECTIONS},
        interleaved=True,
        output="dense",
        query_key_barrier="rotary position embeddings",
        value_output_barrier=None,
    )
    batch = {"input_ids": torch.randint(0, 30, (2, 6))}
    expected, weight = outputs_of(model, batch), model.layers[0].attention.query_key_value.weight.detach().clone()
    reports = balance(model, architecture=spec)
    assert relative_difference(outputs_of(model, batch), expected) < 1e-10
    assert [max(r.after.head_kappa) for r in reports if r.projection == "value"] == pytest.approx([1, 1])
    # The rows of query and key, among those of value in one tensor, are the same bits.
    old, new = (
        tensor.detach().view(4, 3, 8, 32) for tensor in (weight, model.layers[0].attention.query_key_value.weight)
    )
    assert torch.equal(old[:, :2], new[:, :2])
    assert not torch.equal(old[:, 2], new[:, 2])


def test_relative_position_biases_on_the_logits_do_no_harm():
    """T5 adds a bias to the logits and has no scale; its classes are not in the table, so the caller answers for it."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=32, d_kv=8, num_heads=4, d_ff=40, num_layers=2, dropout_rate=0.1)
    )
    model = model.double().eval()
    spec = AttentionSpec(
        "T5Attention",
        {"q": "query", "k": "key", "v": "value"},
        query_heads="n_heads",
        output="o",
        query_key_barrier=None,
        value_output_barrier=None,
    )
    ids = torch.randint(0, 30, (2, 6))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    expected = outputs_of(model, batch)
    with pytest.raises(ValueError, match=r"could not run on the probe \(input_ids\).*Pass probe="):
        balance(model, architecture=spec)
    reports = balance(model, probe=batch, architecture=spec)
    assert len(reports) == 4 * 6
    assert {report.left_alone for report in reports} == {None}
    assert relative_difference(outputs_of(model, batch), expected) < 1e-6  # its norms compute in float32


def cross_attending(kind):
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=20, n_positions=8, add_cross_attention=True)
        return GPT2LMHeadModel(config).double().eval()
    config = BERT.config(is_decoder=True, add_cross_attention=True)
    return BertModel(config).double().eval()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cross_attention(kind):
    model = cross_attending(kind)
    with pytest.raises(ValueError, match=r"does not run the projections of .*cross.*encoder_hidden_states"):
        balance(model)
    batch = {"input_ids": torch.randint(5, 20, (2, 6)), "encoder_hidden_states": torch.randn(2, 5, 32).double()}
    expected = outputs_of(model, batch)
    reports = balance(model, probe=batch)
    assert len(reports) == (8 if kind == "gpt2" else 16)
    assert max(max(r.after.head_kappa) for r in reports if r.projection == "value") == pytest.approx(1)
    assert relative_difference(outputs_of(model, batch), expected) < 1e-10


def test_cached_generation_is_the_same():
    tiny = ARCHITECTURES["gpt2"]
    model = tiny.model("AutoModelForCausalLM")
    prompt = tiny.batch()["input_ids"][:1]
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    balance(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)


def test_the_gauge_at_condition_numbers_of_a_million():
    """In float64 neither products nor what the biases contribute lose more than roundoff."""

    def weight(heads, width=24, dim=4):
        left = torch.linalg.qr(torch.randn(heads, width, dim, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(heads, dim, dim, dtype=torch.float64)).Q
        return (left * torch.logspace(0, -6, dim, dtype=torch.float64) @ right).mT

    query, key, value, output = weight(3)[:, None], weight(3), weight(3), torch.randn(3, 1, 4, 24).double()
    query_bias, key_bias, value_bias = (
        torch.randn(3, 1, 4).double(),
        torch.randn(3, 4).double(),
        torch.randn(3, 4).double(),
    )
    new_q, new_k, new_bq, new_bk = balance_query_key(query, key, query_bias, key_bias)
    torch.testing.assert_close(new_q[:, 0].mT @ new_k, query[:, 0].mT @ key, rtol=0, atol=1e-15)
    torch.testing.assert_close(new_bq @ new_k, query_bias @ key, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        new_q[:, 0].mT @ new_bk[..., None], query[:, 0].mT @ key_bias[..., None], rtol=0, atol=1e-14
    )
    new_v, new_o, new_bv = balance_value_output(value, output, value_bias)
    torch.testing.assert_close(new_v.mT @ new_o[:, 0], value.mT @ output[:, 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(new_bv[:, None] @ new_o[:, 0], value_bias[:, None] @ output[:, 0], rtol=0, atol=1e-8)
    assert kappas(new_v.numpy()) == pytest.approx([1] * 3)
    assert max(kappas(new_q[:, 0].numpy())) <= 1.001e6


# --- left alone ------------------------------------------------------------------------------------------------------


def deficient(block):
    """A copy of a `(head_dim, in_features)` block of rank head_dim - 1."""
    left, sigma, right = np.linalg.svd(block, full_matrices=False)
    sigma[-1] = 0
    return left * sigma @ right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_rank_deficient_head_is_left_alone_and_named(projection, dtype):
    model = BERT.model(dtype=dtype)
    attention = model.encoder.layer[1].attention
    module = getattr(attention.self, projection)
    with torch.no_grad():
        module.weight[16:24] = torch.from_numpy(deficient(module.weight[16:24].double().numpy()))
    assert np.linalg.matrix_rank(module.weight[16:24].detach().numpy()) == 7  # NumPy's rule in the dtype
    weights, expected = snapshot(model), outputs_of(model, BERT.batch())
    reports = balance(model)
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < (1e-10 if dtype == torch.float64 else 1e-5)
    pair = ("value", "output") if projection == "value" else ("query", "key")
    for report in reports:
        named = report.projection in pair and "layer.1." in report.name
        assert report.left_alone_heads == ((2,) if named else ())
        assert report.left_alone is None
    for name in pair:
        holder = attention.output.dense if name == "output" else getattr(attention.self, name)
        prefix = "encoder.layer.1.attention." + ("output.dense" if name == "output" else f"self.{name}")
        old, new = weights[f"{prefix}.weight"], holder.weight.detach()
        same = [torch.equal(*pair) for pair in zip(*((w.T if name == "output" else w).split(8) for w in (old, new)))]
        assert same == [False, False, True, False]
        if name != "output":
            same = [
                torch.equal(*pair) for pair in zip(weights[f"{prefix}.bias"].split(8), holder.bias.detach().split(8))
            ]
            assert same == [False, False, True, False]
    assert format_balance(reports).count("rank-deficient, left alone: heads 2") == 2


def test_a_pair_whose_product_loses_its_rank_is_left_alone():
    """Each weight has full rank in float64, but kappa 1e11: their product has 1e22, more than float64 resolves."""
    model = BERT.model()
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        left, _, right = torch.linalg.svd(attention.query.weight[:8], full_matrices=False)
        attention.query.weight[:8] = (left * torch.logspace(0, -11, 8).double()) @ right
        attention.key.weight[:8] = attention.query.weight[:8]
    assert np.linalg.matrix_rank(attention.query.weight[:8].detach().numpy()) == 8
    reports = balance(model)
    assert [report.left_alone_heads for report in reports] == [(0,), (0,), (), (), (), (), (), ()]


@pytest.mark.parametrize(("sigma", "left_alone"), [(0.5, (0,)), (2.0, ())])
def test_the_threshold_of_rank_deficiency_is_that_of_numpy(sigma, left_alone):
    """The smallest singular value at half of, and twice, max(m, n) * eps of float32 times the largest."""
    left, right = (torch.linalg.qr(torch.randn(size, 4).double()).Q for size in (4, 64))
    sigmas = torch.tensor([1.0, 0.9, 0.8, sigma * 64 * np.finfo(np.float32).eps]).double()
    model, spec, _ = toy()
    model[0].in_proj = nn.Linear(64, 32, dtype=torch.float64)
    with torch.no_grad():
        model[0].in_proj.weight[24:28] = left * sigmas @ right.T
    model = model.float()
    rank = np.linalg.matrix_rank(model[0].in_proj.weight[24:28].detach().numpy())
    assert rank == (3 if left_alone else 4)
    reports = balance(model, probe={"input": torch.randn(2, 5, 64)}, architecture=spec)
    assert [r.left_alone_heads for r in reports if r.projection == "value"] == [left_alone]


def test_a_pruned_model_with_no_fit_head_stays_bit_equal():
    model = BERT.model()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.value.weight.zero_()
            layer.attention.self.key.weight.zero_()
    weights = snapshot(model)
    reports = balance(model)
    assert_bit_equal(model.state_dict(), weights)
    assert {report.left_alone_heads for report in reports} == {(0, 1, 2, 3)}
    assert reports.output_change == OutputChange(0.0, 0.0)


def test_heads_longer_than_their_input_are_left_alone():
    """No basis of 4 columns exists in 3 dimensions, whatever the condition number says."""
    model, spec, _ = toy()
    model[0].in_proj = nn.Linear(3, 32, dtype=torch.float64)
    weights = snapshot(model)
    reports = balance(model, probe={"input": torch.randn(2, 5, 3).double()}, architecture=spec)
    by_projection = {report.projection: report for report in reports}
    assert by_projection["query"].left_alone_heads == (0, 1, 2, 3)
    assert by_projection["value"].left_alone_heads == (0, 1)
    assert max(by_projection["value"].before.head_kappa) < 1e3
    assert_bit_equal(model.state_dict(), weights)


def test_a_part_that_the_table_does_not_know_forbids_both_gauges():
    """A class of the same name from elsewhere may normalize q and k, or add relative positions."""
    model = BERT.model()
    attention = model.encoder.layer[0].attention.self
    attention.distance_embedding = nn.Embedding(9, 8)
    weights = snapshot(model)
    reports = balance(model)
    reason = "distance_embedding, which BertSelfAttention does not have in the table"
    assert [report.left_alone for report in reports] == [reason] * 4 + [None] * 4
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed
    assert all(".layer.1." in name for name in changed)
    attention.extra = nn.Parameter(torch.ones(3))
    assert "distance_embedding, extra, which" in balance(model)[0].left_alone


def test_an_output_projection_outside_the_part_given_is_not_touched():
    model = BERT.model().encoder.layer[0].attention.self
    probe = {"hidden_states": torch.randn(2, 5, 32).double()}
    expected = model(**probe)[1]
    reports = balance(model, probe=probe)
    assert [report.projection for report in reports] == list(PROJECTIONS)
    assert [report.left_alone for report in reports][:2] == [None, None]
    assert "output projection that is not in the part of the model that was given" in reports[2].left_alone
    torch.testing.assert_close(model(**probe)[1], expected, rtol=0, atol=1e-12)


def test_rows_that_do_not_say_are_taken_to_forbid():
    spec = AttentionSpec("BertSelfAttention", dict.fromkeys(("query", "key", "value")) | {n: n for n in PROJECTIONS})
    with pytest.raises(ValueError, match=rf"No gauge of this model can be used.*{UNSTATED}.*query_key_barrier=None"):
        balance(BERT.model(), architecture=spec)
    reports = balance(BERT.model(), architecture=replace(spec, query_key_barrier=None))
    assert [report.left_alone for report in reports] == [None, None, UNSTATED] * LAYERS
    reports = balance(BERT.model(), architecture=replace(spec, output="..output.dense", value_output_barrier=None))
    assert [report.left_alone for report in reports] == [UNSTATED, UNSTATED, None, None] * LAYERS
    partial = AttentionSpec(
        "BertSelfAttention", {"query": "query", "value": "value"}, output="..output.dense", query_key_barrier=None,
        value_output_barrier=None)  # fmt: skip
    reports = balance(BERT.model(), architecture=partial)
    assert [report.left_alone for report in reports][:3] == ["a missing key in the AttentionSpec", None, None]


# --- float32 and half precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_architecture
def test_the_tolerance_is_the_error_of_the_dtype(tiny, dtype):
    model = tiny.model(dtype=dtype)
    exact = copy.deepcopy(model).double()
    for buffer, stored in zip(
        exact.buffers(), model.buffers()
    ):  # Crammed BERT's table of positions is made anew by double()
        buffer.copy_(stored)
    probe = tiny.batch(dtype=dtype)
    reports = balance(model, probe=probe)
    # The dtype's own error, from a whole float64 copy: rounding of norms that compute in float32 is the only difference.
    stock = outputs_of(tiny.model(dtype=dtype), probe)
    reference = outputs_of(exact, {name: v.double() if v.is_floating_point() else v for name, v in probe.items()})
    error = relative_difference(stock, reference)
    assert reports.dtype_error == pytest.approx(error, rel=0.05 if tiny.model_type == "llama" else 1e-3)
    assert reports.tolerance == 4 * max(reports.dtype_error, torch.finfo(dtype).eps)
    assert reports.output_change.relative <= reports.tolerance
    # What was measured with one layer substituted at a time is what the balanced model gives.
    assert relative_difference(outputs_of(model, probe), stock) == reports.output_change.relative
    assert {value.dtype for value in model.parameters()} == {dtype}
    # A balanced value is orthonormal up to the dtype's rounding.
    worst = max(max(report.after.head_kappa) for report in reports if report.projection == "value")
    assert 1 < worst < 1 + 8 * torch.finfo(dtype).eps


def test_a_given_tolerance_is_what_counts():
    model = BERT.model(dtype=torch.float32)
    weights = snapshot(model)
    with pytest.raises(
        OutputChangedError, match=r"more than the tolerance of 1e-12, so the model was not changed"
    ) as caught:
        balance(model, tolerance=1e-12)
    assert caught.value.tolerance == 1e-12
    assert caught.value.change.relative > 1e-12
    assert_bit_equal(model.state_dict(), weights)
    reports = balance(model, tolerance=1e-3)
    assert (reports.tolerance, reports.dtype_error) == (1e-3, None)


@pytest.fixture
def minilm_batch(minilm_path):
    sentences = ["The cat sat on the mat.", "Condition numbers are a property of the parameters, not of the function."]
    return dict(AutoTokenizer.from_pretrained(minilm_path)(sentences, padding=True, return_tensors="pt"))


def test_minilm(minilm_path, minilm_batch):
    model = AutoModel.from_pretrained(minilm_path)
    mask = minilm_batch["attention_mask"][..., None]

    def embeddings():
        hidden = outputs_of(model, minilm_batch)["last_hidden_state"] * mask
        return hidden, nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1)

    expected, old = embeddings(), numpy_kappas(model)
    reports = balance(model)
    new = numpy_kappas(model)
    for value, stock in zip(embeddings(), expected):
        assert (value - stock).abs().max() < 1e-5
    assert reports.output_change.relative <= reports.tolerance < 1e-4
    for report in reports:
        layer = int(report.name.split(".")[2])
        assert report.before.head_kappa == pytest.approx(old[layer][report.projection], rel=1e-6)
        assert report.after.head_kappa == pytest.approx(new[layer][report.projection], rel=1e-6)
    for layer in range(6):
        assert np.mean(new[layer]["value"]) == pytest.approx(1, abs=1e-5)
        assert new[layer]["query"] == pytest.approx(new[layer]["key"], rel=1e-5)
        assert max(new[layer]["query"]) < max(*old[layer]["query"], *old[layer]["key"])
    value, output = (
        [np.mean([layer[name] for layer in found]) for found in (old, new)] for name in ("value", "output")
    )
    assert value[0] > 2.5
    assert output[1] > 1.2 * output[0]  # that is where it went


def numpy_kappas(model):
    found = []
    for layer in model.encoder.layer:
        weights = {name: getattr(layer.attention.self, name).weight for name in PROJECTIONS}
        weights["output"] = layer.attention.output.dense.weight.T
        found.append({n: kappas(np.split(w.detach().double().numpy(), 12)) for n, w in weights.items()})
    return found


def test_minilm_in_bfloat16(minilm_path, minilm_batch):
    model = AutoModel.from_pretrained(minilm_path, dtype=torch.bfloat16)
    expected = outputs_of(model, minilm_batch)
    reports = balance(model, probe=minilm_batch)
    assert 1e-3 < reports.dtype_error < 0.1
    assert relative_difference(outputs_of(model, minilm_batch), expected) == reports.output_change.relative
    assert max(max(r.after.head_kappa) for r in reports if r.projection == "value") < 1.05


# --- raised, and nothing changed -------------------------------------------------------------------------------------


class NormalizedValues(nn.Module):
    """An attention whose values are normalized before the output projection, which the spec below denies."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))
        self.norm = nn.LayerNorm(16, dtype=torch.float64)
        self.out = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, inputs):
        query, key, value = (
            m(inputs).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        return self.out(self.norm(mixed))


def wrong_about_llama():
    row = TABLE["llama"][0]
    return ARCHITECTURES["llama"].model(), replace(row, query_key_barrier=None, key_value_heads=2), None


def wrong_about_a_norm():
    spec = AttentionSpec(
        "NormalizedValues", {n: n for n in PROJECTIONS}, query_heads=4, output="out", query_key_barrier=None,
        value_output_barrier=None)  # fmt: skip
    return nn.Sequential(NormalizedValues()), spec, {"input": torch.randn(2, 5, 16).double()}


@pytest.mark.parametrize("case", [wrong_about_llama, wrong_about_a_norm])
def test_a_function_that_would_change_raises_and_keeps_every_bit(case):
    model, spec, probe = case()
    weights = snapshot(model)
    with pytest.raises(OutputChangedError, match=r"was not changed.*architectures\.py does not know") as caught:
        balance(model, probe=probe, architecture=spec)
    assert caught.value.change.relative > 1e-3
    assert caught.value.tolerance == 1e-10
    assert_bit_equal(model.state_dict(), weights)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_overflow_of_float16_raises_and_keeps_every_bit():
    """A value bias that a nearly deficient weight cannot carry: b_V R^-1 leaves the range of float16."""
    model = BERT.model(dtype=torch.float16)
    value = model.encoder.layer[0].attention.self.value
    with torch.no_grad():
        value.weight[7] = value.weight[6]
        value.weight[7, 0] += 4e-3
        value.bias[6], value.bias[7] = 3e3, -3e3
        model.encoder.layer[0].attention.output.dense.weight.mul_(1e-3)
    weights = snapshot(model)
    with pytest.raises(OutputChangedError, match="change the outputs by nan"):
        balance(model)
    assert_bit_equal(model.state_dict(), weights)


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def test_an_interrupted_forward_pass_leaves_everything_as_it_was():
    model = BERT.model(dtype=torch.float32).train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    weights, calls = snapshot(model), []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == stop:
            raise Interrupted

    for stop in (1, 2, 3):  # the stock weights, those in float64, the balanced ones
        calls.clear()
        handle = model.encoder.layer[1].attention.output.dense.register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            balance(model)
        handle.remove()
        assert len(calls) == stop
        assert_bit_equal(model.state_dict(), weights)
        assert [module.training for module in model.modules()] == modes


def test_the_random_state_and_the_gradients_survive():
    model = BERT.model("AutoModelForSequenceClassification")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    balance(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0}, "tolerance=0 must be a finite number > 0"),
        ({"tolerance": True}, "tolerance=True must be a finite number > 0"),
        ({"tolerance": float("inf")}, "tolerance=inf must be a finite number > 0"),
        ({"tolerance": "1e-3"}, "tolerance='1e-3' must be a finite number > 0"),
        ({"probe": {}}, r"probe=\{\} must be a mapping"),
        ({"probe": [1]}, r"probe=\[1\] must be a mapping"),
        ({"probe": {"nothing": 1}}, r"could not run on the probe \(nothing\): .*Pass probe="),
        ({"architecture": "bert"}, "must be an AttentionSpec"),
        (
            {"architecture": replace(TABLE["bert"][0], output="..output.dens")},
            r"at '..output.dens', but there is no enc",
        ),
        ({"architecture": replace(TABLE["bert"][0], output="..output")}, r"is a .*BertSelfOutput; only exact"),
        ({"architecture": replace(TABLE["bert"][0], output="....intermediate.dense")}, None),
        ({"architecture": replace(TABLE["bert"][0], output="....output.dense")}, "takes 48 inputs, but 4 query heads"),
    ],
)
def test_refused_arguments_leave_the_model_alone(arguments, message):
    model = BERT.model()
    weights = snapshot(model)
    # A wrong module of the right shape is found by the outputs.
    error = ValueError if message else OutputChangedError
    with pytest.raises(error, match=message):
        balance(model, **arguments)
    assert_bit_equal(model.state_dict(), weights)


def quantized(module):
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


def subclassed(module):
    module.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "somewhere"})


def with_nan(module):
    module.bias.data[0] = float("nan")


def on_meta(module):
    module.to("meta")


@pytest.mark.parametrize("where", ["self.value", "output.dense"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantized, r"weight of .* is quantized .*int8.*Balance the model before"),
        (subclassed, r"is a somewhere.Linear4bit; only exact"),
        (with_nan, "The bias of .* has nan or inf"),
        (on_meta, "is on the meta device"),
    ],
)
def test_unfit_weights_are_refused(spoil, message, where):
    model = BERT.model()
    first = model.encoder.layer[0].attention.self.query.weight.detach().clone()
    spoil(model.encoder.layer[1].attention.get_submodule(where))
    with pytest.raises(ValueError, match=message):
        balance(model)
    assert torch.equal(model.encoder.layer[0].attention.self.query.weight, first)


def test_tied_weights_are_refused():
    model = BERT.model()
    one, other = (layer.attention for layer in model.encoder.layer)
    other.output.dense.weight = one.output.dense.weight
    with pytest.raises(ValueError, match=r"layer.0.attention.output.dense is tied: .*layer.1.*Untie"):
        balance(model)
    model = BERT.model()
    model.encoder.layer[1].attention.output.dense = model.encoder.layer[0].attention.output.dense
    with pytest.raises(ValueError, match="are the same module"):
        balance(model)


def test_sharded_weights_are_refused():
    model = BERT.model()
    module = model.encoder.layer[1].attention.output.dense
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), dist.init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"output.dense is sharded \(a DTensor\). Balance before"):
            balance(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["identity", "svd"])
def test_a_conditioned_model_is_refused_until_it_is_folded(method):
    model = BERT.model()
    condition(model, SpectralConfig(method))
    weights = snapshot(model)
    with pytest.raises(ValueError, match=rf"is conditioned with {method}.*fold\(model\) first, then balance"):
        balance(model)
    assert_bit_equal(model.state_dict(), weights)
    expected = outputs_of(model, BERT.batch())
    balance(fold(model))
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < 1e-10


def test_models_without_projections_are_refused():
    with pytest.raises(ValueError, match="No query, key or value projection found in Linear"):
        balance(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        balance(nn.TransformerEncoderLayer(8, 2))


def test_a_model_that_cannot_compute_in_float64_needs_a_tolerance():
    class Strict(nn.Module):
        def forward(self, hidden):
            if hidden.dtype == torch.float64:
                raise TypeError("no float64 here")
            return hidden

    model = BERT.model(dtype=torch.float32)
    model.pooler.activation = Strict()
    with pytest.raises(
        ValueError, match=r"error of the dtype could not be measured.*no float64 here.*pass tolerance="
    ):
        balance(model)
    assert balance(model, tolerance=1e-5).output_change.relative <= 1e-5


# --- the probe and the reports ---------------------------------------------------------------------------------------


def test_a_probe_that_gives_nan_is_refused():
    tiny = ARCHITECTURES["vit"]
    probe = {"pixel_values": torch.full((1, 3, 8, 8), math.nan, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"output.last_hidden_state, .* has nan on the probe before anything"):
        balance(tiny.model(), probe=probe)


def test_probe_batches():
    batch = probe_batch(BERT.model())
    assert batch["input_ids"].shape == (1, 12)  # half of 24 positions
    assert torch.equal(batch["input_ids"], probe_batch(BERT.model())["input_ids"])
    assert probe_batch(ARCHITECTURES["vit"].model(dtype=torch.bfloat16))["pixel_values"].dtype == torch.bfloat16
    model, spec, _ = toy()
    with pytest.raises(ValueError, match=r"No probe batch can be made for Sequential.*pass probe="):
        balance(model, architecture=spec)


def test_outputs_and_their_change():
    model = BERT.model("AutoModelForSequenceClassification").train()
    batch = BERT.batch() | {"output_hidden_states": True}
    outputs = probe_outputs(model, batch)
    assert set(outputs) == {"output.logits"} | {f"output.hidden_states.{index}" for index in range(LAYERS + 1)}
    assert model.training
    assert torch.equal(outputs["output.logits"], outputs_of(model.eval(), batch)["logits"])  # no dropout
    one, other = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.5])}, {"a": torch.tensor([1.5, -4.0])}
    with pytest.raises(ValueError, match="different shapes"):
        output_change(one, other)
    assert output_change(one, other | {"b": torch.tensor([0.75])}) == OutputChange(0.5, 0.5)
    assert output_change(one, other | {"b": torch.tensor([0.5])}) == OutputChange(0.5, 0.125)
    minus_inf = {"a": torch.tensor([-math.inf, 2.0])}
    assert output_change(minus_inf, {"a": torch.tensor([-math.inf, 3.0])}) == OutputChange(1.0, 0.5)
    assert output_change(minus_inf, {"a": torch.tensor([0.0, 2.0])}).relative == math.inf
    assert math.isnan(output_change(one, {"a": one["a"] * float("nan"), "b": one["b"]}).relative)
    assert output_change({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 2.0])}) == OutputChange(2.0, 2.0)


def test_caches_do_not_count():
    """Keys and values are what the gauge changes."""
    outputs = probe_outputs(ARCHITECTURES["gpt2"].model(), ARCHITECTURES["gpt2"].batch() | {"use_cache": True})
    assert set(outputs) == {"output.last_hidden_state"}

    class Legacy(nn.Module):
        def forward(self, inputs):
            return {"logits": inputs, "past_key_values": ((inputs, inputs),), "more": (inputs, [inputs, 3])}

    assert set(probe_outputs(Legacy(), {"inputs": torch.ones(2)})) == {
        "output.logits",
        "output.more.0",
        "output.more.1.0",
    }


def test_table():
    reports = balance(ARCHITECTURES["llama"].model())
    *rows, outputs, moral = format_balance(reports).splitlines()
    assert len(rows) == 1 + 4 * LAYERS
    assert "layers.0.self_attn.q_proj query" in rows[1]
    assert rows[1].endswith("left alone: rotary position embeddings")
    value, output = reports[2], reports[3]
    for number in (
        value.before.kappa,
        value.after.kappa,
        np.mean(value.before.head_kappa),
        max(value.before.head_kappa),
    ):
        assert f"{number:.4g}" in rows[3].split()
    assert rows[4].endswith("took up conditioning")
    assert np.mean(output.after.head_kappa) > np.mean(output.before.head_kappa)
    assert "allowed 1e-10" in outputs
    assert "moves, it does not vanish" in moral
    assert "the dtype's own error is" in format_balance(balance(BERT.model(dtype=torch.float32)))


def peak_memory(layers, tmp_path):
    """The most memory, in bytes, that `balance` holds beyond a float32 BERT of this depth."""
    config = BertConfig(
        vocab_size=30, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        balance(model)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    totals = [event["args"]["Total Allocated"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(totals) - totals[0]


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    one_layer = 4 * 128 * 128 * 8
    shallow, deep = peak_memory(2, tmp_path), peak_memory(6, tmp_path)
    assert one_layer < deep < 3.5 * one_layer
    assert deep < shallow + one_layer / 4
