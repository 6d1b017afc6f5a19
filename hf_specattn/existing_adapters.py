"""What conditioning needs to know about PEFT adapters that a model already has (how they are added: `peft`).

This file travels with checkpoints as remote code. transformers demands every package that such a file imports, so PEFT
is looked up among the loaded modules: if it is not among them, nobody can have added an adapter.
"""

import importlib
import sys
from typing import Any

from torch import nn


def adapted_layers(model: nn.Module) -> set[nn.Module]:
    """The modules of `model` that are under a PEFT adapter."""
    if sys.modules.get("peft") is None:  # absent, or its import is blocked
        return set()
    tuner_layer: Any = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return {module.get_base_layer() for module in model.modules() if isinstance(module, tuner_layer)}


def refuse_adapters(model: nn.Module) -> None:
    """For `condition`: an adapter was trained on the base model as it is, and its configuration names that one.

    Raises:
        ValueError: if PEFT has added anything to `model`.
    """
    if sys.modules.get("peft") is None:
        return
    wrappers: tuple[Any, ...] = (
        importlib.import_module("peft").PeftModel,
        importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer,
        importlib.import_module("peft.utils").AuxiliaryTrainingWrapper,
    )
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise ValueError(
                f"{name or 'The model'} is a {type(module).__module__}.{type(module).__name__}: the model has an "
                "adapter, which was made for the model without corrections. Merge it (model = "
                "model.merge_and_unload()) or remove it (model = model.unload()), condition, and add adapters "
                "afterwards."
            )
