"""Which parameters decay, for AdamW; cramming's own settings of it."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Sort the trainable parameters into a decayed and an exempt group; each one, tied or not, is in one of them once.

    Matrices and larger decay, but for those named. Biases, the gains of norms and single scalars are exempt: they are few,
    and pulling them to zero shrinks activations instead of regularizing.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():  # names tied weights once
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and name not in not_decayed else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(
    model: nn.Module,
    learning_rate: float = 1e-3,  # ten times BERT's: pre-norm and a short budget allow and want it
    betas: tuple[float, float] = (0.9, 0.98),  # a second moment that forgets in 50 steps suits a run of few steps
    eps: float = 1e-12,  # below any gradient's scale, so that rarely seen tokens get full-sized steps
    weight_decay: float = 0.01,  # mild: about one pass over the data overfits little
) -> torch.optim.AdamW:
    """Build AdamW over `parameter_groups`, with the defaults of cramming's pretraining."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=eps)
