"""Models without layer norms, and without the residual connection of attention: no stock class is one of them."""

import logging
import sys
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTLayer

from hf_specattn.conditioning import refuse_to_save

logger = logging.getLogger(__name__)

WITHOUT_RESIDUAL = "WithoutResidual"  # ends the names of the classes


def remove_layer_norms(model: PreTrainedModel) -> int:
    """Replace every `nn.LayerNorm` of the model by the identity, in place; returns how many there were.

    No stock class is such a model, so it refuses `save_pretrained` from then on.

    Raises:
        ValueError: if there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not names:
        raise ValueError(
            f"--no_layer_norm: {type(model).__name__} has no torch.nn.LayerNorm; leave the flag out, or take another model."
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    refuse_to_save(
        model,
        "has no layer norm any more, and a checkpoint of it would load with new ones; save its state_dict() instead.",
    )
    logger.info(f"Took {len(names)} layer norms out of the model.")
    return len(names)


def is_ablated(model: nn.Module) -> bool:
    """Whether a model has no layer norms, or no residual connections of attention."""
    modules = list(model.modules())
    removed = any(type(module).__name__.endswith(WITHOUT_RESIDUAL) for module in modules)
    return removed or not any(isinstance(module, nn.LayerNorm) for module in modules)


def remove_attention_residuals(model: PreTrainedModel) -> int:
    """Let attention replace its input in every block of a ViT (transformers', timm's), in place; returns how many there were.

    The residual connection of the MLP stays. No stock class is such a model, so it refuses `save_pretrained` from then on.

    Raises:
        ValueError: if there is no such block.
    """
    without: dict[type[nn.Module], type[nn.Module]] = {ViTLayer: ViTLayerWithoutResidual}
    if (timm_vit := sys.modules.get("timm.models.vision_transformer")) is not None:
        without[timm_vit.Block] = _timm_block(timm_vit.Block)
    blocks = [module for module in model.modules() if type(module) in without]
    if not blocks or any(not hasattr(block, "mlp") for block in blocks):
        raise ValueError(
            f"--no_attention_residual: {type(model).__name__} has no block of a ViT (ViTLayer of transformers, Block of "
            "timm); leave the flag out, or take a ViT."
        )
    for block in blocks:
        block.__class__ = without[type(block)]
    refuse_to_save(
        model,
        "has no residual connection of attention, and a checkpoint of it would load with one; save its state_dict() instead.",
    )
    logger.info(f"Took {len(blocks)} residual connections of attention out of the model.")
    return len(blocks)


class ViTLayerWithoutResidual(ViTLayer):
    """A block whose attention replaces its input."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`(batch, tokens, width)`, and back."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


def _timm_block(stock: Any) -> type[nn.Module]:
    class BlockWithoutResidual(stock):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            x = self.drop_path1(self.ls1(self.attn(self.norm1(x), **kwargs)))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    return BlockWithoutResidual
