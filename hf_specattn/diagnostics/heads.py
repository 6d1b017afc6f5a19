"""One attention head on one sequence: everything that its Jacobian depends on."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .attentions import to_dtype


@dataclass(frozen=True, eq=False)
class AttentionHead:
    """`softmax(scale * Q K^T + mask) V` with `Q = X W_Q + b_Q` and so on, always in float64.

    Weights are as `nn.Linear` stores them, the transposes of the paper's, and *effective*: the derivative with respect to W
    is that with respect to `W + C`.

    Args:
        x: `(N, D)`, the layer's input at the queries.
        query, key: `(d, D)`; d is the head's width.
        value: `(d_v, D)`.
        scale: the factor of the logits, mostly `d ** -0.5`.
        query_bias, key_bias: `(d,)`, or None.
        value_bias: `(d_v,)`, or None. It does not appear in the Jacobian.
        mask: `(N, M)`, added to the scaled logits: -inf where a query must not see a key, or any other bias; boolean True
            where it may. None: every query sees every key.
        x_key: `(M, D)`, the input of key and value if it differs (cross-attention); None: `x`.
        rotation: `(N, d, d)`, the matrices `R_i` that take query i to `R_i q_i` (rotary position embeddings); None: none.
        key_rotation: `(M, d, d)`, likewise of the keys; None: `rotation`.
        epsilon: relative accuracy of `x`, which decides its rank; 0: that of its dtype.

    Raises:
        ValueError: for shapes that do not fit together, nan or inf, and a query that sees no key.
    """

    x: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    mask: Tensor | None = None
    x_key: Tensor | None = None
    rotation: Tensor | None = None
    key_rotation: Tensor | None = None
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not self.epsilon:
            object.__setattr__(self, "epsilon", torch.finfo(self.x.dtype).eps)
        for field in fields(self):
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor):
                object.__setattr__(self, field.name, _float64(field.name, tensor))
        self._check_shapes()
        if not self.weights().isfinite().all():
            raise ValueError("mask leaves a query without any key to see; leave out the rows of padded queries.")

    @property
    def keys_x(self) -> Tensor:
        """The input of key and value, `(M, D)`."""
        return self.x if self.x_key is None else self.x_key

    @property
    def keys_rotation(self) -> Tensor | None:
        """The rotations of the keys, `(M, d, d)`."""
        return self.rotation if self.key_rotation is None else self.key_rotation

    def at_queries(self, places: Tensor) -> "AttentionHead":
        """The same head with its output at some of the queries only, `(n,)` indices; every key stays."""
        return replace(
            self,
            x=self.x[places],
            x_key=self.keys_x,
            mask=None if self.mask is None else self.mask[places],
            rotation=None if self.rotation is None else self.rotation[places],
            key_rotation=self.keys_rotation,
        )

    def queries(self) -> Tensor:
        """Q, `(N, d)`; rotated, where there is a rotation."""
        return rotated(_affine(self.x, self.query, self.query_bias), self.rotation)

    def keys(self) -> Tensor:
        """K, `(M, d)`; rotated, where there is a rotation."""
        return rotated(_affine(self.keys_x, self.key, self.key_bias), self.keys_rotation)

    def weights(self) -> Tensor:
        """The attention weights P, `(N, M)`."""
        return self.softmax(self.queries(), self.keys())

    def output(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The head's output, `(N, d_v)`, for other weights in place of its own: the function whose Jacobian is meant."""
        queries = rotated(_affine(self.x, query, self.query_bias), self.rotation)
        keys = rotated(_affine(self.keys_x, key, self.key_bias), self.keys_rotation)
        return self.softmax(queries, keys) @ _affine(self.keys_x, value, self.value_bias)

    def softmax(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The attention weights of given queries and keys, under this head's scale and mask."""
        logits = self.scale * queries @ keys.mT
        return (logits if self.mask is None else logits + self.mask).softmax(dim=-1)

    def _check_shapes(self) -> None:
        rows, keys = self.x.shape[0], self.keys_x.shape[0]
        wanted = {
            "query": (self.query.shape[0], self.x.shape[1]),
            "key": (self.query.shape[0], self.keys_x.shape[1]),
            "value": (self.value.shape[0], self.keys_x.shape[1]),
            "query_bias": self.query.shape[:1],
            "key_bias": self.query.shape[:1],
            "value_bias": self.value.shape[:1],
            "mask": (rows, keys),
            "rotation": (rows, self.query.shape[0], self.query.shape[0]),
            "key_rotation": (keys, self.query.shape[0], self.query.shape[0]),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{name} has the shape {tuple(tensor.shape)}; together with the others it must be {shape}."
                )
        if (self.rotation is None) != (self.keys_rotation is None) or (
            self.rotation is not None and self.key_rotation is None and rows != keys
        ):
            raise ValueError("rotation and key_rotation go together; pass both if there is an x_key.")


def _float64(name: str, tensor: Tensor) -> Tensor:
    if name == "mask" and tensor.dtype == torch.bool:
        return torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device).masked_fill(~tensor, -torch.inf)
    tensor = to_dtype(tensor.detach(), torch.float64)
    broken = tensor.isnan() if name == "mask" else ~tensor.isfinite()
    if broken.any():
        raise ValueError(
            f"{name} of the attention head has nan or inf entries. Check the weights of the model and its inputs."
        )
    return tensor


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def rotated(rows: Tensor, rotation: Tensor | None) -> Tensor:
    """Each row `(N, d)` turned by its matrix `(N, d, d)`; as it is without a rotation."""
    return rows if rotation is None else (rotation @ rows[..., None]).squeeze(-1)
