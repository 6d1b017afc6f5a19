"""What vision recipes do not decay, and the average of weights over steps."""

from collections.abc import Iterable

import torch
from timm.utils import ModelEmaV3
from torch import nn
from transformers import PreTrainedModel

# Beside vectors (biases and gains), the learned tables and tokens that vision recipes never decay.
NOT_DECAYED = (
    "cls_token",
    "dist_token",
    "distillation_token",
    "mask_token",
    "position_embeddings",
    "pos_embed",
    "position_bias_table",
)


def not_decayed(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not vectors but still exempt: those a timm model names, and tables."""
    named: set[str] = set()
    for prefix, module in model.named_modules():
        no_weight_decay = getattr(module, "no_weight_decay", None)
        if callable(no_weight_decay):
            names: Iterable[str] = no_weight_decay()
            named |= {f"{prefix}.{name}" if prefix else name for name in names}
    tables = {name for name, _ in model.named_parameters() if name.endswith(NOT_DECAYED)}
    return sorted(named | tables)


class AveragedWeights:
    """The exponential moving average of a model's weights and buffers over steps, through timm.

    Args:
        model: Not wrapped; on its final device.
        decay: The share of the average that a step keeps, below 1.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self._source = model
        self._average = ModelEmaV3(model, decay=decay)

    @property
    def model(self) -> PreTrainedModel:
        """The model with the averaged weights."""
        return self._average.module

    def update(self) -> None:
        """Count one step of the model."""
        self._average.update(self._source)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights and buffers, on the CPU, each tensor on its own."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.model.load_state_dict(state)
