"""What is captured from a model, through its Jacobian: against autograd through the model itself."""

import math

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, HEADS, WIDTH, each_architecture
from torch import nn
from transformers import BertConfig, BertModel

from hf_specattn import AttentionSpec, SpectralConfig, condition
from hf_specattn.diagnostics import capture, jacobian_spectrum

HEAD_WIDTH = WIDTH // HEADS
CORRECTIONS = {
    "stock": None,
    "identity": SpectralConfig(lambda_=0.5),
    "svd": SpectralConfig("svd"),
    "identity of query and value by head": SpectralConfig(lambda_=0.3, targets=("query", "value"), granularity="head"),
}


def jacobian_through_the_model(model, tiny, batch, layer, head, sequence, rows):
    """The dense Jacobian of one head's output at some rows, from the model's own forward pass and parameters."""
    found = capture(model, batch, layers=[layer])[0]
    output = found.attention.output()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {names[id(item.module.weight)]: item.module.weight for item in found.attention.holders}
    columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)

    def head_output(*weights):
        seen = []
        handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            torch.func.functional_call(model, dict(zip(parameters, weights)), kwargs=batch)
        finally:
            handle.remove()
        return seen[0][sequence, rows][:, columns]

    jacobians = torch.autograd.functional.jacobian(head_output, tuple(parameters.values()))
    others = head // (HEADS // tiny.key_value_heads)
    parts = []
    for index, part in enumerate("qkv"):
        place = head if part == "q" else others
        here = slice(place * HEAD_WIDTH, (place + 1) * HEAD_WIDTH)
        if tiny.fused:  # (in, query | key | value)
            parts.append(jacobians[0][..., index * WIDTH : (index + 1) * WIDTH][..., here])
        else:
            parts.append(jacobians[index][:, :, here])
    return torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=1)


@each_architecture
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_jacobian_of_a_models_head_equals_autograd(tiny, correction):
    model = tiny.model()
    if CORRECTIONS[correction] is not None:
        condition(model, CORRECTIONS[correction])
    batch = tiny.batch()
    layer, head, sequence = 1, 2, 1  # a query head whose key head is another one under grouping; a padded text
    rows = np.arange(5 if "pixel_values" in batch else batch["attention_mask"][sequence].sum())
    dense = jacobian_through_the_model(model, tiny, batch, layer, head, sequence, rows)
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)
    found = jacobian_spectrum(capture(model, batch, layers=[layer])[0].head(head, sequence), full=True)
    assert found.shape == dense.shape
    # The eager attention of these two computes its softmax in float32.
    accuracy = 1e-6 if tiny.model_type in ("vit", "llama") else 1e-9
    np.testing.assert_allclose(found.singular_values, expected[: found.rank], rtol=0, atol=accuracy * expected[0])
    assert np.all(expected[found.rank :] < accuracy * expected[0])


def test_at_some_queries_it_is_those_rows():
    tiny = ARCHITECTURES["llama"]
    model, batch = tiny.model(), tiny.batch()
    dense = jacobian_through_the_model(model, tiny, batch, 0, 1, 0, [0, 3, 6, 9])
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)
    found = jacobian_spectrum(capture(model, batch)[0].head(1, queries=4), full=True)
    assert found.shape == dense.shape
    np.testing.assert_allclose(found.singular_values, expected[: found.rank], rtol=0, atol=1e-6 * expected[0])


@each_architecture
def test_weights_are_the_models(tiny):
    model, batch = tiny.model(attn_implementation="eager"), tiny.batch()
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    for found, weights in zip(capture(model, batch), expected):
        torch.testing.assert_close(found.weights, weights, rtol=1e-12, atol=1e-12)
        assert found.x_key is found.x


def test_leaves_the_model_and_the_random_state_as_they_were():
    model = ARCHITECTURES["bert"].model(attn_implementation="sdpa").train()
    model.encoder.layer[0].eval()
    state = torch.random.get_rng_state()
    capture(model, ARCHITECTURES["bert"].batch())
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not model.encoder.layer[0].training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_cross_attention_has_two_inputs():
    settings = ARCHITECTURES["bert"].settings | {"is_decoder": True, "add_cross_attention": True}
    model = BertModel(BertConfig(**settings)).double()
    inputs = {
        "input_ids": torch.randint(5, 40, (1, 6)),
        "encoder_hidden_states": torch.randn(1, 9, WIDTH, dtype=torch.float64),
        "encoder_attention_mask": torch.tensor([[1] * 7 + [0] * 2]),
    }
    found = capture(model, inputs)
    names = [item.attention.name for item in found]
    cross = found[names.index("encoder.layer.0.crossattention.self")]
    assert (cross.x.shape, cross.x_key.shape) == ((1, 6, WIDTH), (1, 9, WIDTH))
    head = cross.head(0)
    assert torch.equal(head.x_key, inputs["encoder_hidden_states"][0, :7])
    torch.testing.assert_close(head.weights(), cross.weights[0, 0, :, :7], rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    """An attention of one's own, with a fused interleaved weight, that returns its output alone."""

    def __init__(self, temperature=1.0):
        super().__init__()
        self.qkv, self.out, self.num_heads = nn.Linear(8, 24), nn.Linear(8, 8), 2
        self.temperature = temperature

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 2, 3, 4).permute(3, 0, 2, 1, 4)
        weights = (self.temperature * query @ key.mT / 2).softmax(dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(batch, length, 8))


SPEC = AttentionSpec(
    "Attention", {"qkv": ("query", "key", "value")}, interleaved=True, query_heads="num_heads", output="out"
)


def test_a_module_that_returns_no_weights():
    module = nn.Sequential(Attention()).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    (found,) = capture(module, {"input": x}, SPEC)
    query, key, _ = module[0].qkv(x).view(2, 5, 2, 3, 4).permute(3, 0, 2, 1, 4)
    torch.testing.assert_close(found.weights, (query @ key.mT / 2).softmax(dim=-1).detach())
    assert jacobian_spectrum(found.head(1)).shape == (5 * 4, 3 * 4 * 8)


def test_weights_that_the_input_does_not_explain_are_an_error():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"returns no attention weights, and those of its input.*do not give its output"
    ):
        capture(nn.Sequential(Attention(temperature=3.0)).double(), {"input": x}, SPEC)
    model = ARCHITECTURES["bert"].model()
    model.encoder.layer[1].attention.self.register_forward_hook(
        lambda module, args, output: (output[0], output[1].flip(-1))
    )
    found = capture(model, ARCHITECTURES["bert"].batch())
    found[0].head(0)
    with pytest.raises(ValueError, match=r"attention weights of encoder.layer.1.attention.self differ by"):
        found[1].head(0)


def test_an_attention_that_is_not_run_is_an_error():
    model = BertModel(BertConfig(**ARCHITECTURES["bert"].settings, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match=r"crossattention.self was not run by these inputs.*encoder_hidden_states"):
        capture(model, {"input_ids": torch.tensor([[5, 6, 7]])})


def test_scale_of_the_model_is_used():
    tiny = ARCHITECTURES["gpt2"]
    model = tiny.model(scale_attn_by_inverse_layer_idx=True)
    scales = [found.scale for found in capture(model, tiny.batch())]
    assert scales == pytest.approx([1 / math.sqrt(HEAD_WIDTH), 1 / math.sqrt(HEAD_WIDTH) / 2])
