"""`condition` a model in place, and `fold` it back: `W + C` in, plain modules out."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import AttentionSpec
from .config import INITS, SpectralConfig, check_choice
from .corrections import at_least_float32
from .existing_adapters import refuse_adapters
from .layers import (
    HALF_PRECISION,
    ProjectionLayout,
    SpectralLayer,
    hold_projections,
    make_spectral,
    make_stock,
    refuse_replaced,
    release_projections,
    spectral_layers,
    unmake_spectral,
)
from .ordinary import refuse_no_module, refuse_unordinary
from .preconditioner import is_preconditioned
from .projection_report import ProjectionReport, Spectrum, build_report, format_reports, projection_spectra
from .projections import Projection, find_projections
from .refreshing import recompute, refresh, refresh_interval

__all__ = [
    "AttentionSpec",
    "ProjectionReport",
    "Spectrum",
    "condition",
    "fold",
    "format_reports",
    "refresh",
    "refresh_interval",
]

logger = logging.get_logger(__name__)


def condition(
    model: nn.Module,
    config: SpectralConfig,
    init: str = "additive",
    architecture: AttentionSpec | Sequence[AttentionSpec] | None = None,
) -> list[ProjectionReport]:
    """Make the query, key and value projections of `model`, or other targets, compute with `W + C`, in place.

    A transformers model of a known architecture also gets its conditioned class and configuration, so that
    `save_pretrained` writes a checkpoint that loads conditioned; pass the whole model then, not a part of it. A model that
    could not be loaded conditioned (found by `architecture`, or composed of several models) refuses to be saved until
    it is folded.

    Args:
        model: any module that contains attention of the table in `architectures.py`; with `architecture`, any other.
        config: what to add, and where.
        init: `"additive"` (the paper's SpecA) leaves W alone, so the *function changes* and the model needs training.
            `"preserve"` sets `W <- W - C`, so that `W + C` and the function do not change; the model then trains as
            the stock model does, except that weight decay pulls `W + C` toward C (static corrections only).
        architecture: where the model keeps its projections, if the table does not know it or should not be used.

    Returns:
        One report per conditioned projection.

    Raises:
        ValueError: for bad settings, no projection found, a target that matches nothing, a model already conditioned,
            tied, quantized, sharded or meta weights, `nn.MultiheadAttention`, PEFT adapters. Nothing is changed then.
    """
    _check_settings(model, config, init)
    _check_not_conditioned(model)
    refuse_adapters(model)
    projections = find_projections(model, architecture, output="output" in config.targets)
    _check_targets(projections, config)
    projections = _holding(config.targets, projections)
    as_the_table_says = architecture is None or _agrees_with_table(model, projections, config)
    refuse_unordinary(model, [(item.name, item.module) for item in projections], "condition")
    _check_values(projections, config)

    preserves = init == "preserve"
    layers: list[SpectralLayer] = []
    reports = []
    try:
        # Small models are done before a bar is drawn; None shows one on a terminal only.
        for item in logging.tqdm(projections, desc="Conditioning", disable=True if len(projections) < 24 else None):
            layers.append(layer := make_spectral(item.module, item.layout, config))
            before = projection_spectra(layer, layer.weight)
            if config.method == "svd":
                recompute(layer)
                check_range(item.name, layer)
            weight = without_correction(layer) if preserves else layer.weight
            after = projection_spectra(layer, layer.with_correction(weight))
            reports += [build_report(item.name, layer, name, before[name], after[name], preserves) for name in before]
    except BaseException:  # an interruption also leaves the model unchanged
        for layer in layers:
            unmake_spectral(layer)
        raise
    if preserves:
        if cost := half_precision_cost(layers, shift=-1):
            logger.warning_once(f"{cost}, so init='preserve' does not keep the function; condition in float32.")
        for layer in layers:
            subtract_correction(layer)
    hold_projections(model)
    adopt(model, is_conditioned, as_the_table_says, spectral=config)
    set_origin(model, "")
    return reports


def attach(model: nn.Module, config: SpectralConfig) -> None:
    """Make the projections of a freshly constructed, stock model conditioned, on whatever device (meta too).

    svd corrections stay zero until `recompute` or a checkpoint fills them.
    """
    projections = find_projections(model, output="output" in config.targets)
    _check_targets(projections, config)
    for item in _holding(config.targets, projections):
        make_spectral(item.module, item.layout, config)
    hold_projections(model)


@torch.no_grad()
def without_correction(layer: SpectralLayer) -> Tensor:
    """`W - C` with the C in force, formed in at least float32, in the dtype of the weight."""
    difference = at_least_float32(layer.weight) - at_least_float32(layer.current_correction())
    return difference.to(layer.weight.dtype)


@torch.no_grad()
def subtract_correction(layer: SpectralLayer) -> None:
    """`W <- W - C`: the effective weight becomes the original W."""
    layer.weight.copy_(without_correction(layer))


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Replace each conditioned projection by the stock module with weight `W + C`, in place.

    The sum is formed in at least float32 and cast once, as in the forward pass: a float32 or float64 model computes the
    same numbers as before. A half-precision identity model loses most of W's diagonal to the rounding of `W + lambda I`,
    so the measured loss is logged; fold in float32 to keep it. Weights that accelerate has offloaded are folded too,
    one layer at a time, and stay in memory from then on.

    Returns:
        `model`, with its stock class and configuration, whose checkpoints need no code of this package. A preconditioned
        model stays one: no weight holds its preconditioner.

    Raises:
        ValueError: if nothing in `model` is conditioned, a projection was replaced, or one carries what a change of its class
            and weight does not reach (see `ordinary`). Nothing is changed then.
    """
    refuse_no_module(model, "fold")
    refuse_replaced(model)
    layers = list(spectral_layers(model))
    if not layers:
        beside = " (no weight can hold its preconditioner, which stays)" if is_preconditioned(model) else ""
        raise ValueError(
            f"fold() found no conditioned projection in this model{beside}; condition it first, or do not fold it."
        )
    refuse_unordinary(model, layers, "fold", offloaded=True)
    if cost := half_precision_cost([layer for _, layer in layers if not layer.weight.is_meta], shift=1):
        logger.warning(
            f"{cost}. Fold in float32 (model.float()) and cast afterwards to do it once, or keep the model conditioned, if W "
            "itself matters; the outputs stay within the dtype's own error."
        )
    for _, layer in layers:
        make_stock(layer)
    release_projections(model)
    _release(model)
    set_origin(model, "")
    if is_preconditioned(model):
        hold_projections(model)
        logger.warning(
            "The corrections are folded, but the preconditioner of attention stays: no weight can hold it, and its "
            "checkpoints still need this package."
        )
    return model


def _holding(targets: Sequence[str], projections: list[Projection]) -> list[Projection]:
    """Those that hold at least one target."""
    return [item for item in projections if set(item.layout.projections) & set(targets)]


# --- checks, all made before anything changes ------------------------------------------------------------------------


def _check_settings(model: Any, config: Any, init: Any) -> None:
    refuse_no_module(model, "condition")
    if not isinstance(config, SpectralConfig):
        raise ValueError(f"config={config!r} must be a SpectralConfig, such as SpectralConfig(method='svd').")
    check_choice("init", init, INITS)
    if init == "preserve" and config.dynamic:
        raise ValueError(
            f"init='preserve' with refresh_every={config.refresh_every} is not possible: a correction recomputed from "
            "W - C is a different one, and the function would jump at the first refresh. Use init='additive' or "
            "refresh_every=None."
        )


def _check_not_conditioned(model: nn.Module) -> None:
    first = next(spectral_layers(model), None)
    if first is not None:
        raise ValueError(
            f"{first[0]} is already conditioned with {first[1].spectral.describe()}; conditioning twice would add both "
            "corrections. Call fold(model) first, then condition again."
        )


def _check_targets(projections: list[Projection], config: SpectralConfig) -> None:
    found = {name for item in projections for name in item.layout.projections}
    missing = [target for target in config.targets if target not in found]
    if missing:
        raise ValueError(
            f"targets={config.targets}: no module of this model holds {', '.join(missing)} (found: {sorted(found)}). "
            "Choose other targets, or pass an architecture=AttentionSpec(...) that maps the missing ones."
        )


def _check_values(projections: list[Projection], config: SpectralConfig) -> None:
    for item in projections:
        check_values(item.name, item.orient(item.module.weight), item.layout, config)
        check_lambda(item.name, item.module.weight, config)


@torch.no_grad()
def check_values(name: str, matrix: Tensor, layout: ProjectionLayout, config: SpectralConfig) -> None:
    """Refuse an `(out_features, in_features)` weight that has no correction.

    Raises:
        ValueError: for nan and inf; for svd also where a matrix with a C of its own is zero.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(f"The weight of {name} has nan or inf entries. Check the checkpoint.")
    if config.method != "svd":
        return
    per_head = config.granularity == "head"
    for projection, part in layout.split(matrix).items():
        if projection not in config.targets:
            continue
        blocks = layout.head_blocks(projection, part) if per_head else part[None]
        for head, block in enumerate(blocks):
            if not block.any():
                where, way_out = (f" (head {head})", "granularity='projection' or ") if per_head else ("", "")
                raise ValueError(
                    f"The weight of {name} is zero in {projection}{where}, and a zero matrix has no spectral correction. "
                    f"Initialize it, or use {way_out}method='identity'."
                )


def check_range(name: str, layer: SpectralLayer) -> None:
    """Refuse an svd correction whose sum with a huge W is not finite.

    Raises:
        ValueError: naming the layer.
    """
    if not torch.isfinite(layer.effective_weight()).all():
        raise ValueError(
            f"W + C of {name} is beyond {layer.weight.dtype}: W has entries of {layer.weight.abs().max():.3g}. Check the "
            "checkpoint, or convert the model to a wider dtype first."
        )


# What weights that start at zero, or near it, become after a few training steps.
SOON = 1e-3


def check_lambda(name: str, weight: Tensor, config: SpectralConfig) -> None:
    """Refuse a lambda beyond the weight's dtype, or so large that the sum `W + lambda I` keeps no digit of W.

    Raises:
        ValueError: naming it, and the greatest that is allowed.
    """
    lambdas = [value for value in map(config.lambda_for, config.targets) if value is not None]
    if not lambdas:
        return
    greatest = weight.detach().abs().max().item() if weight.numel() else 0.0
    precision = torch.finfo(at_least_float32(weight.new_empty(0)).dtype).eps
    limit = min(torch.finfo(weight.dtype).max, 2 * max(greatest, SOON) / precision)
    if max(lambdas) >= limit:
        raise ValueError(
            f"lambda_={max(lambdas):g} is too large for {name}, whose {weight.dtype} entries are at most "
            f"{greatest:.3g}: nothing of W would be left in W + lambda I. Choose a lambda far below {limit:.2g}; the "
            "paper's is 10."
        )


# --- half precision --------------------------------------------------------------------------------------------------


def _rounds_diagonal(layer: SpectralLayer) -> bool:
    return layer.spectral.method == "identity" and layer.weight.dtype in HALF_PRECISION


def half_precision_cost(layers: Sequence[SpectralLayer], shift: int) -> str | None:
    """The error of W under C's nonzero entries when `W + shift * C` is stored in the weights' dtype; None if there is
    none."""
    errors = [_diagonal_error(layer, shift) for layer in layers if _rounds_diagonal(layer)]
    if not errors:
        return None
    return (
        f"lambda * I and {layers[0].weight.dtype} weights do not go together: the sum rounds W's diagonal with a mean "
        f"relative error of {sum(errors) / len(errors):.2g}"
    )


def _diagonal_error(layer: SpectralLayer, shift: int) -> float:
    correction = layer.current_correction()
    touched = correction != 0
    weight, term = layer.weight[touched].float(), shift * correction[touched].float()
    recovered = (weight + term).to(layer.weight.dtype).float() - term
    return ((recovered - weight).abs().mean() / weight.abs().mean()).item()


# --- the class and configuration of transformers models --------------------------------------------------------------

NO_COUNTERPART = (
    "has no conditioned counterpart to be saved as, and its checkpoint would load without the corrections. Call "
    "fold(model) before save_pretrained, or save model.state_dict() and condition the reloaded model again before "
    "load_state_dict."
)

NO_PRECONDITIONED_COUNTERPART = (
    "has no preconditioned class to be saved as, and its checkpoint would load without the preconditioner. Save "
    "model.state_dict(), and precondition the reloaded model before load_state_dict."
)

# Stock model class -> its conditioned class (with `adopt`, and `release` the way back). `modeling` fills it, which this
# file cannot import, one model type at a time.
CONDITIONED_CLASSES: dict[type[PreTrainedModel], Any] = {}
_define: list[Callable[[type[PreTrainedModel]], None]] = []


def define_with(define: Callable[[type[PreTrainedModel]], None]) -> None:
    """Say who makes the conditioned classes of the model type that a stock class belongs to."""
    _define[:] = [define]


def conditioned_counterpart(stock: type[PreTrainedModel]) -> Any:
    """The conditioned class of a stock model class; None if it has none. For a conditioned class, itself."""
    if stock in CONDITIONED_CLASSES.values():
        return stock
    if stock not in CONDITIONED_CLASSES:
        for define in _define:
            define(stock)
    return CONDITIONED_CLASSES.get(stock)


def set_origin(model: nn.Module, path: str) -> None:
    """Record where a checkpoint of the current `model` can be found; "" if there is none (see `peft`).

    What was named before stays in `made_from`.
    """
    for submodel in _submodels(model):
        if submodel.name_or_path:
            vars(submodel)["made_from"] = submodel.name_or_path
        submodel.name_or_path = path


def _submodels(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _outermost_pretrained(model: nn.Module) -> list[PreTrainedModel]:
    if isinstance(model, PreTrainedModel):
        return [model]
    return [host for child in model.children() for host in _outermost_pretrained(child)]


def is_conditioned(model: nn.Module) -> bool:
    """Whether any projection of `model` has a correction."""
    return next(spectral_layers(model), None) is not None


def adopt(
    model: nn.Module,
    is_changed: Callable[[nn.Module], bool],
    as_the_table_says: bool,
    why_not: str = NO_COUNTERPART,
    **settings: Any,
) -> None:
    """Give the transformers models in `model` that were changed their conditioned class and configuration.

    Args:
        model: what was changed.
        is_changed: says it of a model.
        as_the_table_says: whether a checkpoint would be changed alike when it is loaded.
        why_not: what `save_pretrained` says of those that cannot be saved.
        settings: what `SpectralModelMixin.adopt` takes.
    """
    for host in _outermost_pretrained(model):
        counterpart = conditioned_counterpart(type(host)) if as_the_table_says else None
        if counterpart is not None:
            if is_changed(host):
                counterpart.adopt(host, **settings)
            continue
        for submodel in _submodels(host):
            if is_changed(submodel):
                refuse_to_save(submodel, why_not)  # it would silently lose its conditioning


def _release(model: nn.Module) -> None:
    submodels = _submodels(model)
    for submodel in submodels:
        submodel.__dict__.pop("save_pretrained", None)
        if type(submodel) not in CONDITIONED_CLASSES.values():
            continue
        conditioned_config = submodel.config
        submodel.release()  # type: ignore[operator]
        for composite in submodels:  # a composite's configuration holds those of its parts
            names = [name for name, value in vars(composite.config).items() if value is conditioned_config]
            if names:
                composite.config = copy.copy(
                    composite.config
                )  # another model may have been built from the same object
            for name in names:
                setattr(composite.config, name, submodel.config)
    for submodel in submodels:
        if is_preconditioned(submodel) and getattr(submodel.config, "preconditioner_config", None) is None:
            refuse_to_save(submodel, NO_PRECONDITIONED_COUNTERPART)


def _agrees_with_table(model: nn.Module, projections: list[Projection], config: SpectralConfig) -> bool:
    """Whether a checkpoint, which is conditioned by the table when it is loaded, would be conditioned as the model is."""
    try:
        by_table = _holding(config.targets, find_projections(model, output="output" in config.targets))
    except ValueError:
        return False
    return {item.name: item.layout for item in by_table} == {item.name: item.layout for item in projections}


def refuse_to_save(model: PreTrainedModel, why: str = NO_COUNTERPART) -> None:
    """Make `save_pretrained` of a model an error: a checkpoint of it would be loaded as something else."""
    refusal = functools.partial(_refuse_to_save, f"{type(model).__name__} {why}")
    model.save_pretrained = refusal  # type: ignore[method-assign]


def can_be_saved(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` of a model writes what the Auto classes load as the same model."""
    return "save_pretrained" not in vars(model)


def _refuse_to_save(message: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(message)
