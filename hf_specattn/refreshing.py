"""Dynamic corrections: recomputing them, and noticing when nobody does."""

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging

from .adapted import adapted_layers
from .layers import STEPS_SINCE_REFRESH, SpectralLayer, spectral_layers

logger = logging.get_logger(__name__)

# After this many missed intervals training stops: by then the corrections are those of another model.
MISSED_INTERVALS = 10


def refresh_interval(model: nn.Module) -> int | None:
    """`refresh_every` of the model's dynamic corrections, in optimizer steps; None where it has none."""
    return next((layer.spectral.refresh_every for _, layer in spectral_layers(model) if layer.spectral.dynamic), None)


def steps_since_refresh(model: nn.Module) -> int:
    """Optimizer steps since the dynamic corrections of `model` were computed; 0 where it has none."""
    return max((STEPS_SINCE_REFRESH.get(layer, 0) for _, layer in spectral_layers(model)), default=0)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Recompute the dynamic svd corrections of `model` once, in place, from the weights as they stand.

    Call it after the optimizer's step, every `refresh_every` steps: with the Trainer [`SpectralCallback`] does. A refresh
    moves the model's function by the change of `C`. Projections under an adapter of PEFT keep theirs: their `W` is frozen.

    Raises:
        ValueError: if the model has no dynamic correction: a static one is part of the trained function.
    """
    layers = [layer for _, layer in spectral_layers(model) if layer.spectral.dynamic]
    if not layers:
        raise ValueError(
            "refresh() found no dynamic correction: corrections stay fixed unless "
            "SpectralConfig(method='svd', refresh_every=n) was given. Leave the call out, or condition with refresh_every."
        )
    adapted = adapted_layers(model)
    for layer in layers:
        if layer in adapted:
            STEPS_SINCE_REFRESH[layer] = 0
        else:
            recompute(layer)


@torch.no_grad()
def recompute(layer: SpectralLayer) -> None:
    """Recompute one stored svd correction; FSDP2-sharded weights are gathered first, on every rank alike."""
    weight = layer.weight.detach()
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    layer.correction.copy_(layer.orient(layer.correction_of(layer.orient(weight))))
    if layer.spectral.dynamic:
        STEPS_SINCE_REFRESH[layer] = 0


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # torch calls this after every optimizer's step: the forward pass (which torch.compile traces) needs no counter, and
    # any training loop is covered.
    if not STEPS_SINCE_REFRESH:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(STEPS_SINCE_REFRESH):
        if id(layer.weight) not in stepped:
            continue
        steps = STEPS_SINCE_REFRESH[layer] = STEPS_SINCE_REFRESH[layer] + 1
        every = layer.spectral.refresh_every
        assert every is not None
        if steps >= MISSED_INTERVALS * every:
            raise RuntimeError(
                f"refresh_every={every} was asked for, but {steps} optimizer steps have passed and nobody has called "
                "refresh(model). Add SpectralCallback() to the Trainer's callbacks, or call hf_specattn.refresh(model) "
                f"after the optimizer's step every {every} steps; for corrections that stay fixed use refresh_every=None."
            )
        if steps == 2 * every:
            logger.warning_once(
                f"refresh_every={every}: {steps} optimizer steps without a call of refresh(model); training stops with an "
                f"error at {MISSED_INTERVALS * every}."
            )


register_optimizer_step_post_hook(_count_step)
