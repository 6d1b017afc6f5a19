"""torch.compile, torch.export, autocast, gradient checkpointing and copies."""

import contextlib
import copy
import pickle

import pytest
import torch
from models import (
    ARCHITECTURES,
    add_correction,
    assert_bit_equal,
    each_architecture,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
    svd_by_numpy,
)
from torch._dynamo.testing import CompileCounter

from hf_specattn import SpectralConfig, condition, fold, refresh
from hf_specattn.layers import spectral_layers

pytestmark = pytest.mark.integration

BERT = ARCHITECTURES["bert"]
CONFIGS = {"identity": SpectralConfig(lambda_=1.0), "svd": SpectralConfig("svd")}


def conditioned(tiny, method, auto_name="AutoModel", dtype=torch.float32):
    model = tiny.model(auto_name, dtype)
    condition(model, CONFIGS[method])
    return model


def first_output(model, batch):
    return next(value for value in model(**batch).values() if isinstance(value, torch.Tensor))


def gradients(model, batch):
    model.zero_grad()
    output = first_output(model, batch)
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (output.float() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- torch.compile and torch.export


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_compiled_equals_eager(method, autocast):
    model = conditioned(BERT, method, "AutoModelForMaskedLM")
    batch = BERT.batch(dtype=torch.float32)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with context:
        expected, outputs = gradients(model, batch), gradients(compiled, batch)
        expected_output, output = (first_output(m, batch).detach() for m in (model, compiled))
    tolerance = 0.05 if autocast else 1e-4
    assert relative_difference({"output": output}, {"output": expected_output}) < tolerance
    outputs = {name.removeprefix("_orig_mod."): value for name, value in outputs.items()}
    assert relative_difference_of_all(outputs, expected) < tolerance


def relative_difference_of_all(values, expected):
    """Relative to the greatest value of all: some gradients are zero but for rounding."""
    assert values.keys() == expected.keys()
    greatest = max(value.abs().max() for value in expected.values())
    return max((values[name] - value).abs().max() / greatest for name, value in expected.items())


# Tracing takes a second or two: one architecture in the quick run, the others in the slow one.
each_architecture_but_slow = pytest.mark.parametrize(
    "tiny",
    [pytest.param(tiny, marks=[] if tiny is BERT else pytest.mark.slow) for tiny in ARCHITECTURES.values()],
    ids=str,
)


@each_architecture_but_slow
@each_method
def test_traces_without_a_graph_break(tiny, method):
    # What `fullgraph=True` demands, without the time that generating code takes.
    model = conditioned(tiny, method)
    batch = tiny.batch(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_difference(outputs_of(compiled, batch), outputs_of(model, batch)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_difference(outputs_of(compiled, batch), outputs_of(model, batch)) < 0.05


@each_architecture_but_slow
@each_method
def test_export_of_the_folded_model(tiny, method):
    model = conditioned(tiny, method)
    batch = tiny.batch(dtype=torch.float32)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    expected = outputs_of(model, batch)
    exported = torch.export.export(fold(model), (), kwargs=batch)
    assert relative_difference(outputs_of(exported.module(), batch), expected) < 1e-5


@each_method
def test_export_of_the_conditioned_model(method):
    model = conditioned(BERT, method)
    batch = BERT.batch(dtype=torch.float32)
    exported = torch.export.export(model, (), kwargs=batch)
    assert relative_difference(outputs_of(exported.module(), batch), outputs_of(model, batch)) < 1e-5


# --- gradients and precision


@each_architecture
@each_method
def test_gradient_checkpointing_gives_equal_gradients(tiny, method):
    model = conditioned(tiny, method, dtype=torch.float64).train()
    batch = tiny.batch()

    def seeded_gradients():
        torch.manual_seed(11)  # dropout
        return gradients(model, batch)

    expected = seeded_gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert relative_difference_of_all(seeded_gradients(), expected) < 1e-12
    # and they are those of the stock model at W + C
    stock = add_correction(
        tiny, tiny.model(), {"identity": identity_by_numpy(1.0), "svd": svd_by_numpy}[method]
    ).train()
    torch.manual_seed(11)
    stock_gradients = gradients(stock, batch)
    assert relative_difference_of_all(expected, stock_gradients) < 1e-10


@each_architecture
@pytest.mark.parametrize("how", ["stored", "autocast"])
def test_bf16_keeps_the_diagonal_of_w(tiny, how):
    # W + 10 I rounded to bf16 would move each diagonal entry by up to 1/32: no single output shows it beside its own
    # rounding, but the linear map that many outputs have in common does.
    model = tiny.model(dtype=torch.float32)
    condition(model, SpectralConfig(lambda_=10.0))
    for _, layer in spectral_layers(model):
        inputs = torch.randn(4096, layer.matrix().shape[1]).bfloat16()
        if how == "stored":
            output = layer.bfloat16()(inputs)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                output = layer(inputs.float())
        assert output.dtype == torch.bfloat16
        output = output.detach().double() - (0 if layer.bias is None else layer.bias.detach().double())
        measured = torch.linalg.lstsq(inputs.double(), output).solution.T
        rounded = layer.matrix().detach().bfloat16().double()
        parts = layer.layout.split(measured - rounded).values()
        for error in (part.diagonal() - 10 for part in parts):
            # 1/16 / sqrt(12) / sqrt(4096) from rounding the outputs; up to 1/32 from rounding the weights
            assert error.abs().max() < 0.004


@each_architecture
@each_method
def test_bf16_forward_and_backward(tiny, method):
    model = conditioned(tiny, method).bfloat16()
    batch = tiny.batch(dtype=torch.bfloat16)
    expected = outputs_of(conditioned(tiny, method), tiny.batch(dtype=torch.float32))
    for name, output in outputs_of(model, batch).items():
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected[name]).abs().mean() < 0.1 * expected[name].abs().mean()
    for gradient in gradients(model, batch).values():
        assert gradient.dtype == torch.bfloat16
        assert torch.isfinite(gradient).all()


# --- copies of dynamic models


def dynamic_model():
    model = BERT.model(dtype=torch.float32)
    condition(model, SpectralConfig("svd", refresh_every=1))
    return model


@pytest.mark.parametrize("exact", [True, False])
def test_refreshing_breaks_no_graph_and_compiles_nothing_anew(exact):
    model = dynamic_model()
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = BERT.batch(dtype=torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        output = compiled(**batch).last_hidden_state
        # The refreshed corrections are what the compiled graph reads.
        torch.testing.assert_close(output, model(**batch).last_hidden_state)
        output.square().mean().backward()
        optimizer.step()
        refresh(model, exact=exact)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_too_are_watched(duplicate):
    model = duplicate(dynamic_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(**BERT.batch(dtype=torch.float32)).last_hidden_state.square().mean().backward()
            optimizer.step()

    for _ in range(2):  # from the beginning, and once more after a refresh
        train(1)
        with pytest.raises(RuntimeError, match=r"refresh_every=1.*2 optimizer steps"):
            train(1)
        refresh(model)


def test_copies_are_watched_apart():
    # 30 steps of a copy, with its corrections refreshed, are no steps of the model that it was copied from.
    model = dynamic_model()
    duplicate = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (model, duplicate)]
    for each in (model, duplicate):
        each(**BERT.batch(dtype=torch.float32)).last_hidden_state.square().mean().backward()
    for _ in range(30):
        optimizers[1].step()
        refresh(duplicate)
    optimizers[0].step()
    with pytest.raises(RuntimeError, match=r"refresh_every=1.*2 optimizer steps"):
        optimizers[0].step()


@each_architecture
@each_method
def test_state_dict_into_another_conditioned_model(tiny, method):
    # From a model with other weights, also by `assign`, which is how models built on the meta device are filled.
    model = conditioned(tiny, method, dtype=torch.float64)
    batch = tiny.batch()
    for assign in (False, True):
        other = conditioned(tiny, method, dtype=torch.float64)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        for layer in (layer for _, layer in spectral_layers(other) if method == "svd"):
            layer.correction.zero_()
        other.load_state_dict(model.state_dict(), assign=assign)
        assert_bit_equal(outputs_of(other, batch), outputs_of(model, batch))
