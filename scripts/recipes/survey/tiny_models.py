"""Tiny, randomly initialized transformers models of any architecture, for surveys and tests: no network, no checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_specattn import compat_extras

LENGTH, IMAGE_SIZE, VOCABULARY = 12, 32, 64

# Sizes that most configurations share, by the names they give them. Widths of 32 hold 4 heads of 8.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("hidden_dim", "encoder_hidden_size", "word_embed_proj_dim", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "mlp_dim_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_query_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "attention_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "type_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("image_size", "input_size"), IMAGE_SIZE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "entity_vocab_size", "entity_emb_size"), 16),
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_labels": 3,
    "patch_size": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": 8,
    "state_size": 8,
    "encoder_stride": 4,
}
STAGE_DEPTHS, STAGE_HEADS, STAGE_WIDTHS = (1,) * 6, (1, 2, 4, 8, 8, 8), (8, 16, 32, 64, 64, 64)
# Of models in stages; cut to the number of stages.
LISTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("depths", "num_blocks", "depth", "layers_per_stage"), STAGE_DEPTHS),
    **dict.fromkeys(("num_heads", "num_attention_heads"), STAGE_HEADS),
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes"), STAGE_WIDTHS),
}


def tiny_config(config_class: type[PretrainedConfig], changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A configuration whose known sizes are small; parts (`text_config`, ...) are shrunk too.

    Args:
        changes: fields to set after that; a mapping for a part changes that part.

    Raises:
        Exception: whatever the configuration class raises for sizes that do not fit together.
    """
    default = config_class()
    settings: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            wanted = (changes or {}).get(name, {})
            settings[name] = tiny_config(type(part), wanted) if isinstance(wanted, Mapping) else wanted
    names = {**vars(default), **{alias: getattr(default, alias, None) for alias in default.attribute_map}}
    for name, value in names.items():
        if isinstance(getattr(config_class, name, None), property):
            continue
        if isinstance(value, (list, tuple)) and name in LISTS:
            settings[name] = list(LISTS[name][: len(value)])
        elif name in SIZES and not isinstance(value, (list, tuple, dict, PretrainedConfig)):
            settings[name] = None if value is None and not name.endswith("_id") else SIZES[name]
    if "kv_lora_rank" in names and "num_key_value_heads" in settings:  # latent attention expands to all heads
        settings["num_key_value_heads"] = SIZES["num_attention_heads"]
    # A name and its alias say the same.
    for alias, real in default.attribute_map.items():
        if alias in settings and real in settings:
            del settings[alias]
    if isinstance(getattr(default, "layer_types", None), list):
        settings["layer_types"] = _both_ends(default.layer_types)
    settings |= {
        name: value
        for name, value in (changes or {}).items()
        if not isinstance(value, Mapping) or name not in settings
    }
    return config_class(**settings)


def _both_ends(layer_types: list[str]) -> list[str]:
    """Two layers, of different kinds where the model has several."""
    kinds = list(dict.fromkeys(layer_types))
    return [kinds[0], kinds[1] if len(kinds) > 1 else kinds[0]]


def tiny_model(model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float64 model in eval mode, every parameter drawn again: at initial values (zero biases, unit norms) errors hide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Grouped kernels of mixtures of experts do not take float64.
        model = compat_extras.model_from_config(
            model_class, config, dtype=torch.float64, experts_implementation="eager"
        )
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Add noise to every floating-point parameter, so that no two are alike and none is zero."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(torch.nan_to_num(parameter) + 0.1 * torch.randn_like(parameter))


def tiny_inputs(model: PreTrainedModel, seed: int = 1) -> dict[str, Tensor]:
    """Two samples of what the model's `main_input_name` asks for; a text's second sample is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        config: Any = model.config
        channels = getattr(config, "num_channels", None) or 3
        size = getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)}
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[1, LENGTH - 3 :], mask[1, LENGTH - 3 :] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}
