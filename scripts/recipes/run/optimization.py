"""Which parameters decay, how fast the projections learn, and where they decay to: AdamW and the controls on it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_specattn.config import PROJECTIONS, TARGETS
from hf_specattn.projections import find_projections

from .command_line import flag

# Names of the flags.
OPTIMIZATION_SETTINGS = ("no_decay_on", "decay_toward_start_on", "projection_learning_rate_factor")


@dataclass
class OptimizationArguments:
    """Controls for what a fixed correction does besides conditioning: it moves the center of the decay, and a dynamic one
    speeds up rotations."""

    no_decay_on: list[str] | None = flag(None, "Control: exempt these projections from weight decay.", TARGETS)
    decay_toward_start_on: list[str] | None = flag(
        None,
        "Control: let these projections decay toward their initial weights, not toward 0.",
        TARGETS,
    )
    projection_learning_rate_factor: float = flag(
        1.0, "Control: multiply the learning rate of query, key and value by this."
    )

    def check_optimization(self) -> None:
        """Raise ValueError for values that cannot be."""
        if not 0 < self.projection_learning_rate_factor < 1e9:
            raise ValueError(
                f"--projection_learning_rate_factor {self.projection_learning_rate_factor} must be a finite number above 0."
            )
        if twice := sorted(set(self.no_decay_on or ()) & set(self.decay_toward_start_on or ())):
            raise ValueError(
                f"--no_decay_on and --decay_toward_start_on both name {', '.join(twice)}; a projection has one of the two."
            )

    def optimization_settings(self) -> dict[str, Any]:
        """What was chosen, by the names of the flags."""
        defaults = OptimizationArguments()
        return {
            name: value
            for name in OPTIMIZATION_SETTINGS
            if (value := getattr(self, name)) != getattr(defaults, name) and value != []
        }


def build_adamw(
    model: PreTrainedModel,
    arguments: OptimizationArguments,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    *,
    not_decayed: Collection[str] = (),
    groups_of: Callable[[nn.Module, float, Collection[str]], list[dict[str, Any]]] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Build AdamW over `parameter_groups`, with the requested controls, for a model with its initial weights.

    `not_decayed` are also exempt; `groups_of` replaces `parameter_groups`, with the same arguments.

    Raises:
        ValueError: for a control on a part of a fused weight.
    """
    settings = arguments.optimization_settings()
    exempt = _holding(model, settings.get("no_decay_on", ()))
    anchored = _holding(model, settings.get("decay_toward_start_on", ()))
    factor = arguments.projection_learning_rate_factor
    faster = _holding(model, PROJECTIONS) if factor != 1 else {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    sort = parameter_groups if groups_of is None else groups_of
    for group in sort(model, weight_decay, {*not_decayed, *exempt, *anchored}):
        usual = [parameter for parameter in group["params"] if names[id(parameter)] not in faster]
        scaled = [parameter for parameter in group["params"] if names[id(parameter)] in faster]
        groups += [{**group, "params": usual}] if usual else []
        groups += [{**group, "params": scaled, "lr": factor * learning_rate}] if scaled else []
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)
    if anchored:
        _decay_toward_start(optimizer, list(anchored.values()), weight_decay)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Sort the trainable parameters into a decayed and an exempt group; each one, tied or not, is in one of them once.

    Matrices and larger tensors decay, except for those named. Biases, the gains of norms and single scalars are
    exempt: they are few, and pulling them to zero shrinks activations instead of regularizing.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():  # names tied weights once
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and name not in not_decayed else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _holding(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights that hold these projections, by name."""
    found = {}
    for item in find_projections(model, output="output" in targets) if targets else ():
        held = set(item.layout.projections)
        if not held & set(targets):
            continue
        if not held <= set(targets):
            raise ValueError(
                f"{item.name} holds {', '.join(item.layout.projections)} in one weight, and the flags name "
                f"{', '.join(targets)} of them; name all of its projections, or none."
            )
        found[f"{item.name}.weight"] = item.module.weight
    return found


def _decay_toward_start(
    optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], weight_decay: float
) -> None:
    """Move weights toward their current values by `lr * weight_decay` of the way before each step, as AdamW does toward 0."""
    starts = {id(weight): weight.detach().clone() for weight in weights}

    @torch.no_grad()
    def decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in starts and parameter.grad is not None:
                    start = starts[id(parameter)] = starts[id(parameter)].to(parameter.device)
                    parameter.lerp_(start, group["lr"] * weight_decay)

    optimizer.register_step_pre_hook(decay)
