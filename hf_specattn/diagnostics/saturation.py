"""Saturation of the softmax: with a large lambda on query and key every token may attend to itself alone."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def attention_entropy(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Mean entropy of the attention weights, in nats, per layer and head.

    0 is a softmax that picks one token and passes no gradient to query and key; `log n` is uniform attention over n
    tokens. The model runs once in eval mode with eager attention, and is left as it was.

    Args:
        model: a transformers model that can output its attention weights.
        inputs: its keyword arguments; rows of padded queries (`attention_mask` 0) do not count.

    Returns:
        `(layers, heads)`, float32, on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        with _eager_attention(model):
            attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.train(was_training)
    mask = inputs.get("attention_mask")
    return torch.stack([_mean_row_entropy(weights.float(), mask) for weights in attentions])


def _mean_row_entropy(weights: Tensor, mask: Tensor | None) -> Tensor:
    """`(heads,)` from `(batch, heads, queries, keys)` probabilities."""
    entropy = torch.special.entr(weights).sum(dim=-1)
    if mask is None:
        return entropy.mean(dim=(0, 2))
    counted = mask[:, None, :].to(entropy.dtype)
    return (entropy * counted).sum(dim=(0, 2)) / counted.sum()


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    # Fused kernels do not return the weights.
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
