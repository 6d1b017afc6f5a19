"""The page of evidence: its numbers by hand from small results, and the committed page from the committed results."""

import io
import json
import re
from statistics import fmean, stdev

import pytest
from PIL import Image
from scipy import stats

from recipes.compare import evidence_page
from recipes.compare.evidence_page import EvidenceError, Regime, regimes_figure

STOCK, SVD = {"0": 90.0, "1": 92.0, "2": 91.0}, {"0": 93.0, "1": 94.5, "2": 95.0, "3": 50.0}


def record(kappa, rank):
    return {"first": {"kappa_output_value_effective": kappa}, "last": {"path_effective_rank": rank}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    arms = [
        {"setting": "A", "variant": "stock", "values": STOCK, "seconds": {"0": 10.0, "1": 20.0, "2": 30.0}},
        {"setting": "A", "variant": "svd", "values": SVD, "seconds": {"0": 15.0, "1": 20.0, "2": 60.0, "3": 3465.0}},
        {"setting": "A", "variant": "tuned", "values": {"0": 94.0, "1": 94.0, "2": 94.0}, "seconds": {}},
        {"setting": "B", "variant": "svd", "values": {"0": 70.0}, "seconds": {}},
        {"setting": "B", "variant": "stock", "values": {}, "seconds": {}},
    ]
    arms[0]["monitor"] = {"0": record(2.0, 8.0), "1": record(1234.4, 9.0), "2": record(40.0, 7.0)}
    content = {"sweep": "small", "chosen": {"A": {"scale": 8.0}}, "arms": arms}
    (tmp_path / "small.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(evidence_page, "SWEEPS", tmp_path)
    evidence_page.sweep_results.cache_clear()
    yield
    evidence_page.sweep_results.cache_clear()


def test_cells(results):
    values = list(STOCK.values())
    assert evidence_page.arm("small", "stock", "A") == f"{fmean(values):.2f} ± {stdev(values):.2f}"
    assert evidence_page.arm("small", "svd", "B") == "70.00"
    assert evidence_page.arm("small", "stock", "B") == "failed"
    assert evidence_page.mean("small", "stock", "A") == "91.0"
    assert evidence_page.seen("small", "stock", "kappa_output_value_effective", "A") == "40"
    assert evidence_page.seen("small", "stock", "path_effective_rank", "A", "last") == "8"
    assert evidence_page.chosen("small", "scale", "A") == "8"
    assert evidence_page.hours("small") == "1.0"
    assert evidence_page.seeds("small") == 4
    assert evidence_page.time_ratio("small", "svd", "stock", "A") == "1.50"
    assert evidence_page.table("small", ["stock", "svd"], ["A"]).splitlines() == [
        "| accuracy (%) | A |",
        "|---|---:|",
        "| stock | 91.00 ± 1.00 |",
        f"| svd | {evidence_page.arm('small', 'svd', 'A')} |",
    ]
    assert evidence_page.table("small", ["stock"], ["A"], "loss", digits=0).endswith("| stock | 91 ± 1 |")


def test_differences_are_paired_by_seed(results):
    low, high = stats.ttest_rel([93.0, 94.5, 95.0], list(STOCK.values())).confidence_interval(0.95)
    assert evidence_page.minus("small", "svd", "stock", "A") == f"+3.2 ({low:+.1f} to {high:+.1f})"
    assert evidence_page.gain("small", "svd", "stock", "A", digits=0) == "+3"
    # B has no stock run.
    assert evidence_page.pooled("small", "svd", "stock") == evidence_page.minus("small", "svd", "stock", "A")
    assert evidence_page.best_of("small", ["stock", "tuned"], "A") == "tuned"


def test_what_no_sweep_has_is_named(results):
    with pytest.raises(EvidenceError, match="small has 0 arms 'svdd' of 'A'; it has A: stock; A: svd"):
        evidence_page.arm("small", "svdd", "A")
    with pytest.raises(EvidenceError, match="has 2 arms 'svd' of None"):
        evidence_page.arm("small", "svd")
    with pytest.raises(EvidenceError, match="no common seed"):
        evidence_page.minus("small", "svd", "stock", "B")


def test_settings_are_pooled(results):
    content = json.loads((evidence_page.SWEEPS / "small.json").read_text(encoding="utf-8"))
    content["arms"][4]["values"] = {"0": 69.0}
    (evidence_page.SWEEPS / "small.json").write_text(json.dumps(content), encoding="utf-8")
    ours, others = [93.0, 94.5, 95.0, 70.0], [*STOCK.values(), 69.0]
    low, high = stats.ttest_rel(ours, others).confidence_interval(0.95)
    assert evidence_page.pooled("small", "svd", "stock", 2) == f"+2.62 ({low:+.2f} to {high:+.2f})"


def test_paragraphs_and_lists_are_broken_and_nothing_else():
    words = " ".join(["word"] * 40)
    table = f"| {words} |\n|---|\n| {words} |"
    text = f"# {words}\n\n{words}\n{words}\n\n- {words}\n  {words}\n- short\n\n{table}\n"
    lines = evidence_page.wrapped(text).splitlines()
    assert lines[0] == f"# {words}"
    assert "\n".join(lines[-3:]) == table
    broken = [line for line in lines[2:-3] if line]
    assert all(len(line) <= 120 for line in broken)
    assert [line for line in broken if line.startswith("- ")][1:] == ["- short"]
    assert " ".join(broken).split() == [*["word"] * 80, "-", *["word"] * 80, "-", "short"]


def test_the_figure_decodes_and_repeats(results):
    regimes = (
        Regime("a", "small", "A", "svd", "stock", ("stock", "tuned")),
        Regime("b", "small", "A", "svd", None, ("tuned",)),
    )
    images = regimes_figure(regimes)
    assert Image.open(io.BytesIO(images["png"])).size[0] > 500
    assert images == regimes_figure(regimes)


def test_the_committed_page_is_that_of_the_committed_results():
    assert evidence_page.PAGE.read_text(encoding="utf-8") == evidence_page.page()


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("residual_free", "{} points (95 % interval {} to {}) on digits"),
        ("fashion-mnist/residual_free", "{} ({} to {}) on Fashion-MNIST"),
    ],
)
def test_the_readme_names_the_same_gain(sweep, words):
    numbers = re.findall(r"[+-][\d.]+", evidence_page.pooled(sweep, "svd on V and O", "stock, tuned"))
    readme = " ".join((evidence_page.REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert words.format(*numbers) in readme
