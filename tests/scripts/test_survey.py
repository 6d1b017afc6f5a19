"""The survey: a fixed dozen rows, and that it can find what is wrong."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts_loading import REPOSITORY, load_script

from hf_specattn import AttentionSpec, architectures
from recipes.survey import checks
from recipes.survey import rows as rows_of_survey

survey = load_script(REPOSITORY / "scripts" / "survey.py")

DOZEN = {
    ("masked LM", "bert"): "exact",
    ("masked LM", "albert"): "exact",
    ("masked LM", "nystromformer"): "exact",
    ("masked LM", "modernbert"): "exact",
    ("masked LM", "fnet"): "refused",
    ("masked LM", "ibert"): "refused",
    ("image classification", "swin"): "exact",
    ("image classification", "resnet"): "refused",
    ("causal LM", "gpt_neox"): "exact",
    ("timm", "xcit_nano_12_p16_224"): "exact",
    ("timm", "davit_tiny"): "exact",
    ("timm", "swinv2_tiny_window8_256"): "refused",
}


@pytest.mark.parametrize(
    ("row", "status"), DOZEN.items(), ids=lambda value: "-".join(value) * isinstance(value, tuple)
)
def test_a_dozen_rows(row, status):
    result = survey.survey(survey.Row(*row))
    assert (result.status, bool(result.reason)) == (status, status != "exact")
    assert result.attends is (row[1] not in ("fnet", "resnet"))


def test_the_table_in_the_documentation_says_the_same_and_has_every_row():
    text = (REPOSITORY / "docs" / "survey.md").read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    for (task, name), status in DOZEN.items():
        assert f"| `{name}` | {status} |" in sections[task]
    counts = {task: section.count("\n| `") for task, section in sections.items()}
    for task in ("masked LM", "image classification", "causal LM", "timm"):
        # An older transformers has fewer.
        assert counts[task] >= 0.8 * len([row for row in rows_of_survey.all_rows() if row.task == task])
    assert "| wrong |" not in text.partition("## ")[2]


# --- what is wrong is found ------------------------------------------------------------------------------------------


def replace_row(monkeypatch, name, *specs):
    tables = {"ARCHITECTURES": architectures.ARCHITECTURES, "MORE_ARCHITECTURES": architectures.MORE_ARCHITECTURES}
    for attribute, table in tables.items():
        if name in table:
            monkeypatch.setattr(architectures, attribute, {**table, name: specs})


@pytest.mark.parametrize(
    ("row", "name", "spec"),
    [
        # fused, in blocks instead of by head
        (
            ("causal LM", "gpt_neox"),
            "gpt_neox",
            AttentionSpec("GPTNeoXAttention", {"query_key_value": ("query", "key", "value")}),
        ),
        # query and key in each other's place
        (
            ("masked LM", "bert"),
            "bert",
            AttentionSpec("BertSelfAttention", {"query": "key", "key": "query", "value": "value"}),
        ),
        # one of two kinds of attention
        (
            ("timm", "davit_tiny"),
            "timm_davit",
            AttentionSpec("WindowAttention", {"qkv": ("query", "key", "value")}, query_heads="num_heads"),
        ),
        # a class that reads its weight past the module
        (
            ("timm", "swinv2_tiny_window8_256"),
            "timm_swin",
            AttentionSpec("WindowAttention", {"qkv": ("query", "key", "value")}, query_heads="num_heads"),
        ),
    ],
    ids=["layout", "roles", "incomplete", "past the module"],
)
def test_a_wrong_row_of_the_table_is_found(row, name, spec, monkeypatch):
    replace_row(monkeypatch, name, spec)
    result = survey.survey(survey.Row(*row))
    assert result.status == "wrong"
    assert "identity: " in result.reason
    # svd corrects query and key alike, and so does not tell them apart.
    assert ("svd: " in result.reason) is (name != "bert")


@pytest.mark.parametrize("method", ["identity", "svd"])
def test_another_correction_is_found(method, monkeypatch):
    exact = checks.correction
    monkeypatch.setattr(checks, "correction", lambda *arguments: exact(*arguments) * (1 + 1e-4))
    stock, inputs = checks.build(survey.Row("masked LM", "bert"))
    traced = checks.trace_attention(stock, lambda: stock(**inputs))
    assert "is not W + C" in checks.compare(stock, inputs, traced, method)


def test_a_fold_that_loses_the_correction_is_found(monkeypatch):
    stock, inputs = checks.build(survey.Row("masked LM", "bert"))
    traced = checks.trace_attention(stock, lambda: stock(**inputs))
    monkeypatch.setattr(checks, "fold", lambda model: None)
    assert checks.compare(stock, inputs, traced, "svd") == "fold did not give the stock classes back"

    def forgetful(model):
        from hf_specattn.conditioning import fold, spectral_layers

        layers = [layer for _, layer in spectral_layers(model)]
        fold(model)
        with torch.no_grad():
            layers[0].weight.zero_()

    monkeypatch.setattr(checks, "fold", forgetful)
    assert "folded outputs differ" in checks.compare(stock, inputs, traced, "svd")


def test_the_correction_by_numpy():
    block = np.random.default_rng(0).standard_normal((4, 6))
    np.testing.assert_array_equal(checks.correction(block, 2.5, "identity"), 2.5 * np.eye(4, 6))
    singular_values = np.linalg.svd(block + checks.correction(block, 0.0, "svd"), compute_uv=False)
    expected = np.linalg.svd(block, compute_uv=False)
    np.testing.assert_allclose(singular_values, expected + expected[0])


# --- processes, table, command ---------------------------------------------------------------------------------------


def misbehave(row):
    if row.name == "crash":
        os._exit(7)
    if row.name == "hang":
        time.sleep(60)
    if row.name == "raise":
        raise RuntimeError("nothing was caught")
    return survey.Result(row, "exact", attends=True)


def test_one_that_fails_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr(survey, "survey", misbehave)
    rows = [survey.Row("timm", name) for name in ("first", "crash", "raise", "hang", "last")]
    arguments = survey.SurveyArguments(timeout_seconds=5.0, num_processes=3, disable_tqdm=True, max_memory_gb=1024.0)
    results = survey.survey_all(rows, arguments)
    assert [result.row for result in results] == rows
    assert [result.status for result in results] == ["exact", "not built", "not built", "not built", "exact"]
    assert "exit code 7" in results[1].reason
    assert results[3].reason == "it took too long"


def test_counts_and_share_of_the_encoders():
    def result(task, name, status, attends):
        return survey.Result(survey.Row(task, name), status, "because a | b" * (status != "exact"), attends)

    results = [
        result("masked LM", "a", "exact", True),
        result("masked LM", "b", "refused", True),
        result("masked LM", "c", "refused", False),
        result("image classification", "d", "exact", True),
        result("image classification", "e", "not built", None),
        result("causal LM", "f", "exact", True),
        result("causal LM", "g", "wrong", True),
    ]
    text = survey.report(results)
    assert "| all | 3 | 2 | 1 | 1 | 7 |" in text
    assert "| masked LM | 1 | 2 | 0 | 0 | 3 |" in text
    assert "Of the 3 encoders" in text
    assert "2 are exact: 67 %" in text
    assert r"| `b` | refused |  |  | yes | because a \| b |" in text


def test_a_reason_that_several_share_stands_once():
    row = survey.Row("timm", "a")
    result = survey.Result(row, "refused", "no table", True, "refused", "no table", "refused", "a gate")
    assert survey.reasons(result) == "no table; preconditioner: a gate"
    result = survey.Result(row, "exact", "", True, "refused", "a gate", "refused", "a gate")
    assert survey.reasons(result) == "value, output: a gate"
    assert "| timm | 1 | 0 | 0 | 0 | 1 | 0 | 1 | 0 | 0 | 1 | 0 |" in survey.report([result])


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["survey.py", "--only", "masked LM/bert", "timm/resnet18", "--disable_tqdm"])
    monkeypatch.chdir(tmp_path)
    assert survey.main() == 0
    printed = capsys.readouterr().out
    assert "| `bert` | exact | exact | exact | yes |" in printed
    assert "| `resnet18` | refused |  |  | none ran |" in printed
    assert not list(tmp_path.iterdir())


def test_the_whole_survey_writes_the_page_and_fails_where_something_is_wrong(monkeypatch, tmp_path, capsys):
    rows = [survey.Row("masked LM", "bert"), survey.Row("timm", "vit")]
    monkeypatch.setattr(rows_of_survey, "all_rows", lambda: rows)
    monkeypatch.setattr(
        survey, "survey", lambda row: survey.Result(row, "wrong" if row.task == "timm" else "exact", "why")
    )
    page = tmp_path / "survey.md"
    monkeypatch.setattr(
        "sys.argv", ["survey.py", "--output_file", str(page), "--disable_tqdm", "--max_memory_gb", "1024"]
    )
    assert survey.main() == 1
    assert page.read_text() == survey.report([survey.survey(row) for row in rows])
    assert "wrong: timm/vit: why" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "brt"], "--only brt: no such row"),
        (["--num_processes", "0"], "--num_processes=0"),
        (["--timeout_seconds", "-1"], "--timeout_seconds"),
        (["--output_file", "nowhere/page.md"], "no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["survey.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as error:
        survey.main()
    assert message in capsys.readouterr().err + str(error.value)
    assert not list(Path(tmp_path).iterdir())
