import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from recipes.images.image_models import ImageModelSettings, build_stock_model
from recipes.images.vision_optimization import AveragedWeights, not_decayed
from recipes.run.optimization import parameter_groups

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def exempt(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, not_decayed(model))
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}


def test_vectors_tables_and_tokens_do_not_decay():
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL))
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert exempt(model) == expected | {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    swin = SwinForImageClassification(SwinConfig(image_size=16, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    assert any(name.endswith("relative_position_bias_table") for name in exempt(swin))


def test_the_groups_of_a_model_of_timm_are_timms():
    arguments = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
    model = build_stock_model(
        ImageModelSettings(timm_model="vit_tiny_patch16_224", timm_model_args=json.dumps(arguments)), "ab", 8, 3
    )
    own = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    theirs = create_optimizer_v2(own, "adamw", lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    expected = {names[id(p)] for group in theirs.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {name.removeprefix("timm_model.") for name in exempt(model)} == expected
    assert "timm_model.pos_embed" in not_decayed(model)


def test_the_average_is_the_recurrence_and_its_state_comes_back():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averaged = AveragedWeights(model, 0.9)
    expected = model[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += torch.randn(3, 2)
        averaged.update()
        expected = 0.9 * expected + 0.1 * model[0].weight.detach()
    torch.testing.assert_close(averaged.model[0].weight, expected)

    other = AveragedWeights(model, 0.9)
    other.load_state_dict(averaged.state_dict())
    for name, tensor in averaged.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
