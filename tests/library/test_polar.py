"""Corrections by matrix products: the polynomials against mpmath, the corrections against LAPACK and NumPy in float64."""

import math

import mpmath
import numpy as np
import pytest
import torch

from hf_specattn import polar
from hf_specattn.corrections import svd_correction
from hf_specattn.polar import (
    ACCURACY,
    FIRST_KAPPA,
    KAPPA_LIMIT,
    SECOND_KAPPA,
    apply_quintics,
    best_quintic,
    composition,
    full_float32,
    largest_eigenvalue,
    largest_singular_value,
    polar_correction,
    within_limit,
)

KAPPAS = [1.0, 1.5, 30.0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8]
SHAPES = [(48, 48), (24, 80), (80, 24)]


def spectrum(kind, count, kappa):
    """`count` numbers from 1 down to `1 / kappa`."""
    return {
        "geometric": np.geomspace(1, 1 / kappa, count),
        "linear": np.linspace(1, 1 / kappa, count),
        "one small": np.r_[np.ones(count - 1), 1 / kappa],
        "one large": np.r_[1, np.full(count - 1, 1 / kappa)],
    }[kind]


SPECTRA = ["geometric", "linear", "one small", "one large"]


def with_singular_values(rows, columns, sigma, seed=0):
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, rows)))[0][:, : len(sigma)]
    right = np.linalg.qr(generator.standard_normal((columns, columns)))[0][:, : len(sigma)]
    return torch.from_numpy(left @ np.diag(sigma) @ right.T)


def table(shape, dtype):
    """The whole case table of one shape as one batch, and the condition number of each."""
    cases = [(kind, kappa) for kind in SPECTRA for kappa in KAPPAS]
    matrices = [with_singular_values(*shape, spectrum(kind, min(shape), kappa)) for kind, kappa in cases]
    return (0.02 * torch.stack(matrices)).to(dtype), [kappa for _, kappa in cases]


def exact_correction(weight):
    left, sigma, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return sigma[..., :1, None] * (left @ right)


def relative_errors(correction, weight):
    expected = exact_correction(weight)
    norms = np.linalg.norm(expected, axis=(-2, -1))
    return np.linalg.norm(correction.double().numpy() - expected, axis=(-2, -1)) / norms


def kappas(effective):
    return np.linalg.cond(effective.double().numpy())


# --- the polynomials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lower", "upper"), [(1e-6, 1.0), (1e-3, 1.0), (0.05, 1.7), (0.3, 1.9), (0.8, 1.2)])
def test_best_quintic_equioscillates(lower, upper):
    """Chebyshev: `1 - p` taking its maximum with alternating signs at four points is what makes `p` the best one."""
    step, error = best_quintic(lower, upper)
    with mpmath.workdps(50):
        a, b, c = map(mpmath.mpf, step)
        roots = sorted(mpmath.sqrt(y) for y in mpmath.polyroots([5 * c, 3 * b, a]))
        points = [mpmath.mpf(lower), *roots, mpmath.mpf(upper)]
        assert points == sorted(points)
        deviations = [1 - (a * x + b * x**3 + c * x**5) for x in points]
    for sign, deviation in zip((1, -1, 1, -1), deviations):
        assert float(sign * deviation) == pytest.approx(error, rel=1e-9)
    grid = np.linspace(lower, upper, 20001)
    assert np.abs(1 - step(grid)).max() <= error * (1 + 1e-9)


def test_best_quintic_agrees_with_the_solution_in_high_precision():
    step, error = best_quintic(1e-3, 1.0)

    def equations(a, b, c, e, q, r):
        def p(x):
            return a * x + b * x**3 + c * x**5

        def slope(x):
            return a + 3 * b * x**2 + 5 * c * x**4

        low = mpmath.mpf("0.001")
        return p(low) - 1 + e, p(q) - 1 - e, p(r) - 1 + e, p(1) - 1 - e, slope(q), slope(r)

    with mpmath.workdps(40):
        start = (*step, error, *[math.sqrt(x) for x in sorted(np.roots([5 * step.c, 3 * step.b, step.a]))])
        expected = [float(value) for value in mpmath.findroot(equations, start)]
    assert [*step, error] == pytest.approx(expected[:4], rel=1e-10)


@pytest.mark.parametrize("accuracy", ACCURACY.values())
@pytest.mark.parametrize("kappa", [1.0, 1.01, 2.0, 100.0, SECOND_KAPPA, FIRST_KAPPA, 1e7])
def test_a_composition_lifts_everything_to_one(kappa, accuracy):
    steps = composition(kappa, accuracy)
    values = np.geomspace(1 / kappa, 1, 20001)
    for step in steps:
        values = step(values)
        assert values.min() > 0  # no singular vector is turned around
    assert np.abs(values - 1).max() <= accuracy + 1e-15
    # One step less would not do: none is wasted.
    if steps:
        values = np.geomspace(1 / kappa, 1, 20001)
        for step in steps[:-1]:
            values = step(values)
        assert np.abs(values - 1).max() > accuracy


def test_the_numbers_of_polynomials_that_the_constants_stand_for():
    assert len(composition(FIRST_KAPPA, ACCURACY[torch.float32])) == 9
    assert len(composition(SECOND_KAPPA, ACCURACY[torch.float32])) == 8


def test_no_large_singular_value_is_pressed_into_the_rounding():
    """With the polynomials that are best for 1 / kappa itself, some of [0.5, 1] would come out near 1e-4."""
    for step in composition(FIRST_KAPPA, ACCURACY[torch.float32])[:-3]:
        grid = np.linspace(0.5, 1, 1001)
        assert step(grid).min() > 0.04
    naive, error = best_quintic(1 / FIRST_KAPPA, 1.0)
    assert naive(np.linspace(0.5, 1, 100001)).min() == pytest.approx(1 - error, rel=1e-2)
    assert 1 - error < 1e-3


def test_quintics_act_on_the_singular_values():
    matrix = with_singular_values(5, 9, [1.0, 0.7, 0.5, 0.2, 0.01])[None]
    steps = composition(100.0, 1e-3)[:2]
    left, sigma, right = np.linalg.svd(matrix[0].numpy(), full_matrices=False)
    for step in steps:
        sigma = step(sigma)
    expected = left @ np.diag(sigma) @ right
    np.testing.assert_allclose(apply_quintics(matrix, steps)[0].numpy(), expected, rtol=0, atol=1e-13)
    known = apply_quintics(matrix, steps, matrix @ matrix.mT)
    assert torch.equal(known, apply_quintics(matrix, steps))


# --- the largest singular value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_singular_value(kind, dtype):
    sigmas = [spectrum(kind, 100, kappa) for kappa in KAPPAS]
    matrices = torch.stack([3.7 * with_singular_values(100, 100, sigma) for sigma in sigmas]).to(dtype)
    found = largest_singular_value(matrices @ matrices.mT)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), 3.7, rtol=1e-4)


def test_largest_singular_value_of_random_matrices_is_no_upper_bound_and_close():
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(4, 300, 300, generator=generator, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(matrices, 2)
    found = largest_singular_value(matrices @ matrices.mT)
    assert (found <= expected * (1 + 1e-12)).all()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)
    # More products come closer.
    assert ((expected - largest_singular_value(matrices @ matrices.mT, steps=60)) <= expected - found + 1e-12).all()


def test_a_small_matrix_has_its_largest_singular_value_to_rounding():
    generator = torch.Generator().manual_seed(4)
    matrices = torch.randn(5, 6, 8, generator=generator, dtype=torch.float64)
    found = largest_singular_value(matrices @ matrices.mT)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(matrices, 2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 2, 40])
def test_zero_and_multiples_of_the_unit_matrix(size):
    unit = torch.eye(size)[None]
    assert largest_singular_value(0 * unit).item() == 0
    assert largest_singular_value(49 * unit).item() == pytest.approx(7, rel=1e-6)
    assert torch.isnan(largest_singular_value(math.nan * unit)).all()


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_largest_eigenvalue_is_numpys(size):
    generator = torch.Generator().manual_seed(size)
    roots = torch.randn(6, size, size, generator=generator, dtype=torch.float64)
    roots[1] *= 1e-120  # whose square is not far above the smallest number
    roots[2] *= 1e70
    roots[3] = torch.eye(size)  # all eigenvalues equal
    roots[4, 0] = 0  # singular
    matrices = roots @ roots.mT
    expected = np.linalg.eigvalsh(matrices.numpy())[:, -1]
    np.testing.assert_allclose(largest_eigenvalue(matrices).numpy(), expected, rtol=1e-13)
    single = largest_eigenvalue(matrices[3:].float())
    assert single.dtype == torch.float64
    np.testing.assert_allclose(single.numpy(), expected[3:], rtol=1e-5)


def test_largest_eigenvalue_of_two_that_are_nearly_equal():
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((20, 20)))[0]
    values = np.r_[1, 1 - 1e-9, np.linspace(0, 0.9, 18)]
    matrix = torch.from_numpy(basis * values @ basis.T)[None]
    assert largest_eigenvalue(matrix).item() == pytest.approx(1, rel=1e-13)


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lowest", "highest", "passes"),
    [
        (1.0, 2.0, True),
        (0.996, 2.004, True),
        (0.994, 2.0, False),
        (1.0, 2.006, False),
        (0.0, 2.0, False),
        (0.5, 2.0, False),
        (1.0, 5.0, False),  # (B - l^2)(h^2 - B) is negative far beyond as well
    ],
)
def test_the_check_is_about_both_ends(lowest, highest, passes, dtype):
    sigma = np.r_[np.linspace(1.1, 1.9, 38), lowest, highest]
    effective = (0.3 * with_singular_values(40, 50, sigma))[None].to(dtype)
    assert within_limit(effective, torch.tensor([0.3], dtype=dtype)).tolist() == [passes]


def test_a_wrong_sigma_max_never_passes_what_is_bad():
    generator = np.random.default_rng(5)
    effective = torch.stack(
        [with_singular_values(12, 12, generator.uniform(1.0, generator.uniform(1.5, 4), 12)) for _ in range(200)]
    )
    passed = torch.zeros(200, dtype=torch.bool)
    for sigma in np.linspace(0.3, 3, 40):
        passed |= within_limit(effective, torch.full((200,), sigma, dtype=torch.float64))
    assert (kappas(effective)[passed.numpy()] <= KAPPA_LIMIT).all()
    assert 20 < passed.sum() < 180


def test_what_is_not_finite_fails_the_check():
    effective = torch.stack([torch.eye(4), torch.full((4, 4), math.nan), math.inf * torch.ones(4, 4)])
    assert within_limit(effective, torch.ones(3)).tolist() == [True, False, False]


# --- the corrections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_condition_number_is_met_over_the_whole_table(shape, dtype):
    weight, _ = table(shape, dtype)
    result = polar_correction(weight)
    assert result.correction.shape == weight.shape
    assert result.correction.dtype == dtype
    assert (kappas(weight + result.correction) <= KAPPA_LIMIT).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_lapack_in_float64(shape):
    weight, conditions = table(shape, torch.float32)
    errors = relative_errors(polar_correction(weight).correction, weight)
    for error, kappa in zip(errors, conditions):
        if kappa <= 1e4:
            assert error < 1e-3, kappa
    # Not worse than LAPACK in the same precision, beyond where sigma_max decides.
    lapack = relative_errors(svd_correction(weight), weight)
    assert (errors <= 2 * lapack + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_lapack_further(shape):
    weight, conditions = table(shape, torch.float64)
    errors = relative_errors(polar_correction(weight).correction, weight)
    tolerances = [1e-4 if kappa <= 1e6 else 1e-3 for kappa in conditions]
    assert (errors < tolerances).all()


def test_products_do_nearly_all_of_the_table(monkeypatch):
    """The SVD is for what is rank-deficient in the precision at hand; here nothing is, below 1e6."""

    def no_svd(weight):
        raise AssertionError("the exact SVD was asked for")

    monkeypatch.setattr(polar, "svd_correction", no_svd)
    weight, conditions = table((48, 48), torch.float32)
    well = torch.tensor([kappa <= 1e6 for kappa in conditions])
    result = polar_correction(weight[well])
    assert not result.exact.any()
    easy = torch.tensor([kappa <= 1e4 for kappa in conditions])[well]
    assert not result.continued[easy].any()
    assert result.continued[~easy].any()


def test_random_matrices_of_many_sizes():
    generator = torch.Generator().manual_seed(6)
    for shape in [(1, 1), (1, 7), (7, 1), (3, 3), (64, 64), (130, 130), (64, 200)]:
        weight = 0.02 * torch.randn(3, *shape, generator=generator)
        result = polar_correction(weight)
        assert (kappas(weight + result.correction) <= KAPPA_LIMIT).all()
        assert (relative_errors(result.correction, weight) < 1e-3).all()


def test_rank_deficient_weights_get_complete_bases():
    generator = torch.Generator().manual_seed(7)
    low_rank = torch.randn(40, 5, generator=generator) @ torch.randn(5, 60, generator=generator)
    zero_row, equal_rows = torch.randn(2, 40, 60, generator=generator)
    zero_row[3] = 0
    equal_rows[4] = equal_rows[9]
    one_entry = torch.zeros(40, 60)
    one_entry[7, 11] = -3.0
    for weight in (low_rank, zero_row, equal_rows, one_entry):
        for turned in (weight, weight.mT, weight[:, :40]):
            corrected = turned + polar_correction(turned).correction
            assert kappas(corrected) <= KAPPA_LIMIT


def test_what_products_cannot_do_is_left_to_the_svd_alone():
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(2, 3, 20, 30, generator=generator)
    weight[1, 2, 4] = 0  # a row of zeros stays one under every polynomial
    result = polar_correction(weight)
    assert result.exact.tolist() == [[False] * 3, [False, False, True]]
    assert torch.equal(result.correction[1, 2], svd_correction(weight[1, 2]))
    assert result.continued[1, 2]


def test_the_zero_matrix_has_the_zero_correction():
    assert torch.equal(polar_correction(torch.zeros(4, 6)).correction, torch.zeros(4, 6))


def test_weights_that_are_not_finite_raise_as_from_the_svd():
    weight = torch.ones(2, 4, 4)
    weight[1, 0, 0] = math.nan
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        polar_correction(weight)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale(scale):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    power = 2.0 ** round(math.log2(scale))
    # A power of two changes no digit.
    assert torch.equal(polar_correction(power * weight).correction, power * polar_correction(weight).correction)
    assert relative_errors(polar_correction(scale * weight).correction, scale * weight) < 1e-3


def test_half_precision_weights_get_float32_corrections():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(10)).bfloat16()
    result = polar_correction(weight)
    assert result.correction.dtype == torch.float32
    assert torch.equal(result.correction, polar_correction(weight.float()).correction)


def test_it_is_a_function_of_the_weight_alone():
    weight = torch.nn.Parameter(torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(11)))
    first = polar_correction(weight).correction
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            again = polar_correction(weight).correction
    finally:
        torch.set_default_dtype(torch.float32)
        torch.random.set_rng_state(state)
    assert torch.equal(first, again)
    assert not first.requires_grad


# --- what a GPU may do in the first steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_users_precision_of_products_comes_back(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with full_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_coarse_first_steps_still_meet_the_limit(monkeypatch):
    """TF32 keeps 10 bits of each factor; emulated, in all but the last steps and sigma_max."""
    exact_apply = polar.apply_quintics
    calls = []

    def tf32(matrix):
        mantissa, exponent = torch.frexp(matrix)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    def coarse(matrix, steps, gram=None):
        calls.append(len(steps))
        if gram is None:  # the last steps, and the second composition: in full precision
            return exact_apply(matrix, steps)
        for a, b, c in steps:
            gram = tf32(matrix) @ tf32(matrix).mT
            inner = b * gram + c * tf32(gram) @ tf32(gram)
            matrix = a * matrix + tf32(inner) @ tf32(matrix)
        return matrix

    weight = 0.02 * torch.randn(4, 200, 200, generator=torch.Generator().manual_seed(12))
    monkeypatch.setattr(polar, "apply_quintics", coarse)
    result = polar_correction(weight)
    assert calls[:2] == [7, 2]
    assert not result.exact.any()
    assert (kappas(weight + result.correction) <= KAPPA_LIMIT).all()
    errors = relative_errors(result.correction, weight)
    assert 1e-5 < errors.max() < 1e-2
