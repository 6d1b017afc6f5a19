"""`C = sigma_max(W) * polar(W)` by matrix products: the correction of Theorem 3.5 without an SVD.

The polar factor `U V^T` of `W = U S V^T` is `W` with every singular value moved to 1. An odd polynomial
`p(x) = a x + b x^3 + c x^5` applied to the singular values is three matrix products,
`p(W) = a W + (b G + c G^2) W` with `G = W W^T`, and a composition of such polynomials that is close to 1 on all of
`[l, 1]` gives the polar factor of every matrix with `sigma_max = 1` and `sigma_min >= l`. Each polynomial is the best one
(in the maximum norm) on the interval that the previous ones leave. This greedy choice is the best composition of its
degrees (Amsel, Persson, Musco and Gower, 2025, "The Polar Express", arXiv 2505.16932; for rational functions Nakatsukasa
and Freund, 2016, SIAM Review 58), and each is found here by the exchange algorithm of Remez, so that no table of
coefficients is needed. Two departures make it safe in floating point, at the price of at most one step more:

- A best polynomial for a tiny `l` comes close to 0 somewhere inside the interval, and a large singular value that lands
  there drowns in rounding (Nakatsukasa and Higham, 2012, SIAM J. Matrix Anal. Appl. 33). Hence it is taken on an
  interval that begins at `CUSHION` of its end at the least; what lies below grows all the same.
- It is steep at the upper end of the interval. Hence it is taken on one that is wider by `MARGIN`.

All of it is a pure function of `W`: no state is warm-started from one call to the next, so a resumed run and every rank
compute the same correction from the same weights. The condition number is not assumed but checked
([`within_limit`]); a matrix that fails gets more steps, and one that still fails gets its exact SVD, which also
completes the bases where `W` is rank-deficient.

[`correction_by_products`] never waits for the device: on a GPU a host that waits has launched nothing when the wait is over.
One look at the checks of all weights is enough, and only what failed needs another ([`complete`]).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .corrections import at_least_float32, svd_correction

# The limit of kappa(W + C); the exact correction has at most 2.
KAPPA_LIMIT = 2.02
# What the check asks for, in units of sigma_max(W): singular values of W + C between these two, where exact ones lie
# between 1 and 2. Their ratio is 2.015: the rest is left to the rounding of the check itself.
CHECKED_RANGE = (0.995, 2.005)

# The condition number of W up to which the first composition converges. That of a random n x n matrix exceeds t * n with
# probability 2 / t (Edelman, 1988, SIAM J. Matrix Anal. Appl. 9), and the second composition, which goes on where the
# first one ended, costs almost as much. These two are what 9 and 8 polynomials reach in float32.
FIRST_KAPPA, SECOND_KAPPA = 2e4, 3e3
CUSHION = 0.05
MARGIN = 0.01
# The distance of the singular values from 1 at which the composition ends.
ACCURACY = {torch.float32: 3e-5, torch.float64: 1e-14}
# The last ones always run in full float32; before, `torch.set_float32_matmul_precision` decides.
FULL_PRECISION_STEPS = 2

LANCZOS_STEPS = 32
# 2^-48 is the accuracy of double precision with five bits to spare for the logarithm of a norm.
SQUARINGS = 48


# --- the polynomials -------------------------------------------------------------------------------------------------


class Quintic(NamedTuple):
    """The odd polynomial `a x + b x^3 + c x^5`."""

    a: float
    b: float
    c: float

    def __call__(self, x: float) -> float:
        """Its value at one number."""
        return x * (self.a + x * x * (self.b + x * x * self.c))


# 1 + O((x - 1)^3): where the interval is so short that the exchange algorithm would divide rounding errors by each other.
NEAR_ONE = Quintic(15 / 8, -10 / 8, 3 / 8)


def best_quintic(lower: float, upper: float) -> tuple[Quintic, float]:
    """The odd polynomial of degree 5 that comes closest to 1 on `[lower, upper]`, in the maximum norm.

    By equioscillation (Chebyshev's theorem holds, because `x, x^3, x^5` is a Haar system on positive numbers) its error
    takes its maximum `e` with alternating signs at four points, `1 - p = e, -e, e, -e`: both ends, and the two roots of
    `p'` between them. The exchange algorithm solves for `a, b, c, e` and moves the inner points to the roots.

    Args:
        lower: above 0.
        upper: above `lower`, by more than a thousandth of it.

    Returns:
        The polynomial and `e`.
    """
    inner = [lower + (upper - lower) / 4, lower + 3 * (upper - lower) / 4]
    error = math.inf
    for _ in range(100):
        equations = [[x, x**3, x**5, sign] for x, sign in zip([lower, *inner, upper], (1, -1, 1, -1))]
        a, b, c, signed = np.linalg.solve(equations, np.ones(4)).tolist()
        previous, error = error, abs(signed)
        # p' = a + 3 b y + 5 c y^2 in y = x^2.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        if abs(error - previous) <= 1e-14:
            break
    return Quintic(a, b, c), error


@functools.cache
def composition(kappa: float, accuracy: float) -> tuple[Quintic, ...]:
    """The polynomials, first one first, whose composition is within `accuracy` of 1 on all of `[1 / kappa, 1]`.

    Args:
        kappa: at least 1.
        accuracy: above 1e-15.
    """
    lower, upper, steps = 1 / kappa, 1.0, []
    while max(1 - lower, upper - 1) > accuracy:
        if upper - lower > 0.2:
            lower, upper = lower / (1 + MARGIN), upper * (1 + MARGIN)
            step, error = best_quintic(max(lower, CUSHION * upper), upper)
            # Increasing below the interval it was made for.
            lower, upper = min(step(lower), 1 - error), 1 + error
        else:
            # Increasing everywhere, with a saddle at 1.
            step = NEAR_ONE
            lower, upper = step(lower), step(upper)
        steps.append(step)
    return tuple(steps)


# --- by matrix products ----------------------------------------------------------------------------------------------


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices without the shortcuts that the user may have allowed (TF32, bf16 in parts)."""
    mkldnn: Any = torch.backends.mkldnn  # a module in torch's types, and an object when it runs
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def largest_singular_value(gram: Tensor, steps: int = LANCZOS_STEPS) -> Tensor:
    """`sigma_max(W)` from `G = W W^T`, by the method of Lanczos with full reorthogonalization.

    It is a power iteration that makes the best use of all its iterates; it starts from a fixed pseudorandom vector.
    The result is at most `sigma_max` (up to rounding). From a random start the expected relative error is at most
    `0.052 * (ln(k (t - 1)^2) / (t - 1))^2` after `t < k` steps for *any* `k x k` Gram matrix (Kuczynski and
    Wozniakowski, 1992, SIAM J. Matrix Anal. Appl. 13, halved because a square root is taken), and with `t >= k` there
    is none. That is the worst spectrum. For certain it is bounded by [`within_limit`]:
    `sigma_max + result <= 2.005 * result` for what passes.

    Args:
        gram: `(batch, k, k)`, symmetric, at least float32.
        steps: products with `gram`.

    Returns:
        `(batch,)`.
    """
    batch, size, _ = gram.shape
    steps = min(steps, size)
    vector = _start(size, gram.dtype, gram.device).expand(batch, size, 1)
    basis, diagonal, beside = gram.new_zeros(batch, size, steps), [], []
    for step in range(steps):
        basis[:, :, step] = vector[:, :, 0]
        image = gram @ vector
        diagonal.append((vector * image).sum((1, 2)))
        for _ in range(2):  # once leaves what cancellation uncovers
            image = image - basis @ (basis.mT @ image)
        length = image.norm(dim=(1, 2))
        # What is left is rounding, and would be no new direction: the subspace is invariant, and the largest eigenvalue
        # in it exact to about this. Going on with zeros adds eigenvalues 0 and changes no other.
        going_on = length > 1e3 * torch.finfo(gram.dtype).eps * diagonal[0]
        length = torch.where(going_on, length, 0)
        vector = torch.where(going_on[:, None, None], image / length.clamp_min(1e-30)[:, None, None], 0)
        beside.append(length)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    if steps > 1:
        above = torch.diag_embed(torch.stack(beside[:-1], dim=1), offset=1)
        tridiagonal = tridiagonal + above + above.mT
    return largest_eigenvalue(tridiagonal).sqrt().to(gram.dtype)


@functools.cache
def _start(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A unit vector of fixed pseudorandom numbers; kept, because bringing it to a GPU would wait for it."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(size, 1, generator=generator, dtype=torch.float64, device="cpu")
    return (start / start.norm()).to(device=device, dtype=dtype)


def largest_eigenvalue(matrices: Tensor) -> Tensor:
    """Of small positive semidefinite matrices, by squaring them.

    `||M^p||^(1/p)` in the Frobenius norm is at least the largest eigenvalue, and at most `n^(1 / 2p)` times it; here
    `p = 2^SQUARINGS`. `torch.linalg.eigvalsh` would wait for the device to read LAPACK's error code, and raise for one
    matrix that is not finite.

    Args:
        matrices: `(batch, n, n)`.

    Returns:
        `(batch,)`, float64; nan for what is not finite.
    """
    power, logarithm = matrices.double(), torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    for squaring in range(SQUARINGS + 1):
        norm = torch.linalg.matrix_norm(power).clamp_min(torch.finfo(torch.float64).tiny)
        logarithm = logarithm + norm.log() / 2**squaring
        power = power / norm[:, None, None]
        power = power @ power
    return logarithm.exp()


def apply_quintics(matrix: Tensor, steps: Sequence[Quintic], gram: Tensor | None = None) -> Tensor:
    """The polynomials, first one first, applied to the singular values of each matrix.

    Args:
        matrix: `(batch, m, n)` with `m <= n`.
        steps: three products each.
        gram: `matrix @ matrix.mT`, where it is known.

    Returns:
        `(batch, m, n)`.
    """
    for a, b, c in steps:
        if gram is None:
            gram = matrix @ matrix.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrix = torch.baddbmm(matrix, inner, matrix, beta=a)
        gram = None
    return matrix


def within_limit(effective: Tensor, sigma_max: Tensor) -> Tensor:
    """Whether `kappa(W + C) <= KAPPA_LIMIT` is shown for each matrix, from `W + C` itself and nothing else.

    With `B = (W + C)(W + C)^T` and `[l, h]` the `CHECKED_RANGE` times `sigma_max`, the matrix `(B - l^2)(h^2 - B)` is
    positive definite if and only if all singular values of `W + C` lie between `l` and `h`, whose ratio is 2.015. Its
    Cholesky factorization decides: two products and a sixth of one. If rounding changes the factorized matrix
    by `r * sigma_max^4` in the spectral norm, a matrix that passes has singular values between `sqrt(l^2 - r / 3)` and
    `sqrt(h^2 + r / 3)` (in units of sigma_max, to first order), hence `kappa <= 2.02` for `r <= 0.011`. In float32 `r` is
    some 1e-5 for sizes up to 4,096; `benchmarks/bench_polar.py` measures it.

    Args:
        effective: `W + C`, `(batch, m, n)` with `m <= n`.
        sigma_max: `(batch,)`; a wrong one can only let a good matrix fail.

    Returns:
        `(batch,)`, bool; False for what is not finite.
    """
    low, high = ((bound * sigma_max[:, None]).square() for bound in CHECKED_RANGE)
    gram = effective @ effective.mT
    # (B - l^2)(h^2 - B) = (l^2 + h^2) B - B^2 - l^2 h^2
    product = torch.baddbmm((low + high)[:, :, None] * gram, gram, gram, alpha=-1)
    product.diagonal(dim1=1, dim2=2).sub_(low * high)
    _, failed = torch.linalg.cholesky_ex(product)
    return (failed == 0) & torch.isfinite(product).all(dim=2).all(dim=1)


@torch.no_grad()
def correction_by_products(matrices: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sigma_max(W) * polar(W)` of each matrix, and whether it is that; nothing here waits for the device.

    Args:
        matrices: `(batch, m, n)`.
        before: what this function returned for them; the second composition goes on from there. None: the first one.

    Returns:
        The corrections, in the shape of the matrices and at least float32; and `(batch,)`, bool: whether
        `kappa(W + C) <= KAPPA_LIMIT` is shown. What fails may be anything, nan included.
    """
    matrices = at_least_float32(matrices.detach())
    tall = matrices.shape[1] > matrices.shape[2]
    # A power of two, which rounds nothing: the fourth power of a tiny weight would be 0.
    _, exponent = torch.frexp(matrices.abs().amax((1, 2)))
    unit = torch.ldexp(torch.ones_like(matrices[:, 0, 0]), exponent)[:, None, None]
    wide = [(each.mT if tall else each) / unit for each in (matrices, before) if each is not None]
    with torch.autocast(matrices.device.type, enabled=False):
        correction, good = _scaled_correction(*wide)
    return (correction.mT if tall else correction) * unit, good


def _scaled_correction(matrices: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[`correction_by_products`] of `(batch, m, n)` matrices with `m <= n` and entries up to 1."""
    accuracy = ACCURACY[matrices.dtype]
    with full_float32():
        gram = matrices @ matrices.mT
        sigma = largest_singular_value(gram)
    by = sigma[:, None, None]
    if before is None:
        first = composition(FIRST_KAPPA, accuracy)
        polar = apply_quintics(matrices / by, first[:-FULL_PRECISION_STEPS], gram / by.square())
        rest = first[-FULL_PRECISION_STEPS:]
    else:
        polar, rest = before / by, composition(SECOND_KAPPA, accuracy)
    with full_float32():
        polar = apply_quintics(polar, rest)
        return by * polar, within_limit(matrices + by * polar, sigma)


@torch.no_grad()
def complete(matrices: Tensor, corrections: Tensor, failing: Sequence[int]) -> list[int]:
    """Replace the corrections of the matrices that failed the check of the first composition.

    Args:
        matrices: `(batch, m, n)`.
        corrections: [`correction_by_products`] of all of them; those of `failing` are replaced.
        failing: their places.

    Returns:
        Places of those that also failed the second composition and got [`svd_correction`], whose bound needs no check.

    Raises:
        torch.linalg.LinAlgError: where one is not finite, as from the SVD.
    """
    found, good = correction_by_products(
        *(torch.stack([each[i] for i in failing]) for each in (matrices, corrections))
    )
    for place, correction in zip(failing, found):
        corrections[place] = correction
    exact = [place for place, passed in zip(failing, good.tolist()) if not passed]
    for place in exact:
        corrections[place] = svd_correction(at_least_float32(matrices[place]))
    return exact


class PolarCorrection(NamedTuple):
    """The corrections of a batch, and how each was found.

    Attributes:
        correction: `C`, in the shape of the weights and at least float32.
        continued: bool, one for each matrix: whether the second composition was needed.
        exact: bool, one for each matrix: whether it was left to the SVD.
    """

    correction: Tensor
    continued: Tensor
    exact: Tensor


@torch.no_grad()
def polar_correction(weight: Tensor) -> PolarCorrection:
    """`sigma_max(W) * polar(W)` of each matrix, for which `kappa(W + C) <= KAPPA_LIMIT` was checked.

    Args:
        weight: `(..., m, n)`, finite. One shape in many matrices is what makes it fast.

    Raises:
        torch.linalg.LinAlgError: where a weight is not finite, as from the SVD.
    """
    matrices = weight.detach().flatten(0, -3) if weight.dim() > 2 else weight.detach()[None]
    correction, good = correction_by_products(matrices)
    exact = torch.zeros_like(good)
    if failing := [place for place, passed in enumerate(good.tolist()) if not passed]:
        for place in complete(matrices, correction, failing):
            exact[place] = True
    shape = weight.shape[:-2]
    return PolarCorrection(correction.reshape(weight.shape), ~good.reshape(shape), exact.reshape(shape))
