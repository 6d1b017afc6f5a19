"""Which architectures are surveyed, and how each is built small."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from .tiny_models import IMAGE_SIZE, randomize, tiny_config, tiny_inputs, tiny_model

TASKS: dict[str, Any] = {
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
WINDOWS = {"window_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}

# What a model type needs beside small sizes.
CHANGES: dict[str, dict[str, Any]] = {
    "donut-swin": WINDOWS,
    "codegen": {"n_ctx": 64, "rotary_dim": 8, "n_embd": 64, "n_head": 4},
    "esm": {"vocab_size": 64, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "neomme": {"hidden_size": 64, "head_dim": 16},
    "nystromformer": {"segment_means_seq_len": 12, "num_landmarks": 12},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "xmod": {"default_language": "en_XX"},
}

# timm's families with attention, the smallest of each, and three without; settings make them smaller where that is simple.
SMALL_VIT = {"img_size": 32, "depth": 2}
TIMM_FAMILIES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "cait_xxs24_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "coat_tiny": {},
    "coatnet_nano_rw_224": {"img_size": 224},
    "convnext_atto": {},
    "crossvit_tiny_240": {},
    "davit_tiny": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)},
    "davit_base_fl": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)},
    "deit_tiny_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "deit_tiny_distilled_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "deit3_small_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "fastvit_t8": {},
    "flexivit_small": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "gcvit_xxtiny": {},
    "hiera_tiny_224": {},
    "levit_128s": {},
    "maxvit_pico_rw_256": {},
    "mixer_s32_224": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "pit_ti_224": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32} | WINDOWS | {"depths": (2, 1), "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"img_size": 32} | WINDOWS | {"depths": (2, 1), "num_heads": (2, 4)},
    "swinv2_cr_tiny_224": {},
    "tiny_vit_5m_224": {},
    "tnt_s_legacy_patch16_224": {},
    "twins_svt_small": {},
    "visformer_tiny": {},
    "vit_tiny_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "vit_relpos_small_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 4},
    "volo_d1_224": {},
    "xcit_nano_12_p16_224": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4},
}


@dataclass(frozen=True)
class Row:
    """One architecture to be surveyed: a task of transformers and a model type, or timm and a model name."""

    task: str
    name: str

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"


def all_rows() -> list[Row]:
    rows = [Row(task, name) for task, mapping in TASKS.items() for name in mapping]
    return rows + [Row("timm", name) for name in TIMM_FAMILIES]


def chosen_rows(only: Sequence[str] | None) -> list[Row]:
    """All rows, or those asked for.

    Raises:
        ValueError: for a name that no row has.
    """
    rows = all_rows()
    if only is None:
        return rows
    known = {name for row in rows for name in (str(row), row.name)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(
            f"--only {unknown[0]}: no such row. Give a model type of transformers' masked-LM, image-classification or "
            f"causal-LM mapping, one of {', '.join(TIMM_FAMILIES)}, or task/name with a task of {[*TASKS, 'timm']}."
        )
    return [row for row in rows if row.name in only or str(row) in only]


def build(row: Row) -> tuple[nn.Module, dict[str, Tensor]]:
    """The tiny stock model of a row in float64, and inputs for it."""
    if row.task == "timm":
        return _build_timm(row.name)
    class_names = TASKS[row.task][row.name]
    model_class = getattr(transformers, class_names if isinstance(class_names, str) else class_names[0])
    model = tiny_model(model_class, tiny_config(model_class.config_class, CHANGES.get(row.name)))
    if row.name == "nystromformer":
        # It adds a convolution of the values to what the heads give, where no trace of the attention sees it.
        for name, parameter in model.named_parameters():
            if ".conv." in name:
                parameter.requires_grad_(False).zero_()
    return model, tiny_inputs(model)


def _build_timm(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import timm

    settings = TIMM_FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=False, num_classes=3, **settings).double().eval()
        randomize(model)
    size = settings.get("img_size") or model.default_cfg["input_size"][-1]
    size = IMAGE_SIZE if "embed_dims" in settings else size
    generator = torch.Generator().manual_seed(1)
    return model, {"x": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}
