"""`balance` makes a pretrained attention better conditioned without changing its function, by using its gauge freedom.

In the paper's orientation (`X W`), each head's output is unchanged under `W_Q M, W_K M^-T` and `W_V G, G^-1 W_O` for any
invertible `M` and `G`, if the biases go along (`b_Q M, b_K M^-T, b_V G`):

- V/O: from `W_V = Q R`, `G = c R^-1` gives `W_V G = c Q`, whose condition number is 1, and `G^-1 W_O = R W_O / c`. `c` keeps
  the Frobenius norm of the head's `W_V`.
- Q/K: from the SVD `W_Q W_K^T = U S V^T`, `W_Q M = U S^1/2` and `W_K M^-T = V S^1/2`: both condition numbers become
  `sqrt(kappa(W_Q W_K^T))`, which is at most `sqrt(kappa(W_Q) kappa(W_K))`.

Query heads that share a key/value head share its `M` and `G`; `W_Q` is then the group's query weights stacked.
Ill-conditioning does not vanish, it moves: from `W_V` into `W_O`, and between `W_Q` and `W_K`. And it is a property of
the parameters, not of the function that they compute.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import AttentionSpec, unknown_parts
from .layers import SPECTRAL_CLASSES, spectral_layers
from .model_outputs import (
    ERRORS_ALLOWED,
    OutputChange,
    Tensors,
    measured_tolerance,
    output_change,
    probe_batch,
    probe_outputs,
    substituted,
)
from .ordinary import module_problem, refuse_no_module, refuse_unordinary
from .preconditioner import PreconditionedLayer
from .projection_report import Spectrum, text_table
from .projections import AttentionModule, Projection, find_attention_modules

PRECONDITIONER = "the preconditioner of attention, whose norms no gauge but an orthogonal one keeps"

# --- what the caller gets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceReport:
    """What became of one projection.

    Attributes:
        name: full name of the module that holds the weight.
        projection: `query`, `key`, `value` or `output`.
        shape: `(heads * head_dim, in_features)`; of the output projection `(heads * head_dim, out_features)`.
        before: spectrum of the weight, and of each head's block, as it stood; for the output projection a head's block is
            what maps that head's values to the output.
        after: the same for the new weight, rounded to its dtype.
        left_alone: why the projection was not changed; None if it was balanced.
        left_alone_heads: the heads of this projection that were not changed, because a weight of their pair (query and
        key, or value) is numerically rank-deficient.
    """

    name: str
    projection: str
    shape: tuple[int, int]
    before: Spectrum
    after: Spectrum
    left_alone: str | None
    left_alone_heads: tuple[int, ...]


class BalanceReports(list[BalanceReport]):
    """The reports of [`balance`], one per projection, in the order of the modules.

    Attributes:
        output_change: of the probe's outputs, against those before.
        dtype_error: the dtype's own: the relative change of the outputs of the *unbalanced* model when it computes in
            float64; None where it was not measured (a float64 model, or a `tolerance` given).
        tolerance: the greatest relative change that was allowed.
    """

    output_change: OutputChange
    dtype_error: float | None
    tolerance: float


class OutputChangedError(RuntimeError):
    """Balancing would change the outputs by more than the tolerance; the model was not changed.

    Attributes:
        change: of the probe's outputs.
        tolerance: the greatest relative change allowed.
    """

    def __init__(self, message: str, change: OutputChange, tolerance: float):
        super().__init__(message)
        self.change = change
        self.tolerance = tolerance


def balance(
    model: nn.Module,
    probe: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
) -> BalanceReports:
    """Make the query, key and value weights of each head well conditioned and keep the function, in place.

    Each head's `W_V` gets condition number 1, and what it had moves into `W_O`; `W_Q` and `W_K` share theirs equally (see
    the module's docstring). Do not expect it to help quantization (docs/balance.md).

    Stock modules stay stock modules, with the same parameter objects, so that checkpoints do not need this package. A
    gauge that would change the function is left alone (Q/K behind rotary position embeddings or q/k norms; V/O where
    channels are mixed or normalized in between, or attention is preconditioned), as are numerically rank-deficient
    heads, for which `numpy.linalg.matrix_rank` in the weight's dtype (float32 for half precision) finds less than
    `head_dim`. The reports name them.

    Computed in float64 and rounded to the weights' dtype once. Before any weight is changed, the outputs on `probe` are
    compared: with the balanced weights, substituted for one layer at a time, and without. Beyond the model, memory is
    needed for one attention layer in float64 and for the activations of the probe; to measure the dtype's own error, for one
    module at a time in float64.

    `name_or_path` becomes empty: no checkpoint of the balanced model exists yet, and an adapter that PEFT trains on it does
    not fit the old one.

    Balance before you create an optimizer: its moments would belong to the old weights. The function is also kept in
    training mode, but the gradients of the new weights differ, so training takes a different path from the first step
    on.

    Args:
        model: any module that contains attention of the table in `architectures.py`; with `architecture`, any other.
        probe: keyword arguments of the model's forward pass that run every attention, best without padding, whose outputs
            mean nothing and vary more; None makes some by `probe_batch`.
        tolerance: the greatest change of an output tensor, relative to its greatest value. None: 1e-10 for a float64 model,
            else 4 times the dtype's own error, measured as the change of the outputs when the unchanged model computes in
            float64 (at least one rounding, the dtype's `eps`).
        architecture: as in [`condition`]; the gauges are used that its barriers do not forbid.

    Returns:
        One report per projection, the output projections included.

    Raises:
        OutputChangedError: if the outputs would change by more than the tolerance. Nothing is changed then.
        ValueError: for a conditioned model, no projection found, no gauge that could be used, tied, quantized, sharded or
            meta weights, `nn.MultiheadAttention`, a probe that fails or misses an attention. Nothing is changed then.
    """
    refuse_no_module(model, "balance")
    _check_settings(model, probe, tolerance)
    attentions = _find_attentions(model, architecture)
    _check_attentions(model, attentions)
    if probe is None:
        probe = probe_batch(model)

    before = probe_outputs(model, probe)
    if broken := [name for name, value in before.items() if value.isnan().any()]:
        raise ValueError(
            f"{', '.join(broken)} of {type(model).__name__} has nan on the probe before anything is balanced; pass another "
            "probe, or check the checkpoint."
        )
    dtype_error = None
    dtype = _least_precise(attentions)
    if tolerance is None:
        tolerance, dtype_error = measured_tolerance(model, probe, before, dtype)
    change = output_change(before, _balanced_outputs(model, probe, attentions))
    if not change.relative <= tolerance:  # nan included
        raise _too_large(change, tolerance, dtype_error, dtype)

    reports = BalanceReports()
    reports.output_change, reports.dtype_error, reports.tolerance = change, dtype_error, tolerance
    # Small models are done before a bar is drawn; None shows one on a terminal only.
    for attention in logging.tqdm(attentions, desc="Balancing", disable=True if len(attentions) < 8 else None):
        reports += _balance_in_place(attention)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # An adapter trained on the balanced weights must not name the checkpoint of the old ones as its base.
            module.name_or_path = ""
    return reports


def format_balance(reports: BalanceReports) -> str:
    """Return a plain-text table with one line per projection that says what was left alone and why, and how the
    outputs changed."""
    header = ("projection", "shape", "kappa", "balanced", "per head", "balanced", "worst head", "balanced", "")
    measured = "" if reports.dtype_error is None else f", the dtype's own error is {reports.dtype_error:.2g}"
    return "\n".join(
        [
            text_table([header, *map(_row, reports)]),
            f"Largest change of an output on the probe: {reports.output_change.absolute:.2g}, relative "
            f"{reports.output_change.relative:.2g} (allowed {reports.tolerance:.2g}{measured}).",
            "Conditioning moves, it does not vanish: what W_V loses W_O takes up, and W_Q and W_K share theirs. The function "
            "is the same.",
        ]
    )


def _row(report: BalanceReport) -> tuple[str, ...]:
    before, after = report.before.head_kappa, report.after.head_kappa
    notes = [f"left alone: {report.left_alone}"] if report.left_alone else []
    if report.left_alone_heads:
        notes.append(f"rank-deficient, left alone: heads {', '.join(map(str, report.left_alone_heads))}")
    elif max(after) > max(before) * (1 + 1e-6):
        notes.append("took up conditioning")
    return (
        f"{report.name} {report.projection}",
        f"{report.shape[0]}x{report.shape[1]}",
        f"{report.before.kappa:.4g}",
        f"{report.after.kappa:.4g}",
        f"{fmean(before):.4g}",
        f"{fmean(after):.4g}",
        f"{max(before):.4g}",
        f"{max(after):.4g}",
        "; ".join(notes),
    )


# --- the gauge -------------------------------------------------------------------------------------------------------


def balance_query_key(
    query: Tensor, key: Tensor, query_bias: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`W_Q M, W_K M^-T, b_Q M, b_K M^-T` with `M` from the SVD `W_Q W_K^T = U S V^T`, so that both weights have `S^1/2`.

    Head blocks are as `nn.Linear` stores them, `(head_dim, in_features)`: the transposes of the paper's.

    Args:
        query: `(n, g, d, in_features)`: g query heads for each of n key heads; full rank when stacked.
        key: `(n, d, in_features)`, full rank; in_features may differ from the query's.
        query_bias, key_bias: `(n, g, d)` and `(n, d)`, or None.

    Returns:
        The same, balanced.
    """
    groups = query.shape[1]
    left_q, left_r = torch.linalg.qr(_stacked(query).mT)  # the paper's W_Q, of shape (g * in_features, d)
    right_q, right_r = torch.linalg.qr(key.mT)
    # The SVD of the product, through its d x d core R_Q R_K^T.
    left, sigma, right = torch.linalg.svd(left_r @ right_r.mT)
    root = sigma.sqrt()[:, None, :]
    new_query = (left_q @ left * root).unflatten(1, (groups, -1)).mT
    new_key = (right_q @ right.mT * root).mT
    # M = R_Q^-1 U S^1/2 = R_K^T V S^-1/2. The second form keeps b_Q W_K^T to roundoff whatever the rank of W_Q, for what
    # S^-1/2 amplifies here, S^1/2 in the new W_K takes back. M^-T likewise.
    if query_bias is not None:
        query_bias = query_bias @ right_r.mT @ right.mT / root
    if key_bias is not None:
        key_bias = (key_bias[:, None, :] @ left_r.mT @ left / root).squeeze(1)
    return new_query, new_key, query_bias, key_bias


def balance_value_output(
    value: Tensor, output: Tensor, value_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`W_V G, G^-1 W_O, b_V G` with `G = c R^-1` from `W_V = Q R`, so that `W_V G = c Q` has orthonormal columns times c.

    Args:
        value: `(n, d, in_features)`, full rank, as `nn.Linear` stores it.
        output: `(n, g, d, out_features)`: for each of the g query heads of a value head, the rows of the paper's `W_O`.
        value_bias: `(n, d)`, or None.

    Returns:
        The same, balanced; each head of value keeps its Frobenius norm.
    """
    orthonormal, upper = torch.linalg.qr(value.mT)
    scale = torch.linalg.matrix_norm(value, keepdim=True) / math.sqrt(value.shape[-2])
    new_output = (upper / scale)[:, None] @ output
    if value_bias is not None:
        rows = torch.linalg.solve_triangular(upper, value_bias[:, None, :], upper=True, left=False)
        value_bias = (rows * scale).squeeze(1)
    return (orthonormal * scale).mT, new_output, value_bias


def _stacked(query: Tensor) -> Tensor:
    """`(n, g, d, in_features)` as `(n, d, g * in_features)`: the group's query heads side by side."""
    return query.transpose(1, 2).flatten(2)


def _full_rank(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether each `(..., d, in_features)` block has rank d, by `numpy.linalg.matrix_rank`'s rule for `dtype`; `(...,)`."""
    rows, columns = blocks.shape[-2:]
    if rows > columns:
        return torch.zeros(blocks.shape[:-2], dtype=torch.bool, device=blocks.device)
    sigma = torch.linalg.svdvals(blocks)
    return sigma[..., -1] > columns * torch.finfo(dtype).eps * sigma[..., 0]


# --- one attention layer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    """The module with W_O."""

    name: str
    module: Any

    def by_head(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as `(heads * head_dim, out_features)`, and back: a view."""
        return SPECTRAL_CLASSES[type(self.module)].orient(weight).mT


@dataclass(frozen=True)
class _Attention(AttentionModule):
    """An attention, its output projection, and which gauges it allows (those whose barrier is None)."""

    output: _Output | None
    query_key_barrier: str | None
    value_output_barrier: str | None

    @property
    def everything(self) -> list[Projection | _Output]:
        """All that holds a weight of this attention."""
        return [*self.holders, *([] if self.output is None else [self.output])]

    @property
    def moved(self) -> set[str]:
        """The projections that the allowed gauges change."""
        query_key = set() if self.query_key_barrier else {"query", "key"}
        return query_key | (set() if self.value_output_barrier else {"value", "output"})

    @property
    def modules(self) -> list[Any]:
        """The modules with one of them."""
        modules = [item.module for item in self.holders if self.moved & set(item.layout.projections)]
        return modules + ([self.output.module] if self.output is not None and "output" in self.moved else [])


@dataclass(frozen=True)
class _Blocks:
    """The weights of one attention in float64, by projection (`output` too), and what is left alone.

    Attributes:
        weights: `(heads, head_dim, features)`.
        biases: `(heads, head_dim)`; of query, key and value, where they have one.
        dtype: decides what is numerically rank-deficient.
        left_alone_heads: heads that a gauge passed over.
    """

    weights: Tensors
    biases: Tensors
    dtype: torch.dtype
    left_alone_heads: dict[str, tuple[int, ...]]


def _read(attention: _Attention) -> _Blocks:
    weights = {name: block.double() for name, block in attention.head_weights(effective=False).items()}
    biases = {name: block.double() for name, block in attention.head_biases().items()}
    if attention.output is not None:
        matrix = attention.output.by_head(attention.output.module.weight.detach().double())
        weights["output"] = matrix.unflatten(0, (attention.heads["query"], -1))
    # Half precision's own rule would call every matrix of some hundred columns deficient.
    stored = {item.module.weight.dtype for item in attention.holders}
    dtype = torch.float64 if stored == {torch.float64} else torch.float32
    return _Blocks(weights, biases, dtype, {})


def _balanced(attention: _Attention, old: _Blocks) -> _Blocks:
    """The balanced blocks; those that are left alone are the old ones."""
    new = replace(old, weights=dict(old.weights), biases=dict(old.biases), left_alone_heads={})
    if attention.query_key_barrier is None:
        _balance_query_key_blocks(attention, old, new)
    if attention.value_output_barrier is None:
        _balance_value_output_blocks(attention, old, new)
    return new


def _balance_query_key_blocks(attention: _Attention, old: _Blocks, new: _Blocks) -> None:
    key, key_bias = old.weights["key"], old.biases.get("key")
    grouped = (key.shape[0], -1)
    query = old.weights["query"].unflatten(0, grouped)
    query_bias = old.biases["query"].unflatten(0, grouped) if "query" in old.biases else None
    # Not even in float64 does a product of two ill-conditioned weights always have full rank.
    fit = _full_rank(_stacked(query), old.dtype) & _full_rank(key, old.dtype)
    fit &= _full_rank(_core(query, key), torch.float64)
    new.left_alone_heads["key"] = _indices(~fit)
    new.left_alone_heads["query"] = _indices((~fit).repeat_interleave(query.shape[1]))
    if not fit.any():
        return
    results = balance_query_key(*(_chosen(part, fit) for part in (query, key, query_bias, key_bias)))  # type: ignore[arg-type]
    new.weights["query"] = _replaced(query, fit, results[0]).flatten(0, 1)
    new.weights["key"] = _replaced(key, fit, results[1])
    if query_bias is not None:
        new.biases["query"] = _replaced(query_bias, fit, results[2]).flatten(0, 1)
    if key_bias is not None:
        new.biases["key"] = _replaced(key_bias, fit, results[3])


def _core(query: Tensor, key: Tensor) -> Tensor:
    """The `(n, d, d)` matrices with the nonzero singular values of `W_Q W_K^T`."""
    left, right = (torch.linalg.qr(part.mT, mode="r").R for part in (_stacked(query), key))
    return left @ right.mT if left.shape == right.shape else left.new_zeros(key.shape[0], 1, 1)


def _balance_value_output_blocks(attention: _Attention, old: _Blocks, new: _Blocks) -> None:
    value, value_bias = old.weights["value"], old.biases.get("value")
    output = old.weights["output"].unflatten(0, (value.shape[0], -1))
    fit = _full_rank(value, old.dtype)
    new.left_alone_heads["value"] = _indices(~fit)
    new.left_alone_heads["output"] = _indices((~fit).repeat_interleave(output.shape[1]))
    if not fit.any():
        return
    results = balance_value_output(*(_chosen(part, fit) for part in (value, output, value_bias)))  # type: ignore[arg-type]
    new.weights["value"] = _replaced(value, fit, results[0])
    new.weights["output"] = _replaced(output, fit, results[1]).flatten(0, 1)
    if value_bias is not None:
        new.biases["value"] = _replaced(value_bias, fit, results[2])


def _chosen(tensor: Tensor | None, fit: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[fit]


def _replaced(tensor: Tensor, fit: Tensor, values: Tensor | None) -> Tensor:
    assert values is not None
    tensor = tensor.clone()
    tensor[fit] = values
    return tensor


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _as_stored(attention: _Attention, blocks: _Blocks) -> dict[nn.Module, Tensors]:
    """What `weight` and `bias` of each module that changes become, in its dtype and memory layout."""
    stored: dict[nn.Module, Tensors] = {}
    for item in attention.holders:
        names = item.layout.projections
        matrix = item.layout.join({name: blocks.weights[name].flatten(0, 1) for name in names})
        stored[item.module] = {"weight": item.orient(matrix)}
        if item.module.bias is not None:
            stored[item.module]["bias"] = item.layout.join({name: blocks.biases[name].flatten() for name in names})
    if attention.output is not None:
        stored[attention.output.module] = {"weight": attention.output.by_head(blocks.weights["output"].flatten(0, 1))}
    return {
        module: {name: tensor.to(getattr(module, name).dtype).contiguous() for name, tensor in stored[module].items()}
        for module in attention.modules
    }


@torch.no_grad()
def _balance_in_place(attention: _Attention) -> list[BalanceReport]:
    old = _read(attention)
    before = _spectra(old)
    new = _balanced(attention, old)
    for module, tensors in _as_stored(attention, new).items():
        for name, tensor in tensors.items():
            getattr(module, name).copy_(tensor)
    after = _spectra(_read(attention))  # of what was stored, rounding included
    return _reports(attention, new, before, after)


def _spectra(blocks: _Blocks) -> dict[str, Spectrum]:
    return {name: Spectrum.of(block.flatten(0, 1), block) for name, block in blocks.weights.items()}


def _reports(
    attention: _Attention, new: _Blocks, before: Mapping[str, Spectrum], after: Mapping[str, Spectrum]
) -> list[BalanceReport]:
    names = [(item.name, projection) for item in attention.holders for projection in item.layout.projections]
    names += [(attention.output.name, "output")] if attention.output is not None else []
    barriers = dict.fromkeys(("query", "key"), attention.query_key_barrier)
    barriers |= dict.fromkeys(("value", "output"), attention.value_output_barrier)
    return [
        BalanceReport(
            name=name,
            projection=projection,
            shape=(math.prod(new.weights[projection].shape[:2]), new.weights[projection].shape[2]),
            before=before[projection],
            after=after[projection],
            left_alone=barriers[projection],
            left_alone_heads=new.left_alone_heads.get(projection, ()),
        )
        for name, projection in names
    ]


# --- finding, and checks, all made before anything changes -----------------------------------------------------------


def _find_attentions(
    model: nn.Module, architecture: AttentionSpec | Sequence[AttentionSpec] | None
) -> list[_Attention]:
    by_table = architecture is None
    attentions = [_attention(found, by_table) for found in find_attention_modules(model, architecture)]
    if all(item.query_key_barrier and item.value_output_barrier for item in attentions):
        first = attentions[0]
        raise ValueError(
            f"No gauge of this model can be used. {first.name or type(model).__name__}: query and key are left alone because "
            f"of {first.query_key_barrier}, value and output because of {first.value_output_barrier}. If your model does "
            "allow it, pass architecture=AttentionSpec(..., output=..., query_key_barrier=None, value_output_barrier=None)."
        )
    return attentions


def _attention(found: AttentionModule, by_table: bool) -> _Attention:
    # A row of the table speaks for a class of that name; a variant of it may have a part that the row does not know.
    unknown = unknown_parts(found.module, found.spec) if by_table else None
    spec, heads = found.spec, found.heads
    output, preconditioned = _find_output(found)
    query_key = unknown or spec.query_key_barrier or _missing(heads, ("query", "key"))
    value_output = unknown or spec.value_output_barrier or _missing(heads, ("query", "value"))
    if preconditioned:
        value_output = value_output or PRECONDITIONER
    elif output is None:
        why = "given" if spec.output is None else f"in the part of the model that was given ({spec.output})"
        value_output = value_output or f"an output projection that is not {why}"
    elif {"query", "value"} <= heads.keys():
        found.check_output_inputs(output.name, output.by_head(output.module.weight).shape[0])
    return _Attention(**vars(found), output=output, query_key_barrier=query_key, value_output_barrier=value_output)


def _missing(heads: Mapping[str, int], needed: Sequence[str]) -> str | None:
    missing = [name for name in needed if name not in heads]
    return f"a missing {' and '.join(missing)} in the AttentionSpec" if missing else None


def _find_output(attention: AttentionModule) -> tuple[_Output | None, bool]:
    """The output projection, if it is known and a gauge may change it; and whether its input is preconditioned."""
    located = attention.located_output()
    if located is None or isinstance(located[1], PreconditionedLayer):
        return None, located is not None
    full_name, module = located
    if type(module) not in SPECTRAL_CLASSES:
        if (problem := module_problem(module, "balance")) is not None:
            raise ValueError(f"{full_name} {problem}")
        raise ValueError(
            f"{full_name} is a {type(module).__module__}.{type(module).__name__}; only exact torch.nn.Linear and "
            "transformers Conv1D modules can be balanced. Balance before quantizing, and before wrapping with PEFT."
        )
    return _Output(full_name, module), False


def _check_settings(model: nn.Module, probe: Any, tolerance: Any) -> None:
    if probe is not None and not (isinstance(probe, Mapping) and probe):
        raise ValueError(
            f"probe={probe!r} must be a mapping from arguments of the model's forward pass to values, such as what a "
            "tokenizer returns, or None."
        )
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < math.inf):
        raise ValueError(
            f"tolerance={tolerance!r} must be a finite number > 0, the greatest relative change of an output, or None to "
            "measure what the dtype itself costs."
        )
    first = next(spectral_layers(model), None)
    if first is not None:
        raise ValueError(
            f"{first[0]} is conditioned with {first[1].spectral.describe()}; balancing W would change W + C. Call "
            "fold(model) first, then balance."
        )


def _check_attentions(model: nn.Module, attentions: Sequence[_Attention]) -> None:
    parts = [(item.name, item.module) for attention in attentions for item in attention.everything]
    seen: dict[nn.Module, str] = {}
    for name, module in parts:
        if module in seen:
            raise ValueError(f"{name} and {seen[module]} are the same module; a shared projection has no gauge.")
        seen[module] = name
    refuse_unordinary(model, parts, "balance", ("weight", "bias"))
    for name, module in parts:
        for part in ("weight", "bias"):
            tensor = getattr(module, part)
            if tensor is None:
                continue
            if tensor.device.type == "mps":
                raise ValueError(
                    f"The {part} of {name} is on a device without float64. Move the model to the CPU first."
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"The {part} of {name} has nan or inf entries. Check the checkpoint.")


def _least_precise(attentions: Sequence[_Attention]) -> torch.dtype:
    dtypes = {module.weight.dtype for attention in attentions for module in attention.modules}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _balanced_outputs(model: nn.Module, probe: Mapping[str, Any], attentions: Sequence[_Attention]) -> Tensors:
    """The outputs with the balanced weights, of which one attention's exist at a time; the model is not changed."""
    current: dict[str, dict[nn.Module, Tensors]] = {}
    missed = {module: attention.name for attention in attentions for module in attention.modules}

    def tensors_of(attention: _Attention, module: nn.Module) -> Tensors:
        if attention.name not in current:
            current.clear()
            current[attention.name] = _as_stored(attention, _balanced(attention, _read(attention)))
        missed.pop(module, None)
        return current[attention.name][module]

    sources = {
        module: lambda attention=attention, module=module: tensors_of(attention, module)
        for attention in attentions
        for module in attention.modules
    }
    with substituted(sources):
        outputs = probe_outputs(model, probe)
    if missed:
        names = sorted(set(missed.values()))
        raise ValueError(
            f"The probe ({', '.join(probe)}) does not run the projections of "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, so that the outputs would show nothing. Pass "
            f"probe={{...}} that runs the whole model (a decoder with cross-attention needs encoder_hidden_states)."
        )
    return outputs


def _too_large(
    change: OutputChange, tolerance: float, dtype_error: float | None, dtype: torch.dtype
) -> OutputChangedError:
    measured = (
        "" if dtype_error is None else f" ({ERRORS_ALLOWED:g} times the own error of {dtype}, {dtype_error:.2g})"
    )
    return OutputChangedError(
        f"Balancing would change the outputs by {change.relative:.2g} relative to the greatest ({change.absolute:.2g} "
        f"absolute), more than the tolerance of {tolerance:.2g}{measured}, so the model was not changed. Either the "
        f"rounding of the balanced weights to {dtype} loses too much (balance model.float() and cast it afterwards, "
        "or pass tolerance=), or something stands between the projections of this model that architectures.py does "
        "not know.",
        change,
        tolerance,
    )
