"""Models without layer norms and without the residual connection of attention."""

import copy

import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification, ViTModel

from hf_specattn import SpectralConfig, condition
from recipes.run.ablations import remove_attention_residuals, remove_layer_norms

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_layer_norms_are_taken_out_and_the_model_refuses_to_be_saved(tmp_path):
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES))
    assert remove_layer_norms(model) == 5
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    condition(model, SpectralConfig(lambda_=1.0))
    assert model(pixel_values=torch.randn(1, 3, 8, 8)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="no layer norm any more"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--no_layer_norm: .* has no torch\.nn\.LayerNorm"):
        remove_layer_norms(model)


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).double().eval()


def test_attention_replaces_its_input():
    model = vit()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stock = copy.deepcopy(model)
    assert remove_attention_residuals(model) == 2
    # With hooks that take the input away from what attention adds to it.
    seen = {}
    for layer in stock.vit.layers if hasattr(stock.vit, "layers") else stock.vit.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
        layer.attention.register_forward_hook(
            lambda module, args, output, layer=layer: (output[0] - seen[layer], *output[1:])
        )
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, stock(pixels).logits, rtol=0, atol=1e-12)
    assert (model(pixels).logits - vit()(pixels).logits).abs().max() > 1e-6
    with pytest.raises(ValueError, match="has no residual connection of attention"):
        model.save_pretrained("nowhere")


def test_it_is_conditioned_as_any_other():
    model = vit()
    remove_attention_residuals(model)
    reports = condition(model, SpectralConfig("svd", targets=("value", "output")))
    assert len(reports) == 4
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).logits.isfinite().all()


def test_a_vit_of_timm():
    settings = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings).double().eval()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stock = copy.deepcopy(model)
    assert remove_attention_residuals(model) == 2
    seen = {}
    for block in stock.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
        block.attn.register_forward_hook(lambda module, args, output, block=block: output - seen[block])
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), stock(pixels), rtol=0, atol=1e-12)


def test_what_is_no_vit_is_refused():
    config = CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)
    with pytest.raises(ValueError, match="--no_attention_residual: CLIPVisionModel has no block of a ViT"):
        remove_attention_residuals(CLIPVisionModel(config))
