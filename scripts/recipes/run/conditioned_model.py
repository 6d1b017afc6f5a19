"""From a run's stock model to its conditioned one: lambda is found, C added, the preconditioner put on, saturation named."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from hf_specattn import condition, precondition
from hf_specattn.config import SpectralConfig
from hf_specattn.config_fields import MODEL_TYPE_PREFIX
from hf_specattn.layers import spectral_layers
from hf_specattn.preconditioner import PreconditionerConfig

from .distributed import run_on_main_process
from .projection_init import STOCK, keep_norms
from .run_arguments import RunArguments
from .spectral_arguments import AUTO, SpectralArguments

logger = logging.getLogger(__name__)

# Samples on which lambda is found and saturation looked for: attention weights are kept for each.
SAMPLES = 8


class ConditioningError(ValueError):
    """The model cannot be conditioned as the flags say; the message says what to do."""


def condition_model(
    model: PreTrainedModel,
    arguments: RunArguments,
    spectral: SpectralArguments,
    samples: Mapping[str, Any],
    accelerator: Accelerator,
) -> None:
    """Condition and precondition the model of a run in place, as its flags say. Every process calls it.

    A checkpoint that is conditioned already keeps what it has; flags may repeat it.

    Args:
        spectral: `found_lambda` is set where lambda is `auto`.
        samples: What the model reads of the first samples: lambda is found on them, and saturation looked for.

    Raises:
        ConditioningError: for a model without projections that are known, and for settings that do not fit it.
    """
    try:
        if spectral.spectral_conditioning and not _keeps_its_own(model, spectral):
            if arguments.match_norm_of == STOCK:
                keep_norms(model, _settings(spectral))
            _condition(model, spectral, samples, accelerator)
        preconditioner = arguments.preconditioner()
        if preconditioner is not None and _preconditioner_of(model) != preconditioner:
            reports = precondition(model, preconditioner, probe=samples)
            logger.info(f"Preconditioned the outputs of {len(reports)} attentions: {preconditioner.describe()}.")
    except ValueError as error:
        raise ConditioningError(str(error)) from error
    # What auto found saturates nothing.
    if accelerator.is_main_process and not spectral.is_automatic and next(spectral_layers(model), None) is not None:
        _warn_of_saturation(model, samples)


def _condition(
    model: PreTrainedModel, spectral: SpectralArguments, samples: Mapping[str, Any], accelerator: Accelerator
) -> None:
    if spectral.is_automatic:
        highest = _settings(spectral)
        spectral.found_lambda = run_on_main_process(accelerator, lambda: find_lambda(model, highest, samples))
    config = _settings(spectral)
    reports = condition(model, config, init=spectral.init)
    before, after = (max(getattr(report, kappa) for report in reports) for kappa in ("kappa_before", "kappa_after"))
    logger.info(
        f"Conditioned {len(reports)} projections by {config.describe()}, init {spectral.init}: the largest condition number "
        f"was {before:.4g} of W and is {after:.4g} of W + C."
    )


def find_lambda(model: nn.Module, highest: SpectralConfig, samples: Mapping[str, Any]) -> float:
    """The lambda of `highest`, or the largest below it (to 5 %) at which no layer's softmax is saturated on the samples.

    Raises:
        ValueError: where no lambda helps, or the model is of no known architecture.
    """
    # Here, because the diagnostics take a while to import.
    from hf_specattn.diagnostics.advice import SMALLEST_FACTOR, unsaturated_lambda

    assert isinstance(highest.lambda_, float)
    trial = copy.deepcopy(model)
    condition(trial, highest)
    try:
        found = unsaturated_lambda(trial, samples)
    except ValueError as error:
        logger.warning(
            f"--lambda_ {AUTO} takes {highest.lambda_:g}: whether the softmax is saturated cannot be seen in this model. "
            f"{error}"
        )
        return highest.lambda_
    if found is None:
        raise ValueError(
            f"--lambda_ {AUTO}: the softmax is saturated on the first samples with each lambda from {highest.lambda_:g} down "
            f"to {highest.lambda_ * SMALLEST_FACTOR:g}: W_Q and W_K themselves are too large. Scale them down "
            "(--initialization_scale), or take --spectral_method svd."
        )
    why = "saturates no layer" if found == highest.lambda_ else "is the largest that saturates no layer"
    logger.info(f"--lambda_ {AUTO} takes {found:g}, which {why} on the first samples.")
    return found


def _warn_of_saturation(model: nn.Module, samples: Mapping[str, Any]) -> None:
    from hf_specattn.diagnostics.advice import advise

    try:
        advice = advise(model, samples, bound=False)
    except ValueError as error:
        logger.info(f"Whether the softmax is saturated cannot be seen in this model. {error}")
        return
    for warning in advice.warnings():
        logger.warning(warning)


def _keeps_its_own(model: PreTrainedModel, spectral: SpectralArguments) -> bool:
    """Whether the model comes from a conditioned checkpoint, as the flags ask."""
    if not model.config.model_type.startswith(MODEL_TYPE_PREFIX) or model.config.spectral_config is None:
        return False
    if spectral.is_automatic:
        spectral.found_lambda = model.config.spectral_config.lambda_
    asked_for = _settings(spectral)
    if model.config.spectral_config == asked_for:
        return True
    raise ValueError(
        f"--spectral_conditioning: the flags ask for {asked_for.describe()}, and the checkpoint was trained with "
        f"{model.config.describe_conditioning()}. Leave the flags out to continue with it as it is; to change it, "
        "fold the model (hf_specattn.fold), save it, and condition it again."
    )


def _settings(spectral: SpectralArguments) -> SpectralConfig:
    config = spectral.to_config()
    assert config is not None  # asked for
    return config


def _preconditioner_of(model: PreTrainedModel) -> PreconditionerConfig | None:
    return getattr(model.config, "preconditioner_config", None)
