"""Tables of results that a page of docs/ repeats are those of the report that it links to."""

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
