"""The output projection as a target: W_O + C against C put together by NumPy, whose heads are columns."""

import copy

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, assert_bit_equal, outputs_of, relative_difference
from torch import nn

from hf_specattn import (
    AttentionSpec,
    PreconditionerConfig,
    SpectralConfig,
    condition,
    fold,
    precondition,
    refresh,
)
from hf_specattn.layers import OutputLayout, SpectralLinear, make_spectral, spectral_layers
from hf_specattn.projections import find_projections

# Where W_O is, by the end of its name.
OUTPUTS = {
    "bert": "attention.output.dense.weight",
    "roberta": "attention.output.dense.weight",
    "vit": ("attention.o_proj.weight", "attention.output.dense.weight"),
    "crammed_bert": "attention_output.weight",
    "gpt2": "attn.c_proj.weight",
    "llama": "self_attn.o_proj.weight",
}
LAMBDA = 2.5


def correction_of(matrix, method, blocks):
    """C of an `(out, in)` matrix: of the whole, or of each of so many runs of columns."""
    parts = []
    for block in np.split(matrix, blocks, axis=1):
        if method == "identity":
            parts.append(LAMBDA * np.eye(*block.shape))
        else:
            left, values, right = np.linalg.svd(block, full_matrices=False)
            parts.append(values[0] * left @ right)
    return np.concatenate(parts, axis=1)


def with_corrected_outputs(stock, row, name, method, granularity):
    expected = copy.deepcopy(stock)
    transposed = name == "gpt2"
    count = 0
    with torch.no_grad():
        for parameter_name, parameter in expected.named_parameters():
            if parameter_name.endswith(OUTPUTS[name]):
                matrix = parameter.numpy().T if transposed else parameter.numpy()
                blocks = row.heads_of("query") if granularity == "head" else 1
                correction = correction_of(matrix, method, blocks)
                parameter += torch.from_numpy(correction.T if transposed else correction)
                count += 1
    assert count == row.layers
    return expected


def spectral(method, granularity="projection", targets=("output",), **settings):
    lambda_ = LAMBDA if method == "identity" else None
    return SpectralConfig(method, lambda_, targets=targets, granularity=granularity, **settings)


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("method", ["identity", "svd"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_architecture(name, method, granularity):
    row = ARCHITECTURES[name]
    stock = row.model()
    expected = outputs_of(with_corrected_outputs(stock, row, name, method, granularity), row.batch())
    model = copy.deepcopy(stock)
    reports = condition(model, spectral(method, granularity))
    assert {report.projection for report in reports} == {"output"}
    assert len(reports) == row.layers
    assert relative_difference(outputs_of(model, row.batch()), expected) < 1e-11
    assert fold(model) is model
    assert relative_difference(outputs_of(model, row.batch()), expected) < 1e-11
    assert not list(spectral_layers(model))


def test_output_beside_the_others_and_the_report():
    stock = ARCHITECTURES["llama"].model()
    model = copy.deepcopy(stock)
    reports = condition(model, spectral("svd", targets=("output", "value")))
    assert [report.projection for report in reports[:2]] == ["value", "output"]
    weight = stock.layers[0].self_attn.o_proj.weight.detach()
    output = reports[1]
    assert (output.shape, output.name) == (tuple(weight.shape), "layers.0.self_attn.o_proj")
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert output.kappa_before == pytest.approx(values[0] / values[-1])
    assert output.kappa_after == pytest.approx(2 * values[0] / (values[0] + values[-1]))
    blocks = np.split(weight.numpy(), ARCHITECTURES["llama"].heads_of("query"), axis=1)
    assert output.before.head_sigma_max == pytest.approx([np.linalg.norm(block, 2) for block in blocks])
    assert model.config.spectral_targets == ["value", "output"] or model.config.spectral_targets == ("value", "output")


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("method", ["identity", "svd"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (4, 24)], ids=["tall", "wide", "fewer rows than a head has"])
def test_gradients_are_those_of_the_dense_sum(shape, method, granularity):
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0]).double()
    layer = make_spectral(
        copy.deepcopy(dense), OutputLayout.of(shape[0], 4, shape[1] // 4), spectral(method, granularity)
    )
    correction = torch.from_numpy(
        correction_of(dense.weight.detach().numpy(), method, 4 if granularity == "head" else 1)
    )
    if method == "svd":
        layer.correction.copy_(correction)
    inputs = torch.randn(5, shape[1], dtype=torch.float64)
    found, expected = [], []
    for module, results in ((layer, found), (dense, expected)):
        x = inputs.clone().requires_grad_()
        weight = module.weight if module is layer else module.weight + correction
        output = module(x) if module is layer else nn.functional.linear(x, weight, module.bias)
        gradients = torch.autograd.grad(output.sin().sum(), [x, module.weight, module.bias])
        results += [output, *gradients]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_half_precision_keeps_the_diagonal_of_w(dtype, granularity, compiled):
    """Rounding W + lambda I would lose most of W's diagonal; here the error stays that of the output's own rounding."""
    torch.manual_seed(0)
    heads, rows, columns = 4, 24, 32
    stock = nn.Linear(columns, rows).to(dtype)
    inputs = torch.randn(64, columns).to(dtype)
    layer = make_spectral(
        copy.deepcopy(stock), OutputLayout.of(rows, heads, columns // heads), spectral("identity", granularity)
    )
    weight = stock.weight.detach().double().numpy()
    exact = weight + correction_of(weight, "identity", heads if granularity == "head" else 1)
    expected = inputs.double() @ torch.from_numpy(exact).T + stock.bias.detach().double()
    module = torch.compile(layer, backend="aot_eager") if compiled else layer
    with torch.no_grad():
        found = module(inputs).double()
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1.5 * torch.finfo(dtype).eps * scale
    with_gradient = layer(inputs.clone().requires_grad_())
    torch.testing.assert_close(with_gradient.detach().double(), found, rtol=0, atol=torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("method", ["identity", "svd"])
@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_it_loads_as_it_was_saved(tmp_path, method, granularity):
    row = ARCHITECTURES["bert"]
    model = row.model(dtype=torch.float32)
    condition(model, spectral(method, granularity, targets=("value", "output")))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert_bit_equal(
        outputs_of(loaded.eval(), row.batch(dtype=torch.float32)),
        outputs_of(model.eval(), row.batch(dtype=torch.float32)),
    )
    assert loaded.config.spectral_config.targets == ("value", "output")
    with pytest.raises(ValueError, match="targets"):
        type(model).from_pretrained(tmp_path, spectral_targets=["value"])


def test_a_stock_checkpoint_by_the_flag(tmp_path):
    row = ARCHITECTURES["gpt2"]
    stock = row.model(dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(
        tmp_path, spectral_conditioning=True, spectral_method="svd", spectral_targets=["value", "output"]
    )
    expected = copy.deepcopy(stock)
    condition(expected, spectral("svd", targets=("value", "output")))
    assert_bit_equal(loaded.state_dict(), expected.state_dict())


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("exact", [True, False])
def test_refresh_follows_w_o(granularity, exact):
    model = ARCHITECTURES["bert"].model()
    condition(model, spectral("svd", granularity, targets=("query", "output"), refresh_every=1))
    with torch.no_grad():
        for _, layer in spectral_layers(model):
            layer.weight += 0.1 * torch.randn_like(layer.weight)
    refresh(model, exact=exact)
    outputs = [layer for _, layer in spectral_layers(model) if isinstance(layer.layout, OutputLayout)]
    assert len(outputs) == ARCHITECTURES["bert"].layers
    for layer in outputs:
        blocks = ARCHITECTURES["bert"].heads_of("query") if granularity == "head" else 1
        expected = torch.from_numpy(correction_of(layer.weight.detach().numpy(), "svd", blocks))
        tolerance = 1e-10 if exact else 1e-4
        torch.testing.assert_close(layer.correction, expected, rtol=tolerance, atol=tolerance)


def test_preserve_keeps_the_function():
    row = ARCHITECTURES["vit"]
    stock = row.model()
    model = copy.deepcopy(stock)
    condition(model, spectral("identity", "head", targets=("query", "key", "value", "output")), init="preserve")
    assert relative_difference(outputs_of(model, row.batch()), outputs_of(stock, row.batch())) < 1e-12


def test_what_is_not_a_target_stays_stock():
    model = ARCHITECTURES["bert"].model()
    condition(model, SpectralConfig(lambda_=1.0))
    assert type(model.encoder.layer[0].attention.output.dense) is nn.Linear
    assert all(set(item.layout.projections) <= {"query", "key", "value"} for item in find_projections(model))
    with pytest.raises(ValueError, match=r"\('query', 'key', 'value', 'output'\)"):
        SpectralConfig(targets=("out",))


def test_a_correction_and_a_preconditioner_exclude_each_other():
    row = ARCHITECTURES["bert"]
    model = row.model()
    condition(model, spectral("svd"))
    with pytest.raises(ValueError, match="has a spectral correction, and an output projection has either that or"):
        precondition(model, PreconditionerConfig())
    model = row.model()
    precondition(model, PreconditionerConfig())
    with pytest.raises(ValueError, match="has either a correction or a preconditioner"):
        condition(model, spectral("svd"))
    from transformers import BertConfig

    with pytest.raises(ValueError, match="has either a correction or a preconditioner; leave 'output' out"):
        BertConfig(spectral_conditioning=True, spectral_targets=["output"], attention_preconditioner="row")


def test_an_output_projection_that_is_not_known():
    model = ARCHITECTURES["bert"].model()
    spec = AttentionSpec("BertSelfAttention", {"query": "query", "key": "key", "value": "value"})
    with pytest.raises(ValueError, match=r"output projection of encoder.layer.0.* is not known; leave 'output' out"):
        condition(model, spectral("svd"), architecture=spec)
    assert not list(spectral_layers(model))
    # A part of the model, in which the path leads nowhere.
    with pytest.raises(ValueError, match="is not known"):
        condition(model.encoder.layer[0].attention.self, spectral("svd"))


def test_a_conditioned_output_cannot_be_replaced():
    model = ARCHITECTURES["llama"].model()
    condition(model, spectral("svd"))
    assert type(model.layers[0].self_attn.o_proj) is SpectralLinear
    with pytest.raises(ValueError, match="conditioned projection o_proj would compute with W instead of W \\+ C"):
        model.layers[0].self_attn.o_proj = nn.Linear(32, 32)
