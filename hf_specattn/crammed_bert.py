"""Crammed BERT: the encoder of Geiping and Goldstein (2023) as a `transformers` model.

The architecture of "Cramming: Training a Language Model on a Single GPU in One Day" (https://arxiv.org/abs/2212.14034,
configuration `crammed-bert` of https://github.com/JonasGeiping/cramming) in its stock form. It differs from BERT:

- LayerNorm stands before attention and feed-forward, and once more after the last layer;
- the feed-forward is gated (GELU-GLU), and no dense layer of the encoder has a bias;
- positions are a fixed sinusoidal table times one learned scalar, added to the token embeddings before a LayerNorm;
- there are no token types, no pooler, and nothing between the encoder and the tied decoder.

One departure from the original code, which does not change what can be computed: query, key and value are three
projections; there they are one, interleaved per head.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

__all__ = [
    "CrammedBertConfig",
    "CrammedBertForMaskedLM",
    "CrammedBertForSequenceClassification",
    "CrammedBertForTokenClassification",
    "CrammedBertModel",
    "CrammedBertPreTrainedModel",
    "CrammedBertSelfAttention",
    "sinusoidal_table",
]

# The `ignore_index` of torch's cross-entropy.
IGNORED_LABEL = -100

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@strict
class CrammedBertConfig(PreTrainedConfig):
    r"""Configuration of a Crammed BERT.

    The defaults are the 12-layer model, 95,984,641 parameters with the tied decoder. `num_hidden_layers=16` is the
    configuration published in the original repository today, 119,589,889 parameters.

    The dropout rates default to 0.1, which is what *fine-tuning* uses; pretraining passes
    `hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0`.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model; even (sine and cosine alternate), and a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: number of attention heads in each layer.
        intermediate_size: output width of the first feed-forward projection, value and gate together: the second
            projection reads half of it. Even.
        hidden_act: activation of the gate, a key of `transformers.activations.ACT2FN`.
        hidden_dropout_prob: dropout after the embeddings, after attention and after the feed-forward.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        max_position_embeddings: rows of the position table, the greatest sequence length.
        initializer_range: standard deviation of every Linear and Embedding at initialization.
        position_scale: the learned factor of the position table at initialization; None: `hidden_size**-0.5`, as published.
        layer_norm_eps: epsilon of every LayerNorm.
        attention_residual: whether attention is added to its input; if false, it replaces the input (the feed-forward
        is still added).
        pad_token_id: token whose embedding starts as zero, or None.
        tie_word_embeddings: whether the decoder uses the token embeddings as its weight.
        sparse_prediction: whether `CrammedBertForMaskedLM` decodes only labeled positions while training.
        classifier_hidden_size: width of the hidden layer of the sequence classification head.
        classifier_dropout: dropout in the classification heads; None means `hidden_dropout_prob`.

    Raises:
        StrictDataclassError: (of `huggingface_hub.errors`) for a value of the wrong type or outside its range.
    """

    model_type = "crammed_bert"

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 128
    initializer_range: float = 0.02
    position_scale: float | int | None = None
    layer_norm_eps: float = 1e-12
    attention_residual: bool = True
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    sparse_prediction: bool = True
    classifier_hidden_size: int = 1024
    classifier_dropout: float | int | None = None

    @property
    def first_position_scale(self) -> float:
        """`position_scale`, resolved."""
        return self.hidden_size**-0.5 if self.position_scale is None else float(self.position_scale)

    def validate_architecture(self) -> None:
        """Check the ranges of the fields; runs when a config is built and again when a model is built from it.

        Raises:
            ValueError: naming the field, its value, what is allowed and what to change.
        """
        _check_positive(self)
        _check_sizes_fit(self)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(
                    f"{name}={rate} is not a dropout rate: give a number from 0 up to, but not including, 1."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: give one of {', '.join(sorted(ACT2FN))}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary (0 to {self.vocab_size - 1}): give an id "
                "inside it, or None for a model without padding."
            )


def _check_positive(config: CrammedBertConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "initializer_range",
        "first_position_scale",
        "layer_norm_eps",
        "classifier_hidden_size",
    ):
        if not getattr(config, name) > 0:
            raise ValueError(
                f"{name.removeprefix('first_')}={getattr(config, name)} must be positive: give a number above 0."
            )


def _check_sizes_fit(config: CrammedBertConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads="
            f"{config.num_attention_heads}, and every head takes an equal slice: change one of the two."
        )
    if config.hidden_size % 2:
        raise ValueError(
            f"hidden_size={config.hidden_size} is odd, and sine and cosine positions alternate over it: "
            "give an even number."
        )
    if config.intermediate_size % 2:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} is odd, and the gated feed-forward splits it into equal "
            "halves, value and gate: give an even number."
        )


def sinusoidal_table(length: int, width: int) -> torch.Tensor:
    """Sinusoidal positions: `sin(p / 10000^(2i/width))` in column 2i of row p, its cosine in column 2i + 1.

    Args:
        length: number of positions p.
        width: number of columns, even.

    Returns:
        Tensor of shape (length, width) in float64 on the CPU, so that a cast to any dtype rounds once.

    Source: Vaswani et al. (2017), section 3.5.
    """
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    angles = torch.outer(positions, torch.exp(-math.log(10000.0) * exponents))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class CrammedBertEmbeddings(nn.Module):
    """Token embeddings plus the scaled position table, then LayerNorm and dropout."""

    position_table: torch.Tensor

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.word_embeddings: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        # Shape (1,), not (): FSDP2 shards parameters along their first dimension.
        self.position_scale = nn.Parameter(torch.full((1,), config.first_position_scale))
        table = sinusoidal_table(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_table", table.to(self.position_scale), persistent=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def _apply(self, fn: Callable, recurse: bool = True) -> "CrammedBertEmbeddings":
        # The table is a function of its shape and is in no checkpoint, so every move or cast writes it again. Otherwise
        # `to_empty` would leave uninitialized memory, and bf16 and back a table rounded to 8 bits.
        super()._apply(fn, recurse)
        if not self.position_table.is_meta:
            self.position_table = sinusoidal_table(*self.position_table.shape).to(self.position_table)
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            length, limit = inputs_embeds.shape[1], self.position_table.shape[0]
            if length > limit:
                raise ValueError(
                    f"The input has {length} tokens and the model {limit} positions (max_position_embeddings): "
                    f"truncate to {limit} tokens, or load the model with max_position_embeddings={length} (the table "
                    "is not a parameter, but positions beyond those of training are untrained)."
                )
            positions = self.position_table[:length]
        else:
            positions = F.embedding(position_ids, self.position_table)
        return self.dropout(self.norm(inputs_embeds + self.position_scale * positions))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its definition, the one implementation that returns the probabilities.

    Args:
        module: the attention module; only its training mode is read.
        query, key, value: (batch, heads, n, head_dim).
        attention_mask: added to the scores; broadcast to (batch, heads, n, n). None for no mask.
        scaling: factor of the scores.
        dropout: rate applied to the probabilities in training mode.

    Returns:
        The attended values, (batch, n, heads, head_dim), and the probabilities, (batch, heads, n, n).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class CrammedBertSelfAttention(nn.Module):
    """Multi-head self-attention without biases; the projection of its output belongs to the layer.

    Attributes have the names that `BertSelfAttention` gives them; each projection is (hidden_size, hidden_size).
    """

    def __init__(self, config: CrammedBertConfig, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = self.head_dim = config.hidden_size // config.num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False  # read by the sdpa and flash implementations

        self.query = nn.Linear(config.hidden_size, self.all_head_size, bias=False)
        self.key = nn.Linear(config.hidden_size, self.all_head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.all_head_size, bias=False)
        # A module, although only its rate is read, so that code that disables dropout by walking over modules finds
        # it.
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_and_length = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*batch_and_length, -1, self.attention_head_size).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attended.reshape(*batch_and_length, -1), probabilities


class CrammedBertFeedForward(nn.Module):
    """Gated feed-forward: one projection to value and gate side by side, one from `value * act(gate)` back."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.dense_in = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_out = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.dense_in(hidden_states).chunk(2, dim=-1)
        return self.dense_out(value * self.activation(gate))


class CrammedBertLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: CrammedBertConfig, layer_idx: int | None = None):
        super().__init__()
        self.attention_residual = config.attention_residual
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CrammedBertSelfAttention(config, layer_idx=layer_idx)
        self.attention_output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = CrammedBertFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        attended = self.dropout(self.attention_output(attended))
        hidden_states = hidden_states + attended if self.attention_residual else attended
        return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))


class CrammedBertPreTrainedModel(PreTrainedModel):
    """Initialization, loading and saving, shared by the models."""

    config: CrammedBertConfig
    base_model_prefix = "crammed_bert"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["CrammedBertEmbeddings", "CrammedBertLayer"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CrammedBertLayer, "attentions": CrammedBertSelfAttention}  # noqa: RUF012

    def __init__(self, config: CrammedBertConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        # Fields set after the config was built, as keyword arguments of `from_pretrained` are, were not checked yet.
        config.validate_architecture()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Linear, Embedding: N(0, initializer_range), biases and padding row zero. LayerNorm: weight one, bias zero.
        super()._init_weights(module)
        if isinstance(module, CrammedBertEmbeddings):
            init.constant_(module.position_scale, self.config.first_position_scale)
            # Before it comes here, `from_pretrained` puts uninitialized memory in place of buffers not in checkpoints.
            init.copy_(module.position_table, sinusoidal_table(*module.position_table.shape))


class CrammedBertModel(CrammedBertPreTrainedModel):
    """The encoder: embeddings, pre-norm layers, final LayerNorm; no pooler."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.embeddings = CrammedBertEmbeddings(config)
        self.layers = nn.ModuleList(CrammedBertLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | BaseModelOutput:
        """Encode a batch of sequences.

        Args:
            input_ids: (batch, n), token ids.
            attention_mask: (batch, n), 1 for tokens and 0 for padding; or a mask of four dimensions in the form the
                attention implementation takes. None means that there is no padding: no mask is made at all.
            token_type_ids: accepted, as BERT's tokenizers return them, and ignored: the model has no token types.
            position_ids: (batch, n) or (1, n), each below `max_position_embeddings`; None counts from 0.
            inputs_embeds: (batch, n, hidden_size), in place of the token embeddings (positions are still added).
            kwargs: `output_hidden_states`, `output_attentions` (the latter with the eager implementation only),
                `return_dict`, and what the attention implementation takes.

        Returns:
            `last_hidden_state` (batch, n, hidden_size), after the final norm; `hidden_states`: the embeddings, the
            output of each layer but the last, and `last_hidden_state`; `attentions`: (batch, heads, n, n) per layer.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or n exceeds the positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Give exactly one of input_ids and inputs_embeds; {given} was given.")
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        mask = None
        if attention_mask is not None:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


def _normalized_loss(
    loss_function: Callable,
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Mean of the loss, or its sum over `num_items_in_batch`, in float32 at least.

    `Trainer` counts the items of *all* micro-batches of an optimizer step, adds the losses and divides no further. A
    mean over each micro-batch would then be too large by their number.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if num_items_in_batch is None:
        return loss_function(logits, targets, reduction="mean")
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return loss_function(logits, targets, reduction="sum") / num_items_in_batch


def _token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross-entropy of logits (..., classes) and labels (...), those equal to -100 left out."""
    flat_logits, flat_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device)
    return _normalized_loss(F.cross_entropy, flat_logits, flat_labels, num_items_in_batch)


def _check_label_shape(labels: torch.Tensor, shape: torch.Size) -> None:
    if labels.shape != shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and must have {tuple(shape)}, one for each position; "
            f"give {IGNORED_LABEL} where there is nothing to predict."
        )


def _gather_positions(
    hidden_states: torch.Tensor, labels: torch.Tensor | None, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (batch, k, hidden_size) of the hidden states and labels (batch, k); negative positions are padding."""
    if positions.dim() != 2 or positions.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"masked_positions have shape {tuple(positions.shape)} and must have (batch, k) with batch = "
            f"{hidden_states.shape[0]}; if sequences differ in their number, pad with -1."
        )
    positions = positions.to(hidden_states.device, torch.long)
    rows = positions.clamp(min=0)
    gathered = hidden_states.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
    if labels is not None:
        labels = labels.gather(1, rows).masked_fill(positions < 0, IGNORED_LABEL)
    return gathered, labels


class CrammedBertForMaskedLM(CrammedBertPreTrainedModel):
    """Encoder and decoder tied to the token embeddings, with neither a transform layer nor a bias between them."""

    _tied_weights_keys = {"decoder.weight": "crammed_bert.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.crammed_bert = CrammedBertModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | MaskedLMOutput:
        """Predict tokens; arguments not listed are those of `CrammedBertModel.forward`.

        What `logits` holds, by the first case that applies:

        1. `masked_positions` given: (batch, k, vocab_size), those positions in the order given.
        2. Training mode, `labels` given, `config.sparse_prediction` set, not being compiled: (m, vocab_size), the m
           positions of the batch that have a label, sequence after sequence.
        3. Otherwise, so always in eval mode without `masked_positions`: (batch, n, vocab_size), every position.

        The loss is the same in all cases, provided that `masked_positions` lists each labeled position once. The
        shape of case 2 depends on the data; code being compiled, which needs fixed shapes, decodes every position
        instead. `masked_positions` gives both the fixed shape and the small product.

        Args:
            labels: (batch, n), token ids; -100 where nothing is predicted.
            masked_positions: (batch, k), the positions to decode, in training and in eval mode. Negative entries are
                padding for sequences with fewer than k: they take no part in the loss, and their logits, those of
                position 0, mean nothing. Labels at positions that are not listed are left out of the loss.
            num_items_in_batch: number of labeled positions by which the summed loss is divided, as `Trainer` passes
                it; None divides by the number in this batch, which without any label gives nan.

        Returns:
            `loss` if `labels` are given, in float32 at least; `logits`; `hidden_states`; `attentions`.

        Raises:
            ValueError: for labels or masked positions of another shape, and as `CrammedBertModel.forward`.
        """
        outputs = self.crammed_bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states, labels = self._select_predicted(outputs.last_hidden_state, labels, masked_positions)
        logits = self.decoder(hidden_states)
        return MaskedLMOutput(
            loss=None if labels is None else _token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _select_predicted(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, masked_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states that go through the decoder, with their labels: the choice documented in `forward`."""
        if labels is not None:
            _check_label_shape(labels, hidden_states.shape[:2])
            labels = labels.to(hidden_states.device)
        if masked_positions is not None:
            return _gather_positions(hidden_states, labels, masked_positions)
        sparse = self.training and self.config.sparse_prediction and not torch.compiler.is_compiling()
        if labels is None or not sparse:
            return hidden_states, labels
        labeled = labels != IGNORED_LABEL
        return hidden_states[labeled], labels[labeled]


def _classifier_dropout(config: CrammedBertConfig) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


def _infer_problem_type(num_labels: int, labels: torch.Tensor) -> ProblemType:
    """BERT's rule for a config without a problem type."""
    if num_labels == 1:
        return "regression"
    class_indices = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if class_indices else "multi_label_classification"


def _sequence_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: ProblemType,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Loss of logits (batch, num_labels) for BERT's three problem types."""
    if problem_type == "single_label_classification":
        return _token_loss(logits, labels, num_items_in_batch)
    labels = labels.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[-1] == 1:
        labels = labels.reshape(-1, 1)
    # Checked here because the squared error would broadcast unequal shapes.
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}: {problem_type} takes one "
            "number for each logit. Check num_labels and problem_type in the config."
        )
    loss_function = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return _normalized_loss(loss_function, logits, labels, num_items_in_batch)


class CrammedBertForSequenceClassification(CrammedBertPreTrainedModel):
    """Encoder and a head on position 0: dense to `classifier_hidden_size`, tanh, dropout, linear to `num_labels`.

    Unlike the encoder's, the two layers of the head have biases, as in the original code.
    """

    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.crammed_bert = CrammedBertModel(config)
        self.dense = nn.Linear(config.hidden_size, config.classifier_hidden_size)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.classifier_hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | SequenceClassifierOutput:
        """Classify sequences; arguments not listed are those of `CrammedBertModel.forward`.

        Args:
            labels: by `config.problem_type`: "regression", (batch,) or (batch, num_labels) numbers; "single_label_
                classification", (batch,) class indices; "multi_label_classification", (batch, num_labels) of 0 and 1.
                Without a problem type, the first labels decide, and the config keeps it, as with BERT: regression if
                `num_labels` is 1, else by the dtype, integers being class indices.
            num_items_in_batch: number of labels by which the summed loss is divided, as `Trainer` passes it; None
                divides by the number in this batch.

        Returns:
            `loss` if `labels` are given; `logits` (batch, num_labels); `hidden_states`; `attentions`.

        Raises:
            ValueError: for labels whose number does not fit the logits, and as `CrammedBertModel.forward`.
        """
        outputs = self.crammed_bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        pooled = torch.tanh(self.dense(outputs.last_hidden_state[:, 0]))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type or _infer_problem_type(self.num_labels, labels)
            if not torch.compiler.is_compiling():
                # Pipelines read it from a saved config: without it they pass a regression through a sigmoid.
                self.config.problem_type = problem_type
            loss = _sequence_loss(logits, labels, problem_type, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CrammedBertForTokenClassification(CrammedBertPreTrainedModel):
    """Encoder, dropout and a linear layer (with bias) to `num_labels` at every position."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.crammed_bert = CrammedBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | TokenClassifierOutput:
        """Classify tokens; arguments not listed are those of `CrammedBertModel.forward`.

        Args:
            labels: (batch, n), class indices; -100 where there is none.
            num_items_in_batch: number of labels by which the summed loss is divided, as `Trainer` passes it; None
                divides by the number in this batch, which without any label gives nan.

        Returns:
            `loss` if `labels` are given; `logits` (batch, n, num_labels); `hidden_states`; `attentions`.

        Raises:
            ValueError: for labels of another shape, and as `CrammedBertModel.forward`.
        """
        outputs = self.crammed_bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _check_label_shape(labels, logits.shape[:2])
            loss = _token_loss(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
