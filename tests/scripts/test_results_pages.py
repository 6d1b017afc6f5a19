"""Tables of results that a page of docs/ repeats are those of the report that it links to."""

import json
import re

import pytest
from scripts_loading import REPOSITORY

ROW = re.compile(r"^\| *([^|]+?) *\|(.+)\|$", re.MULTILINE)
RESULT = re.compile(r"\d\.\d")


def result_rows(page: str) -> list[tuple[str, str]]:
    """Name and cells of each row of a Markdown page that holds a decimal number."""
    rows = ROW.findall((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))
    return [(name, cells) for name, cells in rows if RESULT.search(cells)]


@pytest.mark.parametrize(
    ("page", "reports", "count"),
    [("detection.md", ["table2"], 5), ("lra.md", ["lra_controls", "table3"], 10)],
)
def test_the_results_of_a_page_are_those_of_its_reports(page, reports, count):
    reported = [row for report in reports for row in result_rows(f"sweeps/{report}.md")]
    # A report of one model names it before the variant: "XCiT, shapes, stock".
    found = [
        (name, cells)
        for name, cells in result_rows(page)
        if any(cells == other and known.endswith(name) for known, other in reported)
    ]
    assert len(found) == count
    missing = [row for row in result_rows(page) if "±" in row[1] and row not in found]
    assert not missing


STEPS = {"bert": "BERT-base", "vit": "ViT-B", "deit": "DeiT-B", "swin": "Swin-B", "xcit": "XCiT-M", "davit": "DaViT-B"}
REFRESHES = [f"svd, refresh_every {every}, {kind}" for kind in ("exact", "products") for every in (1, 10, 100)]


def benchmark(name: str) -> dict:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def cells_of(row: str) -> list[str]:
    """The cells of the row of docs/svd.md that begins so."""
    page = (REPOSITORY / "docs" / "svd.md").read_text(encoding="utf-8")
    return [cell.strip() for cell in re.findall(rf"^\| {re.escape(row)} \|(.+)\|$", page, re.MULTILINE)[-1].split("|")]


def test_the_times_of_a_step_are_those_of_the_benchmark():
    results = benchmark("bench_step_cpu")["results"]
    assert {item["model"] for item in results} == set(STEPS)
    for item in results:
        ratios = [item["variants"]["svd"]["ratio"], *(item["refreshing"][name] for name in REFRESHES)]
        expected = [f"{ratio['median']:.2f}" for ratio in ratios]
        assert cells_of(STEPS[item["model"]])[: len(expected)] == expected


def test_the_parts_of_a_pretraining_step_are_those_of_the_benchmark():
    results = benchmark("bench_pretrain_cpu")["results"]
    ordered = [results[name] for name in ("stock", "identity", "svd_exact", "svd_products")]
    assert cells_of("seconds per step") == [f"{item['parts_whole_seconds']:.3f}" for item in ordered]
    assert cells_of("of which refreshing")[2:] == [
        f"{item['parts_seconds']['correction']:.3f}" for item in ordered[2:]
    ]
    share = "script's tokens/s, share of the bare step"
    assert cells_of(share) == [f"{item['share_of_bare']['median']:.3f}" for item in ordered]
