"""Checkpoints that `pretrain_mlm.py` cannot use, said in one line before the corpus is prepared."""

import re

import pytest
import torch
from test_pretrain_mlm import corpus, fresh_accelerator_state, pretrain, script  # noqa: F401  fixtures
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
)

from hf_specattn import SpectralConfig, condition

# ruff: noqa: F811  the fixtures' names again, as parameters

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FLAG = "--spectral_conditioning"
SVD = [FLAG, "--spectral_method", "svd"]


@pytest.fixture
def saved(pretrain, tmp_path):
    """A function: save a model beside the tokenizer of a run; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(pretrain(name="tokenizer"))

    def save(kind):
        torch.manual_seed(0)
        vocabulary = {"vocab_size": len(tokenizer)}
        models = {
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **vocabulary)),
            "mpnet": lambda: MPNetForMaskedLM(MPNetConfig(max_position_embeddings=30, **SIZES, **vocabulary)),
            "roberta": lambda: RobertaForMaskedLM(
                RobertaConfig(max_position_embeddings=16, pad_token_id=0, **SIZES, **vocabulary)
            ),
            "base": lambda: BertModel(BertConfig(**SIZES, **vocabulary)),
            "vit": lambda: ViTModel(ViTConfig(**SIZES)),
            "small": lambda: BertForMaskedLM(BertConfig(vocab_size=20, **SIZES)),
        }
        model = models.get(kind, lambda: BertForMaskedLM(BertConfig(**SIZES, **vocabulary)))()
        if kind == "conditioned":
            condition(model, SpectralConfig(method="svd"))
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = folder / "model.safetensors"
        if kind == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        if kind == "damaged":
            weights.write_bytes(b"\xff" * 64)
        if kind == "no weights":
            weights.unlink()
        return str(folder)

    return save


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("cut", [], "cut cannot be loaded as a model for MaskedLM"),
        ("damaged", [], "damaged cannot be loaded as a model for MaskedLM"),
        ("no weights", [], "no weights cannot be loaded as a model for MaskedLM"),
        ("gpt2", [], "gpt2 cannot be loaded as a model for MaskedLM: Unrecognized configuration class"),
        ("vit", [], r"vit \(vit\) is not a text model"),
        ("mpnet", [FLAG, "--lambda", "1"], "mpnet cannot be loaded: .*has no conditioned class"),
        ("conditioned", [*SVD, "--spectral_init", "preserve"], "spectral_init"),
        ("conditioned", [FLAG, "--lambda", "2"], "conditioned"),
        ("roberta", [], "--max_seq_length 16 exceeds the 15 positions of"),
        ("small", [], r"The tokenizer has \d+ tokens and the model .*small only 20"),
        ("base", ["--eval_only"], r"base lacks \d+ weights of a BertForMaskedLM"),
    ],
)
def test_what_cannot_be_trained_or_measured(pretrain, saved, capsys, monkeypatch, kind, flags, message):
    folder = saved(kind)
    if kind != "small":  # the tokenizer is known with the data
        monkeypatch.setattr(
            "recipes.text.pretrain_task.prepare_mlm_data", lambda *_, **__: pytest.fail("data prepared")
        )
    with pytest.raises(SystemExit) as ended:
        pretrain("--model_name_or_path", folder, *flags, new_model=False)
    told = capsys.readouterr().err + str(ended.value)
    assert ended.value.code not in (0, None)
    assert "error: " in told
    assert re.search(message, told), told


def test_a_base_model_gets_a_new_head(pretrain, saved):
    folder = pretrain("--model_name_or_path", saved("base"), new_model=False)
    assert (folder / "model.safetensors").is_file()
