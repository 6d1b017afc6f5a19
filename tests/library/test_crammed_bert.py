"""Crammed BERT against an independent reading of its architecture, and in the uses that transformers makes of a model."""

import ast
import contextlib
import copy
import math
import pathlib
import pickle
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from hf_specattn import crammed_bert
from hf_specattn.crammed_bert import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertModel,
    sinusoidal_table,
)

BATCH, LENGTH, VOCABULARY, WIDTH = 3, 10, 50, 16
HEADS = (CrammedBertForMaskedLM, CrammedBertForSequenceClassification, CrammedBertForTokenClassification)
ALL_MODELS = (CrammedBertModel, *HEADS)


def tiny_config(**changes):
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
        "classifier_hidden_size": 20,
        "num_labels": 3,
    }
    return CrammedBertConfig(**(fields | changes))


def tiny_model(model_class=CrammedBertForMaskedLM, dtype=torch.float64, seed=0, attention="sdpa", **changes):
    """Model in eval mode whose norms, biases and scale are random too: at their initial values errors would hide."""
    torch.manual_seed(seed)
    model = model_class._from_config(tiny_config(**changes), dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch=BATCH, length=LENGTH, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, 9:] = 0
    return mask


def masked_batch(per_sequence=3, seed=2):
    """Token ids, positions (batch, k) and labels that are -100 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(BATCH, LENGTH, generator=generator).argsort(dim=1)[:, :per_sequence]
    targets = torch.randint(0, VOCABULARY, (BATCH, per_sequence), generator=generator)
    labels = torch.full((BATCH, LENGTH), -100).scatter(1, positions, targets)
    return tokens(), positions, labels


# An independent reading of the architecture: explicit formulas on the weights, one sequence and one head at a time.


def reference_norm(x, weight, bias, eps):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def reference_positions(length, width):
    return torch.tensor(
        [
            [(math.sin if c % 2 == 0 else math.cos)(p / 10000 ** ((c - c % 2) / width)) for c in range(width)]
            for p in range(length)
        ],
        dtype=torch.float64,
    )


def reference_attention(x, query, key, value, heads, keep):
    """Attended values (n, width) and probabilities (heads, n, n) of one sequence (n, width)."""
    head_dim = x.shape[-1] // heads
    attended, probabilities = [], []
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        scores = (x @ query[rows].T) @ (x @ key[rows].T).T / math.sqrt(head_dim)
        weights = scores.exp() * keep
        probabilities.append(weights / weights.sum(-1, keepdim=True))
        attended.append(probabilities[-1] @ (x @ value[rows].T))
    return torch.cat(attended, dim=-1), torch.stack(probabilities)


def reference_encode(model, ids, keep=None):
    """Last hidden state and per-layer attention probabilities from the weights of a `CrammedBertModel`."""
    weights, config = model.state_dict(), model.config

    def norm(x, name):
        return reference_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    outputs, attentions = [], [[] for _ in range(config.num_hidden_layers)]
    for b, sequence in enumerate(ids):
        x = weights["embeddings.word_embeddings.weight"][sequence]
        x = x + weights["embeddings.position_scale"] * reference_positions(len(sequence), config.hidden_size)
        x = norm(x, "embeddings.norm")
        for index in range(config.num_hidden_layers):
            name = f"layers.{index}"
            projections = (weights[f"{name}.attention.{p}.weight"] for p in ("query", "key", "value"))
            attended, probabilities = reference_attention(
                norm(x, f"{name}.attention_norm"),
                *projections,
                config.num_attention_heads,
                torch.ones(len(sequence)).double() if keep is None else keep[b].double(),
            )
            attentions[index].append(probabilities)
            x = x + attended @ weights[f"{name}.attention_output.weight"].T
            value, gate = torch.split(
                norm(x, f"{name}.feed_forward_norm") @ weights[f"{name}.feed_forward.dense_in.weight"].T,
                config.intermediate_size // 2,
                dim=-1,
            )
            gelu = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
            x = x + (value * gelu) @ weights[f"{name}.feed_forward.dense_out.weight"].T
        outputs.append(norm(x, "final_norm"))
    return torch.stack(outputs), [torch.stack(layer) for layer in attentions]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_equals_independent_implementation(attention, padded):
    model = tiny_model(CrammedBertModel, attention=attention)
    ids, mask = tokens(), padding_mask() if padded else None
    expected, _ = reference_encode(model, ids, mask)
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, expected, rtol=1e-11, atol=1e-11)


def test_reported_attentions_are_the_probabilities():
    model = tiny_model(CrammedBertModel, attention="eager")
    outputs = model(tokens(), attention_mask=padding_mask(), output_attentions=True)
    _, expected = reference_encode(model, tokens(), padding_mask())
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for got, wanted in zip(outputs.attentions, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert outputs.attentions[0][1, :, :, 6:].abs().max() == 0


def test_hidden_states_are_embeddings_layers_and_final_norm():
    model = tiny_model(CrammedBertModel)
    outputs = model(tokens(), output_hidden_states=True)
    states = outputs.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.embeddings(tokens()))
    assert torch.equal(states[1], model.layers[0](states[0]))
    assert torch.equal(states[-1], outputs.last_hidden_state)
    assert torch.equal(states[-1], model.final_norm(model.layers[2](model.layers[1](states[1]))))


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(attention):
    outputs = []
    for name in ("eager", attention):
        model = tiny_model(CrammedBertModel, attention=name, dtype=torch.float32, num_hidden_layers=1)
        with torch.no_grad():  # flex attention has no backward on the CPU
            outputs.append(model(tokens(), attention_mask=padding_mask()).last_hidden_state[padding_mask().bool()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_change_other_tokens(attention):
    model = tiny_model(CrammedBertModel, attention=attention)
    ids, mask = tokens(), padding_mask()
    other_padding = torch.where(mask.bool(), ids, (ids + 7) % VOCABULARY)
    states = model(ids, attention_mask=mask).last_hidden_state
    changed = model(other_padding, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[mask.bool()], changed[mask.bool()], rtol=1e-12, atol=1e-12)
    alone = model(ids[1:2, :6]).last_hidden_state
    torch.testing.assert_close(states[1:2, :6], alone, rtol=1e-11, atol=1e-11)


def test_no_mask_is_made_without_an_attention_mask(monkeypatch):
    monkeypatch.setattr(crammed_bert, "create_bidirectional_mask", lambda *args, **kwargs: pytest.fail("mask made"))
    tiny_model(CrammedBertModel)(tokens())


def test_inputs_embeds_position_ids_and_token_types():
    model = tiny_model(CrammedBertModel)
    ids = tokens()
    expected = model(ids).last_hidden_state
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state, expected)
    assert torch.equal(model(ids, position_ids=torch.arange(LENGTH)[None]).last_hidden_state, expected)
    assert torch.equal(model(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state, expected)
    # Attention knows no order: with the positions reversed along with the tokens, the output is reversed.
    backwards = model(ids.flip(1), position_ids=torch.arange(LENGTH).flip(0)[None]).last_hidden_state
    torch.testing.assert_close(backwards.flip(1), expected, rtol=1e-11, atol=1e-11)


def parameter_count(layers):
    with torch.device("meta"):
        model = CrammedBertForMaskedLM(CrammedBertConfig(num_hidden_layers=layers))
    return model.num_parameters()


def test_parameter_counts():
    assert parameter_count(16) == 119_589_889  # as published with the original code
    assert CrammedBertConfig().num_hidden_layers == 12
    documented = crammed_bert.CrammedBertConfig.__doc__
    assert f"{parameter_count(12):,} parameters" in documented
    assert f"{parameter_count(16):,} parameters" in documented


def test_only_norms_have_biases():
    model = tiny_model()
    biased = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters() if name.endswith("bias")}
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert biased == norms
    assert all(model.get_submodule(name).eps == 1e-12 for name in norms)


def test_attention_has_the_attributes_of_berts():
    attention = tiny_model(CrammedBertModel).layers[0].attention
    assert type(attention).__name__ == "CrammedBertSelfAttention"
    assert (attention.num_attention_heads, attention.attention_head_size, attention.head_dim) == (4, 4, 4)
    assert attention.all_head_size == WIDTH
    assert attention.scaling == 0.5
    assert all(type(getattr(attention, name)) is torch.nn.Linear for name in ("query", "key", "value"))


def test_initialization():
    torch.manual_seed(0)
    model = CrammedBertForSequenceClassification(
        CrammedBertConfig(vocab_size=2000, hidden_size=192, num_hidden_layers=2, initializer_range=0.05)
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            standard_error = 0.05 / math.sqrt(2 * module.weight.numel())
            assert abs(module.weight.std().item() - 0.05) < 6 * standard_error, name
            assert abs(module.weight.mean().item()) < 6 * 0.05 / math.sqrt(module.weight.numel()), name
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) and module.bias is not None:
            assert module.bias.abs().max() == 0, name
        if isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(192)), name
    embeddings = model.crammed_bert.embeddings
    assert embeddings.word_embeddings.weight[0].abs().max() == 0
    assert embeddings.position_scale.item() == pytest.approx(192**-0.5, rel=1e-6)
    louder = CrammedBertModel(
        CrammedBertConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, position_scale=2.5)
    )
    assert louder.embeddings.position_scale.item() == 2.5


# Masked language modeling


def test_masked_lm_logits_are_the_tied_product():
    model = tiny_model()
    states, _ = reference_encode(model.crammed_bert, tokens())
    expected = states @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-11, atol=1e-11)


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_path_has_the_same_loss_and_gradients():
    ids, positions, labels = masked_batch()
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    dense_loss, dense_gradients = loss_and_gradients(model, input_ids=ids, labels=labels)
    logits = model(ids).logits
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -picked[labels != -100].mean()
    torch.testing.assert_close(dense_loss, expected.detach(), rtol=1e-12, atol=0)

    paths = [(True, {}), (True, {"masked_positions": positions}), (False, {"masked_positions": positions})]
    for training, extra in paths:
        model.train(training)
        loss, gradients = loss_and_gradients(model, input_ids=ids, labels=labels, **extra)
        torch.testing.assert_close(loss, dense_loss, rtol=1e-13, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, dense_gradients[name], rtol=1e-10, atol=1e-14, msg=name)


def test_logits_of_every_path():
    ids, positions, labels = masked_batch()
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    dense = model(ids, labels=labels).logits
    assert dense.shape == (BATCH, LENGTH, VOCABULARY)
    rows = torch.arange(BATCH)[:, None]
    for training in (True, False):
        model.train(training)
        gathered = model(ids, labels=labels, masked_positions=positions).logits
        torch.testing.assert_close(gathered, dense[rows, positions], rtol=1e-11, atol=1e-11)
    model.train()
    sparse = model(ids, labels=labels).logits
    torch.testing.assert_close(sparse, dense[labels != -100], rtol=1e-11, atol=1e-11)
    assert model(ids).logits.shape == dense.shape  # nothing is labeled, everything is wanted
    model.config.sparse_prediction = False
    assert model(ids, labels=labels).logits.shape == dense.shape


def test_negative_masked_positions_are_padding():
    ids, positions, labels = masked_batch()
    model = tiny_model()
    labels[:, 0] = 5  # what padding reads must not count even where it has a label
    positions = torch.cat((positions, torch.zeros(BATCH, 1, dtype=torch.long)), dim=1)
    positions[:, :3] = torch.where(positions[:, :3] == 0, -1, positions[:, :3])
    expected = model(ids, labels=labels).loss
    padded = torch.cat((positions, torch.full((BATCH, 2), -1)), dim=1)
    torch.testing.assert_close(model(ids, labels=labels, masked_positions=padded).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_masked_lm_micro_batches_add_up(as_tensor):
    ids, positions, labels = masked_batch()
    labels[0, positions[0, 0]] = -100  # micro-batches of unequal weight, where means do not average
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    count = (labels != -100).sum()
    count = count if as_tensor else int(count)
    whole = model(ids, labels=labels).loss
    for extra in ({}, {"masked_positions": positions}):
        parts = []
        for b in range(BATCH):
            row = {name: value[b : b + 1] for name, value in {"input_ids": ids, "labels": labels, **extra}.items()}
            parts.append(model(**row, num_items_in_batch=count).loss)
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_half_precision_loss_is_computed_in_float32():
    ids, _, labels = masked_batch()
    model = tiny_model(dtype=torch.bfloat16)
    outputs = model(ids, labels=labels)
    assert outputs.logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(outputs.logits.float().view(-1, VOCABULARY), labels.view(-1))
    assert torch.equal(outputs.loss, expected)


def test_ties_and_resizes_embeddings():
    model = tiny_model()
    old = model.get_input_embeddings().weight.detach().clone()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    assert model.decoder.weight is model.crammed_bert.embeddings.word_embeddings.weight
    assert model.config.vocab_size == VOCABULARY + 6
    assert torch.equal(model.decoder.weight[:VOCABULARY], old)
    labels = torch.full((BATCH, LENGTH), VOCABULARY + 3)
    assert model(tokens(), labels=labels).logits.shape[-1] == VOCABULARY + 6

    replacement = torch.nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    model.set_input_embeddings(replacement)
    assert model.crammed_bert.get_input_embeddings() is replacement
    untied = tiny_model(tie_word_embeddings=False)
    assert untied.decoder.weight is not untied.get_input_embeddings().weight


# Classification


def test_sequence_classification_head():
    model = tiny_model(CrammedBertForSequenceClassification)
    states, _ = reference_encode(model.crammed_bert, tokens(), padding_mask())
    weights = model.state_dict()
    hidden = torch.tanh(states[:, 0] @ weights["dense.weight"].T + weights["dense.bias"])
    expected = hidden @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert weights["dense.weight"].shape == (20, WIDTH)
    logits = model(tokens(), attention_mask=padding_mask()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


SEQUENCE_PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression, several": (2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 3.0]])),
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])),
}


def reference_sequence_loss(problem, logits, labels):
    if problem == "single_label_classification":
        return -torch.log_softmax(logits, -1)[torch.arange(BATCH), labels].mean()
    labels = labels.double().reshape(logits.shape)
    if problem.startswith("regression"):
        return (logits - labels).square().mean()
    probabilities = torch.sigmoid(logits)
    return -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log()).mean()


@pytest.mark.parametrize("problem", SEQUENCE_PROBLEMS)
def test_sequence_classification_losses(problem):
    num_labels, labels = SEQUENCE_PROBLEMS[problem]
    problem_type = problem.split(",")[0]
    given = problem_type if problem == "regression, several" else None  # the one type that is not inferred
    model = tiny_model(CrammedBertForSequenceClassification, num_labels=num_labels, problem_type=given)
    outputs = model(tokens(), labels=labels)
    expected = reference_sequence_loss(problem, outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=0)
    assert model.config.problem_type == problem_type
    split = [slice(0, 1), slice(1, BATCH)]
    parts = [model(tokens()[s], labels=labels[s], num_items_in_batch=labels.numel()).loss for s in split]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=0)


def test_token_classification():
    model = tiny_model(CrammedBertForTokenClassification)
    states, _ = reference_encode(model.crammed_bert, tokens())
    labels = tokens(seed=5) % 3
    labels[0, :4] = -100
    outputs = model(tokens(), labels=labels)
    expected = states @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-11, atol=1e-11)
    picked = torch.log_softmax(expected, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kept = labels != -100
    torch.testing.assert_close(outputs.loss, -picked[kept].mean(), rtol=1e-11, atol=0)
    summed = model(tokens(), labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, -picked[kept].sum() / 7, rtol=1e-11, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_heads_return_tuples_on_request(head):
    model = tiny_model(head)
    outputs, as_tuple = model(tokens()), model(tokens(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.logits)
    model.config.return_dict = False
    assert torch.equal(model(tokens())[0], outputs.logits)


def test_each_dropout_rate_acts_in_training_only():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    head = CrammedBertForSequenceClassification
    expected = tiny_model(head, **off)(tokens()).logits
    for name in off:
        model = tiny_model(head, **(off | {name: 0.5}))
        assert torch.equal(model(tokens()).logits, expected), name
        assert not torch.allclose(model.train()(tokens()).logits, expected, rtol=1e-3), name
    assert torch.equal(tiny_model(head, **off).train()(tokens()).logits, expected)
    assert tiny_model(head, classifier_dropout=None, hidden_dropout_prob=0.3).dropout.p == 0.3
    assert tiny_model(head, classifier_dropout=0.2, hidden_dropout_prob=0.3).dropout.p == 0.2


# The position table, which is in no checkpoint


def test_sinusoidal_table():
    torch.testing.assert_close(sinusoidal_table(12, WIDTH), reference_positions(12, WIDTH), rtol=1e-13, atol=1e-13)


def assert_table_is_exact(model, dtype):
    base = getattr(model, "crammed_bert", model)
    assert base.embeddings.position_table.dtype == dtype
    assert torch.equal(base.embeddings.position_table, sinusoidal_table(12, WIDTH).to(dtype))


@contextlib.contextmanager
def filled_uninitialized_memory():
    """Loading allocates with `empty_like`, whose memory may happen to hold the right values: fill it with 777."""
    empty_like = torch.empty_like

    def filled(tensor, **options):
        return empty_like(tensor, **options).fill_(777)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", filled)
        yield


def reallocated(model):
    """The model with weights where torch would put them: alignment in a mapped file changes the order of BLAS sums."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loader", ALL_MODELS)
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_save_and_load_is_bit_exact(tmp_path, dtype, loader, device_map):
    model = tiny_model(loader, dtype=dtype)
    model.save_pretrained(tmp_path)
    with filled_uninitialized_memory():
        loaded, info = loader.from_pretrained(tmp_path, device_map=device_map, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("position_table" in name for name in model.state_dict())
    assert_table_is_exact(loaded, dtype)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    inputs = {"input_ids": tokens(), "attention_mask": padding_mask()}
    assert torch.equal(reallocated(loaded)(**inputs)[0], model(**inputs)[0])


def test_checkpoint_serves_other_heads(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = reallocated(CrammedBertModel.from_pretrained(tmp_path))
    classifier = reallocated(CrammedBertForSequenceClassification.from_pretrained(tmp_path))
    expected = model.crammed_bert(tokens()).last_hidden_state
    assert torch.equal(base(tokens()).last_hidden_state, expected)
    assert torch.equal(classifier.crammed_bert(tokens()).last_hidden_state, expected)
    assert classifier.dense.weight.std().item() == pytest.approx(0.02, rel=0.3)
    base.save_pretrained(tmp_path / "base")
    again = reallocated(CrammedBertForMaskedLM.from_pretrained(tmp_path / "base"))
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_scale_missing_from_a_checkpoint_is_initialized(tmp_path):
    model = tiny_model()
    name = "crammed_bert.embeddings.position_scale"
    state = {key: value for key, value in model.state_dict().items() if key not in (name, "decoder.weight")}
    model.save_pretrained(tmp_path, state_dict=state)
    with filled_uninitialized_memory():
        loaded, info = CrammedBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name}
    assert loaded.crammed_bert.embeddings.position_scale.item() == pytest.approx(WIDTH**-0.5, rel=1e-6)


def test_table_survives_casts_meta_and_to_empty():
    model = tiny_model(CrammedBertModel, dtype=torch.float32)
    assert_table_is_exact(model.to(torch.bfloat16), torch.bfloat16)
    assert_table_is_exact(model.to(torch.float32), torch.float32)
    assert_table_is_exact(model.double(), torch.float64)
    with torch.device("meta"):
        hollow = CrammedBertModel(tiny_config())
    assert hollow.embeddings.position_table.is_meta
    materialized = hollow.to_empty(device="cpu")
    assert_table_is_exact(materialized, torch.float32)
    state = tiny_model(CrammedBertModel, dtype=torch.float32).state_dict()
    materialized.load_state_dict(state)
    expected = tiny_model(CrammedBertModel, dtype=torch.float32)(tokens()).last_hidden_state
    assert torch.equal(materialized.eval()(tokens()).last_hidden_state, expected)


def test_more_positions_can_be_asked_for_on_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    longer = reallocated(CrammedBertForMaskedLM.from_pretrained(tmp_path, max_position_embeddings=30))
    assert torch.equal(longer(tokens()).logits, model(tokens()).logits)
    assert longer(tokens(length=30)).logits.shape == (BATCH, 30, VOCABULARY)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_apart(copier):
    model = tiny_model()
    expected = model(tokens()).logits
    other = copier(model)
    assert torch.equal(other(tokens()).logits, expected)
    assert other.decoder.weight is other.get_input_embeddings().weight
    with torch.no_grad():
        other.crammed_bert.layers[0].attention.query.weight.zero_()
    assert torch.equal(model(tokens()).logits, expected)


# Training and compilation


# Deprecated in 5.23, but the only name that 5.17 knows.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    ids, positions, labels = masked_batch()
    inputs = {"input_ids": ids, "attention_mask": padding_mask(), "labels": labels, "masked_positions": positions}
    model = tiny_model().train()  # dropout stays on: recomputation must draw the same numbers
    torch.manual_seed(3)
    loss, gradients = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.crammed_bert.layers[1].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    loss_again, gradients_again = loss_and_gradients(model, **inputs)
    assert len(calls) == 2  # forward and recomputation
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())


@pytest.mark.slow
@pytest.mark.parametrize(("masked", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_compiles_the_encoder_in_one_graph(masked, backend):
    model = tiny_model(CrammedBertModel, dtype=torch.float32, num_hidden_layers=1)
    inputs = {"input_ids": tokens(), "attention_mask": padding_mask() if masked else None}
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(**inputs).last_hidden_state
        torch.testing.assert_close(compiled, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["eval", "masked positions", "labels only"])
def test_compiles_masked_lm_in_one_graph(path):
    ids, positions, labels = masked_batch()
    model = tiny_model(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.train(path != "eval")
    inputs = {"input_ids": ids, "labels": labels}
    if path == "masked positions":
        inputs["masked_positions"] = positions
    expected_loss, expected = loss_and_gradients(model, **inputs)
    # Whether one graph holds everything is decided before the backend; that of the encoder's test is the slow one.
    outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(outputs.loss.detach(), expected_loss, rtol=1e-10, atol=0)
    count = positions.shape[1] if path == "masked positions" else LENGTH
    assert outputs.logits.shape == (BATCH, count, VOCABULARY)
    model.zero_grad()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12, msg=name)


def test_exports():
    model = tiny_model(num_hidden_layers=1)
    exported = torch.export.export(model, (tokens(),), {"attention_mask": padding_mask()})
    got = exported.module()(tokens(seed=9), attention_mask=padding_mask()).logits
    torch.testing.assert_close(
        got, model(tokens(seed=9), attention_mask=padding_mask()).logits, rtol=1e-12, atol=1e-12
    )


def test_exports_with_any_length():
    model = tiny_model(CrammedBertModel, num_hidden_layers=1)
    length = torch.export.Dim("length", min=2, max=12)
    exported = torch.export.export(model, (tokens(),), dynamic_shapes={"input_ids": {1: length}}).module()
    for n in (3, 12):
        ids = tokens(length=n)
        expected = model(ids).last_hidden_state
        torch.testing.assert_close(exported(ids).last_hidden_state, expected, rtol=1e-12, atol=1e-12)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18}, "hidden_size=18 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size=15 is odd"),
        ({"intermediate_size": 25}, "intermediate_size=25 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be positive"),
        ({"initializer_range": 0.0}, "initializer_range=0.0 must be positive"),
        ({"position_scale": -1.0}, "position_scale=-1.0 must be positive"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 is not a dropout rate"),
        ({"classifier_dropout": -0.1}, "classifier_dropout=-0.1 is not a dropout rate"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo' is unknown: give one of .*gelu"),
        ({"pad_token_id": VOCABULARY}, f"pad_token_id={VOCABULARY} is outside the vocabulary"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**changes)


def test_config_refuses_a_wrong_type():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        tiny_config(hidden_size="16")


def test_model_refuses_a_config_changed_afterwards():
    config = tiny_config()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        CrammedBertModel(config)


def test_refuses_too_many_tokens():
    message = r"13 tokens and the model 12 positions \(max_position_embeddings\): truncate to 12"
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens(length=13))


def test_refuses_no_input_and_two():
    model = tiny_model(CrammedBertModel)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds; neither"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds; both"):
        model(tokens(), inputs_embeds=torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("model_class", [CrammedBertForMaskedLM, CrammedBertForTokenClassification])
def test_refuses_labels_of_another_shape(model_class):
    with pytest.raises(ValueError, match=r"labels have shape \(3, 9\) and must have \(3, 10\)"):
        tiny_model(model_class)(tokens(), labels=torch.zeros(BATCH, 9, dtype=torch.long))


def test_refuses_masked_positions_of_another_shape():
    with pytest.raises(ValueError, match=r"masked_positions have shape \(2,\) and must have \(batch, k\)"):
        tiny_model()(tokens(), masked_positions=torch.tensor([1, 2]))


def test_refuses_targets_that_would_broadcast():
    model = tiny_model(CrammedBertForSequenceClassification, num_labels=2, problem_type="regression")
    with pytest.raises(ValueError, match=r"labels have shape \(3,\) and logits \(3, 2\): regression takes one number"):
        model(tokens(), labels=torch.zeros(BATCH))


def test_config_round_trip(tmp_path):
    config = tiny_config(sparse_prediction=False, classifier_dropout=0.3, hidden_act="silu")
    config.save_pretrained(tmp_path)
    assert CrammedBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.model_type == "crammed_bert"


def test_module_can_travel_as_remote_code():
    """Its imports are torch, transformers, huggingface_hub, the standard library, and flat siblings."""
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(pathlib.Path(crammed_bert.__file__).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            sibling = node.level == 1 and node.module is not None and "." not in node.module
            assert sibling or (node.level == 0 and node.module.split(".")[0] in allowed)


def test_without_the_residual_connection_attention_replaces_its_input(tmp_path):
    settings = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CrammedBertConfig(**settings, intermediate_size=32, attention_residual=False)
    torch.manual_seed(0)
    model = CrammedBertModel(config).double().eval()
    torch.manual_seed(0)
    usual = CrammedBertModel(CrammedBertConfig(**settings, intermediate_size=32)).double().eval()
    seen = {}
    for layer in usual.layers if hasattr(usual, "layers") else usual.encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
        layer.attention_output.register_forward_hook(lambda module, args, output, layer=layer: output - seen[layer])
    ids = torch.arange(6)[None]
    with torch.no_grad():
        found = model(ids).last_hidden_state
        torch.testing.assert_close(found, usual(ids).last_hidden_state, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    assert CrammedBertModel.from_pretrained(tmp_path).config.attention_residual is False
