"""Tiny models: small, whole and random, of whatever the configuration class has."""

import pytest
import torch
import transformers

from recipes.survey.tiny_models import tiny_config, tiny_inputs, tiny_model


@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM",
        "ViTForImageClassification",
        "SegformerForImageClassification",
        "Gemma2ForCausalLM",
        "BartModel",
    ],
)
def test_small_random_and_runnable(name):
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class)
    model = tiny_model(model_class, config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    # At their initial values zero biases and unit norms would hide errors.
    assert not any((parameter == 0).all() or (parameter == 1).all() for parameter in model.parameters())
    inputs = tiny_inputs(model)
    with torch.no_grad():
        outputs, again = (next(iter(m(**inputs).values())) for m in (model, tiny_model(model_class, config)))
    assert torch.isfinite(outputs).all()
    assert torch.equal(outputs, again)


def test_changes_come_last_and_reach_parts():
    config = tiny_config(transformers.CLIPConfig, {"text_config": {"hidden_size": 16}, "projection_dim": 24})
    assert (config.text_config.hidden_size, config.vision_config.hidden_size, config.projection_dim) == (16, 32, 24)
    assert tiny_config(transformers.BertConfig, {"num_hidden_layers": 3}).num_hidden_layers == 3


def test_a_layer_of_each_kind():
    config = tiny_config(transformers.Gemma2Config)
    assert config.num_hidden_layers == 2
    assert len(set(config.layer_types)) == 2


def test_the_second_text_is_padded():
    inputs = tiny_inputs(tiny_model(transformers.BertModel, tiny_config(transformers.BertConfig)))
    assert inputs["attention_mask"][0].all()
    assert not inputs["attention_mask"][1, -3:].any()
