"""Where query, key and value live, per architecture: one table in two parts, matched on the module tree.

Class names and child names are looked up in the live model, so a row holds for every model that contains such an
attention (a BERT inside a VisionEncoderDecoder, a ViT inside a plain `nn.Module`), whatever the model's type or release.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import PROJECTIONS
from .layers import ProjectionLayout

UNSTATED = "something that the AttentionSpec does not rule out"


@dataclass(frozen=True)
class AttentionSpec:
    """How one attention class keeps its projections. A row of the table, or the `architecture=` of [`condition`].

    Args:
        attention: class name, or names, of the module that holds the projections.
        modules: child name -> the projection in it, or the projections in order for a fused tensor:
            `{"q_proj": "query", "k_proj": "key", "v_proj": "value"}` or `{"qkv": ("query", "key", "value")}`.
        defined_in: where the class is defined: dotted names of modules, or of packages that contain them; empty for
            anywhere. A class name such as `Attention` is ambiguous without it.
        interleaved: a fused tensor runs per key/value head (`[heads, 3 * head_dim]`) instead of in blocks.
        query_heads: number of heads, or the name of the attribute that has it: looked up on the attention module, then
            on its `config`, then on the model's. If there are several names, the first existing one counts.
        key_value_heads: the same for key and value; None if they have as many heads as the query.
        output: where the output projection W_O is, for [`balance`], [`precondition`] and the diagnostics: a dotted path
            from the attention module, each leading `..` a step up to the module that holds it (`"o_proj"`,
            `"..output.dense"`). Its inputs are the heads of the query, in order, each as long as a head of the value.
        query_key_barrier: what stands between `X W_Q` and `X W_K` and their product, and so rules out the gauge
            `W_Q M, W_K M^-T`; None: nothing does.
        value_output_barrier: what stands between `X W_V` and `W_O` besides the attention weights of each head, and so
            rules out the gauge `W_V G, G^-1 W_O`; None: nothing does. [`precondition`] refuses an attention with one.
        harmless: names of the attention's other children and parameters that do not act on the output of its heads, but
            before the projections, on the attention weights, or after W_O; for [`precondition`].
    """

    attention: str | tuple[str, ...]
    modules: Mapping[str, str | tuple[str, ...]]
    interleaved: bool = False
    query_heads: str | int | tuple[str, ...] = "num_attention_heads"
    key_value_heads: str | int | tuple[str, ...] | None = None
    defined_in: tuple[str, ...] = ()
    output: str | None = None
    # `balance` takes a row that does not say to forbid both gauges.
    query_key_barrier: str | None = UNSTATED
    value_output_barrier: str | None = UNSTATED
    harmless: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("AttentionSpec.modules is empty; name the child modules that contain the projections.")
        for child, projections in self.projections_of.items():
            unknown = [name for name in projections if name not in PROJECTIONS]
            if unknown or not projections:
                raise ValueError(
                    f"AttentionSpec.modules[{child!r}]={projections!r} must name one or more of {PROJECTIONS}."
                )

    @property
    def class_names(self) -> tuple[str, ...]:
        """`attention` as a tuple."""
        return (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)

    @property
    def projections_of(self) -> dict[str, tuple[str, ...]]:
        """`modules` with each value as a tuple."""
        return {child: (names,) if isinstance(names, str) else tuple(names) for child, names in self.modules.items()}

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is this attention class and has these children."""
        if type(module).__name__ not in self.class_names or not self._is_defined_here(type(module).__module__):
            return False
        return all(isinstance(getattr(module, child, None), nn.Module) for child in self.modules)

    def _is_defined_here(self, module_name: str) -> bool:
        return not self.defined_in or any(f"{module_name}.".startswith(f"{place}.") for place in self.defined_in)

    def output_name(self, attention: str) -> str | None:
        """Full name of the module with W_O, of the attention with that full name.

        None where `output` is None, or lies outside the part of a model in which the attention has this name.
        """
        owner, path = attention, self.output
        while path is not None and path.startswith(".."):
            if not owner:
                return None
            owner, path = owner.rpartition(".")[0], path[2:]
        return path if not owner or path is None else f"{owner}.{path}"

    def layout(self, attention: nn.Module, child: str, out_features: int, model_config: Any) -> ProjectionLayout:
        """The rows of `child`'s weight.

        Raises:
            ValueError: if the number of heads cannot be found, or does not divide the rows.
        """
        projections = self.projections_of[child]
        query_heads = self._heads("query_heads", attention, model_config)
        other_heads = query_heads
        if self.key_value_heads is not None:
            other_heads = self._heads("key_value_heads", attention, model_config)
        heads = tuple(query_heads if name == "query" else other_heads for name in projections)
        head_dim, remainder = divmod(out_features, sum(heads))
        if remainder or query_heads % other_heads:
            raise ValueError(
                f"{type(attention).__name__}.{child} has {out_features} output rows, which {heads} heads for "
                f"{projections} do not divide (or {other_heads} key/value heads do not divide {query_heads} query heads); "
                "pass architecture=AttentionSpec(...) with the right query_heads and key_value_heads."
            )
        groups = other_heads if self.interleaved and len(projections) > 1 else 1
        return ProjectionLayout(projections, heads, (head_dim,) * len(heads), groups)

    def _heads(self, field: str, attention: nn.Module, model_config: Any) -> int:
        value = getattr(self, field)
        if isinstance(value, (str, tuple)):
            owners = (attention, getattr(attention, "config", None), model_config)
            names = (value,) if isinstance(value, str) else value
            found = [
                number for name in names for owner in owners if (number := getattr(owner, name, None)) is not None
            ]
            if not found:
                raise ValueError(
                    f"{field}={value!r} is an attribute neither of {type(attention).__name__} nor of its config; give "
                    "the number of heads, or the name of an attribute that has it."
                )
            value = found[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}={value!r} of {type(attention).__name__} must be an integer >= 1.")
        return value


QUERY_KEY_VALUE = {"query": "query", "key": "key", "value": "value"}
Q_K_V_PROJ = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
Q_K_V_LIN = {"q_lin": "query", "k_lin": "key", "v_lin": "value"}
Q_K_V = {"q": "query", "k": "key", "v": "value"}
FUSED_QKV = {"qkv": PROJECTIONS}

# Plain softmax(X W_Q W_K^T X^T) X W_V W_O: scale, mask and attention dropout stand in the way of neither gauge.
NO_BARRIER: dict[str, Any] = {"query_key_barrier": None, "value_output_barrier": None}
# RoPE leaves of M only scaled rotations of pairs of channels, too few to balance anything.
ROTARY: dict[str, Any] = {"query_key_barrier": "rotary position embeddings", "value_output_barrier": None}

# Attention between channels: its weights act on the channels of a head and not on positions.
CHANNELS = "attention between channels, which mixes the channels of each head"

# Model types that the Auto classes condition by a flag -> how their attention classes keep their projections. Where a
# class appears twice, the first row whose children all exist is taken: names differ between releases, and between self-
# and cross-attention.
ARCHITECTURES: dict[str, tuple[AttentionSpec, ...]] = {
    "bert": (
        AttentionSpec(
            ("BertSelfAttention", "BertCrossAttention"), QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER
        ),
    ),
    "roberta": (
        AttentionSpec(
            ("RobertaSelfAttention", "RobertaCrossAttention"), QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER
        ),
    ),
    "vit": (
        AttentionSpec("ViTAttention", Q_K_V_PROJ, output="o_proj", **NO_BARRIER),
        AttentionSpec("ViTSelfAttention", QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER),
    ),
    "crammed_bert": (
        AttentionSpec("CrammedBertSelfAttention", QUERY_KEY_VALUE, output="..attention_output", **NO_BARRIER),
    ),
    "gpt2": (
        AttentionSpec(
            "GPT2Attention",
            {"q_attn": "query", "c_attn": ("key", "value")},
            query_heads="num_heads",
            output="c_proj",
            **NO_BARRIER,
        ),
        AttentionSpec(
            "GPT2Attention", {"c_attn": PROJECTIONS}, query_heads="num_heads", output="c_proj", **NO_BARRIER
        ),
    ),
    "llama": (
        AttentionSpec("LlamaAttention", Q_K_V_PROJ, key_value_heads="num_key_value_heads", output="o_proj", **ROTARY),
    ),
    "deit": (
        AttentionSpec("DeiTAttention", Q_K_V_PROJ, output="o_proj", **NO_BARRIER),
        AttentionSpec("DeiTSelfAttention", QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER),
    ),
    "dinov2": (
        AttentionSpec("Dinov2Attention", Q_K_V_PROJ, output="o_proj", **NO_BARRIER),
        AttentionSpec("Dinov2SelfAttention", QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER),
    ),
    "electra": (
        AttentionSpec(
            ("ElectraSelfAttention", "ElectraCrossAttention"), QUERY_KEY_VALUE, output="..output.dense", **NO_BARRIER
        ),
    ),
    "xlm-roberta": (
        AttentionSpec(
            ("XLMRobertaSelfAttention", "XLMRobertaCrossAttention"),
            QUERY_KEY_VALUE,
            output="..output.dense",
            **NO_BARRIER,
        ),
    ),
    "distilbert": (
        AttentionSpec("DistilBertSelfAttention", Q_K_V_LIN, query_heads="n_heads", output="out_lin", **NO_BARRIER),
    ),
    "modernbert": (AttentionSpec("ModernBertAttention", {"Wqkv": PROJECTIONS}, output="Wo", **ROTARY),),
    # `balance` leaves the following alone: relative position biases, convolutions, norms or learned scales stand in the
    # attention module, and no test says that they let the gauges through.
    "albert": (AttentionSpec("AlbertAttention", QUERY_KEY_VALUE, output="dense"),),
    "beit": (
        AttentionSpec("BeitAttention", Q_K_V_PROJ, output="o_proj"),
        AttentionSpec(("BeitSelfAttention", "BeitSdpaSelfAttention"), QUERY_KEY_VALUE, output="..output.dense"),
    ),
    "nystromformer": (AttentionSpec("NystromformerSelfAttention", QUERY_KEY_VALUE, output="..output.dense"),),
    "swin": (
        AttentionSpec("SwinAttention", Q_K_V_PROJ, output="o_proj"),
        AttentionSpec("SwinSelfAttention", QUERY_KEY_VALUE, output="..output.dense"),
    ),
    "swinv2": (
        AttentionSpec("Swinv2Attention", Q_K_V_PROJ),
        AttentionSpec("Swinv2SelfAttention", QUERY_KEY_VALUE, output="..output.dense"),
    ),
}

# Attention classes of transformers whose children have the usual names, by that of the output projection; each is a row of
# docs/survey.md or shares its code with one. A list and not a pattern: a q_proj may hold more than queries (Qwen3Next's also
# makes the gate).
USUAL_ATTENTION: dict[str, tuple[str, ...]] = {
    "o_proj": (
        "ApertusAttention",
        "ArceeAttention",
        "AriaTextAttention",
        "Cohere2Attention",
        "Cohere2MoeAttention",
        "CohereAttention",
        "CwmAttention",
        "Dinov2WithRegistersAttention",
        "Emu3Attention",
        "Ernie4_5Attention",
        "Ernie4_5_MoeAttention",
        "EsmcAttention",
        "EuroBertAttention",
        "Exaone4Attention",
        "ExaoneMoeAttention",
        "FlexOlmoAttention",
        "Gemma2Attention",
        "Gemma3Attention",
        "Gemma4TextAttention",
        "Gemma4UnifiedTextAttention",
        "GemmaAttention",
        "Glm4Attention",
        "Glm4MoeAttention",
        "GlmAttention",
        "GptOssAttention",
        "GraniteAttention",
        "GraniteMoeAttention",
        "GteAttention",
        "HYV3Attention",
        "HeliumAttention",
        "HyperCLOVAXAttention",
        "IJepaAttention",
        "InklingAttention",
        "Jais2Attention",
        "JinaEmbeddingsV3Attention",
        "Kolibri1Attention",
        "Llama4TextAttention",
        "MellumAttention",
        "MiMoV2FlashAttention",
        "MiniMaxAttention",
        "MiniMaxM2Attention",
        "MiniMaxM3VLAttention",
        "Ministral3Attention",
        "MistralAttention",
        "MixtralAttention",
        "MllamaTextSelfAttention",
        "NanoChatAttention",
        "NomicBertAttention",
        "Olmo2Attention",
        "Olmo3Attention",
        "OlmoAttention",
        "OlmoHybridAttention",
        "OlmoeAttention",
        "PhimoeAttention",
        "SeedOssAttention",
        "SmolLM3Attention",
        "SolarOpenAttention",
        "StableLmAttention",
        "Starcoder2Attention",
        "UltrabertAttention",
        "VaultGemmaAttention",
        "ViTMSNAttention",
    ),
    "out_proj": (
        "BigBirdPegasusDecoderAttention",
        "BioGptAttention",
        "BlenderbotAttention",
        "BlenderbotSmallAttention",
        "GPTNeoSelfAttention",
        "Lfm2Attention",
        "MBartAttention",
        "MarianAttention",
        "MetaClip2Attention",
        "MvpAttention",
        "OPTAttention",
        "PLBartAttention",
        "PegasusAttention",
        "SiglipAttention",
        "TrOCRAttention",
        "WhisperAttention",
    ),
    "dense": ("PhiAttention",),
    "Wo": ("ModernBertDecoderAttention",),
}
# The same with something before W_O, which no preconditioner is put behind.
BARRED_ATTENTION: dict[str, tuple[str, ...]] = {
    "a gate, which scales what the heads give": (
        "AfmoeAttention",
        "BeamAttention",
        "HrmTextAttention",
        "LagunaAttention",
        "Lfm3Attention",
    ),
    "a sink, which scales what the heads give": ("GraniteSWAAttention",),
    "a norm of what the heads give": ("BitNetAttention", "DiffLlamaAttention"),
    "a gate, and the values taken out of each head's output": ("NeoMMEAttention",),
}
BERT_LIKE = (
    "BertGeneration",
    "Camembert",
    "Data2VecText",
    "Ernie",
    "Esm",
    "Git",
    "LayoutLM",
    "MegatronBert",
    "MobileBert",
    "RemBert",
    "RoCBert",
    "RoFormer",
    "RobertaPreLayerNorm",
    "Tapas",
    "XLMRobertaXL",
    "Xmod",
)
QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads")
USUAL_HEADS: dict[str, Any] = {
    "query_heads": QUERY_HEADS,
    "key_value_heads": ("num_key_value_heads", *QUERY_HEADS),
    "defined_in": ("transformers",),
}

# What `condition` knows in addition: families that the Auto classes load only as stock models.
MORE_ARCHITECTURES: dict[str, tuple[AttentionSpec, ...]] = {
    "gpt_neox": (
        AttentionSpec("GPTNeoXAttention", {"query_key_value": PROJECTIONS}, interleaved=True, output="dense"),
    ),
    "qwen": (
        AttentionSpec(
            ("Qwen2Attention", "Qwen3Attention", "Qwen2MoeAttention", "Qwen3MoeAttention"),
            Q_K_V_PROJ,
            key_value_heads="num_key_value_heads",
            output="o_proj",
        ),
    ),
    "usual names": (
        *(AttentionSpec(names, Q_K_V_PROJ, output=output, **USUAL_HEADS) for output, names in USUAL_ATTENTION.items()),
        AttentionSpec("DogeAttention", Q_K_V_PROJ, output="o_proj", harmless=("A", "dt_proj"), **USUAL_HEADS),
        *(
            AttentionSpec(names, Q_K_V_PROJ, value_output_barrier=barrier, **USUAL_HEADS)
            for barrier, names in BARRED_ATTENTION.items()
        ),
        AttentionSpec(
            tuple(f"{stem}{kind}Attention" for stem in BERT_LIKE for kind in ("Self", "Cross")),
            QUERY_KEY_VALUE,
            query_heads=QUERY_HEADS,
            defined_in=("transformers",),
            output="..output.dense",
        ),
        AttentionSpec(
            "ConvBertSelfAttention",
            QUERY_KEY_VALUE,
            value_output_barrier="a convolution, whose output is put beside that of the heads",
        ),
    ),
    # A BigBird switches from block-sparse to full attention, projections included, when it gets a short text.
    "big_bird": (
        AttentionSpec(
            ("BigBirdBlockSparseAttention", "BigBirdSelfAttention"), QUERY_KEY_VALUE, output="..output.dense"
        ),
    ),
    "data2vec-vision": (
        AttentionSpec(
            ("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention", "Data2VecVisionAttention"),
            QUERY_KEY_VALUE,
            output="..output.dense",
        ),
    ),
    "deberta-v2": (
        AttentionSpec(
            "DisentangledSelfAttention",
            {"query_proj": "query", "key_proj": "key", "value_proj": "value"},
            defined_in=("transformers.models.deberta_v2",),
            output="..output.dense",
        ),
    ),
    "donut-swin": (
        AttentionSpec(("DonutSwinSelfAttention", "DonutSwinAttention"), QUERY_KEY_VALUE, output="..output.dense"),
    ),
    "flaubert": (
        AttentionSpec(
            "MultiHeadAttention",
            Q_K_V_LIN,
            query_heads="n_heads",
            defined_in=("transformers.models.flaubert", "transformers.models.xlm"),
            output="out_lin",
        ),
    ),
    "funnel": (
        AttentionSpec(
            "FunnelRelMultiheadAttention",
            {"q_head": "query", "k_head": "key", "v_head": "value"},
            query_heads=("n_head", "num_attention_heads"),
            output="post_proj",
            harmless=("layer_norm", "r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed"),
        ),
    ),
    "hiera": (AttentionSpec("HieraMaskUnitAttention", FUSED_QKV, query_heads="num_heads", output="proj"),),
    "imagegpt": (
        AttentionSpec("ImageGPTAttention", {"c_attn": PROJECTIONS}, query_heads="num_heads", output="c_proj"),
    ),
    "mobilevit": (AttentionSpec("MobileViTSelfAttention", QUERY_KEY_VALUE, output="..output.dense"),),
    "mpnet": (AttentionSpec("MPNetSelfAttention", Q_K_V, output="o"),),
    "perceiver": (
        AttentionSpec(
            "PerceiverSelfAttention",
            QUERY_KEY_VALUE,
            query_heads="num_heads",
            output="..output.dense",
            harmless=("layernorm1", "layernorm2"),
        ),
    ),
    # The linear maps behind the convolution that shortens keys and values.
    "pvt": (
        AttentionSpec(
            ("PvtEfficientSelfAttention", "SegformerEfficientSelfAttention"),
            QUERY_KEY_VALUE,
            output="..output.dense",
            harmless=("sequence_reduction", "layer_norm"),
        ),
        AttentionSpec(
            "SegformerAttention", Q_K_V_PROJ, output="o_proj", harmless=("sequence_reduction", "layer_norm")
        ),
        AttentionSpec(
            "PvtV2SelfAttention", QUERY_KEY_VALUE, output="proj", harmless=("spatial_reduction", "layer_norm")
        ),
    ),
    "bloom": (
        AttentionSpec(
            ("BloomAttention", "PersimmonAttention"),
            {"query_key_value": PROJECTIONS},
            interleaved=True,
            query_heads="num_heads",
            output="dense",
        ),
        AttentionSpec(
            "GPTNeoXJapaneseAttention",
            {"query_key_value": PROJECTIONS},
            interleaved=True,
            output="dense",
            harmless=("dense_bias",),
        ),
    ),
    "phi3": (
        AttentionSpec(
            ("Phi3Attention", "Phi4MultimodalAttention"),
            {"qkv_proj": PROJECTIONS},
            key_value_heads="num_key_value_heads",
            output="o_proj",
        ),
    ),
    # Self- and cross-attention are one class.
    "t5": (AttentionSpec(("T5Attention", "MT5Attention", "UMT5Attention"), Q_K_V, query_heads="n_heads", output="o"),),
    "bart": (AttentionSpec("BartAttention", Q_K_V_PROJ, query_heads="num_heads", output="out_proj"),),
    "clip": (AttentionSpec("CLIPAttention", Q_K_V_PROJ, query_heads="num_heads", output="out_proj"),),
    "florence2": (
        AttentionSpec("Florence2VisionWindowAttention", FUSED_QKV, query_heads="num_heads", output="proj"),
        AttentionSpec(
            "Florence2VisionChannelAttention",
            FUSED_QKV,
            query_heads="groups",
            output="proj",
            value_output_barrier=CHANNELS,
        ),
    ),
    # ViT, DeiT and most plain vision transformers of timm; its SwinV2, BEiT and EVA classes bear similar names, but hand
    # their weight to a functional call, past any module.
    "timm_vit": (
        AttentionSpec(
            "Attention",
            FUSED_QKV,
            query_heads="num_heads",
            defined_in=("timm.layers.attention", "timm.models.vision_transformer"),
            output="proj",
        ),
    ),
    "timm_swin": (
        AttentionSpec(
            "WindowAttention",
            FUSED_QKV,
            query_heads="num_heads",
            defined_in=("timm.models.swin_transformer",),
            output="proj",
        ),
    ),
    # Cross-covariance attention, and the class attention that XCiT took from CaiT.
    "timm_xcit": (
        AttentionSpec(
            "XCA",
            FUSED_QKV,
            query_heads="num_heads",
            defined_in=("timm.models.xcit",),
            output="proj",
            value_output_barrier=CHANNELS,
        ),
        AttentionSpec("ClassAttn", Q_K_V, query_heads="num_heads", defined_in=("timm.models.cait",), output="proj"),
    ),
    "timm_cait": (
        AttentionSpec(
            "TalkingHeadAttn",
            FUSED_QKV,
            query_heads="num_heads",
            defined_in=("timm.models.cait",),
            output="proj",
            value_output_barrier="talking heads, whose attention weights mix the heads after the softmax",
        ),
    ),
    "timm_crossvit": (
        AttentionSpec(
            "CrossAttention",
            {"wq": "query", "wk": "key", "wv": "value"},
            query_heads="num_heads",
            defined_in=("timm.models.crossvit",),
            output="proj",
        ),
    ),
    # The names of timm's code: its ChannelAttention takes the softmax of the products of what it calls k and v, and
    # applies it to what it calls q (ChannelAttentionV2 has the usual order). All three are conditioned alike by default.
    "timm_davit": (
        AttentionSpec(
            "WindowAttention", FUSED_QKV, query_heads="num_heads", defined_in=("timm.models.davit",), output="proj"
        ),
        AttentionSpec(
            "ChannelAttention",
            FUSED_QKV,
            query_heads="num_heads",
            defined_in=("timm.models.davit",),
            output="proj",
            value_output_barrier=CHANNELS,
        ),
        AttentionSpec(
            "ChannelAttentionV2",
            FUSED_QKV,
            query_heads="groups",
            defined_in=("timm.models.davit",),
            output="proj",
            value_output_barrier=CHANNELS,
        ),
    ),
}


def output_module(model: nn.Module, attention: str, spec: AttentionSpec) -> tuple[str, nn.Module] | None:
    """Full name and module of the output projection of an attention with that full name, as `spec` says.

    Returns:
        None where `spec` does not say, or points outside of `model`.

    Raises:
        ValueError: if there is none where it points.
    """
    full_name = spec.output_name(attention)
    if full_name is None:
        return None
    try:
        return full_name, model.get_submodule(full_name)
    except AttributeError as error:
        raise ValueError(
            f"{type(model.get_submodule(attention)).__name__} should have its output projection at {spec.output!r}, but "
            f"there is no {full_name}; pass architecture=AttentionSpec(..., output=...) with the right path."
        ) from error


def unknown_parts(attention: nn.Module, spec: AttentionSpec, ignored: Collection[str] = ()) -> str | None:
    """That an attention has parameters of its own that its row of the table does not know; None where it has none.

    A row speaks for a class of that name, of which a variant may have a norm or a gate between the projections.

    Args:
        attention: the module that `spec` matched.
        spec: the row.
        ignored: names of children and parameters that are in the way of nothing.
    """
    known = {*spec.projections_of, (spec.output or "").partition(".")[0], *ignored}
    parts = [name for name, child in attention.named_children() if name not in known and list(child.parameters())]
    parts += [name for name, _ in attention.named_parameters(recurse=False) if name not in known]
    return f"{', '.join(parts)}, which {type(attention).__name__} does not have in the table" if parts else None


def attention_specs(architecture: AttentionSpec | Sequence[AttentionSpec] | None) -> tuple[AttentionSpec, ...]:
    """The rows to match: those given, or both parts of the table."""
    if architecture is None:
        return tuple(
            spec for table in (ARCHITECTURES, MORE_ARCHITECTURES) for specs in table.values() for spec in specs
        )
    specs = (architecture,) if isinstance(architecture, AttentionSpec) else tuple(architecture)
    if not specs or not all(isinstance(spec, AttentionSpec) for spec in specs):
        raise ValueError(f"architecture={architecture!r} must be an AttentionSpec or a non-empty sequence of them.")
    return specs
