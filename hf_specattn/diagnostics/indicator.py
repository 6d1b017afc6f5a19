"""The factors of the paper's inequality (10), and their product: an indicator, not a bound.

    kappa(J) <= kappa(X)^3 kappa(Lambda(P)) kappa(W_V) (kappa(W_Q) + kappa(W_K))

As printed it is infinite, because `Lambda(p) = diag(p) - p p^T` is singular on the simplex. With the smallest *nonzero*
singular values it is finite and no longer a bound, because kappa(C D) <= kappa(C) kappa(D) fails for wide times tall
matrices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..corrections import condition_number
from .heads import AttentionHead

BISECTIONS = 110  # of an interval of float64 numbers in their logarithm: to the last bit


@dataclass(frozen=True)
class Indicator:
    """Each factor of (10), with condition numbers of the nonzero singular values.

    Attributes:
        x: of the layer's input (the worse of the two in cross-attention).
        softmax: of the block diagonal matrix of all `Lambda(P_i)`.
        query, key, value: of the effective weights.
    """

    x: float
    softmax: float
    query: float
    key: float
    value: float

    @property
    def product(self) -> float:
        """`x^3 softmax value (query + key)`; an indicator, not a bound (the module's docstring). inf beyond floats."""
        # Not x**3, which raises OverflowError.
        return self.x * self.x * self.x * self.softmax * self.value * (self.query + self.key)

    @property
    def log10_product(self) -> float:
        """Its decimal logarithm, which is finite even for a saturated softmax."""
        factors = (self.x, self.x, self.x, self.softmax, self.value, self.query + self.key)
        return sum(math.log10(factor) for factor in factors)


@torch.no_grad()
def jacobian_indicator(head: AttentionHead) -> Indicator:
    """The factors of (10) for one attention head, in float64."""
    smallest, largest = softmax_jacobian_extremes(head.weights())
    nonzero = largest > 0
    softmax = largest[nonzero].max() / smallest[nonzero].min() if nonzero.any() else torch.tensor(torch.nan)
    inputs = [head.x] if head.x_key is None else [head.x, head.x_key]
    kappas = (condition_number(weight).item() for weight in (head.query, head.key, head.value))
    return Indicator(max(_nonzero_condition_number(x, head.epsilon) for x in inputs), softmax.item(), *kappas)


def softmax_jacobian_extremes(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest nonzero and the largest eigenvalue of `diag(p) - p p^T` for each row p of attention weights.

    Apart from 0 they are the roots of `sum_j p_j / (p_j - mu) = 0`, one between each two neighbors among the sorted
    nonzero p. So even an eigenvalue of 1e-30 in a saturated softmax has all its digits, where an eigensolver would
    return noise.

    Args:
        weights: `(..., M)`, nonnegative, with rows that sum to 1; entries of 0 (masked keys) take no part.

    Returns:
        Two `(...)` float64 tensors; 0 for a row with a single nonzero entry, whose matrix is zero.
    """
    # With a zero in front there are always two neighbors.
    ordered = torch.nn.functional.pad(weights.double(), (1, 0)).sort(dim=-1).values
    count = (ordered > 0).sum(dim=-1, keepdim=True)
    first = (ordered.shape[-1] - count).clamp_max(ordered.shape[-1] - 2)
    several = (count > 1)[..., 0]
    smallest = _root_between(ordered, ordered.gather(-1, first), ordered.gather(-1, first + 1))
    largest = _root_between(ordered, ordered[..., -2:-1], ordered[..., -1:])
    return smallest * several, largest * several


def _root_between(weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The root mu of `sum_j p_j / (p_j - mu)`, which rises from -inf to inf between two neighbors `(..., 1)`."""
    tiny = torch.finfo(torch.float64).tiny
    start, end = low.clamp_min(tiny).log(), high.clamp_min(tiny).log()
    for _ in range(BISECTIONS):
        middle = (start + end) / 2
        terms = weights / (weights - middle.exp())
        # A pole that rounding puts on the middle is one of the ends: both are a root then.
        below = terms.nan_to_num(0.0, 0.0, 0.0).sum(dim=-1, keepdim=True) < 0
        start, end = torch.where(below, middle, start), torch.where(below, end, middle)
    return ((start + end) / 2).exp()[..., 0]


def _nonzero_condition_number(matrix: Tensor, epsilon: float) -> float:
    # What a layer norm makes 0 comes out of a float32 model as its rounding.
    sigma = torch.linalg.svdvals(matrix)
    rank = int((sigma > max(matrix.shape) * epsilon * sigma[0]).sum())
    return (sigma[0] / sigma[rank - 1]).item() if rank else float("inf")
