"""attention_entropy against probabilities worked out by hand."""

import math

import pytest
import torch
from models import ARCHITECTURES
from transformers import BertModel

from hf_specattn import SpectralConfig, condition
from hf_specattn.diagnostics import attention_entropy, gradient_norms, saturation


def bert(**settings):
    return BertModel(ARCHITECTURES["bert"].config(**settings))


def test_zero_logits_give_uniform_attention():
    model = bert()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    entropy = attention_entropy(model, {"input_ids": torch.randint(0, 40, (3, 7))})
    assert entropy.shape == (2, 4)
    torch.testing.assert_close(entropy, torch.full((2, 4), math.log(7)))


def test_equals_the_entropy_of_the_models_probabilities():
    model = bert(initializer_range=1.0, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.randint(0, 40, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][0, 4:] = 0
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    expected = torch.empty(2, 4)
    for index, weights in enumerate(attentions):
        rows = [weights[0, :, :4].double(), weights[1].double(), weights[2].double()]  # real queries only
        logs = [torch.where(row > 0, row * row.log(), 0.0).sum(-1) for row in rows]
        expected[index] = -torch.cat(logs, dim=1).mean(dim=1).float()
    torch.testing.assert_close(attention_entropy(model, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(training):
    model = bert(attn_implementation="sdpa").train(training)
    attention_entropy(model, {"input_ids": torch.randint(0, 40, (1, 5))})
    assert model.config._attn_implementation == "sdpa"
    assert model.training is training


def test_shows_the_saturation_of_a_large_lambda():
    """Self-logits of about lambda^2 |x_head|^2 / sqrt(d): at 10 each token attends to itself alone."""
    inputs = {"input_ids": torch.arange(12)[None]}
    stock, mild, literal = bert(), bert(), bert()
    condition(mild, SpectralConfig(lambda_=0.5))
    condition(literal, SpectralConfig(lambda_=10.0))
    # The first layer: its inputs are the layer-normed embeddings of different tokens.
    values = [attention_entropy(model, inputs)[0].mean().item() for model in (stock, mild, literal)]
    assert values[0] > 0.95 * math.log(12)
    assert values[2] < 0.05 * math.log(12)
    assert values[2] < values[1] < values[0]


def test_saturation_by_hand_under_a_causal_mask_and_padding():
    tiny = ARCHITECTURES["gpt2"]
    model, batch = tiny.model(initializer_range=2.0, attn_implementation="eager"), tiny.batch()
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    rows = saturation(model, batch)
    assert [row.layer for row in rows] == [0, 1]
    for row, weights in zip(rows, attentions):
        counts = [index + 1 for sequence in real for index in range(int(sequence.sum()))]
        assert row.uniform_entropy == pytest.approx(sum(map(math.log, counts)) / len(counts))
        for head in range(4):
            largest = [weights[b, head, i].max().item() for b, i in real.nonzero().tolist() if i > 0]
            share = sum(value > 0.999 for value in largest) / len(largest)
            assert row.saturated_share[head].item() == pytest.approx(share)
            entropies = [torch.special.entr(weights[b, head, i]).sum().item() for b, i in real.nonzero().tolist()]
            assert row.entropy[head].item() == pytest.approx(sum(entropies) / len(entropies))


def test_gradient_norms_by_head():
    tiny = ARCHITECTURES["llama"]
    model = tiny.model()
    with pytest.raises(ValueError, match=r"q_proj has no gradient; call gradient_norms after loss.backward"):
        gradient_norms(model)
    model(**tiny.batch()).last_hidden_state.square().sum().backward()
    for row, layer in zip(gradient_norms(model), model.layers):
        for name, heads in (("query", 4), ("key", 2), ("value", 2)):
            gradient = getattr(layer.self_attn, f"{name[0]}_proj").weight.grad
            expected = [gradient[8 * head : 8 * head + 8].square().sum().sqrt().item() for head in range(heads)]
            assert row.norms[name].tolist() == pytest.approx(expected, rel=1e-12)


def test_saturated_softmax_passes_no_gradient():
    """What the share of saturated rows means for training: with all rows saturated nothing reaches W_Q."""
    inputs = {"input_ids": torch.arange(12)[None]}
    norms, shares = [], []
    for lambda_ in (0.5, 40.0):
        model = bert().double()
        condition(model, SpectralConfig(lambda_=lambda_))
        output = model(**inputs).last_hidden_state
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        norms.append(gradient_norms(model)[0].norms["query"].max().item())
        shares.append(saturation(model, inputs)[0].saturated_share.mean().item())
    assert shares[0] == 0
    assert shares[1] == 1
    assert norms[1] < 1e-3 * norms[0]
