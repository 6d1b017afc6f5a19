"""LoRA on conditioned projections: the effective weight is W + C + B A."""

import copy

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, CORRECTIONS, add_correction, each_method, outputs_of, relative_difference
from models import PROJECTIONS as ALL

from hf_specattn import SpectralConfig, condition
from hf_specattn.layers import spectral_layers

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
pytestmark = pytest.mark.integration

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "crammed_bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}
each_text_model = pytest.mark.parametrize("tiny", [ARCHITECTURES[name] for name in TARGETS], ids=str)


def adapted(tiny, method):
    """A conditioned model with LoRA adapters whose product is not zero, as at initialization, but random."""
    model = tiny.model()
    condition(model, SpectralConfig(method))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=TARGETS[tiny.model_type], fan_in_fan_out=tiny.fused, lora_dropout=0.0
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def with_adapters_by_numpy(tiny, method, model):
    """The stock model with W + C + (alpha / r) B A."""
    expected = add_correction(tiny, tiny.model(), CORRECTIONS[method])
    factors = {name: value.detach().numpy() for name, value in model.named_parameters() if "lora_" in name}
    changed = 0
    for name, weight in expected.state_dict().items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.default.weight" in factors:
            product = factors[f"{prefix}.lora_B.default.weight"] @ factors[f"{prefix}.lora_A.default.weight"]
            matrix = weight.numpy()
            matrix += 2.0 * (product.T if tiny.fused else product)
            changed += 1
    assert changed == len(factors) // 2 > 0
    return expected


@each_text_model
@each_method
def test_effective_weight(tiny, method):
    model = adapted(tiny, method)
    expected = outputs_of(with_adapters_by_numpy(tiny, method, model), tiny.batch())
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10

    # merged, unmerged, and merged for good
    model.merge_adapter()
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
    model.unmerge_adapter()
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_difference(outputs_of(merged, tiny.batch()), expected) < 1e-10
    assert len(list(spectral_layers(merged))) == (2 if tiny.fused else 6)

    # and without the adapter the conditioned model is what it was
    with model.disable_adapter():
        base = outputs_of(add_correction(tiny, tiny.model(), CORRECTIONS[method]), tiny.batch())
        assert relative_difference(outputs_of(model, tiny.batch()), base) < 1e-10


@each_text_model
@each_method
def test_gradients_reach_the_adapters_alone(tiny, method):
    model = adapted(tiny, method).train()
    outputs = model(**tiny.batch())
    outputs.last_hidden_state.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0


@each_method
def test_merged_weights_hold_the_adapters(method):
    tiny = ARCHITECTURES["bert"]
    model = adapted(tiny, method)
    expected = {name: matrix for name, _, matrix in tiny.projections(with_adapters_by_numpy(tiny, method, model))}
    merged = model.merge_and_unload()
    layers = dict(spectral_layers(merged))
    assert len(layers) == 2 * len(ALL)
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.effective_weight().detach().numpy(), expected[f"{name}.weight"], atol=1e-9)
