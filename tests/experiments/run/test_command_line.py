"""How scripts read what a person types."""

import io
import os
import sys
from dataclasses import dataclass, field

import pytest

from recipes.run.command_line import ALIASES, INSTEAD, SWITCHES, ScriptParser
from specattn import expand_home, tolerate_output


@dataclass
class Arguments:
    output_dir: str = "runs"
    learning_rate: float = 1.0
    lambda_: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    train_batch_size: int = 1
    max_steps: int = 1
    mixed_precision: str | None = field(default=None, metadata={"choices": ["no", "bf16"]})
    report_to: list[str] | None = None
    disable_tqdm: bool = False


def parsed(*words):
    (arguments,) = ScriptParser(Arguments).parse_args_into_dataclasses(list(words))
    return arguments


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        parsed(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_both_spellings():
    for flag in ("--output_dir", "--output-dir"):
        assert parsed(flag, "a").output_dir == "a"
        assert parsed(f"{flag}=a").output_dir == "a"
    assert parsed("--train-batch-size", "3").train_batch_size == 3


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lambda 2", "lambda_", "2"),
        ("--lambda=query=1,key=2", "lambda_", "query=1,key=2"),
        ("--lambda_ 2", "lambda_", "2"),
        ("--seed 3", "seeds", [3]),
        ("--seeds 3 4", "seeds", [3, 4]),
        ("--per_device_train_batch_size 8", "train_batch_size", 8),
        ("--per-device-train-batch-size 8", "train_batch_size", 8),
        ("--bf16", "mixed_precision", "bf16"),
        ("--bf16 True", "mixed_precision", "bf16"),
        ("--bf16=true --max_steps 4", "mixed_precision", "bf16"),
        ("--bf16 False", "mixed_precision", None),
        ("--report_to none", "report_to", None),
        ("--report_to=none", "report_to", None),
        ("--report_to none --max_steps 3", "max_steps", 3),
        ("--report_to wandb", "report_to", ["wandb"]),
        ("--learning_rate -2", "learning_rate", -2.0),
        ("--disable_tqdm --bf16", "disable_tqdm", True),
    ],
)
def test_other_names(words, name, value):
    assert getattr(parsed(*words.split()), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "--learning_rat is not a flag of this script; did you mean --learning_rate?"),
        ("--learn 1", "did you mean --learning_rate?"),
        ("--output 1", "did you mean --output_dir?"),
        ("--out-dir 1", "did you mean --output_dir"),
        (
            "--num_train_epochs 3",
            "--num_train_epochs is not a flag of this script: this script counts optimizer steps: --max",
        ),
        ("--push_to_hub", "--push_to_hub is not a flag of this script: `specattn push FOLDER NAME`"),
        ("--fp16", "--fp16 is not a flag"),
        ("--max_steps 1 extra", "'extra' belongs to no flag"),
        ("--max_steps one", "invalid int value: 'one'"),
    ],
)
def test_what_is_no_flag(capsys, words, message):
    assert message in refused(capsys, *words.split())


def test_nothing_is_completed(capsys):
    for flag in ("--max", "--seedz", "--lambd", "--disable"):
        assert f"{flag} is not a flag" in refused(capsys, flag, "1")


def test_tables_of_names_are_sound():
    for alias, flag in ALIASES.items():
        assert alias.startswith("--")
        assert flag.startswith("--")
        assert alias != flag
    assert not {*ALIASES} & {*SWITCHES}
    assert not {*INSTEAD} & {*SWITCHES}


def test_arguments_beside_the_script_are_not_looked_for(tmp_path, monkeypatch):
    (tmp_path / "script.args").write_text("--max_steps 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    (arguments,) = ScriptParser(Arguments).parse_args_into_dataclasses()
    assert arguments.max_steps == 1


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    words = ["~/a", "--output_dir=~/b", "--output_dir", "~", "a~b", "--x=a~", "--", "~/c"]
    expected = [
        "/home/of/a",
        "--output_dir=/home/of/b",
        "--output_dir",
        "/home/of",
        "a~b",
        "--x=a~",
        "--",
        "/home/of/c",
    ]
    assert expand_home(words) == expected
    assert parsed("--output_dir=~/runs").output_dir == os.path.expanduser("~/runs")


def test_an_output_that_is_not_utf8(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    tolerate_output()
    print("λ – 95 %")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u03bb \\u2013 95 %\n"
