"""The architectures beside those of `models.py`: a row each, for tests of what every architecture must do.

`models.ARCHITECTURES` go through every test; these through the ones that could fail for one architecture alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import transformers
from models import (
    HEADS,
    LENGTH,
    PROJECTIONS,
    SIZES,
    SPECIAL_TOKENS,
    TEXT,
    VOCABULARY,
    Correction,
    TinyArchitecture,
)
from torch import Tensor, nn


def heads_of_model(stem: str, *heads: str, **named: str) -> dict[str, str]:
    """Auto class -> class name: those of `heads` follow the usual names."""
    names = {name: f"{stem}{name.removeprefix('AutoModel')}" for name in heads}
    return {"AutoModel": f"{stem}Model", **names, **named}


MLM, SEQUENCE = "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
IMAGE, MASKED_IMAGE = "AutoModelForImageClassification", "AutoModelForMaskedImageModeling"
PICTURES = {"image_size": 16, "patch_size": 4, "num_channels": 3, "encoder_stride": 4}
# Two stages of one block each: 16 and 32 wide, windows of 2 by 2 patches.
STAGES = PICTURES | {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [HEADS, HEADS],
    "window_size": 2,
    "num_labels": 2,
    "encoder_stride": 8,
}

# What the Auto classes take with the flag.
FLAGGED = (
    TinyArchitecture("deit", transformers.DeiTConfig, SIZES | PICTURES, heads_of_model("DeiT", IMAGE, MASKED_IMAGE)),
    TinyArchitecture("dinov2", transformers.Dinov2Config, SIZES | PICTURES, heads_of_model("Dinov2", IMAGE)),
    TinyArchitecture("beit", transformers.BeitConfig, SIZES | PICTURES, heads_of_model("Beit", IMAGE)),
    TinyArchitecture("swin", transformers.SwinConfig, STAGES, heads_of_model("Swin", IMAGE, MASKED_IMAGE)),
    TinyArchitecture("swinv2", transformers.Swinv2Config, STAGES, heads_of_model("Swinv2", IMAGE, MASKED_IMAGE)),
    TinyArchitecture("electra", transformers.ElectraConfig, SIZES | TEXT, heads_of_model("Electra", MLM, SEQUENCE)),
    TinyArchitecture(
        "xlm-roberta",
        transformers.XLMRobertaConfig,
        SIZES | TEXT | SPECIAL_TOKENS,
        heads_of_model("XLMRoberta", MLM, SEQUENCE),
    ),
    # One layer's weights serve all layers.
    TinyArchitecture(
        "albert",
        transformers.AlbertConfig,
        SIZES | TEXT | {"embedding_size": 16},
        heads_of_model("Albert", MLM, SEQUENCE),
        layers=1,
    ),
    TinyArchitecture(
        "distilbert",
        transformers.DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48, "num_labels": 2} | TEXT,
        heads_of_model("DistilBert", MLM, SEQUENCE),
        weights=r"\.(q|k|v)_lin\.weight$",
    ),
    TinyArchitecture(
        "nystromformer",
        transformers.NystromformerConfig,
        # As many landmarks as tokens would be plain attention.
        SIZES | TEXT | {"segment_means_seq_len": LENGTH, "num_landmarks": LENGTH // 2, "conv_kernel_size": 3},
        heads_of_model("Nystromformer", MLM, SEQUENCE),
        padded=False,  # with fewer landmarks than tokens transformers 5.23 fails on a mask, stock too
    ),
    TinyArchitecture(
        "modernbert",
        transformers.ModernBertConfig,
        SIZES | TEXT | SPECIAL_TOKENS | {"cls_token_id": 1, "sep_token_id": 3, "global_attn_every_n_layers": 2},
        heads_of_model("ModernBert", MLM, SEQUENCE),
        weights=r"\.Wqkv\.weight$",
        fused=True,
        transposed=False,
        rotary=True,
    ),
)


@dataclass(frozen=True)
class ConditionOnly:
    """A model that `condition` knows and the Auto classes load as a stock model only.

    Args:
        name: of the row.
        build: makes the model, with PyTorch's random numbers.
        attentions: how many attentions it has.
        separate: regular expression of the weights that hold one projection; its first group begins with q, k or v.
        blocked: the same of `[query | key | value]` weights.
        interleaved: the same of weights of which each head has its query, key and value in one run.
        heads: number of heads, by the name of a weight.
        inputs: the arguments of the model.
    """

    name: str
    build: Callable[[], nn.Module]
    attentions: int
    separate: str | None = None
    blocked: str | None = None
    interleaved: str | None = None
    heads: Callable[[str], int] = lambda name: HEADS
    inputs: Callable[[], Mapping[str, Tensor]] = lambda: {"input_ids": tokens()}

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """In eval mode, every parameter random."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    def projections(self, model: nn.Module) -> list[tuple[str, str, np.ndarray, int, Callable[[np.ndarray], None]]]:
        """`(weight name, projection, matrix, heads, write)`: `write` puts a matrix of the same shape in its place."""
        found = []
        for name, weight in model.state_dict().items():
            matrix, heads = weight.numpy(), self.heads(name)
            if self.separate and (match := re.search(self.separate, name)):
                views = {next(p for p in PROJECTIONS if p[0] == match[1][0]): matrix}
            elif self.blocked and re.search(self.blocked, name):
                views = dict(zip(PROJECTIONS, np.split(matrix, 3)))
            elif self.interleaved and re.search(self.interleaved, name):
                runs = matrix.reshape(heads, 3, -1, matrix.shape[1])
                views = {projection: runs[:, index] for index, projection in enumerate(PROJECTIONS)}
            else:
                continue
            for projection, view in views.items():

                def write(new: np.ndarray, view: np.ndarray = view) -> None:
                    view[...] = new.reshape(view.shape)

                found.append((name, projection, view.reshape(-1, matrix.shape[1]), heads, write))
        return found

    def add_correction(
        self, correction: Correction, targets: Sequence[str] = PROJECTIONS, per_head: bool = False, dtype: Any = None
    ) -> nn.Module:
        """The stock model with weights W + C, without the package."""
        model = self.model(dtype or torch.float64)
        projections = self.projections(model)
        assert len(projections) == 3 * self.attentions
        for _, projection, matrix, heads, write in projections:
            if projection in targets:
                blocks = np.split(matrix, heads) if per_head else [matrix]
                write(np.concatenate([block + correction(block, projection).astype(block.dtype) for block in blocks]))
        return model


def tokens() -> Tensor:
    return torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def pictures(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def encoder_decoder_inputs() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1)}


def clip_inputs() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "pixel_values": pictures(16)}


def clip() -> nn.Module:
    text = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 24, "eos_token_id": 3, "projection_dim": 8}
    picture = SIZES | {"image_size": 16, "patch_size": 4, "projection_dim": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8))


def causal_lm(stem: str, **changes: Any) -> Callable[[], nn.Module]:
    config_class, model_class = (getattr(transformers, f"{stem}{end}") for end in ("Config", "ForCausalLM"))
    return lambda: model_class(config_class(**SIZES | TEXT | SPECIAL_TOKENS | changes))


def masked_lm(stem: str) -> Callable[[], nn.Module]:
    config_class, model_class = (getattr(transformers, f"{stem}{end}") for end in ("Config", "ForMaskedLM"))
    return lambda: model_class(config_class(**SIZES | TEXT | SPECIAL_TOKENS))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCABULARY}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart() -> nn.Module:
    sides = {
        f"{side}_{field}": value
        for side in ("encoder", "decoder")
        for field, value in (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", 48))
    }
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(d_model=32, **sides, **TEXT, **SPECIAL_TOKENS, decoder_start_token_id=2)
    )


def florence2_vision() -> nn.Module:
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    stages: dict[str, Any] = {"depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4]}
    first = {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    return Florence2VisionBackbone(transformers.Florence2VisionConfig(**stages, **first, window_size=4))


TIMM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": HEADS}),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": HEADS}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 2},
    ),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": HEADS}),
    "cait": ("cait_xxs24_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": HEADS}),
    "crossvit": (
        "crossvit_tiny_240",
        {
            "img_size": 48,
            "img_scale": (1.0, 1.0),
            "embed_dim": (32, 32),
            "depth": ((1, 1, 0),),
            "num_heads": (HEADS,) * 2,
        },
    ),
    "davit": (
        "davit_tiny",
        {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4), "window_size": 4},
    ),
    "davit v2": (
        "davit_base_fl",
        {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4), "window_size": 4},
    ),
}


def timm_row(name: str, attentions: int, wrapped: bool = False, **layout: Any) -> ConditionOnly:
    architecture, settings = TIMM_MODELS[name]

    def build() -> nn.Module:
        if not wrapped:
            return timm.create_model(architecture, pretrained=False, num_classes=3, **settings)
        config = transformers.TimmWrapperConfig(architecture=architecture, model_args=settings, num_labels=3)
        return transformers.TimmWrapperForImageClassification(config)

    def inputs() -> dict[str, Tensor]:
        return {"pixel_values" if wrapped else "x": pictures(settings.get("img_size", 32))}

    return ConditionOnly(f"{'TimmWrapper' if wrapped else 'timm'} {name}", build, attentions, inputs=inputs, **layout)


def by_stage(name: str) -> int:
    """Heads of two-stage models: 2, then 4."""
    return 4 if re.match(r"(timm_model\.)?(layers|stages|blocks)\.1\.", name) else 2


FUSED = {"blocked": r"\.qkv\.weight$"}
TIMM_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "vit": (2, FUSED),
    "deit": (2, FUSED),
    "swin": (3, FUSED | {"heads": by_stage}),
    # Two cross-covariance blocks, then two of class attention.
    "xcit": (4, FUSED | {"separate": r"cls_attn_blocks\.\d+\.attn\.(q|k|v)\.weight$"}),
    # Two blocks with talking heads, then two of class attention.
    "cait": (4, FUSED | {"separate": r"blocks_token_only\.\d+\.attn\.(q|k|v)\.weight$"}),
    # A block for each size of patches, then each attends to the other.
    "crossvit": (4, FUSED | {"separate": r"\.attn\.w(q|k|v)\.weight$"}),
    # A window and a channel block in each stage.
    "davit": (4, FUSED | {"heads": by_stage}),
    "davit v2": (4, FUSED | {"heads": by_stage}),
}
Q_K_V_PROJ = r"\.(q|k|v)_proj\.weight$"

CONDITION_ONLY = (
    *(timm_row(name, count, **layout) for name, (count, layout) in TIMM_LAYOUTS.items()),
    *(timm_row(name, count, wrapped=True, **layout) for name, (count, layout) in TIMM_LAYOUTS.items()),
    ConditionOnly("gpt_neox", causal_lm("GPTNeoX"), 2, interleaved=r"\.query_key_value\.weight$"),
    ConditionOnly("camembert", masked_lm("Camembert"), 2, separate=r"\.(query|key|value)\.weight$"),
    *(
        ConditionOnly(
            name.lower(),
            causal_lm(name, num_key_value_heads=2, **({"head_dim": 8} if name == "Qwen3" else {})),
            2,
            separate=Q_K_V_PROJ,
            heads=lambda weight: HEADS if "q_proj" in weight else 2,
        )
        for name in ("Qwen2", "Qwen3", "Mistral")
    ),
    ConditionOnly("t5", t5, 6, separate=r"Attention\.(q|k|v)\.weight$", inputs=encoder_decoder_inputs),
    ConditionOnly("bart", bart, 6, separate=Q_K_V_PROJ, inputs=encoder_decoder_inputs),
    ConditionOnly("clip", clip, 4, separate=Q_K_V_PROJ, inputs=clip_inputs),
    ConditionOnly(
        "florence2 davit",
        florence2_vision,
        4,
        **FUSED,
        heads=by_stage,
        inputs=lambda: {"hidden_states": pictures(32)},
    ),
)
