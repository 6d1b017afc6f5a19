"""spectra against NumPy, for stock, conditioned, partly conditioned and folded models."""

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.diagnostics import spectra

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
