"""The Nystromformer that was published with results on Long Range Arena, as a `transformers` model.

Xiong et al., "Nystromformer" (https://arxiv.org/abs/2102.03902), by the code of their LRA experiments
(https://github.com/mlpen/Nystromformer, folder LRA). It is not `transformers`' own Nystromformer: LayerNorm stands before
attention and feed-forward, nothing normalizes the embeddings, there are no token types, and the head averages positions.

That code has four peculiarities, each an option of the configuration, on by default: results by it have them. With all of
them off, an example's output depends on neither its padding nor the other examples of its batch.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from hf_specattn import AttentionSpec, register_architecture
from hf_specattn.crammed_bert import eager_attention_forward


@strict
class LraNystromformerConfig(PreTrainedConfig):
    """Configuration; the defaults are those of ListOps.

    Args:
        vocab_size: token ids, padding among them.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the encoder; the head's hidden layer has
            `intermediate_size`, too.
        max_position_embeddings: learned positions, the greatest length.
        attention_type: "nystrom", or "softmax" for exact attention (and no convolution).
        num_landmarks: of Nystrom attention. A sequence of exactly this many tokens is attended to exactly.
        conv_kernel_size: of the depthwise convolution over the positions of the values, odd.
        inverse_iterations: of the pseudo-inverse.
        hidden_dropout_prob: after the embeddings, attention and the feed-forward, and in it.
        attention_probs_dropout_prob: of softmax attention; Nystrom attention has none, as published.
        pad_token_id: the token that is padding where no `attention_mask` is given. Published also for images: black pixels
            count as padding. None: every token counts.
        padding_in_landmarks: landmarks are means over equal parts of the padded sequence, padding as zeros among them. False:
            over equal parts of the example's own tokens.
        batch_wide_inverse: the pseudo-inverse starts from the greatest column sum of all examples and heads. False: of each
            matrix alone.
        mean_over_padding: the head divides the sum over the tokens by the padded length. False: by their number.
        layer_norm: False takes every layer norm out: an ablation.
        pairs: classify two sequences together, `input_ids` (batch, 2, n), by one shared encoder.

    Raises:
        StrictDataclassError: (of `huggingface_hub.errors`) for a value of the wrong type or outside its range.
    """

    model_type = "lra_nystromformer"

    vocab_size: int = 32
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 128
    max_position_embeddings: int = 2048
    attention_type: Literal["nystrom", "softmax"] = "nystrom"
    num_landmarks: int = 64
    conv_kernel_size: int = 35
    inverse_iterations: int = 6
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    pad_token_id: int | None = 0
    padding_in_landmarks: bool = True
    batch_wide_inverse: bool = True
    mean_over_padding: bool = True
    layer_norm: bool = True
    pairs: bool = False

    def validate_architecture(self) -> None:
        """Check the ranges of the fields; runs when a config is built and again when a model is built from it."""
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("max_position_embeddings", "num_landmarks", "conv_kernel_size", "inverse_iterations"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={self.conv_kernel_size} must be odd: it is centered on each position.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")


def new_norm(config: LraNystromformerConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size) if config.layer_norm else nn.Identity()


def masked_scores(mask: Tensor) -> Tensor:
    """What is added to the scores of keys, (batch, 1, 1, n), by a mask (batch, n): finite, for examples of padding alone."""
    return ((1 - mask) * torch.finfo(mask.dtype).min)[:, None, None]


def landmark_means(tensors: tuple[Tensor, ...], mask: Tensor, landmarks: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Means over equal parts of each example's own tokens, in their order.

    An example of fewer tokens than landmarks has one for each token, and the others are zero and do not count.

    Args:
        tensors: (batch, heads, n, head_dim) each.
        mask: (batch, n), 1 for a token and 0 for padding.

    Returns:
        The means, (batch, heads, landmarks, head_dim) each, and which of them count, (batch, landmarks) of 0 and 1.
    """
    tokens = mask.sum(1, keepdim=True).long()
    rank = mask.cumsum(1).long() - 1
    part = (rank.clamp(min=0) * tokens.clamp(max=landmarks)) // tokens.clamp(min=1)
    member = F.one_hot(part, landmarks).to(mask.dtype) * mask[..., None]  # (batch, n, landmarks)
    sizes = member.sum(1)
    weights = (member / sizes.clamp(min=1)[:, None]).transpose(1, 2)[:, None]
    return tuple(weights @ tensor for tensor in tensors), (sizes > 0).to(mask.dtype)


def iterative_inverse(matrix: Tensor, iterations: int, batch_wide: bool) -> Tensor:
    """The Moore-Penrose inverse of (batch, heads, m, m) row-stochastic matrices, approximately, by matrix products alone.

    Razavi et al., "A new iterative method for finding approximate inverses" (2014), as in the paper's equation 11.

    Args:
        matrix: entries from 0 to 1; a row may be all zero.
        iterations: each multiplies the error, where it is small, to its third power.
        batch_wide: start from the greatest column sum of all matrices, not of each.
    """
    columns = matrix.sum(-2)
    greatest = columns.max() if batch_wide else columns.amax(-1)[..., None, None]
    inverse = matrix.mT / greatest.clamp(min=torch.finfo(matrix.dtype).tiny)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse


class LraSelfAttention(nn.Module):
    """Nystrom or softmax attention with its output projection. Scores are computed in float32, also under autocast."""

    def __init__(self, config: LraNystromformerConfig):
        super().__init__()
        self.config = config
        self.is_causal = False  # read by the sdpa implementation
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        if config.attention_type == "nystrom":
            heads, kernel = config.num_attention_heads, config.conv_kernel_size
            self.conv = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), bias=False, groups=heads)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (batch, n, hidden_size).
            attention_mask: (batch, 1, n, n), added to the scores.
            mask: (batch, n), 1 for a token and 0 for padding.

        Returns:
            The output, and under the eager implementation (which the diagnostics ask for) the weights of softmax attention,
            (batch, heads, n, n): in Nystrom attention those that it approximates.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        weights = None
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, key, value = (part.to(mask.dtype) for part in (query, key, value))
            if self.config.attention_type == "softmax" or self.config._attn_implementation == "eager":
                attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                    self.config._attn_implementation, eager_attention_forward
                )
                dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
                attended, weights = attend(
                    self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling
                )
            if self.config.attention_type == "nystrom":
                attended = self._nystrom(query, key, value, mask).transpose(1, 2)
        return self.output(attended.flatten(2).to(hidden_states.dtype)), weights

    def _nystrom(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        rows = mask[:, None, :, None]
        query, key, value = query * rows * self.scaling**0.5, key * rows * self.scaling**0.5, value * rows
        landmarks, length = self.config.num_landmarks, query.shape[2]
        if landmarks == length:
            attended = (query @ key.mT + masked_scores(mask)).softmax(-1) @ value
        else:
            if self.config.padding_in_landmarks:
                parts = (landmarks, length // landmarks)
                few_query, few_key = (part.unflatten(2, parts).mean(3) for part in (query, key))
                counts = torch.ones_like(mask[:, :landmarks])
            else:
                (few_query, few_key), counts = landmark_means((query, key), mask, landmarks)
            first = (query @ few_key.mT + masked_scores(counts)).softmax(-1)
            second = (few_query @ few_key.mT + masked_scores(counts)).softmax(-1) * counts[:, None, :, None]
            third = (few_query @ key.mT + masked_scores(mask)).softmax(-1)
            inverse = iterative_inverse(second, self.config.inverse_iterations, self.config.batch_wide_inverse)
            attended = (first @ inverse) @ (third @ value)
        return attended + self.conv(value.to(self.conv.weight.dtype))


class LraLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: LraNystromformerConfig):
        super().__init__()
        self.attention_norm = new_norm(config)
        self.attention = LraSelfAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.feed_forward_norm = new_norm(config)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(config.intermediate_size, config.hidden_size),
            nn.Dropout(config.hidden_dropout_prob),
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, mask)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class LraNystromformerPreTrainedModel(PreTrainedModel):
    """Initialization: embeddings from N(0, 0.02^2), everything else as torch does."""

    config_class = LraNystromformerConfig
    config: LraNystromformerConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _input_embed_layer = "word_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.reset_parameters()


class LraNystromformerModel(LraNystromformerPreTrainedModel):
    """The encoder."""

    def __init__(self, config: LraNystromformerConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(LraLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = new_norm(config)
        self.post_init()

    def mask_of(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """1 for a token and 0 for padding, in the shape of `input_ids`, in float32 at least."""
        if attention_mask is None:
            pad = self.config.pad_token_id
            attention_mask = torch.ones_like(input_ids) if pad is None else input_ids != pad
        return attention_mask.to(torch.promote_types(self.word_embeddings.weight.dtype, torch.float32))

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Encode tokens.

        Args:
            input_ids: (batch, n).
            attention_mask: (batch, n), 1 for a token and 0 for padding. None: by `config.pad_token_id`.

        Returns:
            `last_hidden_state` (batch, n, hidden_size), zero at padding.

        Raises:
            ValueError: for more tokens than positions, or with `padding_in_landmarks` a length that the landmarks do not
                divide.
        """
        config, length = self.config, input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"The input has {length} tokens and the model {config.max_position_embeddings} positions "
                "(max_position_embeddings); cut it."
            )
        if config.attention_type == "nystrom" and config.padding_in_landmarks and length % config.num_landmarks:
            raise ValueError(
                f"The input has {length} tokens, which {config.num_landmarks} landmarks do not divide; pad it to a multiple, "
                "or set padding_in_landmarks=False."
            )
        mask = self.mask_of(input_ids, attention_mask)
        hidden_states = self.dropout(self.word_embeddings(input_ids) + self.position_embeddings.weight[:length])
        added = masked_scores(mask).expand(-1, 1, length, length)
        for layer in self.layers:
            hidden_states = layer(hidden_states, added, mask)
        return BaseModelOutput(
            last_hidden_state=self.final_norm(hidden_states) * mask[..., None].to(hidden_states.dtype)
        )


class LraNystromformerForSequenceClassification(LraNystromformerPreTrainedModel):
    """The encoder, the mean over positions, and a head of one hidden layer; with `config.pairs` on two sequences."""

    def __init__(self, config: LraNystromformerConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.encoder = LraNystromformerModel(config)
        self.classifier = nn.Sequential(
            nn.Linear(config.hidden_size * (4 if config.pairs else 1), config.intermediate_size),
            nn.ReLU(),
            nn.Linear(config.intermediate_size, self.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify sequences, or pairs of them.

        Args:
            input_ids, attention_mask: as `LraNystromformerModel.forward`; with `config.pairs` (batch, 2, n).
            labels: (batch,), class indices.

        Returns:
            `logits` (batch, num_labels), and their mean cross-entropy as `loss` if `labels` are given.

        Raises:
            ValueError: for another shape, and as `LraNystromformerModel.forward`.
        """
        pairs = self.config.pairs
        if input_ids.dim() != 2 + pairs or (pairs and input_ids.shape[1] != 2):
            wanted = "(batch, 2, n)" if pairs else "(batch, n)"
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; with pairs={pairs} give {wanted}.")
        if pairs:
            masks = (None, None) if attention_mask is None else attention_mask.unbind(1)
            # Two passes: the batch of one is not the batch of the other, where the pseudo-inverse looks at all of it.
            one, two = (self._pooled(ids, mask) for ids, mask in zip(input_ids.unbind(1), masks))
            pooled = torch.cat([one, two, one * two, one - two], dim=-1)
        else:
            pooled = self._pooled(input_ids, attention_mask)
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        summed = self.encoder(input_ids, attention_mask, return_dict=True).last_hidden_state.sum(1)
        if self.config.mean_over_padding:
            return summed / input_ids.shape[1]
        tokens = self.encoder.mask_of(input_ids, attention_mask).sum(1, keepdim=True).clamp(min=1)
        return summed / tokens.to(summed.dtype)


# Scores depend on Q and K by products alone, and the convolution treats every channel of a head alike.
SPEC = AttentionSpec(
    "LraSelfAttention",
    {"query": "query", "key": "key", "value": "value"},
    defined_in=(__name__,),
    output="output",
    query_key_barrier=None,
    value_output_barrier=None,
)


def register() -> None:
    """Register these models with the Auto classes and the flag; call it before loading a saved one."""
    register_architecture(
        LraNystromformerConfig,
        {
            AutoModel: LraNystromformerModel,
            AutoModelForSequenceClassification: LraNystromformerForSequenceClassification,
        },
        SPEC,
    )
