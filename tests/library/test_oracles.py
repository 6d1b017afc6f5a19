"""The method's own oracles, in float64: no reference code is needed to know what a conditioned model must do.

Each compares a conditioned model with a stock one whose weights an independent NumPy computation set to W + C.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_specattn import SpectralConfig, condition, fold

CONFIGS = {
    "identity": SpectralConfig(),
    "identity, one lambda each": SpectralConfig(lambda_={"query": 0.5, "key": 1.0, "value": 3.0}),
    "identity per head": SpectralConfig(lambda_=2.0, granularity="head"),
    "svd": SpectralConfig("svd"),
    "svd per head, query and value": SpectralConfig("svd", targets=("query", "value"), granularity="head"),
}
HEADS, WIDTH = 4, 32


def bert(dropout=0.1):
    config = BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        num_labels=3,
    )
    return BertForSequenceClassification(config).double()


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=HEADS, initializer_range=0.2)
    ).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (4, 9), generator=generator),
        "labels": torch.randint(0, 3, (4,), generator=generator),
    }


def numpy_correction(weight, projection, config):
    """C of one `(out, in)` projection, by NumPy."""
    blocks = np.split(weight, HEADS) if config.granularity == "head" else [weight]
    corrections = []
    for block in blocks:
        if projection not in config.targets:
            corrections.append(np.zeros_like(block))
        elif config.method == "identity":
            corrections.append(config.lambda_for(projection) * np.eye(*block.shape))
        else:
            left, sigma, right = np.linalg.svd(block, full_matrices=False)
            corrections.append(sigma[0] * left @ right)
    return torch.from_numpy(np.concatenate(corrections))


def independent_corrections(model, config):
    """Parameter name -> C in the parameter's own orientation; GPT-2's fused tensor gets one for each of Q, K, V."""
    corrections = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        for projection in ("query", "key", "value"):
            if name.endswith(f"self.{projection}.weight"):
                corrections[name] = numpy_correction(weight, projection, config)
        if name.endswith("c_attn.weight"):
            thirds = zip(("query", "key", "value"), np.split(weight.T, 3))
            corrections[name] = torch.cat([numpy_correction(part, p, config) for p, part in thirds]).T
    assert corrections
    return corrections


def with_w_plus_c(model, config):
    """A stock copy that starts at W + C."""
    twin = copy.deepcopy(model)
    corrections = independent_corrections(model, config)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in corrections:
                parameter.add_(corrections[name])
    return twin


def losses(model, optimizer, steps, after_step=lambda: None, clip=None):
    """Training losses with dropout, the same seeds for whoever calls."""
    model.train()
    values = []
    for step in range(steps):
        torch.manual_seed(1000 + step)
        loss = model(**batch(step)).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        values.append(loss.item())
    return np.array(values)


# name -> (optimizer, gradient clipping)
OPTIMIZERS = {
    "SGD, clipped": (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), 0.5),
    "AdamW without decay": (lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0), None),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reparameterization(name, optimizer):
    """Training W in W + C is, step for step, training a stock model that starts at W + C."""
    conditioned = bert()
    stock = with_w_plus_c(conditioned, CONFIGS[name])
    start = {key: value.clone() for key, value in stock.state_dict().items()}
    condition(conditioned, CONFIGS[name])
    build, clip = OPTIMIZERS[optimizer]
    ours = losses(conditioned, build(conditioned.parameters()), 20, clip=clip)
    theirs = losses(stock, build(stock.parameters()), 20, clip=clip)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert abs(theirs[-1] - theirs[0]) > 1e-3  # the models did train
    fold(conditioned)
    for key, value in stock.state_dict().items():
        if key.endswith("key.bias"):
            continue  # no loss depends on it (softmax ignores a shift), so Adam follows the sign of rounding errors
        torch.testing.assert_close(conditioned.state_dict()[key], value, rtol=0, atol=1e-10)
    moved = max((stock.state_dict()[key] - value).abs().max().item() for key, value in start.items())
    assert moved > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_acts_on_w_so_the_stock_twin_decays_toward_c(name):
    config, lr, decay = CONFIGS[name], 3e-3, 0.5
    conditioned = bert()
    corrections = independent_corrections(conditioned, config)
    stock = with_w_plus_c(conditioned, config)
    condition(conditioned, config)
    named = dict(stock.named_parameters())

    @torch.no_grad()
    def pull_toward_c():
        for key, correction in corrections.items():
            named[key].add_(lr * decay * correction)

    ours = losses(conditioned, torch.optim.AdamW(conditioned.parameters(), lr=lr, weight_decay=decay), 20)
    plain = copy.deepcopy(stock)
    theirs = losses(
        stock, torch.optim.AdamW(stock.parameters(), lr=lr, weight_decay=decay), 20, after_step=pull_toward_c
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    # Without the pull it is another model: the equality above is no accident.
    other = losses(plain, torch.optim.AdamW(plain.parameters(), lr=lr, weight_decay=decay), 20)
    assert np.abs(ours - other).max() > 1e-6


@pytest.mark.parametrize("build", [bert, gpt2], ids=["bert", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folding(name, build):
    """A conditioned model equals the stock model with W + C; folded, it is one."""
    model = build().eval()
    twin = with_w_plus_c(model, CONFIGS[name])
    classes = {key: type(module) for key, module in model.named_modules()}
    condition(model, CONFIGS[name])
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        expected = twin(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-11)
        fold(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-11)
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert set(model.state_dict()) == set(twin.state_dict())


@pytest.mark.parametrize("build", [bert, gpt2], ids=["bert", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_preserve_keeps_the_function_and_the_effective_condition_number(name, build):
    model = build().eval()
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs).logits
        stock_weights = {key: value.clone() for key, value in model.named_parameters()}
        reports = condition(model, CONFIGS[name], init="preserve")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-11)
        for report in reports:
            assert report.kappa_after == pytest.approx(report.kappa_before, rel=1e-6)
        changed = [key for key, value in model.named_parameters() if not torch.equal(value, stock_weights[key])]
        assert changed
        fold(model)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, stock_weights[key], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("svd")])
def test_svd_brings_every_conditioned_block_to_kappa_two_at_most(name):
    config = CONFIGS[name]
    for report in condition(bert(), config):
        blocks = report.after.head_kappa if config.granularity == "head" else (report.kappa_after,)
        assert max(blocks) <= 2 * (1 + 1e-9)


def test_scale_invariance_of_the_reports():
    model, scaled = bert(), None
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for key, value in scaled.named_parameters():
            if key.endswith(("query.weight", "key.weight", "value.weight")):
                value.mul_(7.0)
    pairs = zip(condition(model, SpectralConfig(lambda_=0.5)), condition(scaled, SpectralConfig(lambda_=3.5)))
    for report, other in pairs:
        assert other.kappa_after == pytest.approx(report.kappa_after, rel=1e-10)
        assert other.kappa_before == pytest.approx(report.kappa_before, rel=1e-10)
        assert other.sigma_max == pytest.approx(7 * report.sigma_max, rel=1e-10)


def test_one_eye_over_the_fused_tensor_would_condition_the_query_alone():
    """What a naive `weight + lambda * eye(*weight.shape)` on GPT-2's c_attn computes is not what we compute."""
    model = gpt2().eval()
    naive, right = copy.deepcopy(model), with_w_plus_c(model, CONFIGS["identity"])
    with torch.no_grad():
        for key, value in naive.named_parameters():
            if key.endswith("c_attn.weight"):
                value.add_(10.0 * torch.eye(*value.shape))
    condition(model, CONFIGS["identity"])
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        ours = model(**inputs).logits
        torch.testing.assert_close(ours, right(**inputs).logits, rtol=0, atol=1e-11)
        assert (ours - naive(**inputs).logits).abs().max() > 1e-3
