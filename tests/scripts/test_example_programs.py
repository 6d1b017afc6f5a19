"""The programs in examples/ print what their docstrings say."""

import ast
import re
import runpy

import pytest
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import REPOSITORY

PROGRAMS = sorted((REPOSITORY / "examples").glob("*.py"))
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def promised(program):
    """The lines that a docstring ends with, behind `Prints:`."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8")))
    head, found, block = text.partition("Prints:\n\n")
    assert found, program
    assert f"python examples/{program.name}" in head
    return [line.removeprefix("    ") for line in block.splitlines()]


def test_there_are_five():
    assert [program.stem for program in PROGRAMS] == ["diagnose", "fine_tune", "lora", "precondition", "pretrain"]
    assert all(len(program.read_text().splitlines()) <= 75 for program in PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_an_example_prints_what_its_docstring_says(program, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program))
    printed, expected = capsys.readouterr().out.splitlines(), promised(program)
    assert [NUMBER.sub("#", line) for line in printed] == [NUMBER.sub("#", line) for line in expected]
    for line, other in zip(printed, expected):
        found, told = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (line, other))
        # Another processor rounds otherwise, and training amplifies it.
        assert found == pytest.approx(told, rel=0.1, abs=0.05), (line, other)
    assert not list(tmp_path.iterdir())
