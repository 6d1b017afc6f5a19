"""The product with `W + C` in eager mode, which keeps only X and W for its backward pass.

Written out in torch's operations, `X (W + C)^T` keeps a matrix of the weight's size until the backward pass, or in
half precision reads and writes the output once more in each direction. These functions form `W + C` again instead,
which costs one write of the weight's size regardless of the number of rows of X. `torch.compile` does not need them:
Inductor fuses the plain form.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from .compat import is_transformed


def is_eager() -> bool:
    """Whether operations run as they are called, so that these functions pay off and writing in place is safe.

    Under `torch.compile`, export, tracing, `torch.func` or forward-mode differentiation torch has to see plain operations.
    """
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast would cast a tensor for a product. It knows no meta device, and leaves float64 alone."""
    return (
        tensor.device.type != "meta"
        and torch.is_autocast_enabled(tensor.device.type)
        and tensor.dtype != torch.float64
    )


class SumProduct(torch.autograd.Function):
    """`X (W + C)^T + b`, with `W + C` in the dtype of W, as the layer forms it."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None
    ) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        ctx.layer = layer
        ctx.save_for_backward(input, weight, correction)
        return _as_new(layer.multiply(input, layer.sum_of(weight, correction), bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of X, W and b."""
        input, weight, correction = ctx.saved_tensors
        return _gradients(ctx, input, gradients[0], lambda: ctx.layer.sum_of(weight, correction), weight.dtype)


class ShiftedProduct(torch.autograd.Function):
    """`X W^T + b + X C^T` in half precision for the identity correction, whose last term is a slice of X.

    The gradient of X is one product with `W + lambda I` in half precision. That rounds W's diagonal to the spacing of the
    dtype at lambda, which is what the gradient itself is rounded to; output and gradient of W lose nothing.
    """

    @staticmethod
    def forward(ctx: Any, layer: Any, input: Tensor, exact: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`.

        Args:
            input: X in half precision, through which its gradient goes.
            exact: X as it came, detached; float32 behind a layer norm under autocast.
            weight: W in the dtype that it is stored in.
        """
        ctx.layer = layer
        ctx.save_for_backward(input, weight)
        in_half = (None if bias is None else bias.to(input.dtype)) if weight.dtype != input.dtype else bias
        product: Tensor = layer.multiply(input, weight.to(input.dtype), in_half)
        layer.add_input(product, exact)
        return _as_new(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of X, W and b."""
        input, weight = ctx.saved_tensors
        shifted = lambda: ctx.layer.shifted(weight.to(input.dtype, copy=True))  # noqa: E731
        d_input, d_weight, d_bias = _gradients(ctx, input, gradients[0], shifted, weight.dtype, bias_at=4)[1:4]
        return None, d_input, None, d_weight, d_bias


def _as_new(output: Tensor) -> Tensor:
    """The same tensor, not as the view that a product with more than two dimensions is: torch refuses to change one in place
    where a function of ours made it, and PEFT (adapters by sample) and other code change outputs of a stock layer so."""
    return output.data


def _gradients(ctx: Any, input: Tensor, gradient: Tensor, effective: Any, dtype: torch.dtype, bias_at: int = 3) -> Any:
    layer, needed = ctx.layer, ctx.needs_input_grad
    d_input = d_weight = d_bias = None
    # Whoever calls backward() there.
    with torch.autocast(gradient.device.type, enabled=False) if autocasts(gradient) else contextlib.nullcontext():
        rows = gradient.reshape(-1, gradient.shape[-1])
        if needed[1]:
            d_input = (rows @ layer.orient(effective())).view(input.shape)
        if needed[bias_at - 1]:
            d_weight = layer.outer(rows, input.reshape(-1, input.shape[-1])).to(dtype)
        if needed[bias_at]:
            d_bias = rows.sum(0).to(dtype)
    return None, d_input, d_weight, d_bias, None
