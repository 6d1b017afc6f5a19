"""Preconditioned attention: each head's output equilibrated on its way into the output projection.

*Preconditioned Attention* (arXiv 2603.27153) multiplies each head's attention by a diagonal matrix that depends on query,
key and value. Its formula is not in any text that we could read. **What stands here is a third-party reading of it**, that
of a public repository: `C = diag(1 / |row_i(A)|)` for the output `A = softmax(Q K^T / sqrt d) V` of a head, `(positions,
head_dim)`, with the norm detached from the graph. Axis, gradient and scale are options.

It changes the function, `fold` cannot take it away, and it promises nothing about the condition number of `A`: for more
positions than channels, rows scaled alike can raise it (`I_64` over 133 rows `0.001 e_1`: from 1.0001 to 11.58).

It acts on what enters the output projection, split by heads, by the same change of class as the corrections of `layers`:
attention kernels (SDPA, flash) are not touched, and there is no parameter and no buffer.
"""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .adapted import refuse_adapters
from .architectures import UNSTATED, AttentionSpec, attention_specs, output_module, unknown_parts
from .compat import Conv1D
from .conditioning import Projection, find_projections
from .config import check_choice
from .corrections import at_least_float32

logger = logging.get_logger(__name__)

SOURCE = "a third-party reading of arXiv 2603.27153"
AXES = ("row", "column")
GRADIENTS = ("detached", "through")
SCALES = ("unit", "rms", "match")

# What a table's row need not know, because it acts on the attention weights or beside the heads' output.
HARMLESS_PARTS = (
    "q_norm",
    "k_norm",
    "relative_attention_bias",
    "relative_position_bias",
    "relative_position_bias_table",
    "continuous_position_bias_mlp",
    "logit_scale",
    "conv",  # Nystroemformer's: of the values, added to the output of each head
    "LayerNorm",  # ALBERT's, behind the output projection
)


@dataclass(frozen=True)
class PreconditionerConfig:
    """How the output of each head is scaled before the output projection (a third-party reading of arXiv 2603.27153).

    Args:
        axis: `"row"` divides each position's output by its norm over the head's channels; `"column"` each channel by its
            norm over the positions. A column mixes positions, so it is refused where they are masked.
        gradient: `"detached"` takes the norm for a constant in the backward pass, `"through"` differentiates it too.
        scale: what the norm becomes. `"unit"`: 1. `"rms"`: the root of the number of entries, so that their root mean
            square is 1 (of rows: RMSNorm per head, without gain). `"match"`: the mean norm that the layer's heads had on
            a probe when the preconditioner was put on, a fixed number; this control tells the equilibration from the
            change of scale that the other two bring along.
        eps: norms below it count as `eps`, so that a head's output of zero stays zero.

    Raises:
        ValueError: for a value outside these sets; the message says what is allowed.
    """

    axis: str = "row"
    gradient: str = "detached"
    scale: str = "unit"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choice("axis", self.axis, AXES)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("scale", self.scale, SCALES)
        # bool is a Real, and True would silently mean 1.
        if isinstance(self.eps, bool) or not isinstance(self.eps, Real) or not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps!r} is not allowed; give a finite number > 0, such as 1e-6.")
        object.__setattr__(self, "eps", float(self.eps))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def describe(self) -> str:
        """One short line for `extra_repr`, logs and reports, such as `row(unit, detached)`."""
        eps = "" if self.eps == type(self).eps else f", eps={self.eps:g}"
        return f"{self.axis}({self.scale}, {self.gradient}{eps})"


# --- the layer -------------------------------------------------------------------------------------------------------


def precondition_heads(
    input: Tensor, heads: int, preconditioner: PreconditionerConfig, stock_norm: float | None = None
) -> Tensor:
    """Each head's output divided by its norms along the axis, `max(norm, eps)`, times what the scale says.

    Norms and quotients are formed in at least float32.

    Args:
        input: `(..., positions, heads * head_dim)`.
        heads: the number of heads.
        preconditioner: the settings.
        stock_norm: what the norms become with `scale="match"`.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: for the column axis, if `input` has no dimension of positions beside the batch's.
    """
    if preconditioner.axis == "column" and input.dim() < 3:
        raise ValueError(
            f"axis='column' needs (batch, positions, channels), but what enters the output projection has the shape "
            f"{tuple(input.shape)}, in which positions of several samples may stand in one row; use axis='row'."
        )
    dim = -1 if preconditioner.axis == "row" else -3
    values = at_least_float32(input.unflatten(-1, (heads, -1)))
    measured = values.detach() if preconditioner.gradient == "detached" else values
    norms = torch.linalg.vector_norm(measured, dim=dim, keepdim=True).clamp_min(preconditioner.eps)
    if preconditioner.scale == "match":
        assert stock_norm is not None  # measured before the layer took its class
        factor: Any = stock_norm
    else:
        factor = 1.0 if preconditioner.scale == "unit" else values.shape[dim] ** 0.5
    return (values * (factor / norms)).to(input.dtype).flatten(-2)


class PreconditionedLayer(nn.Module):
    """What preconditioned `Linear` and `Conv1D` share. Made by `make_preconditioned`, never constructed.

    Attributes:
        preconditioner: the settings.
        heads: how many heads the input is split into.
        stock_norm: what the norms become with `scale="match"`; a Python number, which no cast and no sharding changes.
    """

    weight: Any  # nn.Parameter; declared by the stock class too
    preconditioner: PreconditionerConfig
    heads: int
    stock_norm: float | None

    def forward(self, input: Tensor) -> Tensor:
        """The stock product with the preconditioned input: `(..., heads * head_dim)` to `(..., out_features)`."""
        preconditioned = precondition_heads(input, self.heads, self.preconditioner, self.stock_norm)
        output: Tensor = super().forward(preconditioned)
        return output

    def _describe(self) -> str:
        return f"preconditioner={self.preconditioner.describe()} of {self.heads} heads"


class PreconditionedLinear(PreconditionedLayer, nn.Linear):
    """`nn.Linear` with preconditioned input."""

    def extra_repr(self) -> str:
        """The stock line, and what was applied."""
        return f"{super().extra_repr()}, {self._describe()}"


class PreconditionedConv1D(PreconditionedLayer, Conv1D):
    """transformers' `Conv1D` with preconditioned input."""

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}, {self._describe()})"


# Exact types only, as for the corrections: a subclass may read its weight in another way, or its input twice.
PRECONDITIONED_CLASSES: dict[type[nn.Module], type[PreconditionedLayer]] = {
    nn.Linear: PreconditionedLinear,
    Conv1D: PreconditionedConv1D,
}
STOCK_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    preconditioned: stock for stock, preconditioned in PRECONDITIONED_CLASSES.items()
}


def stock_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the preconditioner if it has one."""
    return STOCK_CLASSES.get(type(module), type(module))


def preconditioned_layers(model: nn.Module) -> Iterator[tuple[str, PreconditionedLayer]]:
    """`(full name, layer)` of each preconditioned output projection of `model`, each once."""
    for name, module in model.named_modules():
        if isinstance(module, PreconditionedLayer):
            yield name, module


# --- finding the output projections ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputProjection:
    """A module with W_O, the attention that it belongs to, and the heads that enter it."""

    name: str
    module: Any
    attention: str
    heads: int


def find_output_projections(
    model: nn.Module, architecture: AttentionSpec | Sequence[AttentionSpec] | None = None
) -> list[OutputProjection]:
    """The output projection of every attention of `model`, in the order of its modules.

    Raises:
        ValueError: where none is found, one is not known, lies in another module than `Linear` and `Conv1D`, or something
            mixes or normalizes heads before it.
    """
    specs = attention_specs(architecture)
    holders: dict[str, list[Projection]] = {}
    for item in find_projections(model, architecture):
        holders.setdefault(item.name.rpartition(".")[0], []).append(item)
    found = []
    for name, items in holders.items():
        spec = next(spec for spec in specs if spec.matches(model.get_submodule(name)))
        found.append(_output_projection(model, name, items, spec, by_table=architecture is None))
    modules = [item.module for item in found]
    if twice := [item for index, item in enumerate(found) if item.module in modules[:index]]:
        raise ValueError(
            f"{twice[0].name} is the output projection of two attentions, and can be preconditioned once."
        )
    return found


def _output_projection(
    model: nn.Module, name: str, items: list[Projection], spec: AttentionSpec, by_table: bool
) -> OutputProjection:
    attention = model.get_submodule(name)
    kind = f"{name or 'The model'} ({type(attention).__name__})"
    way_out = "pass architecture=AttentionSpec(..., output='<path to the output projection>')"
    located = output_module(model, name, spec)
    if located is None:
        missing = "the table does not say" if by_table else "the AttentionSpec does not say"
        why = missing if spec.output is None else f"the part of the model that was given does not hold ({spec.output})"
        raise ValueError(f"{kind} has an output projection that {why}; {way_out}, or the whole model.")
    between = None if spec.value_output_barrier == UNSTATED else spec.value_output_barrier
    if between is None and by_table:
        between = unknown_parts(attention, spec, HARMLESS_PARTS)
    if between is not None:
        raise ValueError(
            f"{kind} cannot be preconditioned: before its output projection stands {between}, so that what enters it is "
            f"not softmax(Q K^T) V of each head. If it is in your model, {way_out}."
        )
    full_name: str = located[0]
    module: Any = located[1]
    heads = {part: count for item in items for part, count in zip(item.layout.projections, item.layout.heads)}
    dims = {part: dim for item in items for part, dim in zip(item.layout.projections, item.layout.head_dims)}
    if not {"query", "value"} <= heads.keys():
        raise ValueError(f"{kind}: the AttentionSpec must name query and value, which say what the heads are.")
    if stock_class_of(module) not in PRECONDITIONED_CLASSES:
        raise ValueError(
            f"{full_name} is a {type(module).__module__}.{type(module).__name__}; only the input of exact torch.nn.Linear "
            "and transformers Conv1D modules can be preconditioned. Precondition before quantizing, and before wrapping with "
            "PEFT or the like."
        )
    inputs = module.weight.shape[0 if stock_class_of(module) is Conv1D else 1]
    if inputs != heads["query"] * dims["value"]:
        raise ValueError(
            f"{full_name} takes {inputs} inputs, but {heads['query']} query heads with values of length {dims['value']} "
            f"give {heads['query'] * dims['value']}; pass architecture=AttentionSpec(...) with the right output and numbers "
            "of heads."
        )
    return OutputProjection(full_name, module, name, heads["query"])


def _check_axis(model: nn.Module, outputs: Sequence[OutputProjection], preconditioner: PreconditionerConfig) -> None:
    """Refuse columns where positions are masked by design, or a batch of texts may be padded."""
    if preconditioner.axis != "column":
        return
    why = None
    for item in outputs:
        attention = model.get_submodule(item.attention)
        if getattr(attention, "is_causal", False) is True:
            why = f"{item.attention} is causal (a longer text would change earlier positions, and a cache is wrong)"
        elif hasattr(attention, "window_size") or any(hasattr(module, "shift_size") for module in model.modules()):
            why = f"{item.attention} attends within windows, which are shifted with a mask and padded"
    if why is None and "input_ids" in inspect.signature(model.forward).parameters:
        why = "it reads texts, whose batches are padded"
    if why is not None:
        raise ValueError(
            f"axis='column' scales each channel by its norm over all positions, masked ones too, and "
            f"{type(model).__name__} has such: {why}. Use axis='row'."
        )


def _refuse_masks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook of attentions with the column axis: only the forward pass knows of a mask that a caller gives."""
    masks = [name for name, value in kwargs.items() if name.endswith("mask") and value is not None]
    masks += ["is_causal"] if kwargs.get("is_causal") else []
    masks += ["a mask"] if any(isinstance(value, Tensor) for value in args[1:]) else []
    if masks:
        raise ValueError(
            f"{type(module).__name__} got {masks[0]}, and axis='column' scales each channel by its norm over all positions, "
            "masked ones too. Leave the mask out, or use axis='row'."
        )


def make_preconditioned(
    model: nn.Module,
    outputs: Sequence[OutputProjection],
    preconditioner: PreconditionerConfig,
    stock_norms: Sequence[float] | None = None,
) -> None:
    """Turn stock output projections into preconditioned ones, in place."""
    for index, item in enumerate(outputs):
        module = item.module
        module.__class__ = PRECONDITIONED_CLASSES[type(module)]
        module.preconditioner, module.heads = preconditioner, item.heads
        module.stock_norm = None if stock_norms is None else stock_norms[index]
        if preconditioner.axis == "column":
            model.get_submodule(item.attention).register_forward_pre_hook(_refuse_masks, with_kwargs=True)


# --- the reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreconditionReport:
    """What preconditioning does to the heads of one attention on the probe (a third-party reading of arXiv 2603.27153).

    The same output `A`, `(positions, head_dim)`, of each head is measured as it stands and preconditioned; the layers before
    are stock. Over several samples, or windows, condition numbers and bounds are geometric means.

    Attributes:
        name: full name of the module with W_O.
        attention: full name of the attention module.
        shape: `(positions, head_dim)` of a head's output.
        preconditioner: what was applied.
        mean_norm: of each head, the mean norm along the axis, as it stands.
        norm_after: what the norms become.
        kappa_before: of each head, the condition number of its output; inf where it is singular.
        kappa_after: the same of the preconditioned output; it can be greater.
        log10_bound_before: of each head, log10 of the paper's bound `B(A) = (2 / prod s_i) (|A|_F / sqrt k)^k` of kappa
            (Theorem 4.2). Vacuous as an estimate; it is what row equilibration minimizes for positions <= head_dim.
        log10_bound_after: the same of the preconditioned output.
    """

    name: str
    attention: str
    shape: tuple[int, int]
    preconditioner: PreconditionerConfig
    mean_norm: tuple[float, ...]
    norm_after: float
    kappa_before: tuple[float, ...]
    kappa_after: tuple[float, ...]
    log10_bound_before: tuple[float, ...]
    log10_bound_after: tuple[float, ...]

    @property
    def kappa_grew(self) -> tuple[int, ...]:
        """The heads whose condition number is greater than it was."""
        pairs = zip(self.kappa_before, self.kappa_after)
        return tuple(head for head, (before, after) in enumerate(pairs) if after > before)


def head_condition(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Condition number and log10 of the bound `B` of each head's output, geometric means over samples, in float64.

    Args:
        heads: `(samples, positions, heads, head_dim)`.

    Returns:
        kappa and log10 B, each `(heads,)`; inf where an output is singular.
    """
    sigma = torch.linalg.svdvals(heads.detach().double().transpose(1, 2))  # (samples, heads, k)
    k = sigma.shape[-1]
    singular = sigma[..., -1] <= 0
    log_kappa = (sigma[..., 0].log() - sigma[..., -1].log()).masked_fill(singular, math.inf)
    frobenius = torch.linalg.vector_norm(sigma, dim=-1)
    log_bound = math.log(2) - sigma.log().sum(-1) + k * (frobenius.log() - 0.5 * math.log(k))
    log_bound = log_bound.masked_fill(singular, math.inf)
    return log_kappa.mean(0).exp(), log_bound.mean(0) / math.log(10)


def _report(item: OutputProjection, heads: Tensor, preconditioner: PreconditionerConfig) -> PreconditionReport:
    """The report on one attention, of the stock output of its heads, `(samples, positions, heads, head_dim)` in float64."""
    dim = -1 if preconditioner.axis == "row" else 1
    norms = torch.linalg.vector_norm(heads, dim=dim)
    # Heads are the second last dimension of rows' norms, and of columns' too.
    head_norms = norms.mean((0, 1)) if preconditioner.axis == "row" else norms.mean((0, 2))
    stock_norm = norms.mean().item()
    after = precondition_heads(heads.flatten(-2), item.heads, preconditioner, stock_norm).unflatten(
        -1, (item.heads, -1)
    )
    length = heads.shape[dim]
    kappa, bound = head_condition(heads)
    new_kappa, new_bound = head_condition(after)
    return PreconditionReport(
        name=item.name,
        attention=item.attention,
        shape=(heads.shape[1], heads.shape[3]),
        preconditioner=preconditioner,
        mean_norm=tuple(head_norms.tolist()),
        norm_after={"unit": 1.0, "rms": length**0.5, "match": stock_norm}[preconditioner.scale],
        kappa_before=tuple(kappa.tolist()),
        kappa_after=tuple(new_kappa.tolist()),
        log10_bound_before=tuple(bound.tolist()),
        log10_bound_after=tuple(new_bound.tolist()),
    )


def format_preconditioning(reports: Sequence[PreconditionReport]) -> str:
    """A plain-text table, one line per attention, which says where kappa grew."""
    header = ("attention", "A", "|A|", "|C A|", "kappa(A)", "kappa(C A)", "log10 B(A)", "log10 B(C A)", "")
    rows = [header, *map(_row, reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
             for row in rows]  # fmt: skip
    grew = sum(len(report.kappa_grew) for report in reports)
    total = sum(len(report.kappa_before) for report in reports)
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            f"Means over heads (of condition numbers: geometric) on one probe, with stock layers before. Kappa grew in "
            f"{grew} of {total} heads. The preconditioner is {SOURCE}.",
        ]
    )


def _row(report: PreconditionReport) -> tuple[str, ...]:
    grew = ", ".join(map(str, report.kappa_grew))
    return (
        report.attention or "(model)",
        f"{report.shape[0]}x{report.shape[1]}",
        f"{_mean(report.mean_norm):.3g}",
        f"{report.norm_after:.3g}",
        f"{math.exp(_mean([math.log(kappa) for kappa in report.kappa_before])):.4g}",
        f"{math.exp(_mean([math.log(kappa) for kappa in report.kappa_after])):.4g}",
        f"{_mean(report.log10_bound_before):.4g}",
        f"{_mean(report.log10_bound_after):.4g}",
        f"kappa GREW in heads {grew}" if grew else "",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- precondition ----------------------------------------------------------------------------------------------------


def precondition(
    model: nn.Module,
    config: PreconditionerConfig,
    probe: Mapping[str, Any] | None = None,
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
) -> list[PreconditionReport]:
    """Precondition the attention of `model` in place (a third-party reading of arXiv 2603.27153).

    What enters each output projection is split into heads and divided by its norms, as `config` says. The *function
    changes*, so a trained model needs training afterwards, and no `fold` undoes it. Condition numbers may rise as well as
    fall; the reports say which.

    Args:
        model: any module that contains attention whose output projection the table in `architectures.py` knows; with
            `architecture`, any other.
        config: the settings.
        probe: keyword arguments of the model's forward pass that run every attention, on which the reports, and the norms of
            `scale="match"`, are measured; None makes 16 random tokens or a random picture. Pass real data to match norms.
        architecture: how the model keeps its projections, `output` included, where the table does not know.

    Returns:
        One report per attention.

    Raises:
        ValueError: for a model that is preconditioned already, an output projection that is not known or that heads are mixed
            or normalized before, the column axis where positions are masked, adapters of PEFT, a probe that fails or misses
            an attention. Nothing is changed then.
    """
    if not isinstance(config, PreconditionerConfig):
        raise ValueError(
            f"config={config!r} must be a PreconditionerConfig, such as PreconditionerConfig(axis='row')."
        )
    check_not_preconditioned(model)
    refuse_adapters(model)
    outputs = find_output_projections(model, architecture)
    _check_axis(model, outputs, config)
    return _measured(model, outputs, config, probe)


def check_not_preconditioned(model: nn.Module) -> None:
    """Raise a ValueError if anything in `model` is preconditioned."""
    first = next(preconditioned_layers(model), None)
    if first is not None:
        raise ValueError(
            f"{first[0]} is already preconditioned with {first[1].preconditioner.describe()}; start from the stock model to "
            "choose other settings."
        )


def _measured(
    model: nn.Module,
    outputs: Sequence[OutputProjection],
    config: PreconditionerConfig,
    probe: Mapping[str, Any] | None,
) -> list[PreconditionReport]:
    """The reports of stock attentions, which are preconditioned then."""
    attended = _attended(model, outputs, probe)
    reports = [_report(item, attended[item.module], config) for item in outputs]
    norms = [report.norm_after for report in reports] if config.scale == "match" else None
    make_preconditioned(model, outputs, config, norms)
    return reports


def _attended(
    model: nn.Module, outputs: Sequence[OutputProjection], probe: Mapping[str, Any] | None
) -> dict[nn.Module, Tensor]:
    """What enters each output projection on the probe, `(samples, positions, heads, head_dim)` in float64."""
    # By its name: an import statement would make that file, which no checkpoint needs, travel along.
    balance = importlib.import_module(".balance", __package__)
    probe = balance.probe_batch(model) if probe is None else probe
    seen: dict[nn.Module, list[Tensor]] = {item.module: [] for item in outputs}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module].append(args[0].detach().double())

    handles = [item.module.register_forward_pre_hook(see) for item in outputs]
    try:
        balance.probe_outputs(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    for item in outputs:
        if not seen[item.module]:
            raise ValueError(
                f"The probe ({', '.join(probe)}) does not run {item.name}, so that nothing could be measured. Pass "
                "probe={...} that runs all of the model (a decoder with cross-attention needs encoder_hidden_states)."
            )
        if not all(torch.isfinite(value).all() for value in seen[item.module]):
            raise ValueError(f"{item.name} gets nan or inf on the probe; pass another probe, or check the checkpoint.")
    return {item.module: _by_head(seen[item.module], item.heads) for item in outputs}


def _by_head(calls: Sequence[Tensor], heads: int) -> Tensor:
    # A module that several layers share is called by each of them.
    positions, width = calls[0].shape[-2:]
    same = torch.stack([call for call in calls if call.shape == calls[0].shape])
    return same.reshape(-1, positions, heads, width // heads)
