"""The Nystromformer of LRA against NumPy in float64, and what its options promise."""

import numpy as np
import pytest
import torch
from lra_support import registered  # noqa: F401
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.diagnostics.monitor import SpectralMonitor
from hf_specattn.layers import spectral_layers
from recipes.lra.nystromformer import (
    LraNystromformerConfig,
    LraNystromformerForSequenceClassification,
    LraSelfAttention,
    iterative_inverse,
)

OFF = {"padding_in_landmarks": False, "batch_wide_inverse": False, "mean_over_padding": False}
SMALL = {"hidden_size": 12, "num_attention_heads": 3, "num_landmarks": 4, "conv_kernel_size": 5}


def small_config(**options):
    return LraNystromformerConfig(**{**SMALL, "max_position_embeddings": 24, **options})


def small_model(**options):
    torch.manual_seed(0)
    return LraNystromformerForSequenceClassification(small_config(**options)).double().eval()


def softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def published_attention(attention, hidden, mask, config):
    """The published Nystrom attention from its formulas, one example and head after the other."""
    weights = {name: value.numpy() for name, value in attention.state_dict().items()}
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    m, kernel = config.num_landmarks, config.conv_kernel_size
    parts = {}
    for index in np.ndindex(len(hidden), heads):
        example, head = index
        rows = slice(head * width, (head + 1) * width)
        real = mask[example][:, None]
        q, k, v = (
            (hidden[example] @ weights[f"{name}.weight"][rows].T + weights[f"{name}.bias"][rows]) * real
            for name in ("query", "key", "value")
        )
        q, k = q / width**0.25, k / width**0.25
        few_q, few_k = (x.reshape(m, -1, width).mean(1) for x in (q, k))
        hidden_keys = np.where(mask[example] > 0, 0.0, -np.inf)
        parts[index] = (softmax(q @ few_k.T), softmax(few_q @ few_k.T), softmax(few_q @ k.T + hidden_keys) @ v, v)
    greatest = max(part[1].sum(0).max() for part in parts.values())
    output = np.zeros((len(hidden), hidden.shape[1], heads * width))
    for (example, head), (first, second, third, v) in parts.items():
        inverse = second.T / greatest
        for _ in range(config.inverse_iterations):
            product = second @ inverse
            eye = np.eye(m)
            inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
        convolved = np.zeros_like(v)
        for position in range(len(v)):
            for tap in range(kernel):
                if 0 <= (source := position + tap - kernel // 2) < len(v):
                    convolved[position] += weights["conv.weight"][head, 0, tap, 0] * v[source]
        output[example, :, head * width : (head + 1) * width] = first @ inverse @ third + convolved
    return output @ weights["output.weight"].T + weights["output.bias"]


def test_nystrom_attention_is_the_published_one():
    torch.manual_seed(0)
    config = small_config()
    attention = LraSelfAttention(config).double()
    with torch.no_grad():  # scores far from 0, so that the softmaxes are no means
        attention.query.weight.mul_(6)
        attention.key.weight.mul_(6)
    hidden = torch.randn(3, 24, 12, dtype=torch.float64)
    mask = torch.ones(3, 24, dtype=torch.float64)
    mask[1, 15:] = 0
    mask[2, ::3] = 0
    with torch.no_grad():
        found, weights = attention(hidden, None, mask)
    expected = published_attention(attention, hidden.numpy(), mask.numpy(), config)
    assert weights is None
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_without_the_peculiarities_it_is_nystrom_attention_on_the_tokens_alone():
    """The pseudo-inverse is NumPy's, the padding is cut out, and an example of fewer tokens than landmarks is exact."""
    torch.manual_seed(0)
    config = small_config(inverse_iterations=30, **OFF)
    attention = LraSelfAttention(config).double()
    hidden, lengths = torch.randn(3, 24, 12, dtype=torch.float64), (24, 10, 3)
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).double()
    with torch.no_grad():
        found = attention(hidden, None, mask)[0].numpy()
        attention.conv.weight.zero_()
        without_convolution = attention(hidden, None, mask)[0].numpy()
    assert np.abs(found - without_convolution).max() > 0.01
    weights = {name: value.numpy() for name, value in attention.state_dict().items()}
    for example, length in enumerate(lengths):
        q, k, v = (
            (hidden[example, :length].numpy() @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
            .reshape(length, 3, 4)
            .transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        count = min(4, length)
        owner = np.arange(length) * count // length
        few_q, few_k = (
            np.stack([x[:, owner == part].mean(1) for part in range(count)], axis=1) for x in (q / 2**0.5, k / 2**0.5)
        )
        q, k = q / 2**0.5, k / 2**0.5
        first, second, third = (softmax(a @ b.transpose(0, 2, 1)) for a, b in ((q, few_k), (few_q, few_k), (few_q, k)))
        expected = first @ np.linalg.pinv(second) @ (third @ v)
        if length < 4:
            np.testing.assert_allclose(expected, softmax(q @ k.transpose(0, 2, 1)) @ v, atol=1e-9)
        expected = expected.transpose(1, 0, 2).reshape(length, 12) @ weights["output.weight"].T
        difference = without_convolution[example, :length] - expected - weights["output.bias"]
        np.testing.assert_allclose(difference, 0, atol=1e-8)


@pytest.mark.parametrize("batch_wide", [True, False])
def test_the_pseudo_inverse_is_that_of_numpy(batch_wide):
    generator = torch.Generator().manual_seed(0)
    matrices = (2 * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)).softmax(-1)
    matrices[0, 0, 5:], matrices[0, 0, :, 5:] = 0, 0  # landmarks that do not count
    matrices[0, 1, 3] = matrices[0, 1, 2]  # singular
    found = iterative_inverse(matrices, 16, batch_wide)
    expected = np.linalg.pinv(matrices.numpy(), rcond=1e-10)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_the_batch_wide_start_makes_an_example_depend_on_its_batch():
    matrices = (4 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))).softmax(-1)
    for batch_wide in (True, False):
        alone = torch.cat([iterative_inverse(each[None], 2, batch_wide) for each in matrices])
        same = torch.allclose(alone, iterative_inverse(matrices, 2, batch_wide), rtol=1e-4)
        assert same != batch_wide


def tokens(lengths, padded, seed=0):
    ids = torch.randint(1, 32, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    ids = torch.nn.functional.pad(ids, (0, padded - max(lengths)))
    return ids * (torch.arange(padded) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("attention_type", ["nystrom", "softmax"])
def test_without_the_peculiarities_neither_batch_nor_padding_matters(attention_type):
    model = small_model(attention_type=attention_type, **OFF)
    ids = tokens((7, 24, 2, 13), 24)
    together = model(ids).logits
    for row, length in enumerate((7, 24, 2, 13)):
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-12)
        longer = model(ids[row : row + 1, : min(24, length + 5)]).logits[0]
        torch.testing.assert_close(longer, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OFF)
def test_each_peculiarity_alone_makes_them_matter(name):
    model = small_model(inverse_iterations=1, **OFF | {name: True})
    ids = tokens((9, 8), 24)
    together = model(ids).logits
    alone = torch.cat([model(row[None, :12]).logits for row in ids])
    assert (together - alone).abs().max() > 1e-6


def test_zero_is_padding_unless_a_mask_or_the_configuration_says_otherwise():
    ids = tokens((24, 24), 24)
    ids[0, 5] = 0
    as_padding = small_model()(ids).logits
    mask = torch.ones_like(ids)
    all_count = small_model(pad_token_id=None)(ids).logits
    assert (as_padding[0] - all_count[0]).abs().max() > 1e-6
    torch.testing.assert_close(small_model()(ids, attention_mask=mask).logits, all_count)
    torch.testing.assert_close(small_model()(ids, attention_mask=(ids != 0).long()).logits, as_padding)


def test_a_sequence_of_as_many_tokens_as_landmarks_is_attended_to_exactly():
    exact, ids = small_model(num_landmarks=24), tokens((24, 24), 24)
    softmax_model = small_model(attention_type="softmax")
    softmax_model.load_state_dict({k: v for k, v in exact.state_dict().items() if "conv" not in k})
    for layer in exact.encoder.layers:
        torch.nn.init.zeros_(layer.attention.conv.weight)
    torch.testing.assert_close(exact(ids).logits, softmax_model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "labels", "count"),
    [
        ({}, 10, 209_942),
        ({"vocab_size": 512, "max_position_embeddings": 4096}, 2, 370_702),
        ({"vocab_size": 512, "max_position_embeddings": 4096, "pairs": True}, 2, 395_278),
        ({"vocab_size": 512, "max_position_embeddings": 1024}, 10, 175_126),
        ({"vocab_size": 512, "max_position_embeddings": 1024}, 2, 174_094),
        ({"attention_type": "softmax"}, 10, 209_942 - 2 * 2 * 35),
    ],
)
def test_parameter_counts_are_the_published_ones(options, labels, count):
    config = LraNystromformerConfig(num_labels=labels, **options)
    assert LraNystromformerForSequenceClassification(config).num_parameters() == count


def test_pairs_are_read_by_one_encoder():
    model = small_model(pairs=True, **OFF)
    pairs = torch.stack([tokens((24, 9), 24), tokens((11, 24), 24, seed=1)], dim=1)
    one, two = (
        model.encoder(ids).last_hidden_state.sum(1) / (ids > 0).sum(1, keepdim=True) for ids in pairs.unbind(1)
    )
    expected = model.classifier(torch.cat([one, two, one * two, one - two], dim=-1))
    torch.testing.assert_close(model(pairs).logits, expected)
    with pytest.raises(ValueError, match=r"shape \(2, 24\); with pairs=True give \(batch, 2, n\)"):
        model(pairs[:, 0])


def test_embeddings_start_small_and_everything_else_as_torch_does():
    torch.manual_seed(0)
    model = LraNystromformerForSequenceClassification(LraNystromformerConfig())
    assert model.encoder.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.encoder.position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    weight, bias = (getattr(model.encoder.layers[0].attention.query, name) for name in ("weight", "bias"))
    for tensor in (weight, bias):  # uniform in 1 / sqrt(64) both ways
        assert 0.11 < tensor.abs().max().item() <= 0.125
    assert (model.encoder.final_norm.weight == 1).all()
    assert model.get_input_embeddings() is model.encoder.word_embeddings


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({}, 23, "23 tokens, which 4 landmarks do not divide"),
        ({}, 28, "28 tokens and the model 24 positions"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options, length, message):
    with pytest.raises(ValueError, match=message):
        small_model(**options)(torch.ones(1, length, dtype=torch.long))


@pytest.mark.parametrize(
    "options",
    [{"conv_kernel_size": 4}, {"num_landmarks": 0}, {"num_attention_heads": 5}, {"hidden_dropout_prob": 1.0}],
)
def test_impossible_configurations_are_refused(options):
    (name,) = options
    with pytest.raises(Exception, match=name):
        small_config(**options)


def test_half_precision_keeps_the_attention_in_float32():
    ids = tokens((24, 9), 24)
    model = small_model()
    expected = model(ids).logits
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids).logits
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    assert model.bfloat16()(ids).logits.dtype == torch.bfloat16


@pytest.mark.integration
@pytest.mark.usefixtures("registered")
def test_the_flag_conditions_a_saved_model_as_by_hand(tmp_path):
    model, ids = small_model().float(), tokens((24, 9), 24)
    model.save_pretrained(tmp_path / "stock")
    conditioned = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "stock", spectral_conditioning=True, lambda_=0.5
    )
    conditioned.save_pretrained(tmp_path / "conditioned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "conditioned").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight", "value.weight")):
            parameter.data += 0.5 * torch.eye(12)
    for each in (conditioned.eval(), again):
        torch.testing.assert_close(each(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    encoder = AutoModel.from_pretrained(tmp_path / "conditioned").eval()
    expected = model.encoder(ids).last_hidden_state
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_both_corrections_and_the_preconditioner_find_every_attention():
    ids = tokens((24, 9), 24)
    for pairs in (False, True):
        model = small_model(pairs=pairs)
        condition(model, SpectralConfig(method="svd"))
        assert len(list(spectral_layers(model))) == 6
    model = small_model()
    before = model(ids).logits
    assert len(precondition(model, PreconditionerConfig(axis="row"))) == 2
    seen = []
    output = model.encoder.layers[0].attention.output
    output.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    assert (model(ids).logits - before).abs().max() > 1e-6
    (attended, result) = seen[0]
    heads = attended.unflatten(-1, (3, 4))
    by_hand = (heads / heads.norm(dim=-1, keepdim=True)).flatten(-2) @ output.weight.T + output.bias
    torch.testing.assert_close(result, by_hand, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("attention_type", ["nystrom", "softmax"])
def test_the_monitor_reads_its_attention(attention_type):
    model, ids = small_model(attention_type=attention_type), tokens((24, 9), 24)
    before = model(ids).logits
    values = SpectralMonitor(1, batch={"input_ids": ids, "attention_mask": (ids > 0).long()}).first_values(model)
    weight = model.encoder.layers[0].attention.query.weight, model.encoder.layers[1].attention.query.weight
    kappa = np.mean([np.linalg.cond(head.detach().numpy()) for each in weight for head in each.chunk(3)])
    assert values["spectral/kappa_query"] == pytest.approx(kappa, rel=1e-6)
    assert np.isfinite(list(values.values())).all()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
