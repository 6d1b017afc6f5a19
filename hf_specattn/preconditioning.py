"""Preconditioned attention: each head's output equilibrated on its way into the output projection.

*Preconditioned Attention* (arXiv 2603.27153) multiplies each head's attention by a diagonal matrix that depends on
query, key and value. No text that we could read has its formula. **This is a third-party reading of it**, that of a
public repository: `C = diag(1 / |row_i(A)|)` for the output `A = softmax(Q K^T / sqrt d) V` of a head,
`(positions, head_dim)`, with the norm detached from the graph. Axis, gradient and scale are options.

It changes the function, `fold` cannot remove it, and it guarantees nothing about the condition number of `A`: with more
positions than channels, equal row norms can raise it (`I_64` over 133 rows `0.001 e_1`: from 1.0001 to 11.58).

It acts on the input of the output projection, split by heads, through a change of class as in `layers`: attention kernels
(SDPA, flash) are not touched, and there is no parameter and no buffer.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import UNSTATED, AttentionSpec, unknown_parts
from .compat import Conv1D
from .conditioning import NO_PRECONDITIONED_COUNTERPART, adopt, set_origin
from .existing_adapters import refuse_adapters
from .layers import SpectralLayer, hold_projections
from .ordinary import refuse_no_module, refuse_unordinary
from .preconditioner import (
    PRECONDITIONED_CLASSES,
    PreconditionerConfig,
    is_preconditioned,
    make_preconditioned,
    precondition_heads,
    preconditioned_layers,
    stock_class_of,
)
from .projection_report import text_table
from .projections import AttentionModule, find_attention_modules

logger = logging.get_logger(__name__)

SOURCE = "a third-party reading of arXiv 2603.27153"

# What a row of the table need not mention, because it acts on the attention weights or in parallel to the heads'
# output.
HARMLESS_PARTS = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "sinks",
    "relative_attention_bias",
    "relative_position_bias",
    "relative_position_bias_table",
    "continuous_position_bias_mlp",
    "logit_scale",
    "conv",  # Nystroemformer's: of the values, added to the output of each head
    "LayerNorm",  # ALBERT's, behind the output projection
)


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
        ValueError: if none is found, one is not known or is neither a `Linear` nor a `Conv1D`, or something mixes or
        normalizes heads before it.
    """
    by_table = architecture is None
    found = [_output_projection(attention, by_table) for attention in find_attention_modules(model, architecture)]
    modules = [item.module for item in found]
    if twice := [item for index, item in enumerate(found) if item.module in modules[:index]]:
        raise ValueError(
            f"{twice[0].name} is the output projection of two attentions, and can be preconditioned only once."
        )
    return found


def _output_projection(attention: AttentionModule, by_table: bool) -> OutputProjection:
    spec, heads = attention.spec, attention.heads
    kind = f"{attention.name or 'The model'} ({type(attention.module).__name__})"
    way_out = "pass architecture=AttentionSpec(..., output='<path to the output projection>')"
    between = None if spec.value_output_barrier == UNSTATED else spec.value_output_barrier
    if between is None and by_table:
        between = unknown_parts(attention.module, spec, (*HARMLESS_PARTS, *spec.harmless))
    if between is not None:
        raise ValueError(
            f"{kind} cannot be preconditioned: before its output projection there is {between}, so its input is not "
            f"softmax(Q K^T) V of each head. If it is in your model, {way_out}."
        )
    located = attention.located_output()
    if located is None:
        missing = "the table does not say" if by_table else "the AttentionSpec does not say"
        why = missing if spec.output is None else f"is not in the part of the model that was passed ({spec.output})"
        raise ValueError(f"{kind} has an output projection that {why}; {way_out}, or the whole model.")
    full_name: str = located[0]
    module: Any = located[1]
    if not {"query", "value"} <= heads.keys():
        raise ValueError(f"{kind}: the AttentionSpec must name query and value, which say what the heads are.")
    if isinstance(module, SpectralLayer):
        raise ValueError(
            f"{full_name} has a spectral correction, and an output projection has either that or a preconditioner; condition "
            "without 'output' among the targets, or fold the model first."
        )
    if stock_class_of(module) not in PRECONDITIONED_CLASSES:
        raise ValueError(
            f"{full_name} is a {type(module).__module__}.{type(module).__name__}; only the input of exact torch.nn.Linear "
            "and transformers Conv1D modules can be preconditioned. Precondition before quantizing, and before wrapping with "
            "PEFT or similar."
        )
    attention.check_output_inputs(full_name, module.weight.shape[0 if stock_class_of(module) is Conv1D else 1])
    return OutputProjection(full_name, module, attention.name, heads["query"])


def check_axis(model: nn.Module, outputs: Sequence[OutputProjection], preconditioner: PreconditionerConfig) -> None:
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


def _hook_masks(model: nn.Module) -> None:
    """Let the forward pass of a model with the column axis refuse a mask that a caller gives: only there is it known.

    Not that of its attentions: while a graph is traced, transformers makes them a mask of its own that masks nothing.
    """
    for module in model.modules():
        if module is model or isinstance(module, PreTrainedModel):
            parameters = inspect.signature(module.forward).parameters
            places = tuple(place for place, name in enumerate(parameters) if name.endswith("mask"))
            module.register_forward_pre_hook(functools.partial(_refuse_masks, places), with_kwargs=True)


def _refuse_masks(places: tuple[int, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    masks = [name for name, value in kwargs.items() if name.endswith("mask") and value is not None]
    masks += ["is_causal"] if kwargs.get("is_causal") else []
    masks += ["a mask" for place in places if place < len(args) and args[place] is not None]
    if masks:
        raise ValueError(
            f"{type(module).__name__} got {masks[0]}, and axis='column' scales each channel by its norm over all positions, "
            "masked ones too. Leave the mask out, or use axis='row'."
        )


def attach_preconditioner(
    model: nn.Module,
    outputs: Sequence[OutputProjection],
    preconditioner: PreconditionerConfig,
    stock_norms: Sequence[float] | None = None,
) -> None:
    """Turn stock output projections into preconditioned ones, in place, on whatever device (meta too).

    Raises:
        ValueError: for the column axis where positions are masked, and unless there is a norm for each where norms are
            matched.
    """
    check_axis(model, outputs, preconditioner)
    if preconditioner.scale == "match" and len(stock_norms or ()) != len(outputs):
        raise ValueError(
            f"scale='match' needs the mean norm of each attention's heads, measured on its weights: there are "
            f"{len(stock_norms or ())} norms for {len(outputs)} attentions. Make or load the stock model with its weights "
            "and layers, then call hf_specattn.precondition(model, PreconditionerConfig(scale='match'))."
        )
    for index, item in enumerate(outputs):
        stock_norm = float(stock_norms[index]) if stock_norms and preconditioner.scale == "match" else None
        make_preconditioned(item.module, item.heads, preconditioner, stock_norm)
    hold_projections(model)
    if preconditioner.axis == "column":
        _hook_masks(model)


# --- the reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreconditionReport:
    """What preconditioning does to the heads of one attention on the probe (a third-party reading of arXiv 2603.27153).

    The same output `A`, `(positions, head_dim)`, of each head is measured without and with the preconditioner. The layers
    before it are stock in a report of [`precondition`], and unchanged in one of [`preconditioning_reports`]. Condition
    numbers and bounds are geometric means over samples, or windows.

    Attributes:
        name: full name of the module with W_O.
        attention: full name of the attention module.
        shape: `(positions, head_dim)` of a head's output.
        preconditioner: what was applied.
        mean_norm: of each head, the mean norm along the axis, without the preconditioner.
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

    @property
    def mean_kappa(self) -> tuple[float, float]:
        """Geometric means over the heads of `kappa_before` and `kappa_after`."""
        return geometric_mean(self.kappa_before), geometric_mean(self.kappa_after)


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


def _report(
    item: OutputProjection, heads: Tensor, preconditioner: PreconditionerConfig, stock_norm: float | None = None
) -> PreconditionReport:
    """The report on one attention, of the output of its heads, `(samples, positions, heads, head_dim)` in float64.

    Args:
        stock_norm: what `scale="match"` sets; None for the mean norm of these heads.
    """
    dim = -1 if preconditioner.axis == "row" else 1
    norms = torch.linalg.vector_norm(heads, dim=dim)
    # Heads are the second last dimension of rows' norms, and of columns' too.
    head_norms = norms.mean((0, 1)) if preconditioner.axis == "row" else norms.mean((0, 2))
    stock_norm = norms.mean().item() if stock_norm is None else stock_norm
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
    """Return a plain-text table with one line per attention that says where kappa grew."""
    header = ("attention", "A", "|A|", "|C A|", "kappa(A)", "kappa(C A)", "log10 B(A)", "log10 B(C A)", "")
    grew = sum(len(report.kappa_grew) for report in reports)
    total = sum(len(report.kappa_before) for report in reports)
    return (
        f"{text_table([header, *map(_row, reports)])}\n"
        f"Means over heads (of condition numbers: geometric) on one probe. Kappa grew in {grew} of {total} heads. The "
        f"preconditioner is {SOURCE}."
    )


def _row(report: PreconditionReport) -> tuple[str, ...]:
    grew = ", ".join(map(str, report.kappa_grew))
    before, after = report.mean_kappa
    return (
        report.attention or "(model)",
        f"{report.shape[0]}x{report.shape[1]}",
        f"{fmean(report.mean_norm):.3g}",
        f"{report.norm_after:.3g}",
        f"{before:.4g}",
        f"{after:.4g}",
        f"{fmean(report.log10_bound_before):.4g}",
        f"{fmean(report.log10_bound_after):.4g}",
        f"kappa GREW in heads {grew}" if grew else "",
    )


# --- precondition ----------------------------------------------------------------------------------------------------


def precondition(
    model: nn.Module,
    config: PreconditionerConfig,
    probe: Mapping[str, Any] | None = None,
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
) -> list[PreconditionReport]:
    """Precondition the attention of `model` in place (a third-party reading of arXiv 2603.27153).

    The input of each output projection is split into heads and divided by its norms, as `config` says. The *function
    changes*, so a trained model needs training afterwards, and `fold` does not undo it. Condition numbers may rise as well
    as fall; the reports say which. Like [`condition`], it gives a transformers model of a known architecture its class and
    configuration, so that `save_pretrained` writes a checkpoint that loads preconditioned; others refuse to be saved.

    Args:
        model: any module that contains attention whose output projection the table in `architectures.py` knows; with
            `architecture`, any other.
        config: the settings.
        probe: keyword arguments of the model's forward pass that run every attention, on which the reports, and the norms of
            `scale="match"`, are measured; None makes 16 random tokens or a random image. Pass real data to match norms.
        architecture: where the model keeps its projections, including `output`, if the table does not know.

    Returns:
        One report per attention.

    Raises:
        ValueError: for a model that is already preconditioned, an output projection that is not known or has heads
        mixed or normalized before it, the column axis where positions are masked, PEFT adapters, and a probe that
        fails or misses an attention. Nothing is changed then.
    """
    if not isinstance(config, PreconditionerConfig):
        raise ValueError(
            f"config={config!r} must be a PreconditionerConfig, such as PreconditionerConfig(axis='row')."
        )
    refuse_no_module(model, "precondition")
    check_not_preconditioned(model)
    refuse_adapters(model)
    outputs = find_output_projections(model, architecture)
    refuse_unordinary(
        model, [(item.name, item.module) for item in outputs], "precondition", sharded=True, reads_only=True
    )
    check_axis(model, outputs, config)
    as_the_table_says = architecture is None or _agrees_with_table(model, outputs)
    attended = _attended(model, outputs, probe)
    reports = [_report(item, attended[item.module], config) for item in outputs]
    norms = [report.norm_after for report in reports] if config.scale == "match" else None
    attach_preconditioner(model, outputs, config, norms)
    adopt(
        model, is_preconditioned, as_the_table_says, NO_PRECONDITIONED_COUNTERPART, preconditioner=config, norms=norms
    )
    set_origin(model, "")
    return reports


def preconditioning_reports(
    model: nn.Module,
    probe: Mapping[str, Any] | None = None,
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
) -> list[PreconditionReport]:
    """What the preconditioner of a preconditioned model does to its heads on a probe, with the layers unchanged.

    Arguments as in [`precondition`]; nothing is changed.

    Returns:
        One report per attention.

    Raises:
        ValueError: for a model without a preconditioner, and for a probe that fails or misses an attention.
    """
    if not is_preconditioned(model):
        raise ValueError(
            f"{type(model).__name__} has no preconditioner; precondition(model, ...) reports what it does."
        )
    outputs = [item for item in find_output_projections(model, architecture) if hasattr(item.module, "preconditioner")]
    attended = _attended(model, outputs, probe)
    return [
        _report(item, attended[item.module], item.module.preconditioner, item.module.stock_norm) for item in outputs
    ]


def _agrees_with_table(model: nn.Module, outputs: Sequence[OutputProjection]) -> bool:
    """Whether a checkpoint, which is preconditioned by the table when it is loaded, would be preconditioned alike."""
    try:
        by_table = find_output_projections(model)
    except ValueError:
        return False
    return [(item.name, item.heads) for item in by_table] == [(item.name, item.heads) for item in outputs]


def check_not_preconditioned(model: nn.Module) -> None:
    """Raise a ValueError if anything in `model` is preconditioned."""
    first = next(preconditioned_layers(model), None)
    if first is not None:
        raise ValueError(
            f"{first[0]} is already preconditioned with {first[1].preconditioner.describe()}; start from the stock model to "
            "choose other settings."
        )


def _attended(
    model: nn.Module, outputs: Sequence[OutputProjection], probe: Mapping[str, Any] | None
) -> dict[nn.Module, Tensor]:
    """What enters each output projection on the probe, `(samples, positions, heads, head_dim)` in float64."""
    # By its name: an import statement would copy that file, which no checkpoint needs, into checkpoints.
    outputs_of = importlib.import_module(".model_outputs", __package__)
    probe = outputs_of.probe_batch(model) if probe is None else probe
    seen: dict[nn.Module, list[Tensor]] = {item.module: [] for item in outputs}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module].append(args[0].detach().double())

    handles = [item.module.register_forward_pre_hook(see) for item in outputs]
    try:
        outputs_of.probe_outputs(model, probe)
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
