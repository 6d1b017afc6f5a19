"""The factors of inequality (10) against NumPy and exact arithmetic."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from jacobian_cases import HeadCase, dense_singular_values

from hf_specattn.diagnostics import AttentionHead, jacobian_indicator, softmax_jacobian_extremes


def softmax_jacobian(row):
    return np.diag(row) - np.outer(row, row)


def test_extremes_equal_those_of_an_eigensolver():
    weights = (2 * torch.randn(3, 11, 8, dtype=torch.float64)).softmax(dim=-1)
    smallest, largest = softmax_jacobian_extremes(weights)
    assert smallest.shape == largest.shape == (3, 11)
    expected = np.linalg.eigvalsh([[softmax_jacobian(row) for row in rows] for rows in weights.numpy()])
    np.testing.assert_allclose(smallest, expected[..., 1], rtol=1e-9)
    np.testing.assert_allclose(largest, expected[..., -1], rtol=1e-12)


def test_uniform_masked_and_single_entries():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    smallest, largest = softmax_jacobian_extremes(weights)
    assert smallest.tolist() == pytest.approx([0.25, 0.5, 0.0], rel=1e-15)
    assert largest.tolist() == pytest.approx([0.25, 0.5, 0.0], rel=1e-15)
    assert softmax_jacobian_extremes(torch.ones(2, 1))[0].tolist() == [0.0, 0.0]


def test_saturated_softmax_keeps_its_digits():
    """Of (1 - 3 e, 2 e, e): the eigenvalue is the root of a quadratic, in exact arithmetic; float64 sees only noise."""
    e = Fraction(1, 10**30)
    p = [1 - 3 * e, 2 * e, e]
    smallest, largest = softmax_jacobian_extremes(torch.tensor([[float(x) for x in p]], dtype=torch.float64))
    # mu^2 - (1 - sum p^2) mu + 3 p1 p2 p3 = 0, by the trace and the principal minors.
    total = 1 - sum(x * x for x in p)
    product = 3 * p[0] * p[1] * p[2]
    root = total / 2 - Fraction(math.isqrt(int((total**2 / 4 - product) * 10**140)), 10**70)
    assert smallest.item() == pytest.approx(float(root), rel=1e-12)
    assert largest.item() == pytest.approx(float(total - root), rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_factors(bias):
    head = HeadCase(7, 12, 4, bias=bias, mask="causal").head()
    found = jacobian_indicator(head)
    for name in ("query", "key", "value"):
        assert getattr(found, name) == pytest.approx(np.linalg.cond(getattr(head, name).numpy()), rel=1e-10)
    assert found.x == pytest.approx(np.linalg.cond(head.x.numpy()), rel=1e-10)
    rows = [row[: index + 1] for index, row in enumerate(head.weights().numpy())]
    eigenvalues = np.concatenate([np.linalg.eigvalsh(softmax_jacobian(row))[1:] for row in rows])
    assert found.softmax == pytest.approx(eigenvalues.max() / eigenvalues.min(), rel=1e-9)
    assert found.product == pytest.approx(
        found.x**3 * found.softmax * found.value * (found.query + found.key), rel=1e-12
    )


def test_it_is_no_bound():
    """A head whose Jacobian is worse conditioned than the product of the factors: so nothing here calls it a bound."""
    # One channel has condition number 1, orthonormal tokens too; but nearly uniform attention makes `P X` nearly rank 1.
    head = replace(HeadCase(12, 12, 1, deviation=0.05).head(), x=torch.eye(12, dtype=torch.float64))
    sigma = dense_singular_values(head)
    assert sigma[0] / sigma[-1] > jacobian_indicator(head).product


def test_rank_deficient_inputs_count_their_nonzero_singular_values():
    head = HeadCase(7, 12, 4).head()
    x = head.x.clone()
    x[6] = 2 * x[5]
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    assert jacobian_indicator(replace(head, x=x)).x == pytest.approx(sigma[0] / sigma[5], rel=1e-10)


def test_what_a_layer_norm_makes_zero_is_no_singular_value_of_a_float32_input():
    """Rows without a mean lie in a subspace; rounded to float32 they do not, and float64 alone sees that."""
    torch.manual_seed(0)
    x = torch.nn.functional.layer_norm(torch.randn(12, 8, dtype=torch.float64), (8,))
    weights = {name: torch.randn(4, 8, dtype=torch.float64) for name in ("query", "key", "value")}
    sigma = torch.linalg.svdvals(x)
    assert sigma[-1] < 1e-12 < 1e-2 < sigma[-2]
    expected = (sigma[0] / sigma[-2]).item()
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        head = AttentionHead(x=x.to(dtype), scale=0.5, **weights)
        assert jacobian_indicator(head).x == pytest.approx(expected, rel=rel)
