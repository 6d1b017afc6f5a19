"""The matrix-free estimate against the exact singular values."""

import pytest
from jacobian_cases import HeadCase

from hf_specattn.diagnostics import estimate_jacobian, jacobian_spectrum

WELL_CONDITIONED = [
    HeadCase(16, 24, 4, scale=0.5),
    HeadCase(16, 24, 4, correction="identity", bias=True, mask="additive", scale=0.3),
    HeadCase(16, 24, 4, rotary=True, bias=True, scale=0.3),
    HeadCase(14, 24, 4, keys=20, bias=True, scale=0.3, value_width=6),
    HeadCase(80, 8, 4, correction="identity"),  # J^T J, whose gauge zeros must not be found
    HeadCase(80, 8, 4, correction="identity", bias=True),
    HeadCase(80, 8, 4, correction="identity", normed=True, bias=True),
]


@pytest.mark.parametrize("case", WELL_CONDITIONED, ids=str)
def test_converges_to_the_exact_extremes(case):
    head = case.head()
    exact = jacobian_spectrum(head)
    found = estimate_jacobian(head, block_size=4)
    assert found.shape == exact.shape
    assert max(found.sigma_max_error, found.sigma_min_error) <= 1e-3
    assert found.sigma_max == pytest.approx(exact.sigma_max, rel=1e-4)
    assert found.sigma_min == pytest.approx(exact.sigma_min, rel=1e-4)
    assert found.kappa == pytest.approx(exact.kappa, rel=2e-4)


@pytest.mark.parametrize("case", [WELL_CONDITIONED[0], WELL_CONDITIONED[4], HeadCase(12, 24, 4)], ids=str)
def test_stopped_early_it_errs_on_the_known_side_and_says_so(case):
    head = case.head()
    exact = jacobian_spectrum(head)
    found = estimate_jacobian(head, block_size=4, max_iterations=6)
    assert found.iterations <= 20
    assert found.sigma_min_error > 1e-2
    assert found.sigma_min > exact.sigma_min * (1 - 1e-9)
    assert found.sigma_max < exact.sigma_max * (1 + 1e-9)
    assert found.kappa < exact.kappa


def test_too_small_for_its_blocks():
    with pytest.raises(ValueError, match=r"28 rows or columns, too few for blocks of 8; take jacobian_spectrum"):
        estimate_jacobian(HeadCase(7, 12, 4).head())
