"""The corrections `C` and the condition number, as pure functions of one matrix or a batch of them.

A weight `W` is stored as `nn.Linear` stores it, `(out_features, in_features)`; the paper's `W_Q` is its transpose. Both
corrections commute with transposition, so nothing here depends on that choice.
"""

import math

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`, in float32 if it was stored in half precision, for which LAPACK has no kernel."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def identity_correction(weight: Tensor, lambda_: float) -> Tensor:
    """`lambda_ * I_k` in the shape of `weight` (Theorem 3.8).

    Args:
        weight: `(..., m, n)`; only its shape, dtype and device are read.
        lambda_: the number on the main diagonal, whose length is `k = min(m, n)`.

    Returns:
        `(..., m, n)`, at least float32. Broadcast over the batch: do not write into it.
    """
    rows, columns = weight.shape[-2:]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # In place: the forward pass comes here, and a second matrix would be memory traffic for nothing.
    return torch.eye(rows, columns, dtype=dtype, device=weight.device).mul_(lambda_).expand(weight.shape)


def svd_correction(weight: Tensor) -> Tensor:
    """`sigma_max(W) * U V^T` from the thin SVD `W = U S V^T` (proof of Theorem 3.5).

    The singular values of `W + C` are `s_i + s_1`, so its condition number is `2 s_1 / (s_1 + s_k) <= 2`. `U V^T` is the
    orthogonal polar factor of `W`; where `W` is rank-deficient LAPACK completes the bases, and the bound still holds.
    No gradient flows through the result.

    Args:
        weight: `(..., m, n)`, finite.

    Returns:
        `(..., m, n)`, at least float32.
    """
    left, sigma, right = torch.linalg.svd(at_least_float32(weight.detach()), full_matrices=False)
    return sigma[..., :1, None] * (left @ right)


def extreme_singular_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`(sigma_min, sigma_max)` of each `(..., m, n)` matrix, computed in float64; sigma_min is that of `k = min(m, n)`."""
    sigma = torch.linalg.svdvals(weight.detach().double())
    return sigma[..., -1], sigma[..., 0]


def condition_number(weight: Tensor) -> Tensor:
    """`sigma_max / sigma_min` (Definition 3.1) of each `(..., m, n)` matrix, in float64; inf where `sigma_min` is 0."""
    sigma_min, sigma_max = extreme_singular_values(weight)
    return sigma_max / sigma_min


def weyl_bound(sigma_max: float, lambda_: float) -> float | None:
    """The bound on `kappa(W + lambda_ * I_k)` that Weyl's inequalities give: `(lambda_ + s_1) / (lambda_ - s_1)`.

    It replaces Theorem 3.8, which is false as printed: its proof bounds `sigma_min(W + lambda_ I)` by
    `lambda_ - sigma_max(W)` (eq. 53) and goes on with `lambda_ - sigma_min(W)` (eq. 55). `diag(-10, eps)` with lambda
    10 satisfies the printed assumption, but `W + 10 I` is singular.

    Returns:
        The bound, or None where `lambda_ <= sigma_max(W)` and nothing is guaranteed.
    """
    if not lambda_ > sigma_max or math.isinf(lambda_):
        return None
    return (lambda_ + sigma_max) / (lambda_ - sigma_max)
