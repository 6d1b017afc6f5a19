"""The tiny random models that the tests share, and `W + C` computed independently of the package.

Adding an architecture to the tests is one row of `ARCHITECTURES`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import hf_specattn

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 32, 4, 2, 48, 10
PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class TinyArchitecture:
    """One row of the table.

    Args:
        model_type: of the stock configuration.
        config_class: the stock configuration class.
        settings: the fields of a tiny configuration.
        classes: what each Auto class must load: Auto class -> stock class, both by name.
        weights: regular expression of the names of the weights that hold query, key and value; its first group begins
            with q, k or v, unless the weight is fused.
        fused: whether each weight is `[query | key | value]`.
        transposed: whether a fused weight is `(in_features, out_features)`, a transformers Conv1D.
        layers: how many attentions have weights of their own.
        padded: whether the second text is padded.
        key_value_heads: heads of key and value.
        rotary: whether rotary position embeddings act on query and key.
        outputs: regular expression of the names of the weights of the attentions' output projections.
    """

    model_type: str
    config_class: type[PretrainedConfig]
    settings: Mapping[str, Any]
    classes: Mapping[str, str]
    weights: str = r"\.(query|key|value|q_proj|k_proj|v_proj)\.weight$"
    fused: bool = False
    transposed: bool = True
    layers: int = LAYERS
    padded: bool = True
    key_value_heads: int = HEADS
    rotary: bool = False
    outputs: str = r"(attention\.output\.dense|attention_output|o_proj|attn\.c_proj)\.weight$"

    def __str__(self) -> str:
        return self.model_type

    def config(self, **changes: Any) -> PretrainedConfig:
        return self.config_class(**{**self.settings, **changes})

    def stock_class(self, auto_name: str = "AutoModel") -> type[PreTrainedModel]:
        name = self.classes[auto_name]
        return getattr(transformers, name, None) or getattr(hf_specattn, name)

    def model(self, auto_name: str = "AutoModel", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """A stock model in eval mode whose norms and biases are random too: at their initial values errors would hide."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.stock_class(auto_name)._from_config(self.config(**changes), dtype=torch.float64)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    def batch(self, auto_name: str = "AutoModel", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Two samples; the second text is padded on the right, where the architecture takes that."""
        generator = torch.Generator().manual_seed(1)
        if "image_size" in self.settings:
            channels, size = self.settings["num_channels"], self.settings["image_size"]
            pixels = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
            return {"pixel_values": pixels.to(dtype)}
        shape = (2, 3, LENGTH) if auto_name == "AutoModelForMultipleChoice" else (2, LENGTH)
        tokens = torch.randint(5, VOCABULARY, shape, generator=generator)
        mask = torch.ones_like(tokens)
        if not self.padded:
            return {"input_ids": tokens}
        tokens[1, ..., LENGTH - 3 :], mask[1, ..., LENGTH - 3 :] = 0, 0
        return {"input_ids": tokens, "attention_mask": mask}

    def heads_of(self, projection: str) -> int:
        return HEADS if projection == "query" else self.key_value_heads

    def projections(self, model: nn.Module) -> list[tuple[str, str, np.ndarray]]:
        """`(weight name, projection, matrix)` of a stock model; each matrix is an `(out, in)` view of the weight."""
        found = []
        for name, weight in model.state_dict().items():
            match = re.search(self.weights, name)
            if match and self.fused:
                matrix = weight.numpy().T if self.transposed else weight.numpy()
                found += [(name, *part) for part in zip(PROJECTIONS, np.split(matrix, 3))]
            elif match:
                found.append((name, next(p for p in PROJECTIONS if p[0] == match[1][0]), weight.numpy()))
        return found


BERT_HEADS = {
    "AutoModel": "BertModel",
    "AutoModelForPreTraining": "BertForPreTraining",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForCausalLM": "BertLMHeadModel",
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "BertForMultipleChoice",
    "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
}
ROBERTA_HEADS = {
    "AutoModel": "RobertaModel",
    "AutoModelForPreTraining": "RobertaForMaskedLM",
    "AutoModelForMaskedLM": "RobertaForMaskedLM",
    "AutoModelForCausalLM": "RobertaForCausalLM",
    "AutoModelForSequenceClassification": "RobertaForSequenceClassification",
    "AutoModelForTokenClassification": "RobertaForTokenClassification",
    "AutoModelForQuestionAnswering": "RobertaForQuestionAnswering",
    "AutoModelForMultipleChoice": "RobertaForMultipleChoice",
}
VIT_HEADS = {
    "AutoModel": "ViTModel",
    "AutoModelForImageClassification": "ViTForImageClassification",
    "AutoModelForMaskedImageModeling": "ViTForMaskedImageModeling",
}
CRAMMED_BERT_HEADS = {
    "AutoModel": "CrammedBertModel",
    "AutoModelForPreTraining": "CrammedBertForMaskedLM",
    "AutoModelForMaskedLM": "CrammedBertForMaskedLM",
    "AutoModelForSequenceClassification": "CrammedBertForSequenceClassification",
    "AutoModelForTokenClassification": "CrammedBertForTokenClassification",
}
GPT2_HEADS = {
    "AutoModel": "GPT2Model",
    "AutoModelForPreTraining": "GPT2LMHeadModel",
    "AutoModelForCausalLM": "GPT2LMHeadModel",
    "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "GPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering",
}
LLAMA_HEADS = {
    "AutoModel": "LlamaModel",
    "AutoModelForCausalLM": "LlamaForCausalLM",
    "AutoModelForSequenceClassification": "LlamaForSequenceClassification",
    "AutoModelForTokenClassification": "LlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "LlamaForQuestionAnswering",
}

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "num_labels": 2,
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 24, "pad_token_id": 0}
SPECIAL_TOKENS = {"bos_token_id": 2, "eos_token_id": 3}

ARCHITECTURES = {
    row.model_type: row
    for row in (
        TinyArchitecture("bert", transformers.BertConfig, SIZES | TEXT, BERT_HEADS),
        TinyArchitecture("roberta", transformers.RobertaConfig, SIZES | TEXT | SPECIAL_TOKENS, ROBERTA_HEADS),
        TinyArchitecture(
            "vit",
            transformers.ViTConfig,
            SIZES | {"image_size": 8, "patch_size": 4, "encoder_stride": 4, "num_channels": 3},
            VIT_HEADS,
        ),
        TinyArchitecture(
            "crammed_bert",
            hf_specattn.CrammedBertConfig,
            SIZES | TEXT | {"classifier_hidden_size": 20},
            CRAMMED_BERT_HEADS,
        ),
        TinyArchitecture(
            "gpt2",
            transformers.GPT2Config,
            {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 24, "num_labels": 2}
            | {"vocab_size": VOCABULARY, "pad_token_id": 0}
            | SPECIAL_TOKENS,
            GPT2_HEADS,
            weights=r"\.c_attn\.weight$",
            fused=True,
        ),
        TinyArchitecture(
            "llama",
            transformers.LlamaConfig,
            SIZES | TEXT | SPECIAL_TOKENS | {"num_key_value_heads": 2},
            LLAMA_HEADS,
            key_value_heads=2,
            rotary=True,
        ),
    )
}
each_architecture = pytest.mark.parametrize("tiny", ARCHITECTURES.values(), ids=str)
each_head = pytest.mark.parametrize(
    ("tiny", "auto_name"),
    [
        pytest.param(tiny, auto_name, id=f"{tiny}-{auto_name}")
        for tiny in ARCHITECTURES.values()
        for auto_name in tiny.classes
    ],
)
each_method = pytest.mark.parametrize("method", ["identity", "svd"])
# Every head once, with the method that has tensors, and every base model with both: heads differ in names and prefixes, which
# the identity adds nothing to.
each_head_once = pytest.mark.parametrize(
    ("tiny", "auto_name", "method"),
    [
        pytest.param(tiny, auto_name, method, id=f"{tiny}-{auto_name}-{method}")
        for tiny in ARCHITECTURES.values()
        for auto_name in tiny.classes
        for method in ("identity", "svd")
        if method == "svd" or auto_name == "AutoModel"
    ],
)
each_init = pytest.mark.parametrize("init", ["additive", "preserve"])


# --- W + C with NumPy alone ------------------------------------------------------------------------------------------

Correction = Callable[[np.ndarray, str], np.ndarray]


def identity_by_numpy(lambda_: float | Mapping[str, float] = 10.0) -> Correction:
    def correction(matrix: np.ndarray, projection: str) -> np.ndarray:
        number = lambda_[projection] if isinstance(lambda_, Mapping) else lambda_
        return number * np.eye(*matrix.shape)

    return correction


def svd_by_numpy(matrix: np.ndarray, projection: str) -> np.ndarray:
    left, singular_values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return singular_values[0] * (left @ right)


CORRECTIONS: dict[str, Correction] = {"identity": identity_by_numpy(), "svd": svd_by_numpy}


def add_correction(
    tiny: TinyArchitecture,
    model: nn.Module,
    correction: Correction,
    targets: Sequence[str] = PROJECTIONS,
    per_head: bool = False,
) -> nn.Module:
    """A stock `model` whose weights become W + C, in place, without the package."""
    projections = tiny.projections(model)
    assert len(projections) == 3 * tiny.layers
    for _, projection, matrix in projections:
        if projection in targets:
            for block in np.split(matrix, tiny.heads_of(projection)) if per_head else [matrix]:
                block += correction(block, projection).astype(block.dtype)
    return model


# --- comparisons -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the forward pass returns."""
    return {name: value for name, value in model(**batch).items() if isinstance(value, Tensor)}


def relative_difference(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The greatest difference, relative to the greatest expected value, over all tensors."""
    assert outputs.keys() == expected.keys()
    assert expected
    return max(
        ((outputs[name].double() - value.double()).abs().max() / value.double().abs().max()).item()
        for name, value in expected.items()
    )


def assert_bit_equal(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert expected
    different = [
        name
        for name, value in expected.items()
        if value.dtype != tensors[name].dtype or not torch.equal(value, tensors[name])
    ]
    assert not different


class ToyAttention(nn.Module):
    """An attention that the table does not know: one fused tensor, queries of 4 heads, keys and values of 2."""

    def __init__(self, width=16, heads=4, groups=2, interleaved=False):
        super().__init__()
        self.width, self.heads, self.groups, self.head_dim = width, heads, groups, width // heads
        self.interleaved = interleaved
        self.in_proj = nn.Linear(width, (heads + 2 * groups) * self.head_dim, dtype=torch.float64)
        self.out_proj = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, inputs):
        fused = self.in_proj(inputs)
        per_group = self.heads // self.groups
        if self.interleaved:
            query, key, value = fused.unflatten(-1, (self.groups, per_group + 2, self.head_dim)).split(
                [per_group, 1, 1], dim=-2
            )
            query = query.flatten(-3, -2)
            key, value = key.squeeze(-2), value.squeeze(-2)
        else:
            query, key, value = fused.unflatten(-1, (-1, self.head_dim)).split(
                [self.heads, self.groups, self.groups], dim=-2
            )
        key, value = (part.repeat_interleave(per_group, dim=-2) for part in (key, value))
        query, key, value = (part.transpose(-3, -2) for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(-3, -2).flatten(-2))


def toy_spec(interleaved):
    return hf_specattn.AttentionSpec(
        "ToyAttention",
        {"in_proj": ("query", "key", "value")},
        interleaved=interleaved,
        query_heads="heads",
        key_value_heads="groups",
    )
