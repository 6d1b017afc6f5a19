"""The README's blocks run as they stand there, in order, in a fresh folder, and print what is shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture
def fresh_folder(tmp_path, monkeypatch):
    """A folder with the checkout's scripts in it; what a Trainer leaves in accelerate's state goes afterwards."""
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_shell(block):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", block], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def compare(printed, shown):
    """The same words, and the same numbers but for another processor's rounding."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    found, told = ([float(number) for number in NUMBER.findall(text)] for text in (printed, shown))
    assert found == pytest.approx(told, rel=0.02)


def test_the_first_model_of_the_tutorial(fresh_folder, capsys):
    page = (REPOSITORY / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = dict(reversed(re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL)))  # the first of each language
    exec(compile(blocks["python"], "tutorial.md", "exec"), {})
    compare(capsys.readouterr().out, blocks["text"])
    assert (fresh_folder / "runs" / "tutorial" / "conditioned-model" / "config.json").is_file()


def test_length_and_set_up():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 120
    assert len(dict(BLOCKS[:2])["python"].splitlines()) <= 12
    (set_up,) = [block for language, block in BLOCKS if language == "console"]
    targets = re.findall(r"^\$ make (\w+)", set_up, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in (REPOSITORY / "Makefile").read_text() for target in targets)


@pytest.mark.slow
def test_every_block_runs_in_order_and_prints_what_is_shown(fresh_folder, capsys):
    namespace: dict[str, object] = {}
    printed = ""
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "bash":
            printed = run_shell(block)
        elif language == "text":
            compare(printed, block)
        else:
            assert language == "console"  # the set-up
    assert {"stock", "conditioned", "plain", "preserved"} <= {path.name for path in fresh_folder.iterdir()}
    assert (fresh_folder / "runs" / "comparison" / "comparison.png").is_file()
