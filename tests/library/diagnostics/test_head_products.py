"""kappa of each head's products, against the whole matrices by NumPy; no gauge changes it, and conditioning does."""

import copy

import numpy as np
import pytest
import torch
from models import ARCHITECTURES

from hf_specattn import AttentionSpec, SpectralConfig, balance, condition
from hf_specattn.diagnostics import head_products, value_path

WIDTH, HEADS = 32, 4


def by_numpy(left, right, rank):
    values = np.linalg.svd(left @ right, compute_uv=False)
    assert values[rank:].max(initial=0) < 1e-12 * values[0]
    return values[0] / values[rank - 1]


def weights_of(layer, query_heads, other_heads):
    """Each head's W_Q, W_K, W_V (rows) and W_O (columns) of a Llama layer."""
    attention = layer.self_attn
    found = {
        name: np.split(getattr(attention, f"{name}_proj").weight.detach().numpy(), heads)
        for name, heads in (("q", query_heads), ("k", other_heads), ("v", other_heads))
    }
    return found | {"o": np.split(attention.o_proj.weight.detach().numpy(), query_heads, axis=1)}


def test_each_heads_products_where_heads_share_keys_and_values():
    model = ARCHITECTURES["llama"].model()
    query_heads, other_heads = (ARCHITECTURES["llama"].heads_of(name) for name in ("query", "key"))
    assert query_heads > other_heads
    rows = head_products(model)
    assert [(row.layer, row.product) for row in rows] == [
        (layer, product) for layer in range(len(model.layers)) for product in ("query-key", "output-value")
    ]
    share = query_heads // other_heads
    for layer, module in enumerate(model.layers):
        weights = weights_of(module, query_heads, other_heads)
        rank = weights["q"][0].shape[0]
        of = {row.product: row for row in rows if row.layer == layer}
        expected = [by_numpy(weights["q"][h].T, weights["k"][h // share], rank) for h in range(query_heads)]
        assert of["query-key"].kappa == pytest.approx(expected, rel=1e-9)
        expected = [by_numpy(weights["o"][h], weights["v"][h // share], rank) for h in range(query_heads)]
        assert of["output-value"].kappa == pytest.approx(expected, rel=1e-9)
        assert of["output-value"].kappa_raw == of["output-value"].kappa


def test_a_gauge_changes_none_of_them():
    model = ARCHITECTURES["bert"].model()
    before = head_products(model)
    weight = model.encoder.layer[0].attention.self.query.weight.detach().clone()
    balance(model)
    assert not torch.allclose(model.encoder.layer[0].attention.self.query.weight, weight)
    for row, other in zip(before, head_products(model), strict=True):
        assert row.kappa == pytest.approx(other.kappa, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_conditioning_value_and_output_shows_in_their_product(name):
    stock = ARCHITECTURES[name].model()
    model = copy.deepcopy(stock)
    condition(model, SpectralConfig("svd", targets=("value", "output"), granularity="head"))
    plain, rows = head_products(stock), head_products(model)
    for one, other in zip(plain, rows, strict=True):
        assert other.kappa_raw == pytest.approx(one.kappa, rel=1e-9)
        if other.product == "query-key":
            assert other.kappa == pytest.approx(one.kappa, rel=1e-9)
        else:
            assert max(other.kappa) <= 4 + 1e-9  # each factor's is at most 2
            assert max(other.kappa) < max(one.kappa)


def test_a_singular_head_is_infinite():
    model = ARCHITECTURES["bert"].model()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight[:8] = 0
    rows = head_products(model, layers=[1])
    assert [row.layer for row in rows] == [1, 1]
    assert rows[1].kappa[0] > 1e12
    assert max(rows[1].kappa[1:]) < 1e12


def test_the_value_path_is_the_product_of_the_layers():
    model = ARCHITECTURES["llama"].model()
    query_heads, other_heads = (ARCHITECTURES["llama"].heads_of(name) for name in ("query", "key"))
    product = np.eye(WIDTH)
    for module in model.layers:
        weights = weights_of(module, query_heads, other_heads)
        share = query_heads // other_heads
        product = sum(weights["o"][h] @ weights["v"][h // share] for h in range(query_heads)) @ product
    expected = np.linalg.svd(product, compute_uv=False)
    values = value_path(model).numpy()
    np.testing.assert_allclose(values / values[0], expected / expected[0], rtol=0, atol=1e-12)


def test_a_model_whose_output_projection_is_not_known_has_no_value_path():
    spec = AttentionSpec("BertSelfAttention", {"query": "query", "key": "key", "value": "value"})
    assert value_path(ARCHITECTURES["bert"].model(), spec) is None
