"""GPT-2 and Llama through `condition`: logits and greedy generation against NumPy's `W + C`."""

import pytest
import torch
from models import (
    ARCHITECTURES,
    LAYERS,
    add_correction,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
)
from models import svd_by_numpy as svd
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_specattn import SpectralConfig, condition, fold

pytestmark = pytest.mark.integration

DECODERS = [ARCHITECTURES["gpt2"], ARCHITECTURES["llama"]]
CONFIGS = {"identity": SpectralConfig(lambda_=1.0), "svd": SpectralConfig("svd")}
CORRECTIONS = {"identity": identity_by_numpy(1.0), "svd": svd}
each_decoder = pytest.mark.parametrize("tiny", DECODERS, ids=str)
PROMPTS = torch.tensor([[0, 0, 11, 17, 23], [7, 29, 41, 13, 31]])
GREEDY = {
    "attention_mask": (PROMPTS > 0).long(),
    "max_new_tokens": 12,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "eos_token_id": None,
}


@each_decoder
@each_method
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_generation(tiny, method, use_cache):
    model, stock = tiny.model("AutoModelForCausalLM"), tiny.model("AutoModelForCausalLM")
    unconditioned = stock.generate(PROMPTS, use_cache=use_cache, **GREEDY)
    expected = add_correction(tiny, stock, CORRECTIONS[method])
    condition(model, CONFIGS[method])
    assert relative_difference(outputs_of(model, tiny.batch()), outputs_of(expected, tiny.batch())) < 1e-10
    tokens, expected_tokens = (m.generate(PROMPTS, use_cache=use_cache, **GREEDY) for m in (model, expected))
    assert tokens.sequences.shape == (2, 17)
    assert torch.equal(tokens.sequences, expected_tokens.sequences)
    torch.testing.assert_close(torch.stack(tokens.logits), torch.stack(expected_tokens.logits), rtol=1e-9, atol=1e-9)
    assert not torch.equal(tokens.sequences, unconditioned.sequences)


@each_decoder
@each_method
def test_fold_leaves_plain_modules(tiny, method):
    model = tiny.model("AutoModelForCausalLM")
    condition(model, CONFIGS[method])
    expected = model.generate(PROMPTS, **GREEDY)
    fold(model)
    assert type(model) is tiny.stock_class("AutoModelForCausalLM")
    names = {name.removesuffix(".weight") for name, _, _ in tiny.projections(model)}
    assert len(names) == LAYERS * (1 if tiny.fused else 3)
    for name in names:
        module = model.get_submodule(name)
        assert type(module) is (Conv1D if tiny.fused else nn.Linear)
        assert not dict(module.named_buffers())
        assert vars(module).keys() == vars(tiny.model("AutoModelForCausalLM").get_submodule(name)).keys()
    tokens = model.generate(PROMPTS, **GREEDY)
    assert torch.equal(tokens.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(tokens.logits), torch.stack(expected.logits), rtol=1e-12, atol=1e-12)


@each_decoder
@each_method
def test_generation_from_a_saved_checkpoint(tiny, method, tmp_path):
    model = tiny.model("AutoModelForCausalLM")
    condition(model, CONFIGS[method])
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert torch.equal(loaded.generate(PROMPTS, **GREEDY).sequences, model.generate(PROMPTS, **GREEDY).sequences)
