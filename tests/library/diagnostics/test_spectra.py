"""spectra against NumPy, for stock, conditioned, partly conditioned and folded models."""

import copy
import re

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, LAYERS
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.diagnostics import effective_rank, spectra

HEADS = {"query": 4, "key": 2, "value": 2}


def llama():
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return LlamaModel(config).double()


def assert_spectrum(spectrum, matrix, heads):
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert (spectrum.sigma_max, spectrum.sigma_min) == pytest.approx((sigma[0], sigma[-1]), rel=1e-9)
    assert spectrum.head_kappa == pytest.approx([np.linalg.cond(block) for block in np.split(matrix, heads)], rel=1e-9)


def test_stock_conditioned_and_folded():
    model = llama()
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    stock = spectra(model)
    assert [row.projection for row in stock] == ["query", "key", "value"] * 2
    assert all(row.raw is row.effective for row in stock)
    condition(model, SpectralConfig(lambda_=3.0, targets=("query", "value")))
    conditioned = spectra(model)
    assert [row.name for row in conditioned] == [row.name for row in stock]
    folded = spectra(fold(copy.deepcopy(model)))
    for row, after_fold in zip(conditioned, folded):
        weight = weights[f"{row.name}.weight"]
        effective = weight + (0 if row.projection == "key" else 3.0 * np.eye(*weight.shape))
        assert_spectrum(row.raw, weight, HEADS[row.projection])
        assert_spectrum(row.effective, effective, HEADS[row.projection])
        assert_spectrum(after_fold.raw, effective, HEADS[row.projection])


def test_fused_tensor_gives_each_projection_its_own():
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=20, n_positions=8)).double()
    rows = spectra(model)
    thirds = np.split(model.h[0].attn.c_attn.weight.detach().numpy().T, 3)
    assert [row.projection for row in rows] == ["query", "key", "value"]
    for row, third in zip(rows, thirds):
        assert_spectrum(row.raw, third, 4)


def test_nothing_to_see_is_an_error():
    with pytest.raises(ValueError, match="No query, key or value projection"):
        spectra(torch.nn.Linear(3, 3))


def test_singular_values_and_effective_rank():
    model = llama()
    row = spectra(model)[4]
    matrix = model.layers[1].self_attn.k_proj.weight.detach().numpy()
    sigma = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(row.raw.singular_values, sigma, rtol=1e-12)
    blocks = [np.linalg.svd(block, compute_uv=False) for block in np.split(matrix, 2)]
    np.testing.assert_allclose(row.raw.head_singular_values, blocks, rtol=1e-12)
    ranks = [np.exp(-np.sum(s / s.sum() * np.log(s / s.sum()))) for s in (sigma, *blocks)]
    assert row.raw.effective_rank == pytest.approx(ranks[0], rel=1e-12)
    assert row.raw.head_effective_rank == pytest.approx(ranks[1:], rel=1e-12)
    assert (row.layer, row.shape) == (1, (8, 16))


def test_effective_rank_of_equal_single_and_no_values():
    values = torch.tensor([[3.0, 3.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert effective_rank(values).tolist() == pytest.approx([3.0, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "crammed_bert"])
def test_output_projection_by_head(name):
    tiny = ARCHITECTURES[name]
    model = tiny.model()
    rows = [row for row in spectra(model, output=True) if row.projection == "output"]
    weights = {key: value.numpy() for key, value in model.state_dict().items() if re.search(tiny.outputs, key)}
    assert [f"{row.name}.weight" for row in rows] == list(weights)
    assert [row.layer for row in rows] == list(range(LAYERS))
    for row, weight in zip(rows, weights.values()):
        # In rows of inputs: what maps one head's values to the output lies together.
        assert_spectrum(row.raw, weight if tiny.fused else weight.T, HEADS["query"])
        assert row.raw is row.effective


def test_chosen_layers_and_dtype():
    model = llama()
    every = spectra(model)
    assert [row.layer for row in spectra(model, layers=[-1])] == [1, 1, 1]
    single = spectra(model, layers=[-1], dtype=torch.float32)[0]
    assert single.raw.singular_values.dtype == torch.float32
    assert single.raw.sigma_max == pytest.approx(every[3].raw.sigma_max, rel=1e-5)
    with pytest.raises(ValueError, match=r"layers=\[2\].*2 attention layers, 0 to 1"):
        spectra(model, layers=[2])


def test_weights_without_values_are_an_error():
    with torch.device("meta"):
        model = LlamaModel(llama().config)
    with pytest.raises(ValueError, match="meta device"):
        spectra(model)
