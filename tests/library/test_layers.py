"""The conditioned layers: layouts, effective weights, gradients, precision, representation."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_specattn import SpectralConfig
from hf_specattn.layers import (
    ProjectionLayout,
    SpectralConv1D,
    SpectralLinear,
    add_scaled_input,
    correction_matrix,
    make_spectral,
    make_stock,
)
from hf_specattn.refreshing import recompute

QKV = ("query", "key", "value")
# name -> (layout, in_features, rows of (query, key, value) in the weight by head, written out by hand)
LAYOUTS = {
    "separate": (ProjectionLayout(("query",), (3,), (4,)), 12, {"query": [range(0, 4), range(4, 8), range(8, 12)]}),
    "separate wide": (ProjectionLayout(("key",), (2,), (3,)), 10, {"key": [range(0, 3), range(3, 6)]}),
    "separate tall": (ProjectionLayout(("value",), (3,), (4,)), 7, {"value": [range(i, i + 4) for i in (0, 4, 8)]}),
    "blocked": (
        ProjectionLayout(QKV, (2, 2, 2), (3, 3, 3)),
        6,
        {
            "query": [range(0, 3), range(3, 6)],
            "key": [range(6, 9), range(9, 12)],
            "value": [range(12, 15), range(15, 18)],
        },
    ),
    "blocked, grouped K/V heads": (
        ProjectionLayout(QKV, (4, 2, 2), (2, 2, 2)),
        8,
        {
            "query": [range(0, 2), range(2, 4), range(4, 6), range(6, 8)],
            "key": [range(8, 10), range(10, 12)],
            "value": [range(12, 14), range(14, 16)],
        },
    ),
    "interleaved per head": (
        ProjectionLayout(QKV, (2, 2, 2), (3, 3, 3), groups=2),
        6,
        {
            "query": [range(0, 3), range(9, 12)],
            "key": [range(3, 6), range(12, 15)],
            "value": [range(6, 9), range(15, 18)],
        },
    ),
    "interleaved, grouped K/V heads": (
        ProjectionLayout(QKV, (4, 2, 2), (2, 2, 2), groups=2),
        8,
        {
            "query": [range(0, 2), range(2, 4), range(8, 10), range(10, 12)],
            "key": [range(4, 6), range(12, 14)],
            "value": [range(6, 8), range(14, 16)],
        },
    ),
    "unequal head sizes": (
        ProjectionLayout(QKV, (2, 2, 2), (3, 3, 5)),
        8,
        {
            "query": [range(0, 3), range(3, 6)],
            "key": [range(6, 9), range(9, 12)],
            "value": [range(12, 17), range(17, 22)],
        },
    ),
}
CONFIGS = {
    "identity": SpectralConfig(lambda_=1.5),
    "svd": SpectralConfig("svd"),
    "identity per head": SpectralConfig(lambda_=1.5, granularity="head"),
    "svd per head": SpectralConfig("svd", granularity="head"),
}


def config_for(name, layout):
    """The config with one lambda per projection and only the targets that the layout holds."""
    config = CONFIGS[name]
    lambda_ = None if config.method == "svd" else {p: 1.5 + i for i, p in enumerate(layout.projections)}
    return SpectralConfig(config.method, lambda_, layout.projections, config.granularity)


def independent_correction(weight, head_rows, config):
    """C by NumPy, row by row from the hand-written table."""
    expected = np.zeros_like(weight)
    for projection, heads in head_rows.items():
        if projection not in config.targets:
            continue
        blocks = [list(rows) for rows in heads]
        if config.granularity == "projection":
            blocks = [[row for rows in blocks for row in rows]]
        for rows in blocks:
            block = weight[rows]
            if config.method == "identity":
                expected[rows] = config.lambda_for(projection) * np.eye(*block.shape)
            else:
                left, sigma, right = np.linalg.svd(block, full_matrices=False)
                expected[rows] = sigma[0] * left @ right
    return expected


def spectral_layer(layout, in_features, config, kind=nn.Linear, bias=True, dtype=torch.float64):
    if kind is Conv1D:
        layer = Conv1D(layout.out_features, in_features).to(dtype)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(in_features, layout.out_features, bias=bias, dtype=dtype)
    nn.init.normal_(layer.weight)
    make_spectral(layer, layout, config)
    if config.method == "svd":
        recompute(layer)
    return layer


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_layout_split_and_join(layout_name):
    layout, in_features, head_rows = LAYOUTS[layout_name]
    weight = torch.randn(layout.out_features, in_features)
    parts = layout.split(weight)
    for projection, heads in head_rows.items():
        rows = [row for head in heads for row in head]
        assert torch.equal(parts[projection], weight[rows])
        assert torch.equal(
            layout.head_blocks(projection, parts[projection]), torch.stack([weight[list(head)] for head in heads])
        )
    assert torch.equal(layout.join(parts), weight)


def test_layout_kinds():
    kinds = {name: layout.kind for name, (layout, _, _) in LAYOUTS.items()}
    assert kinds["separate wide"] == "separate"
    assert kinds["blocked, grouped K/V heads"] == "qkv_blocked"
    assert kinds["interleaved per head"] == "qkv_interleaved"


@pytest.mark.parametrize("config_name", CONFIGS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_correction_matrix_conditions_each_projection_by_itself(layout_name, config_name):
    layout, in_features, head_rows = LAYOUTS[layout_name]
    config = config_for(config_name, layout)
    weight = torch.randn(layout.out_features, in_features, dtype=torch.float64)
    expected = independent_correction(weight.numpy(), head_rows, config)
    np.testing.assert_allclose(correction_matrix(weight, layout, config).numpy(), expected, rtol=0, atol=1e-12)


def test_one_eye_over_a_fused_tensor_is_not_the_correction():
    """The mistake that no shape check finds: `eye(3D, D)` touches the query (blocked), or a third of the heads."""
    for name in ("blocked", "interleaved per head"):
        layout, in_features, _ = LAYOUTS[name]
        config = SpectralConfig(lambda_=1.0)
        weight = torch.randn(layout.out_features, in_features, dtype=torch.float64)
        one_eye = torch.eye(layout.out_features, in_features, dtype=torch.float64)
        correction = correction_matrix(weight, layout, config)
        assert not torch.equal(correction, one_eye)
        assert correction.sum().item() == 3 * one_eye.sum().item()
        touched = {p: bool(part.any()) for p, part in layout.split(correction).items()}
        assert touched == dict.fromkeys(QKV, True)
        wrongly_touched = {p: int(part.sum()) for p, part in layout.split(one_eye).items()}
        assert wrongly_touched != dict.fromkeys(QKV, in_features)


def test_targets_leave_the_other_rows_alone():
    layout, in_features, _ = LAYOUTS["interleaved, grouped K/V heads"]
    config = SpectralConfig(lambda_=2.0, targets=("key",))
    parts = layout.split(correction_matrix(torch.randn(layout.out_features, in_features), layout, config))
    assert not parts["query"].any()
    assert not parts["value"].any()
    assert torch.equal(parts["key"], 2.0 * torch.eye(4, in_features))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("config_name", CONFIGS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_forward_and_gradients_equal_a_stock_layer_with_w_plus_c(layout_name, config_name, kind):
    layout, in_features, head_rows = LAYOUTS[layout_name]
    config = config_for(config_name, layout)
    layer = spectral_layer(layout, in_features, config, kind)
    oriented = layer.weight.detach().numpy() if kind is nn.Linear else layer.weight.detach().numpy().T
    effective = torch.from_numpy(oriented + independent_correction(oriented, head_rows, config)).requires_grad_()
    inputs = torch.randn(2, 5, in_features, dtype=torch.float64, requires_grad=True)
    same_inputs = inputs.detach().clone().requires_grad_()
    output, expected = layer(inputs), F.linear(same_inputs, effective, layer.bias.detach())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)

    direction = torch.randn_like(expected)
    output.backward(direction)
    expected.backward(direction)
    gradient = layer.weight.grad if kind is nn.Linear else layer.weight.grad.T
    torch.testing.assert_close(gradient, effective.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs.grad, same_inputs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SpectralConfig(), SpectralConfig("svd")], ids=["identity", "svd"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_only_the_stock_parameters_train_and_no_activation_is_added(kind, config):
    layout = ProjectionLayout(("query",), (4,), (8,))
    layer = spectral_layer(layout, 32, config, kind, dtype=torch.float32)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in layer.named_buffers()} == ({"correction"} if config.method == "svd" else set())
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    inputs = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs)
    # For the backward pass stand: the input (as in the stock layer) and one tensor of the weight's size.
    activations = [t for t in saved if t.numel() not in (layer.weight.numel(), layer.bias.numel())]
    assert {t.data_ptr() for t in activations} == {inputs.data_ptr()}


@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_half_precision_path_equals_w_plus_c(layout_name, granularity):
    """The slices of X, in float64 where nothing rounds."""
    layout, in_features, _ = LAYOUTS[layout_name]
    config = SpectralConfig(lambda_=3.0, targets=layout.projections, granularity=granularity)
    weight = torch.randn(layout.out_features, in_features, dtype=torch.float64)
    inputs = torch.randn(2, 5, in_features, dtype=torch.float64)
    expected = inputs @ (weight + correction_matrix(weight, layout, config)).T
    output = add_scaled_input(inputs @ weight.T, inputs, layout, config)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_diagonal_of_w(kind, stored):
    """Near 10 bf16 has a spacing of 1/16: rounding W + 10 I would leave 10 itself on most of the diagonal."""
    width = 256
    layout = ProjectionLayout(("query",), (4,), (width // 4,))
    layer = spectral_layer(layout, width, SpectralConfig(), kind, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.mul_(0.02)
        layer.bias.zero_()
    layer = layer.to(stored)
    inputs = torch.eye(width, dtype=stored)
    exact = layer.orient(layer.weight.detach()).double().T + 10 * torch.eye(width, dtype=torch.float64)
    output = layer(inputs)
    assert output.dtype == stored
    # Correctly rounded, once: within half a spacing of the dtype at each entry.
    assert torch.equal(output, exact.to(stored))

    probe = torch.randn(512, width).to(stored)
    through_layer = (layer(probe).double() - probe.double() @ exact).abs().mean()
    through_sum = (probe @ exact.to(stored)).double() - probe.double() @ exact
    assert through_layer <= through_sum.abs().mean()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_autocast_adds_the_scaled_input_in_float32(kind):
    width = 128
    layout = ProjectionLayout(("query",), (4,), (width // 4,))
    layer = spectral_layer(layout, width, SpectralConfig(), kind, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.mul_(0.02)
        layer.bias.zero_()
    inputs = torch.randn(300, width)
    exact = inputs.double() @ layer.orient(layer.effective_weight()).double().T + layer.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
        weight = layer.effective_weight()
        rounded_sum = F.linear(inputs, weight if kind is nn.Linear else weight.T, layer.bias)
    assert output.dtype == torch.bfloat16
    error = (output.double() - exact).abs()
    # One rounding of the output (at most 2^-8 relative), and that of the small X W^T beneath it.
    assert (error <= exact.abs() * 2**-8 + 0.01).all()
    assert error.mean() < 0.7 * (rounded_sum.double() - exact).abs().mean()


def test_autocast_leaves_float64_alone():
    layout = ProjectionLayout(("query",), (2,), (4,))
    layer = spectral_layer(layout, 8, SpectralConfig())
    inputs = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(inputs)
    assert torch.equal(inside, layer(inputs))


def test_svd_in_half_precision_sums_in_float32_and_casts_once():
    layout = ProjectionLayout(("query",), (4,), (16,))
    layer = spectral_layer(layout, 64, SpectralConfig("svd"), dtype=torch.float32).to(torch.bfloat16)
    expected = (layer.weight.float() + layer.correction.float()).bfloat16()
    assert torch.equal(layer.effective_weight(), expected)
    inputs = torch.randn(5, 64).bfloat16()
    assert torch.equal(layer(inputs), F.linear(inputs, expected, layer.bias))


@pytest.mark.parametrize(
    ("kind", "spectral_class"), [(nn.Linear, SpectralLinear), (Conv1D, SpectralConv1D)], ids=["Linear", "Conv1D"]
)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_make_stock_is_the_mirror_image(kind, spectral_class, config_name):
    layout, in_features, _ = LAYOUTS["interleaved per head"]
    layer = spectral_layer(layout, in_features, CONFIGS[config_name], kind, dtype=torch.float32)
    keys = set(layer.state_dict())
    assert type(layer) is spectral_class
    inputs = torch.randn(4, in_features)
    before = layer(inputs)
    make_stock(layer)
    assert type(layer) is kind
    assert set(layer.state_dict()) == {"weight", "bias"} == keys - {"correction"}
    assert not {"spectral", "layout", "correction"} & set(vars(layer))
    assert torch.equal(layer(inputs), before)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_representation_shows_what_was_applied(kind):
    layout, in_features, _ = LAYOUTS["blocked"]
    layer = spectral_layer(layout, in_features, SpectralConfig(lambda_=2, targets=("key", "value")), kind)
    assert "spectral=identity(lambda_=2.0) on key+value, layout=qkv_blocked" in repr(layer)
    assert "spectral" not in repr(make_stock(layer))


@pytest.mark.parametrize("config_name", CONFIGS)
def test_copies_and_pickles_compute_the_same(config_name):
    layout, in_features, _ = LAYOUTS["blocked"]
    layer = spectral_layer(layout, in_features, CONFIGS[config_name])
    inputs = torch.randn(3, in_features, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(inputs), layer(inputs))


# --- eager mode keeps X and W alone ----------------------------------------------------------------------------------


EAGER = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def as_written(layer, inputs, precise=torch.float64):
    """`X (W + C)^T + b` in float64 from the layer's stored weight."""
    weight = layer.orient(layer.weight).to(precise)
    correction = layer.orient(layer.current_correction()).to(precise)
    bias = None if layer.bias is None else layer.bias.to(precise)
    return F.linear(inputs.to(precise), weight + correction, bias)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("mode", EAGER)
@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("method", ["identity", "svd"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_outputs_and_gradients_of_every_eager_path(layout_name, method, granularity, mode, kind):
    layout, in_features, _ = LAYOUTS[layout_name]
    lambda_ = None if method == "svd" else {p: 1.5 + i for i, p in enumerate(layout.projections)}
    config = SpectralConfig(method, lambda_, layout.projections, granularity)
    dtype, autocast = EAGER[mode]
    module = Conv1D if kind == "conv1d" else nn.Linear
    layer = spectral_layer(layout, in_features, config, module, kind != "linear without bias", dtype=torch.float32).to(
        dtype
    )
    inputs = torch.randn(3, 4, in_features, dtype=dtype, requires_grad=True)
    direction = torch.randn(3, 4, layout.out_features, dtype=autocast or dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        output = layer(inputs)
        with torch.no_grad():
            assert torch.equal(layer(inputs), output)
    assert output.dtype == (autocast or dtype)
    output.backward(direction)
    found = [output, inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(grad.dtype == of.dtype for grad, of in zip(found[1:], [inputs, *layer.parameters()]))

    parameters = list(layer.parameters())
    expected_output = as_written(layer, inputs)
    expected = [
        expected_output,
        *torch.autograd.grad(expected_output, [inputs, *parameters], direction.double()),
    ]
    eps = torch.finfo(autocast or dtype).eps
    for name, value, right in zip(("output", "X", "W", "b"), found, expected):
        scale = right.detach().abs().max().item()
        error = (value.double() - right.double()).abs().max().item()
        assert error <= (8 * eps * scale if eps > 1e-5 else 200 * eps * scale), name


@pytest.mark.parametrize("shape", [(5,), (0, 6), (2, 0, 6), (1, 1, 1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_that_a_linear_takes(shape, dtype):
    layout = ProjectionLayout(("query",), (2,), (4,))
    width = shape[-1]
    layer = spectral_layer(layout, width, SpectralConfig(), dtype=dtype)
    inputs = torch.randn(shape, dtype=dtype, requires_grad=True)
    output = layer(inputs)
    assert output.shape == (*shape[:-1], 8)
    output.sum().backward()
    assert inputs.grad.shape == shape
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("method", ["identity", "svd"])
def test_second_derivatives(method, kind):
    layout, in_features, _ = LAYOUTS["blocked"]
    layer = spectral_layer(layout, in_features, SpectralConfig(method), kind)
    inputs = torch.randn(2, in_features, dtype=torch.float64, requires_grad=True)

    def call(inputs, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (inputs,))

    arguments = (inputs, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(call, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_second_derivatives_in_half_precision():
    layout = ProjectionLayout(("query",), (2,), (4,))
    layer = spectral_layer(layout, 8, SpectralConfig(lambda_=1.0), dtype=torch.float32)
    inputs = torch.randn(5, 8, requires_grad=True)

    def penalty(forward):
        (gradient,) = torch.autograd.grad(forward(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [inputs, layer.weight])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalty(lambda inputs: layer(inputs).float())
    expected = penalty(lambda inputs: as_written(layer, inputs, torch.float32))
    for value, right in zip(found, expected):
        assert (value - right).abs().max() <= 0.05 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_func_and_forward_mode(dtype):
    layout, in_features, _ = LAYOUTS["blocked"]
    layer = spectral_layer(layout, in_features, SpectralConfig(), dtype=torch.float32).to(dtype)
    inputs, tangent = torch.randn(4, in_features, dtype=dtype), torch.randn(4, in_features, dtype=dtype)
    expected = as_written(layer, tangent) - layer.bias.double()
    _, pushed = torch.func.jvp(layer, (inputs,), (tangent,))
    bound = 8 * torch.finfo(dtype).eps * expected.detach().abs().max()
    assert (pushed.double() - expected).abs().max() <= bound
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(inputs, tangent))
        pushed = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert (pushed.double() - expected).abs().max() <= bound
    mapped = torch.func.vmap(layer)(inputs)
    assert (mapped.double() - as_written(layer, inputs)).abs().max() <= 2 * bound
    _, pull = torch.func.vjp(layer, inputs)
    (pulled,) = pull(torch.ones(4, layout.out_features, dtype=dtype))
    effective = (layer.orient(layer.weight) + layer.orient(layer.current_correction())).double()
    right = torch.ones(4, layout.out_features, dtype=torch.float64) @ effective
    assert (pulled.double() - right).abs().max() <= 16 * torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("config_name", ["identity", "svd"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_output_may_be_changed_in_place(dtype, kind, config_name):
    layer = spectral_layer(ProjectionLayout(("query",), (2,), (4,)), 6, CONFIGS[config_name], kind, dtype=dtype)
    inputs = torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)
    wanted = (inputs, layer.weight, layer.bias)
    expected = layer(inputs) * 2
    expected = torch.cat([expected[:1] + 1, expected[1:]])
    gradients = torch.autograd.grad(expected.pow(2).sum(), wanted)
    output = layer(inputs)
    output *= 2
    output[0] += 1
    assert torch.equal(output, expected)
    for found, gradient in zip(torch.autograd.grad(output.pow(2).sum(), wanted), gradients):
        assert torch.equal(found, gradient)


@pytest.mark.parametrize("frozen", ["weight", "inputs", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_no_gradient_gets_none(dtype, frozen):
    layer = spectral_layer(ProjectionLayout(("query",), (2,), (4,)), 8, SpectralConfig(), dtype=dtype)
    inputs = torch.randn(3, 8, dtype=dtype, requires_grad=frozen != "inputs")
    if frozen != "inputs":
        getattr(layer, frozen).requires_grad_(False)
    layer(inputs).sum().backward()
    tensors = {"inputs": inputs, "weight": layer.weight, "bias": layer.bias}
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_nothing_but_input_and_weight_is_kept(kind, mode):
    layout = ProjectionLayout(QKV, (2, 2, 2), (8, 8, 8))
    dtype, autocast = EAGER[mode]
    layer = spectral_layer(layout, 16, SpectralConfig(), kind, dtype=dtype)
    inputs = torch.randn(64, 16, dtype=dtype, requires_grad=True)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        layer(inputs)
    weights = [tensor for tensor in saved if tensor.numel() == layer.weight.numel()]
    assert {tensor.data_ptr() for tensor in weights} == {layer.weight.data_ptr()}
    others = [tensor for tensor in saved if tensor.numel() != layer.weight.numel()]
    assert {tuple(tensor.shape) for tensor in others} == {tuple(inputs.shape)}
    assert len({tensor.data_ptr() for tensor in others}) == 1


def test_a_backward_pass_within_autocast():
    layer = spectral_layer(ProjectionLayout(("query",), (2,), (4,)), 8, SpectralConfig(), dtype=torch.float32)
    inputs = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
        output.sum().backward()
    within = [tensor.grad.clone() for tensor in (inputs, layer.weight, layer.bias)]
    for tensor in (inputs, layer.weight, layer.bias):
        tensor.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
    output.sum().backward()
    assert all(torch.equal(old, new.grad) for old, new in zip(within, (inputs, layer.weight, layer.bias)))


@pytest.mark.parametrize("config", [SpectralConfig(), SpectralConfig("svd")], ids=["identity", "svd"])
def test_the_meta_device(config):
    layer = spectral_layer(ProjectionLayout(("query",), (2,), (4,)), 8, config, dtype=torch.float32).to("meta")
    layer(torch.randn(3, 8, device="meta")).sum().backward()
    assert layer.weight.grad.shape == (8, 8)
