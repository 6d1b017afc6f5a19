"""Preconditioned attention against what follows from its definition, in float64, over the table of architectures."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    ARCHITECTURES,
    HEADS,
    LENGTH,
    ToyAttention,
    assert_bit_equal,
    each_architecture,
    outputs_of,
    relative_difference,
    toy_spec,
)
from more_models import CONDITION_ONLY, FLAGGED
from torch import nn

from hf_specattn import (
    AttentionSpec,
    PreconditionerConfig,
    SpectralConfig,
    condition,
    fold,
    format_preconditioning,
    precondition,
)
from hf_specattn.preconditioner import precondition_heads, preconditioned_layers
from hf_specattn.preconditioning import find_output_projections, head_condition

BERT, GPT2, VIT = (ARCHITECTURES[name] for name in ("bert", "gpt2", "vit"))
ROW, THROUGH = PreconditionerConfig(), PreconditionerConfig(gradient="through")
SUPPORTED_ROWS = [row for row in CONDITION_ONLY if not re.search("xcit|cait|davit", row.name)]
MIXED_ROWS = [row for row in CONDITION_ONLY if re.search("xcit|cait|davit", row.name)]

each_gradient = pytest.mark.parametrize("config", [ROW, THROUGH], ids=["detached", "through"])


def heads_output(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_by_name(tiny, model):
    """The output projections, found by the names in the tests' table."""
    named = dict(model.named_modules())
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters() if re.search(tiny.outputs, name)]
    return [named[name] for name in names]


def normalize_inputs(modules, heads, scale=1.0):
    """Make stock modules see their input with each head's rows of norm `scale`: an independent preconditioner."""

    def rows_of_norm_one(module, args):
        (x,) = args
        parts = [part / part.square().sum(-1, keepdim=True).sqrt() for part in x.chunk(heads, dim=-1)]
        return (scale * torch.cat(parts, dim=-1),)

    return [module.register_forward_pre_hook(rows_of_norm_one) for module in modules]


# --- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "norm"), [("unit", 1.0), ("rms", math.sqrt(8)), ("match", 0.3)])
def test_rows_of_each_head_have_the_norm_that_the_scale_says(scale, norm):
    x = heads_output(2, 5, HEADS * 8)
    result = precondition_heads(x, HEADS, PreconditionerConfig(scale=scale), stock_norm=0.3)
    assert result.shape == x.shape
    by_head = result.reshape(2, 5, HEADS, 8)
    assert torch.allclose(by_head.norm(dim=-1), torch.full((2, 5, HEADS), norm, dtype=torch.float64), rtol=1e-13)
    assert torch.allclose(
        F.cosine_similarity(by_head, x.reshape(by_head.shape), dim=-1).min(), torch.ones(()).double()
    )


@pytest.mark.parametrize(("scale", "norm"), [("unit", 1.0), ("rms", math.sqrt(5)), ("match", 0.3)])
def test_columns_of_each_head_have_the_norm_that_the_scale_says(scale, norm):
    x = heads_output(2, 5, HEADS * 8)
    result = precondition_heads(x, HEADS, PreconditionerConfig("column", scale=scale), stock_norm=0.3)
    assert torch.allclose(result.norm(dim=1), torch.full((2, HEADS * 8), norm, dtype=torch.float64), rtol=1e-13)
    # each sample for itself
    assert torch.equal(
        result[:1], precondition_heads(x[:1], HEADS, PreconditionerConfig("column", scale=scale), stock_norm=0.3)
    )


def test_rows_are_rms_norm_per_head_over_the_root_of_its_length():
    x = heads_output(2, 5, HEADS * 8)
    result = precondition_heads(x, HEADS, ROW)
    by_head = F.rms_norm(x.unflatten(-1, (HEADS, 8)), (8,), eps=1e-300).flatten(-2) / math.sqrt(8)
    assert torch.allclose(result, by_head, rtol=1e-13, atol=0)
    over_all_heads = F.rms_norm(x, (HEADS * 8,), eps=1e-300) / math.sqrt(8)
    assert (result - over_all_heads).abs().max() > 0.1


def test_a_positive_factor_per_row_of_the_attention_weights_cancels():
    weights, values = heads_output(HEADS, 5, 6).softmax(-1), heads_output(HEADS, 6, 8, seed=1)
    factors = heads_output(HEADS, 5, 1, seed=2).exp()

    def attended(of_weights):
        return (of_weights @ values).transpose(0, 1).flatten(1)

    result = precondition_heads(attended(weights), HEADS, ROW)
    assert torch.allclose(precondition_heads(attended(factors * weights), HEADS, ROW), result, rtol=1e-12)
    assert not torch.allclose(precondition_heads(attended(-weights), HEADS, ROW), result)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("scale", ["unit", "rms", "match"])
def test_the_gradient_through_the_norm_is_that_of_finite_differences(axis, scale):
    config = PreconditionerConfig(axis, "through", scale)
    x = heads_output(2, 3, 2 * 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: precondition_heads(x, 2, config, 0.7), x)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_detached_gradient_takes_the_norm_for_a_constant(axis):
    config = PreconditionerConfig(axis)
    x, upstream = heads_output(2, 3, 2 * 4).requires_grad_(), heads_output(2, 3, 2 * 4, seed=1)
    precondition_heads(x, 2, config).backward(upstream)
    norms = x.detach().reshape(2, 3, 2, 4).norm(dim=-1 if axis == "row" else 1, keepdim=True)
    assert torch.allclose(x.grad, (upstream.reshape(2, 3, 2, 4) / norms).flatten(-2), rtol=1e-12)
    assert not torch.autograd.gradcheck(lambda x: precondition_heads(x, 2, config), x, raise_exception=False)


@each_gradient
@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_row_that_attends_to_nothing_gives_zero_and_no_nan(config, axis):
    config = PreconditionerConfig(axis, config.gradient)
    weights = heads_output(1, 3, 3).softmax(-1)
    weights[0, 1] = 0  # fully masked
    values = heads_output(1, 3, 4, seed=1)
    if axis == "column":
        values[..., 2] = 0
    values.requires_grad_()
    result = precondition_heads(weights @ values, 1, config)
    assert torch.equal(result[0, 1], torch.zeros(4, dtype=torch.float64))
    result.square().sum().backward()
    (result.detach() * precondition_heads(weights @ values, 1, config)).sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(values.grad).all()


def test_norms_below_eps_count_as_eps():
    x = torch.tensor([[3e-4, 4e-4], [0.6, 0.8]], dtype=torch.float64)
    result = precondition_heads(x, 1, PreconditionerConfig(eps=1e-2))
    assert torch.allclose(result, torch.tensor([[3e-2, 4e-2], [0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_formed_in_float32(dtype):
    x = (1e3 * heads_output(4, 2 * 64)).to(dtype)  # squares overflow float16
    result = precondition_heads(x, 2, ROW)
    assert result.dtype == dtype
    assert torch.equal(result, precondition_heads(x.float(), 2, ROW).to(dtype))
    assert torch.allclose(result.float().unflatten(-1, (2, 64)).norm(dim=-1), torch.ones(4, 2), rtol=1e-2)


def test_columns_need_a_dimension_of_positions():
    with pytest.raises(ValueError, match=r"axis='column' needs \(batch, positions, channels\).*\(3, 8\).*axis='row'"):
        precondition_heads(heads_output(3, 8), 2, PreconditionerConfig("column"))


def test_the_counterexample_grows():
    rows = torch.zeros(133, 64, dtype=torch.float64)
    rows[:, 0] = 0.001
    stacked = torch.cat([torch.eye(64, dtype=torch.float64), rows])[None, :, None]
    kappa, _ = head_condition(stacked)
    assert kappa.item() == pytest.approx(math.sqrt(1 + 133e-6))
    after, _ = head_condition(precondition_heads(stacked.flatten(-2), 1, ROW)[:, :, None])
    assert after.item() == pytest.approx(math.sqrt(134))
    assert round(after.item(), 2) == 11.58


def test_the_bound_is_that_of_the_theorem_and_rows_minimize_it_for_few_positions():
    for positions, channels in ((4, 9), (9, 4)):
        heads = heads_output(1, positions, 2, channels)
        kappa, bound = head_condition(heads)
        for head in range(2):
            sigma = torch.linalg.svdvals(heads[0, :, head])
            expected = 2 / sigma.prod() * (sigma.norm() / math.sqrt(len(sigma))) ** len(sigma)
            assert bound[head].item() == pytest.approx(math.log10(expected))
            assert kappa[head].item() == pytest.approx((sigma[0] / sigma[-1]).item())
            assert kappa[head] <= expected
        for config, fewest in ((ROW, positions < channels), (PreconditionerConfig("column"), positions > channels)):
            after = precondition_heads(heads.flatten(-2), 2, config).unflatten(-1, (2, channels))
            if fewest:
                assert (head_condition(after)[1] < bound).all()
            for seed in range(5):  # among the diagonals of its side it is the least
                factors = 0.3 * heads_output(
                    1, positions if config is ROW else 1, 1, 1 if config is ROW else channels, seed=seed
                )
                others = head_condition(after * factors.exp())[1]
                assert not fewest or (others > head_condition(after)[1]).all()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("tiny", [*ARCHITECTURES.values(), *FLAGGED], ids=str)
def test_every_architecture_of_the_flag_equals_an_independent_preconditioner(tiny):
    model, plain = tiny.model(), tiny.model()
    expected = tiny.model()
    outputs = [plain.get_submodule(item.name) for item in find_output_projections(plain)]
    assert len(outputs) == tiny.layers
    names = [item.name for item in find_output_projections(expected)]
    normalize_inputs([expected.get_submodule(name) for name in names], HEADS)
    batch = tiny.batch()
    reports = precondition(model, ROW, probe=batch)
    assert [report.name for report in reports] == names
    assert relative_difference(outputs_of(model, batch), outputs_of(expected, batch)) < 1e-12
    assert relative_difference(outputs_of(model, batch), outputs_of(plain, batch)) > 1e-2
    assert_bit_equal(model.state_dict(), plain.state_dict())  # neither parameters nor buffers


@pytest.mark.integration
@pytest.mark.parametrize("row", SUPPORTED_ROWS, ids=str)
def test_every_other_architecture_equals_an_independent_preconditioner(row):
    model, expected = row.model(), row.model()
    plain = first_output(row.model()(**row.inputs()))
    items = find_output_projections(expected)
    assert len(items) == row.attentions
    for item in items:
        normalize_inputs([item.module], row.heads(f"{item.attention}.q_proj.weight"))
    precondition(model, PreconditionerConfig(scale="unit"), probe=row.inputs())
    with torch.no_grad():
        result, reference = first_output(model(**row.inputs())), first_output(expected(**row.inputs()))
    assert (result - reference).abs().max() < 1e-11 * reference.abs().max()
    assert (result - plain).abs().max() > 1e-3 * reference.abs().max()


def first_output(output):
    if isinstance(output, torch.Tensor):
        return output
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@each_architecture
def test_what_is_preconditioned_is_each_heads_attention_times_values(tiny):
    """Attention weights of the model, and values computed from its weights, give what enters the output projections."""
    model = tiny.model(attn_implementation="eager")
    inputs, seen = [], []
    for module in value_holders(tiny, model):
        module.register_forward_hook(lambda module, args, output: inputs.append(output.detach()))
    for module in outputs_by_name(tiny, model):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        attentions = model(**tiny.batch(), output_attentions=True).attentions
    assert len(attentions) == len(seen) == len(inputs) == tiny.layers
    found = [item.module for item in find_output_projections(model)]
    assert found == outputs_by_name(tiny, model)
    for weights, values, attended in zip(attentions, inputs, seen):
        values = values.chunk(3, dim=-1)[2] if tiny.fused else values
        values = values.unflatten(-1, (tiny.key_value_heads, -1)).transpose(1, 2)
        values = values.repeat_interleave(HEADS // tiny.key_value_heads, dim=1)
        expected = (weights @ values).transpose(1, 2).flatten(-2)
        assert (attended - expected).abs().max() < 1e-12 * expected.abs().max()


def value_holders(tiny, model):
    names = dict.fromkeys(name for name, projection, _ in tiny.projections(model) if projection == "value")
    return [model.get_submodule(name.removesuffix(".weight")) for name in names]


@each_architecture
@each_gradient
def test_what_the_gradient_says_of_the_scale_of_the_values(tiny, config):
    """Scaling W_V and b_V scales A. Through the norm that changes nothing; with the norm detached it scales Y."""
    model = tiny.model()
    precondition(model, config)
    layers = [layer for _, layer in preconditioned_layers(model)]
    seen = []

    for layer in layers:
        layer.forward = lambda x, layer=layer: recorded(layer, x, seen)
    output = first_output(model(**tiny.batch()))
    (output * heads_output(*output.shape, seed=3)).sum().backward()
    assert len(seen) == tiny.layers
    for holder, y in zip(value_holders(tiny, model), seen):
        total = sum(
            (part.grad * part).flatten()[value_part(tiny, part)].sum()
            for part in (holder.weight, holder.bias)
            if part is not None
        )
        scale = y.grad.norm() * y.norm()
        expected = 0.0 if config is THROUGH else (y.grad * y).sum()
        assert (total - expected).abs() < 1e-11 * scale
        if config is ROW:
            assert abs(expected) > 1e-5 * scale


def recorded(layer, x, seen):
    y = precondition_heads(x, layer.heads, layer.preconditioner)
    y.retain_grad()
    seen.append(y)
    return super(type(layer).__mro__[1], layer).forward(y)


def value_part(tiny, part):
    """The entries of a weight or bias that belong to the values."""
    if not tiny.fused:
        return slice(None)
    mask = torch.zeros_like(part, dtype=torch.bool)
    mask.chunk(3, dim=-1)[2].fill_(True)
    return mask.flatten()


@each_architecture
@each_gradient
def test_gradients_of_a_model_agree_with_the_independent_preconditioner(tiny, config):
    model, expected = tiny.model(), tiny.model()
    precondition(model, config)
    for module in outputs_by_name(tiny, expected):

        def scaled(module, args):
            heads = args[0].unflatten(-1, (HEADS, -1))
            norms = heads.square().sum(-1, keepdim=True).sqrt()
            return ((heads / (norms.detach() if config is ROW else norms)).flatten(-2),)

        module.register_forward_pre_hook(scaled)
    for each in (model, expected):
        output = first_output(each(**tiny.batch()))
        (output * heads_output(*output.shape, seed=3)).sum().backward()
    reference = {name: parameter.grad for name, parameter in expected.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == reference.keys()
    scale = max(gradient.abs().max() for gradient in reference.values())  # those of key biases are zero
    for name, gradient in reference.items():
        assert (found[name] - gradient).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_prefix_left_padding_and_cache_give_what_the_whole_text_gives(model_type):
    tiny = ARCHITECTURES[model_type]
    model = tiny.model("AutoModelForCausalLM")
    precondition(model, ROW)
    tokens = tiny.batch()["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        prefix = model(input_ids=tokens[:, :4], use_cache=True)
        assert torch.allclose(prefix.logits, whole[:, :4], rtol=0, atol=1e-12)
        cache, rest = prefix.past_key_values, []
        for place in range(4, LENGTH):
            step = model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rest.append(step.logits)
        assert torch.allclose(torch.cat(rest, dim=1), whole[:, 4:], rtol=0, atol=1e-12)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        left = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(left).all()
    assert torch.allclose(left[:, 3:], whole, rtol=0, atol=1e-12)


def test_right_padding_changes_nothing_of_an_encoder():
    model = BERT.model()
    precondition(model, ROW)
    batch = BERT.batch()
    with torch.no_grad():
        padded = model(**batch).last_hidden_state[1, : LENGTH - 3]
        alone = model(input_ids=batch["input_ids"][1:, : LENGTH - 3]).last_hidden_state[0]
    assert torch.allclose(padded, alone, rtol=0, atol=1e-12)


@each_architecture
def test_eager_equals_sdpa(tiny):
    differences = []
    for preconditioned in (True, False):
        outputs = []
        for implementation in ("eager", "sdpa"):
            model = tiny.model(attn_implementation=implementation)
            if preconditioned:
                precondition(model, ROW)
            outputs.append(outputs_of(model, tiny.batch()))
        differences.append(relative_difference(*outputs))
    # transformers' eager softmax works in float32 for some architectures
    assert differences[0] < 10 * max(differences[1], 1e-13)
    assert differences[0] < 1e-6


def test_the_scale_of_the_values_is_a_gauge():
    model = BERT.model()
    precondition(model, ROW)
    expected = outputs_of(model, BERT.batch())
    with torch.no_grad():
        for index, layer in enumerate(model.encoder.layer):
            for parameter in layer.attention.self.value.parameters():
                parameter *= 2.5 + index
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < 1e-12


def test_an_orthogonal_gauge_of_values_and_output_is_left_and_a_general_one_is_not():
    model = BERT.model()
    precondition(model, ROW)
    expected = outputs_of(model, BERT.batch())
    for orthogonal in (True, False):
        changed, plain = copy.deepcopy(model), BERT.model()
        for each in (changed, plain):
            gauge(each, orthogonal)
        difference = relative_difference(outputs_of(changed, BERT.batch()), expected)
        assert difference < 1e-11 if orthogonal else difference > 1e-3
        # both are gauges of the stock model
        assert relative_difference(outputs_of(plain, BERT.batch()), outputs_of(BERT.model(), BERT.batch())) < 1e-10


@torch.no_grad()
def gauge(model, orthogonal):
    generator = torch.Generator().manual_seed(5)
    for layer in model.encoder.layer:
        value, output = layer.attention.self.value, layer.attention.output.dense
        for head in range(HEADS):
            rows = slice(8 * head, 8 * head + 8)
            matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            if orthogonal:
                matrix = torch.linalg.qr(matrix).Q
            value.weight[rows] = matrix.T @ value.weight[rows]
            value.bias[rows] = matrix.T @ value.bias[rows]
            output.weight[:, rows] = output.weight[:, rows] @ torch.linalg.inv(matrix).T


def test_columns_of_an_image_model():
    model, expected = VIT.model(), VIT.model()
    precondition(model, PreconditionerConfig("column", scale="rms"))
    for module in outputs_by_name(VIT, expected):
        module.register_forward_pre_hook(
            lambda module, args: (args[0] / args[0].square().mean(1, keepdim=True).sqrt(),)
        )
    assert relative_difference(outputs_of(model, VIT.batch()), outputs_of(expected, VIT.batch())) < 1e-12


@each_architecture
def test_matched_norms_keep_each_layers_mean(tiny):
    model, expected = tiny.model(), tiny.model()
    probe = tiny.batch()
    norms = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: norms.append(args[0].unflatten(-1, (HEADS, -1)).norm(dim=-1).mean().item())
        )
        for module in outputs_by_name(tiny, expected)
    ]
    outputs_of(expected, probe)
    for handle in handles:
        handle.remove()
    reports = precondition(model, PreconditionerConfig(scale="match"), probe=probe)
    assert [report.norm_after for report in reports] == pytest.approx(norms)
    for report in reports:
        assert report.norm_after == pytest.approx(sum(report.mean_norm) / HEADS)
    for module, norm in zip(outputs_by_name(tiny, expected), norms):
        normalize_inputs([module], HEADS, norm)
    assert relative_difference(outputs_of(model, probe), outputs_of(expected, probe)) < 1e-12


def test_the_reports_are_those_of_numpy():
    probe = VIT.batch()
    model = VIT.model()
    seen = []
    for module in outputs_by_name(VIT, model):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs_of(model, probe)
    reports = precondition(VIT.model(), ROW, probe=probe)
    for report, attended in zip(reports, seen):
        heads = attended.unflatten(-1, (HEADS, 8)).transpose(1, 2).numpy()  # two samples
        before = np.log([[np.linalg.cond(heads[sample, head]) for head in range(HEADS)] for sample in range(2)])
        rows = heads / np.linalg.norm(heads, axis=-1, keepdims=True)
        after = np.log([[np.linalg.cond(rows[sample, head]) for head in range(HEADS)] for sample in range(2)])
        assert report.kappa_before == pytest.approx(np.exp(before.mean(0)))
        assert report.kappa_after == pytest.approx(np.exp(after.mean(0)))
        grew = [head for head in range(HEADS) if after.mean(0)[head] > before.mean(0)[head]]
        assert report.kappa_grew == tuple(grew)
        assert report.mean_norm == pytest.approx(np.linalg.norm(heads, axis=-1).mean((0, 2)))
        assert report.shape == (5, 8)
        assert report.norm_after == 1
    text = format_preconditioning(reports)
    assert "a third-party reading of arXiv 2603.27153" in text
    total = sum(len(report.kappa_grew) for report in reports)
    assert f"Kappa grew in {total} of {2 * HEADS} heads" in text
    for line, report in zip(text.splitlines()[1:], reports):
        assert ("kappa GREW in heads " + ", ".join(map(str, report.kappa_grew)) in line) == bool(report.kappa_grew)


def test_a_model_that_the_table_does_not_know():
    toy = ToyAttention()
    spec = AttentionSpec(
        "ToyAttention", toy_spec(False).modules, query_heads="heads", key_value_heads="groups", output="out_proj"
    )
    inputs = heads_output(2, 5, 16)
    expected = copy.deepcopy(toy)
    normalize_inputs([expected.out_proj], 4)
    with pytest.raises(ValueError, match=r"No probe batch can be made.*pass probe="):
        precondition(toy, ROW, architecture=spec)
    precondition(toy, ROW, probe={"inputs": inputs}, architecture=spec)
    assert torch.allclose(toy(inputs), expected(inputs), rtol=1e-12)
    assert "preconditioner=row(unit, detached) of 4 heads" in repr(toy)


def test_with_corrections_in_either_order():
    spectral = SpectralConfig(lambda_=1.0)
    first, second, expected = (BERT.model() for _ in range(3))
    precondition(first, ROW)
    condition(first, spectral)
    condition(second, spectral)
    precondition(second, ROW)
    condition(expected, spectral)
    normalize_inputs(outputs_by_name(BERT, expected), HEADS)
    reference = outputs_of(expected, BERT.batch())
    for model in (first, second):
        assert relative_difference(outputs_of(model, BERT.batch()), reference) < 1e-12
        fold(model)
        assert len(list(preconditioned_layers(model))) == BERT.layers
        assert relative_difference(outputs_of(model, BERT.batch()), reference) < 1e-12


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_copies_and_pickles_are_preconditioned(model_type):
    tiny = ARCHITECTURES[model_type]
    model = tiny.model()
    precondition(model, PreconditionerConfig(scale="match"))
    expected = outputs_of(model, tiny.batch())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bit_equal(outputs_of(again, tiny.batch()), expected)
        assert len(list(preconditioned_layers(again))) == tiny.layers


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": "rows"}, r"axis='rows' is unknown; choose one of 'row', 'column'"),
        ({"gradient": True}, r"gradient=True is unknown; choose one of 'detached', 'through'"),
        ({"scale": "norm"}, r"scale='norm' is unknown; choose one of 'unit', 'rms', 'match'"),
        ({"eps": 0}, r"eps=0 is not allowed; give a finite number > 0"),
        ({"eps": True}, r"eps=True is not allowed"),
        ({"eps": math.inf}, r"eps=inf is not allowed"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreconditionerConfig(**settings)


def test_a_config_says_what_it_is():
    config = PreconditionerConfig("column", "through", "rms", 1e-3)
    assert PreconditionerConfig(**config.to_dict()) == config
    assert config.describe() == "column(rms, through, eps=0.001)"
    assert ROW.describe() == "row(unit, detached)"


def refused(model, message, config=ROW, **kwargs):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        precondition(model, config, **kwargs)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_is_no_config_is_refused():
    refused(BERT.model(), r"config='row' must be a PreconditionerConfig", "row")


def test_twice_is_refused():
    model = BERT.model()
    precondition(model, THROUGH)
    refused(model, r"attention.output.dense is already preconditioned with row\(unit, through\); start from the stock")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: GPT2.model("AutoModelForCausalLM"), r"is causal \(a longer text would change"),
        (lambda: ARCHITECTURES["llama"].model(), r"is causal \(a longer text would change"),
        (lambda: BERT.model(), "it reads texts, whose batches are padded"),
        (lambda: BERT.model("AutoModelForCausalLM", is_decoder=True), "causal"),
        (lambda: next(tiny for tiny in FLAGGED if tiny.model_type == "swin").model(), "attends within windows"),
    ],
    ids=["gpt2", "llama", "bert", "bert decoder", "swin"],
)
def test_columns_are_refused_where_positions_are_masked(model, why):
    refused(model(), rf"axis='column'.*has such: .*{why}.*Use axis='row'", PreconditionerConfig("column"))


@pytest.mark.integration
@pytest.mark.parametrize("row", MIXED_ROWS, ids=str)
def test_mixed_heads_and_channels_are_refused(row):
    why = "talking heads, whose attention" if " cait" in row.name else "attention between channels, which mixes"
    refused(row.model(), rf"cannot be preconditioned: before its output projection there is {why}", probe=row.inputs())


@pytest.mark.integration
@pytest.mark.parametrize("part", ["scale_norm", "gated"])
def test_a_norm_or_gate_before_the_output_projection_is_refused(part):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, embed_dim=32, depth=1, num_heads=4
    )
    kwargs = {"scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm}, "gated": {"gated": True}}[part]
    model.blocks[0].attn = timm.layers.attention.Attention(32, num_heads=4, **kwargs)
    name = {"scale_norm": "norm", "gated": "gate"}[part]
    refused(model, rf"there is {name}, which Attention does not have in the table.*AttentionSpec\(..., output=")


def test_an_unknown_output_projection_is_refused():
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.ConvBertModel(transformers.ConvBertConfig(vocab_size=48, **settings))
    refused(
        model, r"before its output projection there is a convolution, whose output is put beside .*AttentionSpec\("
    )
    spec = AttentionSpec("BertSelfAttention", {"query": "query", "key": "key", "value": "value"})
    message = r"has an output projection that the AttentionSpec does not say.*AttentionSpec\(..., output='<path"
    refused(BERT.model(), message, architecture=spec)


def test_a_wrong_output_projection_is_refused():
    modules = {"query": "query", "key": "key", "value": "value"}
    cases = {
        "..output.dens": r"should have its output projection at '..output.dens', but there is no encoder.layer.0.*dens;",
        "..output": r"is a .*BertSelfOutput; only the input of exact torch.nn.Linear",
        "....output.dense": r"takes 48 inputs, but 4 query heads with values of length 8 give 32",
        "............dense": r"is not in the part of the model that was passed",
    }
    for output, message in cases.items():
        refused(BERT.model(), message, architecture=AttentionSpec("BertSelfAttention", modules, output=output))
    only = AttentionSpec("BertSelfAttention", {"key": "key"}, output="..output.dense")
    refused(BERT.model(), "must name query and value", architecture=only)


def test_a_probe_must_run_every_attention_and_be_finite():
    model = BERT.model("AutoModelForCausalLM", is_decoder=True, add_cross_attention=True)
    refused(model, r"The probe \(input_ids\) does not run bert.encoder.layer.0.crossattention.output.dense")
    model = BERT.model()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight[0, 0] = math.nan
    refused(model, r"layer.1.attention.output.dense gets nan or inf on the probe")
