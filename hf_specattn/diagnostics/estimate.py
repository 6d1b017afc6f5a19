"""Extreme singular values of a head's Jacobian without any of its matrices, where the Gram matrix is too large.

LOBPCG (Knyazev, 2001; SciPy's) on `J J^T`, or on `J^T J` where that is smaller, through Jacobian-vector and
vector-Jacobian products. Its Ritz values lie inside the spectrum, so that sigma_max is estimated from below, sigma_min from
above, and kappa from below; their residuals bound the distance to *a* singular value.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .heads import AttentionHead, rotated
from .jacobian import EPSILON, ReducedInputs, gauge_eigenbases, head_shape

Operator = Callable[[Tensor], Tensor]

# Iterations of LOBPCG between looks at the residual.
ROUND = 100


@dataclass(frozen=True)
class JacobianEstimate:
    """What LOBPCG found.

    Attributes:
        sigma_max, sigma_min: from below and from above.
        sigma_max_error, sigma_min_error: bounds on the relative distance to the nearest singular value, from the residuals.
        shape: of J, as in [`JacobianSpectrum`].
        iterations: products of `J J^T` or `J^T J` with a block of vectors, in all.
    """

    sigma_max: float
    sigma_min: float
    sigma_max_error: float
    sigma_min_error: float
    shape: tuple[int, int]
    iterations: int

    @property
    def kappa(self) -> float:
        """`sigma_max / sigma_min`, from below."""
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf


def estimate_jacobian(
    head: AttentionHead, *, tolerance: float = 1e-3, max_iterations: int = 500, block_size: int = 8, seed: int = 0
) -> JacobianEstimate:
    """Estimate the extreme singular values of the head's Jacobian with respect to (W_Q, W_K, W_V), in float64.

    Memory: some dozen blocks of vectors, and what the derivatives of one head keep.

    Args:
        tolerance: relative residual of the squared singular values at which the iteration ends.
        max_iterations: products with a block of vectors, for each end of the spectrum, after which it stops;
            `sigma_min_error` then tells what was reached.
        block_size: vectors iterated together.
        seed: of the first block.

    Raises:
        ValueError: if J has fewer than `5 * block_size` rows or columns (use [`jacobian_spectrum`]).
    """
    problem = _Problem.of(head)
    size = problem.size
    if size < 5 * block_size:
        raise ValueError(
            f"The Jacobian has {size} rows or columns, too few for blocks of {block_size}; take jacobian_spectrum, or a "
            "smaller block_size."
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, block_size, generator=generator, dtype=torch.float64).numpy()
    top = _lobpcg(problem.apply, start, None, tolerance, max_iterations, largest=True, like=head.x)
    # Zeros of the gauge are moved to the other end.
    shifted = problem.shifted(top.value)
    preconditioner = problem.preconditioner(generator, top.value)
    bottom = _lobpcg(shifted, start, preconditioner, tolerance, max_iterations, largest=False, like=head.x)
    return JacobianEstimate(
        sigma_max=math.sqrt(top.value),
        sigma_min=math.sqrt(max(bottom.value, 0.0)),
        # Of the square root: half the relative error.
        sigma_max_error=top.residual / top.value / 2,
        sigma_min_error=bottom.residual / bottom.value / 2 if bottom.value > 0 else math.inf,
        shape=head_shape(head),
        iterations=top.iterations + bottom.iterations,
    )


@dataclass(frozen=True)
class _Problem:
    """The symmetric operator, and what is known about it.

    Attributes:
        size: of its vectors.
        apply: `(size, k)` to `(size, k)`.
        project: onto its known null space; None where there is none.
        mixed: `(N, r)`, P X, whose `(P X)(P X)^T (x) I` is the value's part of `J J^T`; None for `J^T J`.
        width: d_v.
    """

    size: int
    apply: Operator
    project: Operator | None
    mixed: Tensor | None
    width: int

    @classmethod
    def of(cls, head: AttentionHead) -> "_Problem":
        inputs = ReducedInputs.of(head)
        x, query, key_x, key, mixed = inputs.x, inputs.query, inputs.key_x, inputs.key, inputs.mixed
        values = head.keys_x @ head.value.mT
        weights: tuple[Tensor, ...] = (query, key, query.new_zeros(mixed.shape[1], values.shape[1]))
        shapes = [weight.shape for weight in weights]
        sizes = [weight.numel() for weight in weights]

        def output(query: Tensor, key: Tensor, value_change: Tensor) -> Tensor:
            keys = rotated(key_x @ key if head.key_bias is None else key_x @ key + head.key_bias, head.keys_rotation)
            queries = x @ query if head.query_bias is None else x @ query + head.query_bias
            return head.softmax(rotated(queries, head.rotation), keys) @ values + mixed @ value_change

        backward: Any = vjp(output, *weights)[1]

        def product(columns: Tensor) -> Tensor:
            parts = [part.mT.unflatten(1, shape) for part, shape in zip(columns.split(sizes), shapes)]
            return vmap(lambda *tangents: jvp(output, weights, tangents)[1])(*parts).flatten(1).mT

        def transposed(columns: Tensor) -> Tensor:
            parts = vmap(backward)(columns.mT.unflatten(1, (len(x), values.shape[1])))
            return torch.cat([part.flatten(1) for part in parts], dim=1).mT

        rows, columns = len(x) * values.shape[1], sum(sizes)
        gauge = (
            None
            if head.rotation is not None
            else _Gauge(*inputs.gauge_weights[:2], *gauge_eigenbases(*inputs.gauge_weights))
        )
        if rows <= columns - (0 if gauge is None else gauge.dimension):
            return cls(rows, lambda v: product(transposed(v)), None, mixed, values.shape[1])
        project = None if gauge is None else gauge.project
        return cls(columns, lambda v: transposed(product(v)), project, None, values.shape[1])

    def shifted(self, amount: float) -> Operator:
        """The operator plus `amount` times the projection onto its null space."""
        project = self.project
        return self.apply if project is None else lambda v: self.apply(v) + amount * project(v)

    def preconditioner(self, generator: torch.Generator, largest: float) -> Operator | None:
        """The inverse of `((P X)(P X)^T + c I) (x) I`, for the value's part of `J J^T` is known; c: 1 % of the others' mean.

        The small eigenvalues of the others' part, which matter here, lie far below its mean.
        """
        if self.mixed is None:
            return None
        values, vectors = torch.linalg.eigh(self.mixed @ self.mixed.mT)
        probes = torch.randn(self.size, 4, generator=generator, dtype=torch.float64).to(self.mixed)
        mean = (probes * self.apply(probes)).sum() / probes.square().sum()
        remaining = (0.01 * (mean - values.mean())).clamp_min(largest * EPSILON)
        scale = 1 / (values.clamp_min(0) + remaining)

        def inverse(columns: Tensor) -> Tensor:
            by_query = columns.unflatten(0, (-1, self.width)).flatten(1)
            return (vectors @ (scale[:, None] * (vectors.mT @ by_query))).view_as(columns)

        return inverse


@dataclass(frozen=True)
class _Gauge:
    """The directions `(W_Q A, -W_K A^T, 0)` along which nothing changes.

    Attributes:
        query, key: the weights, `(., d)`.
        left, right, squares: as `gauge_eigenbases` gives them.
    """

    query: Tensor
    key: Tensor
    left: Tensor
    right: Tensor
    squares: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, bias: Tensor | None) -> "_Gauge":
        return cls(query, key, *gauge_eigenbases(query, key, bias))

    @property
    def dimension(self) -> int:
        return int((self.squares > 0).sum())

    def project(self, columns: Tensor) -> Tensor:
        """The orthogonal projection: least squares for A are a Sylvester equation, diagonal in the two eigenbases."""
        shapes = self.query.shape, self.key.shape
        ends = self.query.numel(), self.query.numel() + self.key.numel()
        of_query = columns[: ends[0]].mT.unflatten(1, shapes[0])
        of_key = columns[ends[0] : ends[1]].mT.unflatten(1, shapes[1])
        right_side = self.left.mT @ (self.query.mT @ of_query - of_key.mT @ self.key) @ self.right
        inverse = torch.where(self.squares > 0, 1 / self.squares, 0.0)
        a = self.left @ (right_side * inverse) @ self.right.mT
        result = torch.zeros_like(columns)
        result[: ends[0]] = (self.query @ a).flatten(1).mT
        result[ends[0] : ends[1]] = -(self.key @ a.mT).flatten(1).mT
        return result


@dataclass(frozen=True)
class _Ritz:
    value: float
    residual: float
    iterations: int


def _lobpcg(
    operator: Operator,
    start: np.ndarray,
    preconditioner: Operator | None,
    tolerance: float,
    max_iterations: int,
    *,
    largest: bool,
    like: Tensor,
) -> _Ritz:
    """The extreme eigenvalue, the residual of its vector, and the iterations taken."""
    try:
        from scipy.sparse.linalg import LinearOperator, lobpcg
    except ImportError as error:
        raise ImportError("The estimate needs SciPy: pip install scipy.") from error

    products = 0

    def on_device(function: Operator, counted: bool) -> LinearOperator:
        def apply(columns: np.ndarray) -> np.ndarray:
            nonlocal products
            products += counted
            block = torch.from_numpy(np.ascontiguousarray(columns.reshape(len(start), -1))).to(like)
            return function(block).cpu().numpy().reshape(columns.shape)

        return LinearOperator((len(start), len(start)), matvec=apply, matmat=apply, dtype=np.float64)

    matrix, vectors = on_device(operator, True), np.linalg.qr(start)[0]
    options: dict[str, Any] = {"M": None if preconditioner is None else on_device(preconditioner, False)}
    ritz = _first_ritz(matrix, vectors, largest)
    # SciPy's tolerance is absolute, and the value is not known before: rounds, until it is met.
    while products < max_iterations and not ritz.residual <= tolerance * abs(ritz.value):
        with warnings.catch_warnings():
            # That the tolerance was not reached is in the residual.
            warnings.simplefilter("ignore", UserWarning)
            _, vectors = lobpcg(
                matrix,
                vectors,
                tol=tolerance * abs(ritz.value) / 10,
                maxiter=min(ROUND, max_iterations - products),
                largest=largest,
                **options,
            )
        ritz = _first_ritz(matrix, vectors, largest)
    return replace(ritz, iterations=products)


def _first_ritz(matrix: Any, vectors: np.ndarray, largest: bool) -> _Ritz:
    """The extreme Ritz value in the span of the orthonormal `vectors`, and the norm of its residual."""
    images = matrix @ vectors
    values, coefficients = np.linalg.eigh(vectors.T @ images)
    place = -1 if largest else 0
    residual = (images - values[place] * vectors) @ coefficients[:, place]
    return _Ritz(values[place].item(), np.linalg.norm(residual).item(), 0)
