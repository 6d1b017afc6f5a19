"""The `specattn` command: what its flags do, what it prints, how it fails."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from models import ARCHITECTURES
from transformers import AutoModel, logging

from hf_specattn import SpectralConfig, cli
from hf_specattn.checkpoints import publishing

BERT = ARCHITECTURES["bert"]
SECRET = "hf_thisIsASecretToken"


@pytest.fixture
def specattn(capsys, monkeypatch):
    """Runs the command in this process; returns its exit status and what it printed."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("COLUMNS", "200")
    verbosity = logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["specattn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err
        return stop.value.code or 0, captured.out, captured.err

    yield run
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    BERT.model("AutoModel", torch.float32).save_pretrained(folder)
    return folder


def test_the_console_script_is_this_command():
    root = Path(__file__).parents[2]
    target = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["specattn"]
    module, _, function = target.partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


LOADED = """
import json, sys
from transformers import PreTrainedModel, AutoModel
before = set(sys.modules)
import hf_specattn.cli, hf_specattn.diagnostics.command
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_command_loads_what_it_needs_when_it_needs_it():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert {"hf_specattn.checkpoints.cards", "hf_specattn.diagnostics.command"} <= set(loaded)
    heavy = r"(matplotlib|scipy|jinja2|peft|datasets|pandas|sklearn|PIL)$|transformers\.(trainer|training_args)"
    assert [name for name in loaded if re.match(heavy, name)] == []


def test_convert_inspect_fold(specattn, source, tmp_path):
    code, out, _ = specattn(
        "convert", source, tmp_path / "new", "--lambda", "query=1,value=2.5", "--targets", "query,value",
        "--granularity", "head",
    )  # fmt: skip
    assert code == 0
    config = AutoModel.from_pretrained(tmp_path / "new").config.spectral_config
    assert config == SpectralConfig(
        lambda_={"query": 1.0, "value": 2.5}, targets=("query", "value"), granularity="head"
    )
    assert len(re.findall(r"^encoder\.layer\.\d\S* (query|value) ", out, re.MULTILINE)) == 4
    assert "The function is another one" in out
    assert f"Written: {tmp_path / 'new'}" in out

    code, out, _ = specattn("inspect", tmp_path / "new")
    assert code == 0
    assert "SpecBertModel (model type specattn_bert, of this package)" in out
    assert "identity(lambda_={'query': 1.0, 'value': 2.5}, granularity=head) on query, value" in out
    assert len(re.findall(r"^encoder\.layer", out, re.MULTILINE)) == 6

    code, out, _ = specattn("fold", tmp_path / "new", tmp_path / "folded", "--dtype", "float64")
    assert code == 0
    assert "relative 0" in out or "allowed" in out
    assert AutoModel.from_pretrained(tmp_path / "folded").dtype == torch.float64


def test_convert_defaults(specattn, source, tmp_path):
    assert specattn("convert", source, tmp_path / "new")[0] == 0
    assert AutoModel.from_pretrained(tmp_path / "new").config.spectral_config == SpectralConfig()
    code, out, _ = specattn(
        "convert", source, tmp_path / "new", "--method", "svd", "--init", "preserve", "--overwrite"
    )
    assert code == 0
    assert AutoModel.from_pretrained(tmp_path / "new").config.spectral_config == SpectralConfig("svd")
    assert "allowed" in out


def test_balance_says_that_conditioning_moves(specattn, source, tmp_path):
    code, out, _ = specattn("balance", source, tmp_path / "new", "--base-model", "org/tiny")
    assert code == 0
    assert "attention.output.dense output" in out
    assert "does not vanish" in out
    assert json.loads((tmp_path / "new" / "specattn.json").read_text())["base_model"] == "org/tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "SRC", "DST", "--lambda", "ten"), "--lambda 'ten' is no number"),
        (("convert", "SRC", "DST", "--lambda", "query=1,query=2"), "names a projection twice"),
        (("convert", "SRC", "DST", "--lambda", "0"), "finite number > 0"),
        (("convert", "SRC", "DST", "--method", "svd", "--lambda", "1"), "means nothing to method='svd'"),
        (("convert", "SRC", "DST", "--method", "qr"), "method='qr' is unknown"),
        (("convert", "SRC", "DST", "--targets", "query,output"), "non-empty subset"),
        (("convert", "SRC", "DST", "--granularity", "row"), "granularity='row'"),
        (("convert", "SRC", "DST", "--init", "zero"), "init='zero' is unknown"),
        (("convert", "SRC", "DST", "--dtype", "int8"), "--dtype 'int8' is unknown"),
        (("convert", "SRC", "SRC"), "which would be lost"),
        (("fold", "SRC", "DST"), "not conditioned"),
        (("inspect", "DST"), "neither a folder nor a name"),
        (("push", "SRC", "no name"), "no name on the Hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_messages(arguments, message, specattn, source, tmp_path):
    code, out, err = specattn(*({"SRC": source, "DST": tmp_path / "new"}.get(text, text) for text in arguments))
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert not out
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_and_help(specattn):
    assert specattn("convert")[0] == 2
    assert specattn("convert", "a", "b", "--unknown")[0] == 2
    code, out, _ = specattn("convert", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--method", "--lambda", "--init", "--targets", "--granularity", "--overwrite"))
    assert specattn("--version")[1].strip() == cli.__version__


def test_a_command_that_moved_says_where_to(specattn, tmp_path):
    code, out, err = specattn("report-training", tmp_path / "run", tmp_path / "other", "--output-dir", "report")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "python scripts/compare_runs.py RUN ... --output_dir report" in err
    assert specattn("report-training")[0] == 1


def test_push(specattn, source, tmp_path, monkeypatch):
    calls = []

    class RecordedApi:
        def create_repo(self, repo_id, **_):
            calls.append("create_repo")
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **keywords):
            calls.append("create_commit")
            assert keywords["token"] is None  # huggingface_hub finds it
            return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=None)

    monkeypatch.setattr(publishing, "HfApi", RecordedApi)
    assert specattn("convert", source, tmp_path / "new")[0] == 0
    code, out, _ = specattn("push", tmp_path / "new", "me/tiny", "--dry-run")
    assert code == 0
    assert "Dry run: nothing was uploaded." in out
    assert "modeling.py" in out
    assert not calls
    card = tmp_path / "card"
    code, out, _ = specattn("push", tmp_path / "new", "me/tiny", "--dry-run", "--new-card", "--card-dir", card)
    assert code == 0
    assert f"Written into {card}: README.md, kappa.png" in out
    assert "# tiny\n" in (card / "README.md").read_text()
    assert not calls
    code, out, _ = specattn("push", tmp_path / "new", "me/tiny", "--private")
    assert code == 0
    assert "Published: https://hub/commit/1" in out
    assert calls == ["create_repo", "create_commit"]

    def refuse(self, repo_id, **_):
        response = SimpleNamespace(status_code=401, headers={}, request=None)
        raise RepositoryNotFoundError(f"401 with {SECRET}", response=response)

    monkeypatch.setattr(RecordedApi, "create_repo", refuse)
    code, _, err = specattn("push", tmp_path / "new", "me/tiny")
    assert code == 1
    assert "the Hub refused (RepositoryNotFoundError, status 401)" in err
    assert "hf auth login" in err
