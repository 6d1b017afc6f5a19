"""The heads that the tests of the Jacobian share, and its singular values by dense autograd."""

from dataclasses import dataclass

import numpy as np
import torch

from hf_specattn.diagnostics import AttentionHead


@dataclass(frozen=True)
class HeadCase:
    """One row of the table.

    Attributes:
        tokens, width, head_width: N, D and d.
        correction: `stock`, `identity` or `svd`: what is added to the weights.
        bias: whether query, key and value have one.
        mask: `none`, `causal`, or `additive` (any numbers).
        scale: factor of the logits, times `d ** -0.5`.
        normed: whether X is as behind a layer norm with weight and bias, so that it can produce a constant.
        value_width: d_v; None: d.
        keys: M for cross-attention with an input of other width; None: self-attention.
        rotary: whether query and key are rotated.
        deviation: standard deviation of the weights.
    """

    tokens: int
    width: int
    head_width: int
    correction: str = "stock"
    bias: bool = False
    mask: str = "none"
    scale: float = 1.0
    normed: bool = False
    value_width: int | None = None
    keys: int | None = None
    rotary: bool = False
    deviation: float = 0.3

    def head(self, seed: int = 0) -> AttentionHead:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = normal(self.tokens, self.width)
        if self.normed:
            gain, shift = 1 + 0.2 * normal(self.width), 0.3 * normal(self.width)
            x = torch.nn.functional.layer_norm(x, (self.width,), gain, shift)
        x_key = None if self.keys is None else normal(self.keys, self.width + 2)
        key_width = self.width if x_key is None else self.width + 2
        shapes = [(self.head_width, self.width), (self.head_width, key_width)]
        shapes.append((self.value_width or self.head_width, key_width))
        weights = [corrected(self.deviation * normal(*shape), self.correction) for shape in shapes]
        biases = [0.5 * normal(len(weight)) if self.bias else None for weight in weights]
        keys = self.tokens if self.keys is None else self.keys
        mask = {
            "none": None,
            "causal": torch.ones(self.tokens, keys, dtype=torch.bool).tril(),
            "additive": normal(self.tokens, keys),
        }[self.mask]
        return AttentionHead(
            x,
            *weights,
            scale=self.scale * self.head_width**-0.5,
            query_bias=biases[0],
            key_bias=biases[1],
            value_bias=biases[2],
            mask=mask,
            x_key=x_key,
            rotation=rotations(self.tokens, self.head_width) if self.rotary else None,
        )


def corrected(weight: torch.Tensor, correction: str) -> torch.Tensor:
    matrix = weight.numpy()
    if correction == "identity":
        matrix = matrix + np.eye(*matrix.shape)
    elif correction == "svd":
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        matrix = matrix + sigma[0] * left @ right
    return torch.from_numpy(matrix)


def rotations(tokens: int, width: int) -> torch.Tensor:
    """Rotary position embeddings as matrices: pair k of the channels is turned by position times `100^(-2k/width)`."""
    matrices = torch.zeros(tokens, width, width, dtype=torch.float64)
    for position in range(tokens):
        for pair in range(width // 2):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / width), dtype=torch.float64)
            block = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            here = slice(2 * pair, 2 * pair + 2)
            matrices[position, here, here] = block
    return matrices


def attention(head: AttentionHead, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The head's output from the definition of attention."""

    def projected(x, weight, bias):
        return x @ weight.T + (0 if bias is None else bias)

    x_key = head.x if head.x_key is None else head.x_key
    queries = projected(head.x, query, head.query_bias)
    keys = projected(x_key, key, head.key_bias)
    if head.rotation is not None:
        queries = torch.stack([turn @ row for turn, row in zip(head.rotation, queries)])
        keys = torch.stack([turn @ row for turn, row in zip(head.rotation, keys)])
    logits = head.scale * queries @ keys.T
    exponentials = (logits if head.mask is None else logits + head.mask).exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True) @ projected(x_key, value, head.value_bias)


def dense_jacobian(head: AttentionHead) -> torch.Tensor:
    parts = torch.autograd.functional.jacobian(
        lambda *weights: attention(head, *weights), (head.query, head.key, head.value)
    )
    return torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=1)


def dense_singular_values(head: AttentionHead) -> np.ndarray:
    return np.linalg.svd(dense_jacobian(head).numpy(), compute_uv=False)
