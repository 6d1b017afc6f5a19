"""The Jacobian's singular values from the closed form, against dense autograd and the SVD."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from jacobian_cases import HeadCase, dense_jacobian, dense_singular_values

from hf_specattn.diagnostics import AttentionHead, jacobian_spectrum
from hf_specattn.diagnostics import jacobian as module
from hf_specattn.diagnostics.jacobian import extreme_eigenvalues, jacobian_matrix

# Wide: N d rows are fewer than the rank that 3 D d - d^2 columns can have. Tall: more. Table: (case, rank).
WIDE = [
    # svd's weights are larger: at the same scale their softmax is saturated, and kappa beyond 5e3.
    HeadCase(7, 12, 4, correction=correction, bias=bias, mask=mask, scale=scale * (0.2 if correction == "svd" else 1))
    for correction in ("stock", "identity", "svd")
    for bias, mask, scale in (
        (False, "none", 1.0),
        (True, "none", 0.5),
        (False, "additive", 0.5),
        (True, "additive", 1.0),
    )
]
CASES = [
    *((case, 28) for case in WIDE),
    (HeadCase(7, 12, 4, bias=True, mask="causal", scale=0.3), 28),
    (HeadCase(6, 12, 4, value_width=3), 18),
    (HeadCase(6, 12, 4, keys=9, bias=True), 24),
    (HeadCase(7, 12, 4, rotary=True, bias=True), 28),
    (HeadCase(11, 12, 4, normed=True, bias=True), 44),
    *((HeadCase(40, 8, 4, correction=correction), 96 - 16) for correction in ("stock", "identity", "svd")),
    (HeadCase(40, 8, 4, bias=True), 96 - 12),  # a bias, which stays, takes a part of the gauge
    (HeadCase(40, 8, 4, bias=True, mask="additive", scale=0.5), 96 - 12),
    (HeadCase(40, 8, 4, bias=True, mask="causal"), 96 - 12),
    (HeadCase(40, 8, 4, normed=True, deviation=0.5), 96 - 16 - 4),  # a constant added to every key changes nothing
    (HeadCase(40, 8, 4, normed=True, bias=True), 96 - 16 - 4),  # and the bias is what X times W_Q can give
    (HeadCase(60, 8, 4, value_width=3), 88 - 16),
    (HeadCase(60, 8, 4, keys=12, bias=True), 4 * (8 + 10 + 10) - 12),
    (HeadCase(24, 4, 4, rotary=True, bias=True), 48),
]


def identity_of(item):
    return item if not isinstance(item, HeadCase) else "-".join(str(value) for value in vars(item).values())


@pytest.mark.parametrize(("case", "rank"), CASES, ids=identity_of)
def test_equals_dense_autograd(case, rank):
    head = case.head()
    expected = dense_singular_values(head)[:rank]
    assert expected[-1] > 1e-10 * expected[0]
    kappa = expected[0] / expected[-1]
    assert kappa < 5e3
    found = jacobian_spectrum(head, full=True)
    assert found.source == "gram"
    assert not found.is_lower_bound
    assert found.shape == dense_jacobian(head).shape
    assert found.rank == rank
    assert found.kappa == pytest.approx(kappa, rel=1e-8)
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-8)
    assert (found.sigma_max, found.sigma_min) == pytest.approx((expected[0], expected[-1]), rel=1e-8)
    assert abs(found.kappa / kappa - 1) < 30 * found.relative_error


@pytest.mark.parametrize("case", [CASES[3][0], CASES[20][0]], ids=identity_of)
def test_zeros_are_where_the_rank_says(case):
    """The singular values beyond the rank are those of roundoff: nothing nonzero is dropped."""
    rank = dict(CASES)[case]
    sigma = dense_singular_values(case.head())
    assert np.all(sigma[rank:] < 1e-13 * sigma[0])


@pytest.mark.parametrize(
    "case", [CASES[0][0], CASES[15][0], CASES[17][0], CASES[21][0], CASES[26][0]], ids=identity_of
)
def test_iterations_and_factorization_find_the_same_extremes(case, monkeypatch):
    """Large matrices go through Cholesky and Lanczos; here every size does."""
    head = case.head()
    whole = jacobian_spectrum(head)
    monkeypatch.setattr(module, "FULL_SPECTRUM_SIZE", 0)
    extremes = jacobian_spectrum(head)
    assert extremes.singular_values is None
    assert extremes.rank == whole.rank
    assert (extremes.sigma_max, extremes.sigma_min) == pytest.approx((whole.sigma_max, whole.sigma_min), rel=1e-9)


@pytest.mark.parametrize("case", [CASES[3][0], CASES[21][0], CASES[-1][0]], ids=identity_of)
def test_chunks_change_nothing(case, monkeypatch):
    head = case.head()
    whole = jacobian_spectrum(head, full=True)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 400)
    np.testing.assert_allclose(jacobian_spectrum(head, full=True).singular_values, whole.singular_values, rtol=1e-10)


@pytest.mark.parametrize(
    "case", [CASES[3][0], CASES[13][0], CASES[15][0], CASES[21][0], CASES[26][0]], ids=identity_of
)
def test_matrix_in_reduced_coordinates_has_its_singular_values(case):
    head = case.head()
    expected = dense_singular_values(head)
    found = np.linalg.svd(jacobian_matrix(head).numpy(), compute_uv=False)
    count = min(len(found), len(expected))
    np.testing.assert_allclose(found[:count], expected[:count], rtol=0, atol=1e-13 * expected[0])


def ill_conditioned():
    """Tokens of very different lengths."""
    head = HeadCase(7, 12, 4).head()
    return replace(head, x=head.x * torch.logspace(0, -4, 7, dtype=torch.float64)[:, None])


def test_beyond_what_squaring_resolves_the_svd_of_j_is_taken():
    head = ill_conditioned()
    expected = dense_singular_values(head)
    kappa = expected[0] / expected[-1]
    assert 1e8 < kappa < 1e9
    found = jacobian_spectrum(head, full=True)
    assert (found.source, found.rank, found.is_lower_bound) == ("svd", 28, False)
    assert found.kappa == pytest.approx(kappa, rel=1e-14 * kappa)
    np.testing.assert_allclose(found.singular_values, expected, rtol=0, atol=1e-13 * expected[0])


@pytest.mark.parametrize("size", [0, 384])
def test_where_j_is_too_large_for_it_kappa_is_at_least(size, monkeypatch):
    monkeypatch.setattr(module, "FULL_SPECTRUM_SIZE", size)
    head = ill_conditioned()
    found = jacobian_spectrum(head, full=size > 0, svd_elements=10)
    assert found.is_lower_bound
    assert found.rank is None
    assert found.singular_values is None
    assert str(found).startswith("at least ")
    assert found.kappa == pytest.approx(1 / math.sqrt(28 * np.finfo(float).eps), rel=1e-6)
    sigma = dense_singular_values(head)
    assert found.sigma_max == pytest.approx(sigma[0], rel=1e-8)
    assert sigma[-1] < found.sigma_min


def test_repeated_tokens_lower_the_rank():
    head = HeadCase(6, 12, 4).head()
    x = head.x.clone()
    x[5] = x[4]
    head = replace(head, x=x)
    sigma = dense_singular_values(head)
    found = jacobian_spectrum(head)
    assert (found.source, found.rank) == ("svd", 20)
    assert found.kappa == pytest.approx(sigma[0] / sigma[19], rel=1e-8)


def test_roundoff_of_float32_inputs_is_no_rank():
    """A layer norm's output in float32 can produce a constant up to float32's roundoff only; see CASES."""
    case = HeadCase(40, 8, 4, normed=True, bias=True)
    single = case.head()
    single = replace(single, x=single.x.float(), epsilon=0.0)
    assert single.epsilon == torch.finfo(torch.float32).eps
    assert jacobian_spectrum(single).rank == 96 - 16 - 4
    assert jacobian_spectrum(single).kappa == pytest.approx(jacobian_spectrum(case.head()).kappa, rel=1e-4)


@pytest.mark.parametrize("case", [HeadCase(7, 12, 4), HeadCase(7, 12, 4, bias=True, mask="causal")], ids=identity_of)
def test_equal_tokens_have_the_best_condition_number(case):
    """Every attention averages equals, so only W_V matters, alike at each of the 7 tokens."""
    head = case.head()
    head = replace(head, x=head.x[:1].expand(7, 12).clone())
    sigma = dense_singular_values(head)
    found = jacobian_spectrum(head)
    assert (found.rank, found.kappa) == (4, pytest.approx(1, rel=1e-12))
    assert found.sigma_max == pytest.approx(sigma[0], rel=1e-12)
    assert sigma[3] == pytest.approx(sigma[0], rel=1e-12)
    assert found.sigma_max == pytest.approx(math.sqrt(7) * head.x[0].norm().item(), rel=1e-12)


def test_one_token():
    """Its softmax is constant: only W_V matters, and J is x times the identity."""
    head = HeadCase(1, 5, 3).head()
    found = jacobian_spectrum(head)
    assert found.kappa == pytest.approx(1, rel=1e-12)
    assert found.sigma_max == pytest.approx(head.x.norm().item(), rel=1e-12)


def test_zero_weights_leave_the_values_part():
    zero = torch.zeros(3, 5)
    head = AttentionHead(torch.eye(4, 5), zero, zero, zero, scale=1.0)
    # Uniform attention over orthonormal rows, and nothing else: P X has rank 1.
    found = jacobian_spectrum(head)
    assert (found.rank, found.kappa) == (3, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(3, 12)}, r"key has the shape \(3, 12\).*must be \(4, 12\)"),
        ({"mask": torch.zeros(7, 6)}, r"mask has the shape \(7, 6\)"),
        ({"mask": torch.zeros(7, 7, dtype=torch.bool)}, "leaves a query without any key"),
        ({"x": torch.full((7, 12), math.nan)}, "x of the attention head has nan"),
        ({"query_bias": torch.tensor([math.inf] * 4)}, "query_bias of the attention head has nan or inf"),
    ],
)
def test_bad_input(change, message):
    head = HeadCase(7, 12, 4).head()
    with pytest.raises(ValueError, match=message):
        replace(head, **change)


def test_extreme_eigenvalues_beside_a_known_null_space(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(1.0, 50.0, 25, dtype=torch.float64)
    gram = basis[:, 5:] * values @ basis[:, 5:].mT
    for size in (0, 100):
        monkeypatch.setattr(module, "FULL_SPECTRUM_SIZE", size)
        found = extreme_eigenvalues(gram.clone(), False, basis[:, :5])
        torch.testing.assert_close(found, values[[0, -1]], rtol=1e-10, atol=0)
    torch.testing.assert_close(extreme_eigenvalues(gram, True, basis[:, :5]), values, rtol=1e-10, atol=0)


def test_where_the_inverse_iteration_does_not_converge_lapack_decides(monkeypatch):
    """As for a head of a conditioned MiniLM: next to singular, a solve has more rounding than the iteration tolerates."""
    monkeypatch.setattr(module, "FULL_SPECTRUM_SIZE", 0)
    iterate, calls = module._lanczos, []

    def fails_at_the_second_call(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise module.NotConvergedError
        return iterate(*arguments)

    monkeypatch.setattr(module, "_lanczos", fails_at_the_second_call)
    matrix = torch.randn(40, 60, dtype=torch.float64)
    expected = np.linalg.eigvalsh((matrix @ matrix.mT).numpy())
    found = extreme_eigenvalues(matrix @ matrix.mT, False)
    assert len(calls) == 2
    np.testing.assert_allclose(found.numpy(), expected[[0, -1]], rtol=1e-9)
