"""The corrections against NumPy and SciPy in float64, and what the theorems say of them."""

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_specattn.corrections import (
    condition_number,
    extreme_singular_values,
    identity_correction,
    svd_correction,
    weyl_bound,
)

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5), (3, 5, 8), (2, 3, 7, 4)]


def random_matrix(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def with_singular_values(rows, columns, sigma, seed=0):
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, rows)))[0][:, : len(sigma)]
    right = np.linalg.qr(generator.standard_normal((columns, columns)))[0][:, : len(sigma)]
    return torch.from_numpy(left @ np.diag(sigma) @ right.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_the_rectangular_unit_matrix(shape):
    correction = identity_correction(random_matrix(shape), 2.5)
    assert np.array_equal(correction.numpy(), np.broadcast_to(2.5 * np.eye(*shape[-2:]), shape))
    assert correction.dtype == torch.float64


def test_half_precision_weights_get_float32_corrections():
    weight = random_matrix((4, 6)).bfloat16()
    assert identity_correction(weight, 0.1).dtype == torch.float32
    assert svd_correction(weight).dtype == torch.float32
    # lambda itself never passes through bfloat16, where 0.1 becomes 0.10009765625.
    assert identity_correction(weight, 0.1)[0, 0].item() == np.float32(0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_sigma_max_times_the_polar_factor(shape):
    weight = random_matrix(shape)
    correction = svd_correction(weight).numpy()
    for index in np.ndindex(*shape[:-2]):
        matrix = weight.numpy()[index]
        wide = matrix.shape[0] < matrix.shape[1]
        polar = scipy.linalg.polar(matrix.T if wide else matrix)[0]
        expected = np.linalg.norm(matrix, 2) * (polar.T if wide else polar)
        np.testing.assert_allclose(correction[index], expected, rtol=0, atol=1e-13 * np.linalg.norm(matrix, 2))


@pytest.mark.parametrize("kappa", [1.0, 3.0, 1e3, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_svd_brings_kappa_to_two_at_most(shape, kappa):
    weight = with_singular_values(*shape, np.geomspace(1.0, 1.0 / kappa, min(shape)))
    corrected = (weight + svd_correction(weight)).numpy()
    expected = 2 / (1 + 1 / kappa)  # 2 s_1 / (s_1 + s_k), from the proof of Theorem 3.5
    assert np.linalg.cond(corrected) == pytest.approx(expected, rel=1e-9)
    assert np.linalg.cond(corrected) <= 2 * (1 + 1e-9)


def test_a_dynamic_correction_speeds_rotations_up_and_never_damps():
    """For square W = U S V^T and A = U^T dW V, with symmetric and antisymmetric parts A_s and A_a:
    d(W + C) = U [A_s + A_a (1 + 2 s_1 / (s_i + s_j)) + A_11 I] V^T.
    """
    generator = torch.Generator().manual_seed(5)
    weight, change = torch.randn(2, 9, 9, dtype=torch.float64, generator=generator)
    left, sigma, right = torch.linalg.svd(weight)
    inner = left.T @ change @ right.T
    symmetric, antisymmetric = (inner + inner.T) / 2, (inner - inner.T) / 2
    speed = 1 + 2 * sigma[0] / (sigma[:, None] + sigma)
    expected = left @ (symmetric + antisymmetric * speed + inner[0, 0] * torch.eye(9)) @ right
    assert speed.min() >= 2

    step = 1e-6
    ends = [weight + sign * step * change for sign in (1, -1)]
    effective = [end + svd_correction(end) for end in ends]
    torch.testing.assert_close((effective[0] - effective[1]) / (2 * step), expected, rtol=1e-7, atol=1e-8)


def test_svd_of_a_rank_deficient_matrix():
    weight = with_singular_values(10, 7, [3.0, 1.0, 0.0, 0.0])
    corrected = (weight + svd_correction(weight)).numpy()
    np.testing.assert_allclose(np.linalg.svd(corrected, compute_uv=False), [6, 4, 3, 3, 3, 3, 3], rtol=0, atol=1e-12)


def test_no_gradient_through_the_corrections():
    weight = random_matrix((5, 7)).requires_grad_()
    assert not svd_correction(weight).requires_grad
    assert not identity_correction(weight, 1.0).requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_condition_number(shape):
    weight = random_matrix(shape)
    np.testing.assert_allclose(condition_number(weight).numpy(), np.linalg.cond(weight.numpy()), rtol=1e-10)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    sigma_min, sigma_max = extreme_singular_values(weight)
    np.testing.assert_allclose(sigma_min.numpy(), sigma[..., -1], rtol=1e-10)
    np.testing.assert_allclose(sigma_max.numpy(), sigma[..., 0], rtol=1e-10)


def test_condition_number_of_a_singular_matrix_is_infinite():
    assert torch.isinf(condition_number(torch.diag(torch.tensor([1.0, 0.0]))))


def test_scale_invariance():
    weight = random_matrix((6, 9))
    corrected = weight + svd_correction(weight)
    torch.testing.assert_close(condition_number(0.037 * corrected), condition_number(corrected), rtol=1e-12, atol=0)
    # svd scales with W, so that conditioning a scaled weight is scaling the conditioned one.
    torch.testing.assert_close(svd_correction(5 * weight), 5 * svd_correction(weight), rtol=1e-12, atol=1e-12)


def test_weyl_bound_holds_on_random_matrices():
    generator = np.random.default_rng(1)
    checked = 0
    for _ in range(400):
        rows, columns = generator.integers(2, 9, size=2)
        matrix = generator.standard_normal((rows, columns)) * generator.uniform(0.1, 2.0)
        lambda_ = float(generator.uniform(0.5, 12.0))
        bound = weyl_bound(np.linalg.norm(matrix, 2), lambda_)
        if bound is None:
            assert lambda_ <= np.linalg.norm(matrix, 2)
            continue
        checked += 1
        assert np.linalg.cond(matrix + lambda_ * np.eye(rows, columns)) <= bound * (1 + 1e-12)
    assert checked > 150


def test_weyl_bound_is_attained():
    assert weyl_bound(3.0, 10.0) == 13 / 7
    matrix = torch.diag(torch.tensor([3.0, -3.0], dtype=torch.float64))
    assert condition_number(matrix + identity_correction(matrix, 10.0)).item() == pytest.approx(13 / 7, rel=1e-14)


@pytest.mark.parametrize(("sigma_max", "lambda_"), [(10.0, 10.0), (11.0, 10.0), (0.0, 0.0)])
def test_no_bound_where_lambda_does_not_exceed_sigma_max(sigma_max, lambda_):
    assert weyl_bound(sigma_max, lambda_) is None


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0, 3.3])
def test_theorem_3_8_as_printed_is_false(eps):
    lambda_ = 10.0
    matrix = np.diag([-lambda_, eps])
    sigma_max, sigma_min = np.linalg.svd(matrix, compute_uv=False)
    # Its assumption is met ...
    assert (sigma_max + lambda_) / (lambda_ - sigma_min) <= sigma_max / sigma_min
    # ... and W + lambda I is singular, where it promises a smaller condition number. Ours promises nothing here.
    assert np.linalg.matrix_rank(matrix + lambda_ * np.eye(2)) == 1
    assert weyl_bound(sigma_max, lambda_) is None


def test_a_valid_bound_does_not_mean_that_kappa_falls():
    matrix = torch.diag(torch.tensor([-9.0, 3.0], dtype=torch.float64))
    assert condition_number(matrix).item() == pytest.approx(3.0)
    after = condition_number(matrix + identity_correction(matrix, 10.0)).item()
    assert after == pytest.approx(13.0)
    bound = weyl_bound(9.0, 10.0)
    assert bound == 19.0
    assert after <= bound
