"""bench_polar.py at its tiny scale: what it writes and computes. Times are never asserted."""

import json

import numpy as np
import pytest
import torch
from scripts_loading import REPOSITORY, load_script

from hf_specattn.polar import polar_correction, within_limit

SCRIPT = REPOSITORY / "benchmarks" / "bench_polar.py"
TINY = ["--scale", "tiny", "--device", "cpu", "--rounds", "1", "--repeats", "1", "--sequence_length", "8"]
TINY += ["--sequences", "1", "2"]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as for a program that lies there
        return load_script(SCRIPT)


def test_measures_every_combination(bench, tmp_path, capsys):
    flags = ["--sizes", "8", "20", "--kappas", "10", "1e6", "--dtypes", "fp32", "fp64", "--models", "bert"]
    flags += ["--num_hidden_layers", "3"]
    bench.main([*TINY, *flags, "--batch", "2", "--largest_reference", "8", "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "bench_polar_cpu.json").read_text())
    page = (tmp_path / "bench_polar_cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    found = [(row["dtype"], row["size"], row["kappa"]) for row in content["matrices"]]
    assert found == [(d, s, k) for d in ("fp32", "fp64") for s in (8, 20) for k in (None, 10, 1e6)]
    for row in content["matrices"]:
        assert ("error_svd" in row) == (row["size"] == 8)
        if row["size"] == 8:
            assert row["kappa_after"] <= 2.02
            assert row["error_products"] < 1e-2
            assert row["kappa"] is None or row["kappa_measured"] == pytest.approx(row["kappa"], rel=0.2)
    (model,) = content["models"]
    assert (model["layers"], model["weights"], model["shapes"], model["tokens"]) == (3, 9, ["32 x 32"], [8, 16])
    assert len(model["break_even_tokens"]) == 6
    for line in page.splitlines():
        if line.startswith(("| 8 |", "| 20 |")):
            assert line.count("|") == len(bench.MATRIX_COLUMNS) + 1
        if line.startswith(("| products, every", "| svd, every")):
            assert line.count("|") == len(bench.MODEL_COLUMNS) + 1
    assert str(tmp_path) not in page + json.dumps(content)


def test_matrices_have_the_condition_number_asked_for(bench):
    arguments = bench.PolarBenchArguments(device="cpu", batch=3)
    matrices = bench.build_matrices(12, 1e5, arguments).numpy()
    assert matrices.shape == (3, 12, 12)
    np.testing.assert_allclose(np.linalg.svd(matrices, compute_uv=False), [np.geomspace(1, 1e-5, 12)] * 3, rtol=1e-6)


def test_break_even_by_hand(bench):
    per_token, fixed = bench.line_through([100, 300], [0.5, 0.9])
    assert (per_token, fixed) == (pytest.approx(0.002), pytest.approx(0.3))
    # 0.1 s of refreshing is 5 % of a step of 2 s: (2 - 0.3) / 0.002 tokens.
    assert bench.break_even(0.1, 0.05, per_token, fixed) == 850
    assert bench.break_even(0.001, 0.05, per_token, fixed) == 0
    # Noise: the larger step was not slower, or the line would begin below 0.
    assert bench.line_through([100, 300], [0.5, 0.4]) == (pytest.approx(0.4 / 300), 0.0)
    assert bench.line_through([100, 300], [0.1, 0.9]) == (pytest.approx(0.003), 0.0)


def test_the_rounding_is_that_of_the_check(bench, monkeypatch):
    """The matrix whose rounding is measured is the one that is factorized, but for a constant on its diagonal."""
    weight = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(0))
    effective = weight + polar_correction(weight).correction
    sigma = torch.linalg.matrix_norm(weight, 2)
    factorized = []

    def record(matrix):
        factorized.append(matrix.clone())
        return original(matrix)

    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", record)
    assert within_limit(effective, sigma).all()
    assert within_limit(effective.double(), sigma.double()).all()
    change = torch.linalg.matrix_norm(factorized[0].double() - factorized[1], 2) / sigma.double() ** 4
    measured = bench.rounding_of_the_check(effective, sigma)
    assert 0 < measured < 1e-4
    assert measured == pytest.approx(change.max().item(), abs=2e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--sizes", "0"], "--sizes 0 must be at least 1"),
        (["--kappas", "0.5"], "must be finite numbers of at least 1"),
        (["--sequences", "4", "4"], "must be two numbers, the first the smaller"),
        (["--sequence_length", "0"], "--sequence_length 0 must be at least 1"),
    ],
)
def test_refuses_bad_arguments(bench, given, message, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main([*TINY, *given])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
