"""One architecture: conditioned and preconditioned, and compared with an independent W + C, and with normalized heads."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, fold, precondition
from hf_specattn.layers import spectral_layers

from .rows import Row, build
from .tracing import ROLES, TracedAttention, trace_attention, with_changed_heads

# Each another number, and small: with 10 the softmax saturates, and its output barely depends on the rest of Q and K.
LAMBDAS = {"query": 0.5, "key": 0.25, "value": 2.0, "output": 1.5}
VALUE_OUTPUT = ("value", "output")
# float64; models that compute a norm or a softmax in float32 whatever their weights are round a difference up to it.
TOLERANCE = 1e-5
# What a correction must change at least, so that comparing outputs to TOLERANCE says something.
VISIBLE = 10 * TOLERANCE


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        status, reason: of conditioning query, key and value.
        attends: whether attention ran in the stock model; None where it was not built.
        output, output_reason: of conditioning value and output; empty where nothing attends, as the next two.
        preconditioned, preconditioned_reason: of preconditioning.
    """

    row: Row
    status: str
    reason: str = ""
    attends: bool | None = None
    output: str = ""
    output_reason: str = ""
    preconditioned: str = ""
    preconditioned_reason: str = ""


def survey(row: Row) -> Result:
    """Build, trace, condition, precondition, compare."""
    try:
        stock, inputs = build(row)
        expected = outputs_of(stock, inputs)
        if not expected or not all(torch.isfinite(value).all() for value in expected.values()):
            raise ValueError("the stock model gives no finite output")
        traced = trace_attention(stock, lambda: stock(**inputs))
    except Exception as error:
        return Result(row, "not built", describe(error))
    result = conditioned(stock, inputs, traced, ROLES)
    if not traced:
        return Result(row, *result, attends=False)
    output = conditioned(stock, inputs, traced, VALUE_OUTPUT)
    return Result(row, *result, True, *output, *preconditioned(stock, inputs))


def conditioned(
    stock: nn.Module, inputs: Mapping[str, Tensor], traced: Sequence[TracedAttention], targets: tuple[str, ...]
) -> tuple[str, str]:
    """Status and reason of conditioning these projections, by both methods."""
    reasons = []
    for method in ("identity", "svd"):
        try:
            problem = compare(stock, inputs, traced, method, targets)
        except Refused as refusal:
            return "refused", describe(refusal)
        except Exception as error:
            problem = f"{type(error).__name__} ({describe(error)})"
        if problem:
            reasons.append(f"{method}: {problem}")
    return "wrong" if reasons else "exact", "; ".join(reasons)


class Refused(ValueError):
    """`condition` refused the model."""


def compare(
    stock: nn.Module,
    inputs: Mapping[str, Tensor],
    traced: Sequence[TracedAttention],
    method: str,
    targets: tuple[str, ...] = ROLES,
) -> str | None:
    """What is wrong with the conditioned model; None where nothing is."""
    lambdas = {target: LAMBDAS[target] for target in targets}
    config = SpectralConfig(method, lambda_=lambdas if method == "identity" else None, targets=targets)
    conditioned = copy.deepcopy(stock)
    try:
        condition(conditioned, config)
    except ValueError as error:
        raise Refused(str(error)) from None
    unplaced = [f"{item.module[0]} ({item.module[1]})" for item in traced if not item.is_plain]
    if unplaced or not traced:
        return f"conditioned, but the trace cannot say where queries, keys and values come from: {unplaced[:2]}"
    if "output" in targets and (unread := [item.module[0] for item in traced if item.output is None]):
        return f"conditioned, but the trace cannot say what reads the heads of {unread[:2]}"

    expected = independent(stock, traced, method, targets)
    idle = idle_modules(stock, inputs)
    for name, weight in effective_weights(conditioned).items():
        gap = difference(weight, expected.get_parameter(name))
        if gap > TOLERANCE and name.removesuffix(".weight") not in idle:
            return f"{name} is not W + C (relative difference {gap:.2g})"
    outputs, expected_outputs = outputs_of(conditioned, inputs), outputs_of(expected, inputs)
    if largest_difference(expected_outputs, outputs_of(stock, inputs)) < VISIBLE:
        return "W + C does not change the outputs, so that comparing them says nothing"
    if (gap := largest_difference(outputs, expected_outputs)) > TOLERANCE:
        return f"outputs differ by {gap:.2g}"
    if (gap := largest_difference(gradients(conditioned, inputs), gradients(expected, inputs))) > TOLERANCE:
        return f"gradients differ by {gap:.2g}"
    classes = [type(module) for module in stock.modules()]
    fold(conditioned)
    if [type(module) for module in conditioned.modules()] != classes:
        return "fold did not give the stock classes back"
    if (gap := largest_difference(outputs_of(conditioned, inputs), expected_outputs)) > TOLERANCE:
        return f"folded outputs differ by {gap:.2g}"
    return None


def preconditioned(stock: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[str, str]:
    """Status and reason of the row preconditioner: the oracle normalizes the heads that it sees, without the table."""
    model = copy.deepcopy(stock)
    try:
        try:
            precondition(model, PreconditionerConfig(), probe=inputs)
        except ValueError as error:
            if "encoder_hidden_states" not in str(error):
                raise
            inputs = {**inputs, "encoder_hidden_states": encoder_states(stock)}  # of a decoder with cross-attention
            precondition(model, PreconditionerConfig(), probe=inputs)
    except ValueError as error:
        return "refused", describe(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__} ({describe(error)})"
    expected = with_normalized_heads(stock, inputs)
    if (gap := largest_difference(outputs_of(model, inputs), expected)) > TOLERANCE:
        return "wrong", f"outputs differ by {gap:.2g}"
    if largest_difference(expected, outputs_of(stock, inputs)) < VISIBLE:
        return "wrong", "normalized heads do not change the outputs, so that comparing them says nothing"
    gap = largest_difference(gradients(model, inputs), gradients(stock, inputs, with_normalized_heads))
    return ("wrong", f"gradients differ by {gap:.2g}") if gap > TOLERANCE else ("exact", "")


def encoder_states(model: Any) -> Tensor:
    width = getattr(model.config, "cross_attention_hidden_size", None) or model.config.hidden_size
    return torch.randn(2, 6, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def with_normalized_heads(stock: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def rows_of_norm_one(heads: Tensor) -> Tensor:
        return heads / heads.detach().square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)

    return tensors_in(with_changed_heads(stock, lambda: stock(**inputs), rows_of_norm_one))


def idle_modules(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Names of modules that do not run: the cross-attention of a decoder without an encoder, say. No trace finds them."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in model.named_modules()
    ]
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    return {name for name, _ in model.named_modules()} - ran


@torch.no_grad()
def independent(
    stock: nn.Module, traced: Sequence[TracedAttention], method: str, targets: Sequence[str] = ROLES
) -> nn.Module:
    """A stock model with W + C in the traced rows, by NumPy."""
    model = copy.deepcopy(stock)
    modules = dict(model.named_modules())
    done = set()
    for item in traced:
        places: dict[str, tuple[Any, Any]] = {}
        for role in ROLES:
            ((name, found),) = item.rows[role].items()
            places[named_role(item, role)] = name, list(found)
        places["output"] = item.output, slice(None)
        for target in targets:
            name, rows = places[target]
            if (name, str(rows)) in done:
                continue
            done.add((name, str(rows)))
            module: Any = modules[name]
            weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
            block = weight[rows].numpy()
            weight[rows] = torch.from_numpy(block + correction(block, LAMBDAS[target], method))
    return model


def named_role(item: TracedAttention, role: str) -> str:
    """What a model's own code calls this role, where that is something else."""
    if item.module[1] == "ChannelAttention":  # timm's DaViT: softmax(k^T v), applied to q
        return {"query": "key", "key": "value", "value": "query"}[role]
    return role


def correction(block: np.ndarray, lambda_: float, method: str) -> np.ndarray:
    if method == "identity":
        return lambda_ * np.eye(*block.shape)
    left, singular_values, right = np.linalg.svd(block, full_matrices=False)
    return singular_values[0] * (left @ right)


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, conditioned weights as W + C."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights | {f"{name}.weight": layer.effective_weight().detach() for name, layer in spectral_layers(model)}


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors_in(model(**inputs))


def tensors_in(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): value for name, value in items if isinstance(value, Tensor) and value.is_floating_point()}


def run_plainly(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return tensors_in(model(**inputs))


def gradients(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    run: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]] = run_plainly,
) -> dict[str, Tensor]:
    """Of the sum of squares of the outputs, by parameter: C is a constant, so those to W and to W + C are the same."""
    model.zero_grad()
    loss = sum((value.double() ** 2).sum() for value in run(model, inputs).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def difference(value: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest expected value; 0 of nothing (MobileBERT has an empty weight)."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((value.double() - expected.double()).abs().max() / scale).item()


def largest_difference(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all tensors, relative to the greatest value of the greatest of them; infinite where the names differ."""
    if values.keys() != expected.keys():
        return float("inf")
    names = [name for name, value in expected.items() if value.numel()]
    scale = max(expected[name].abs().max().item() for name in names)
    return max((values[name].double() - expected[name].double()).abs().max().item() for name in names) / scale


def describe(error: BaseException) -> str:
    """The first line of an error, short enough for a table, without what is a machine's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
    known = re.match(r"(No query, key or value projection found in \w+)", text)
    seen = re.search(r"Attention-like modules in it: ([^.]*(?:\.\d[^.]*)*)", text)
    if known:
        names = sorted(set(re.findall(r"\((\w+)\)", text[seen.start() :]))) if seen else []
        return f"{known[1]}; it attends in {', '.join(names)}" if names else known[1]
    return text if len(text) <= 160 else f"{text[:157]}..."
