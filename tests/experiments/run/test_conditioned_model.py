"""From a stock model to a run's conditioned one: the lambda that is found, what a checkpoint keeps, what is refused."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from models import ARCHITECTURES, assert_bit_equal
from torch import nn
from transformers import AutoModel, BertModel

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.config import DEFAULT_LAMBDA
from hf_specattn.diagnostics import saturation
from hf_specattn.projections import find_projections
from recipes.run.conditioned_model import ConditioningError, condition_model, find_lambda
from recipes.run.projection_init import check_initialization
from recipes.run.run_arguments import RunArguments
from recipes.run.spectral_arguments import SpectralArguments

SAMPLES = {"input_ids": torch.arange(24).reshape(2, 12)}


def bert(scale=1.0):
    torch.manual_seed(0)
    model = BertModel(ARCHITECTURES["bert"].config()).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter *= scale
    return model


def with_lambda(number):
    model = bert()
    condition(model, SpectralConfig(lambda_=number))
    return model


def largest_share(model):
    return max(row.saturated_share.mean().item() for row in saturation(model, SAMPLES))


def conditioned(*, model=None, run=None, **flags):
    """The model, and the flags with what was found."""
    model = bert() if model is None else model
    spectral = SpectralArguments(spectral_conditioning=True, **flags)
    condition_model(model, RunArguments(**(run or {})), spectral, SAMPLES, Accelerator(cpu=True))
    return model, spectral


def test_auto_is_the_largest_lambda_that_saturates_no_layer():
    assert largest_share(with_lambda(DEFAULT_LAMBDA)) > 0.5
    model, spectral = conditioned(lambda_="auto")
    found = spectral.found_lambda
    assert largest_share(with_lambda(found)) <= 0.5
    assert largest_share(with_lambda(1.05 * found)) > 0.5
    assert model.config.lambda_ == found < DEFAULT_LAMBDA
    assert_bit_equal(model.state_dict(), with_lambda(found).state_dict())
    assert spectral.to_config() == SpectralConfig(lambda_=found)


def test_auto_is_the_papers_value_where_nothing_saturates():
    stock = bert(scale=1e-3)
    highest = SpectralConfig(lambda_=0.5)  # in place of 10: a value that saturates nothing here
    assert find_lambda(stock, highest, SAMPLES) == 0.5
    assert not hasattr(stock.config, "spectral_conditioning")  # tried on a copy


def test_auto_is_the_papers_value_where_saturation_cannot_be_seen(monkeypatch, caplog):
    def refuse(*arguments):
        raise ValueError("the attention is a channel's")

    monkeypatch.setattr("hf_specattn.diagnostics.advice.saturation", refuse)
    with caplog.at_level(logging.WARNING):
        assert find_lambda(bert(), SpectralConfig(), SAMPLES) == DEFAULT_LAMBDA
    assert "cannot be seen in this model. the attention is a channel's" in caplog.text


def test_where_no_lambda_helps():
    with pytest.raises(
        ConditioningError, match=r"saturated .* from 10 down to 0\.01: W_Q and W_K themselves are too large"
    ):
        conditioned(model=bert(scale=1e4), lambda_="auto")


def test_preserve_keeps_the_function_so_nothing_is_looked_for():
    spectral = SpectralArguments(spectral_conditioning=True, spectral_init="preserve")
    spectral.find_lambda_by_default()
    assert spectral.lambda_ is None
    assert spectral.to_config() == SpectralConfig()


@pytest.mark.parametrize(
    ("flags", "automatic"),
    [
        ({}, True),
        ({"spectral_method": "identity"}, True),
        ({"lambda_": "2"}, False),
        ({"spectral_method": "svd"}, False),
    ],
)
def test_training_finds_lambda_where_none_is_given(flags, automatic):
    spectral = SpectralArguments(spectral_conditioning=True, **flags)
    spectral.find_lambda_by_default()
    assert spectral.is_automatic == automatic
    stock = SpectralArguments()
    stock.find_lambda_by_default()
    assert not stock.is_automatic


def test_a_lambda_that_saturates_is_named_with_a_better_one(caplog):
    with caplog.at_level(logging.WARNING):
        conditioned(lambda_="10")
    assert "is saturated (more than half of the rows" in caplog.text
    assert "instead of 10 no layer is saturated" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        conditioned(lambda_="0.1")
        conditioned(lambda_="auto")
    assert caplog.text == ""


def test_the_preconditioner_of_the_flags():
    model, _ = conditioned(
        spectral_method="svd",
        run={"attention_preconditioner": "row", "preconditioner_scale": "match", "preconditioner_eps": 1e-4},
    )
    settings = PreconditionerConfig("row", scale="match", eps=1e-4)
    expected = bert()
    condition(expected, SpectralConfig("svd"))
    precondition(expected, settings, probe=SAMPLES)
    assert model.config.preconditioner_config == settings
    assert model.config.preconditioner_norms == expected.config.preconditioner_norms
    with torch.no_grad():
        assert torch.equal(model(**SAMPLES).last_hidden_state, expected(**SAMPLES).last_hidden_state)


def test_a_preconditioner_alone():
    model = bert()
    condition_model(
        model, RunArguments(attention_preconditioner="row"), SpectralArguments(), SAMPLES, Accelerator(cpu=True)
    )
    assert model.config.preconditioner_config == PreconditionerConfig()
    assert model.config.spectral_conditioning is False


@pytest.fixture
def checkpoint(tmp_path):
    model, _ = conditioned(lambda_="2", run={"attention_preconditioner": "row"})
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("flags", [{"lambda_": "2"}, {"lambda_": "auto"}])
def test_a_conditioned_checkpoint_keeps_what_it_has(checkpoint, flags):
    model, folder = checkpoint
    loaded, spectral = conditioned(
        model=AutoModel.from_pretrained(folder), run={"attention_preconditioner": "row"}, **flags
    )
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.lambda_ == 2.0 == spectral.to_config().lambda_


def test_a_conditioned_checkpoint_is_conditioned_no_other_way(checkpoint):
    _, folder = checkpoint
    with pytest.raises(
        ConditioningError, match=r"ask for identity\(lambda_=3\.0\), and the checkpoint was trained with"
    ):
        conditioned(model=AutoModel.from_pretrained(folder), lambda_="3")
    with pytest.raises(ConditioningError, match="is already preconditioned with row"):
        conditioned(model=AutoModel.from_pretrained(folder), lambda_="2", run={"attention_preconditioner": "column"})


def test_a_model_without_projections():
    model = bert()
    model.encoder = nn.Identity()
    with pytest.raises(ConditioningError, match="No query, key or value projection found"):
        conditioned(model=model, lambda_="2")


def test_flags_of_the_preconditioner_belong_together():
    with pytest.raises(ValueError, match="--preconditioner_scale given without --attention_preconditioner"):
        RunArguments(preconditioner_scale="rms").check_run()
    with pytest.raises(ValueError, match="eps="):
        RunArguments(attention_preconditioner="row", preconditioner_eps=-1.0).check_run()
    with pytest.raises(ValueError, match="--lambda_ auto: of the identity correction; leave it out for svd"):
        SpectralArguments(spectral_conditioning=True, spectral_method="svd", lambda_="auto")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_svd_at_the_norm_of_the_stock_model(name):
    stock = ARCHITECTURES[name].model()
    model = copy.deepcopy(stock)
    targets = ["query", "output"]
    spectral = SpectralArguments(spectral_conditioning=True, spectral_method="svd", spectral_targets=targets)
    samples = ARCHITECTURES[name].batch()
    condition_model(model, RunArguments(match_norm_of="stock"), spectral, samples, Accelerator(cpu=True))
    before = {item.name: item for item in find_projections(stock, output=True)}
    for item in find_projections(model, output=True):
        conditioned = hasattr(item.module, "spectral")
        weight = item.module.effective_weight() if conditioned else item.module.weight
        parts = item.layout.split(item.orient(weight.detach()))
        for part, old in before[item.name].layout.split(item.orient(before[item.name].module.weight.detach())).items():
            torch.testing.assert_close(parts[part].norm(), old.norm(), rtol=1e-12, atol=0)
            same = torch.equal(parts[part], old)
            assert same == (part not in targets)


def test_the_norm_of_the_stock_model_is_of_svd_alone():
    for flags in ({}, {"spectral_conditioning": True, "lambda_": "1"}):
        with pytest.raises(ValueError, match="--match_norm_of stock gives W \\+ C the norm that W had"):
            check_initialization(RunArguments(match_norm_of="stock"), SpectralArguments(**flags))
