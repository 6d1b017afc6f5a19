"""The `specattn` command: what its flags do, what it prints, how it fails."""

import importlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import _http
from models import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, logging

import specattn as cli
from hf_specattn import SpectralConfig, __version__
from hf_specattn.checkpoints import conversion, publishing
from hf_specattn.config import GRANULARITIES, INITS, METHODS
from hf_specattn.machine_output import as_json
from hf_specattn.preconditioner import AXES, GRADIENTS, SCALES

BERT = ARCHITECTURES["bert"]
httpx = getattr(_http, "httpx2", None) or _http.httpx  # what this release of huggingface_hub speaks through
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
import hf_specattn.checkpoints.conversion, hf_specattn.checkpoints.publishing, hf_specattn.diagnostics.command
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_command_loads_what_it_needs_when_it_needs_it():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert {"hf_specattn.checkpoints.cards", "hf_specattn.diagnostics.command"} <= set(loaded)
    heavy = r"(matplotlib|scipy|jinja2|peft|datasets|pandas|sklearn|PIL)$|transformers\.(trainer|training_args)"
    assert [name for name in loaded if re.match(heavy, name)] == []


SHOWN_AT_ONCE = """
import json, sys
import specattn
sys.argv = ["specattn", *json.loads(sys.argv[1])]
try:
    specattn.main()
finally:
    print(json.dumps(sorted({"torch", "transformers", "numpy", "hf_specattn"} & sys.modules.keys())))
"""


@pytest.mark.parametrize("arguments", [["--help"], [], ["convert", "--help"], ["fold"], ["report", "--queries", "x"]])
def test_help_and_wrong_flags_wait_for_no_import(arguments):
    command = [sys.executable, "-c", SHOWN_AT_ONCE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "specattn" in done.stdout + done.stderr


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
    assert "The function has changed" in out
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
        (("convert", "SRC", "DST", "--lambda", "ten"), "--lambda 'ten' is not a number"),
        (("convert", "SRC", "DST", "--lambda", "query=1,query=2"), "names a projection twice"),
        (("convert", "SRC", "DST", "--lambda", "0"), "finite number > 0"),
        (("convert", "SRC", "DST", "--method", "svd", "--lambda", "1"), "means nothing to method='svd'"),
        (("convert", "SRC", "DST", "--targets", "query,pooler"), "non-empty subset"),
        (("convert", "SRC", "SRC"), "which would be lost"),
        (("fold", "SRC", "DST"), "not conditioned"),
        (("inspect", "DST"), "neither a folder nor a name"),
        (("push", "SRC", "no name"), "is not a valid name on the Hub"),
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


CHOICES = {
    "--method": METHODS,
    "--init": INITS,
    "--granularity": GRANULARITIES,
    "--dtype": ("auto", *cli.DTYPES),
    "--preconditioner": AXES,
    "--preconditioner-gradient": GRADIENTS,
    "--preconditioner-scale": SCALES,
}


def test_choices_are_listed_and_others_are_usage_errors(specattn, source, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, listed, _ = specattn("convert", "--help")
    assert code == 0
    assert all(flag in listed for flag in ("--lambda", "--targets", "--overwrite", "--json"))
    for flag, choices in CHOICES.items():
        assert f"<{'|'.join(choices)}>" in listed, flag
        code, out, err = specattn("convert", source, tmp_path / "new", flag, "other")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"specattn convert: error: Invalid value for '{flag}': ")
        assert all(repr(choice) in err for choice in choices)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_have_the_form_and_status_of_the_scripts(specattn):
    code, out, err = specattn("convert")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Usage: specattn convert .*\nspecattn convert: error: Missing argument 'SRC'\.\n", err)
    code, _, err = specattn("convert", "a", "b", "--unknown")
    assert (code, "specattn convert: error: No such option: --unknown" in err) == (2, True)
    code, _, err = specattn("--json")
    assert (code, "--json goes after the name of a command" in err) == (2, True)
    code, out, _ = specattn()
    assert (code, "convert" in out) == (2, True)


def test_the_version_comes_with_the_environment(specattn):
    code, out, _ = specattn("--version")
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert (code, lines["hf_specattn"], lines["torch"]) == (0, __version__, importlib.metadata.version("torch"))
    found = json.loads(specattn("--version", "--json")[1])
    assert found["transformers"] == importlib.metadata.version("transformers")
    assert found["device"].startswith("cuda: " if torch.cuda.is_available() else ("cpu, ", "mps"))


def test_json_has_the_numbers_of_the_text(specattn, source, tmp_path):
    code, out, _ = specattn("convert", source, tmp_path / "new", "--method", "svd", "--json")
    made = json.loads(out)
    assert (code, made["folder"]) == (0, str(tmp_path / "new"))
    assert sorted(made["files"]) == sorted(path.name for path in (tmp_path / "new").iterdir())
    stored = json.loads((tmp_path / "new" / "specattn.json").read_text())
    assert made["record"] == {name: value for name, value in stored.items() if name != "format"}

    found = json.loads(specattn("inspect", tmp_path / "new", "--json")[1])
    assert found["is_conditioned"] is True
    assert found["settings"]["spectral_method"] == "svd"
    text = specattn("inspect", tmp_path / "new")[1]
    for row, reported in zip(found["projections"], made["record"]["rows"], strict=True):
        assert (row["name"], row["projection"]) == (reported["name"], reported["projection"])
        assert row["after"] == pytest.approx(reported["after"], rel=1e-4)
        assert f"{row['after']:.4g}" in text

    code, out, _ = specattn("push", tmp_path / "new", "me/tiny", "--dry-run", "--json")
    listed = json.loads(out)
    assert (code, listed["repo_id"], listed["url"]) == (0, "me/tiny", None)
    assert {"config.json", "model.safetensors", "modeling.py"} <= set(listed["files"])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_json_has_null_for_what_it_cannot_hold(value):
    assert json.loads(as_json({"kappa": (value, torch.tensor([value, 1.5]))})) == {"kappa": [None, [None, 1.5]]}


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


# --- whatever is raised, one message ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioned(source, tmp_path_factory):
    """A conditioned checkpoint of the package, with the code that it carries, and a tokenizer's files."""
    folder = tmp_path_factory.mktemp("conditioned") / "tiny"
    conversion.convert(str(source), folder, SpectralConfig("svd"))
    return folder


def write(name, content):
    def change(folder):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def in_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def index(**content):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        names = load_file(folder / "model-00001-of-00001.safetensors")
        content["weight_map"] = dict.fromkeys(names, "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def readme(**fields):
    return write("README.md", f"---\n{yaml.safe_dump(fields)}---\nText.\n")


def tokenizer_of(content):
    def change(folder):
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
        write("tokenizer_config.json", content)(folder)

    return change


def spoil(name, value):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


QUERY = "encoder.layer.0.attention.self.query"
DAMAGES = {
    "text for a number": (in_config(hidden_size="32"), "restore it from its source"),
    "no number of heads": (in_config(num_attention_heads=None), "restore it from its source"),
    "a list for the type": (in_config(model_type=["bert"]), "names no model_type"),
    "a list for a lambda": (in_config(lambda_=[1]), "lambda_=[1] means nothing to method='svd'"),
    "auto_map a number": (in_config(auto_map=5), "is damaged: auto_map is 5, not a dict."),
    "an index without metadata": (index(), "has no metadata, which transformers reads"),
    "an index with metadata that are a list": (index(metadata=[]), "has no metadata, which transformers reads"),
    "modules.json a number": (write("modules.json", 5), "restore it from its source"),
    "modules.json with numbers": (write("modules.json", [5]), "restore it from its source"),
    "modules.json cut off": (write("modules.json", '[{"path": '), "restore it from its source"),
    "tokenizer_config.json a list": (tokenizer_of([]), "restore it from its source"),
    "tokenizer_config.json cut off": (tokenizer_of('{"a"'), "restore it from its source"),
    "a license that is false": (readme(license=False), "license in its metadata is False, but must be a string"),
    "a tag that is a number": (readme(tags=["a", 5]), "tags in its metadata is ['a', 5], but must be"),
    "a pipeline that is a list": (
        readme(pipeline_tag=["x"]),
        "pipeline_tag in its metadata is ['x'], but must be a string;",
    ),
    "nan in W": (spoil(f"{QUERY}.weight", math.nan), f"{QUERY}.weight has nan or inf entries"),
    "inf in C": (spoil(f"{QUERY}.correction", math.inf), "has nan or inf entries"),
    "an adapter beside": (
        write("adapter_config.json", {"peft_type": "LORA"}),
        "has a PEFT adapter next to its weights",
    ),
    "a stock type with the flag": (
        in_config(model_type="bert", architectures=["BertModel"]),
        "a stock class wrote it, or somebody edited it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_end_in_one_message(damage, specattn, conditioned, tmp_path):
    change, message = DAMAGES[damage]
    folder = tmp_path / "source"
    shutil.copytree(conditioned, folder)
    change(folder)
    failed = {}
    for command in (
        ("inspect", folder),
        ("fold", folder, tmp_path / "new"),
        ("balance", folder, tmp_path / "new"),
        ("convert", folder, tmp_path / "new", "--method", "svd"),
        ("push", folder, "me/x", "--dry-run", "--new-card"),
        ("report", folder, "--output-dir", tmp_path / "report", "--jacobian-heads", 0),
    ):
        code, _, err = specattn(*command)
        assert (code, err.count("\n")) in ((0, 0), (0, 1), (1, 1)), (command[0], err)
        assert not (tmp_path / "new").exists()
        if code:
            assert err.startswith("error: ")
            failed[command[0]] = err
    assert message in failed["fold"]


def test_the_traceback_can_be_asked_for(specattn, conditioned, tmp_path, monkeypatch):
    shutil.copytree(conditioned, tmp_path / "source")
    in_config(hidden_size="32")(tmp_path / "source")
    assert "report this with what SPECATTN_TRACEBACK=1 shows" in specattn("inspect", tmp_path / "source")[2]
    monkeypatch.setenv("SPECATTN_TRACEBACK", "1")
    monkeypatch.setattr("sys.argv", ["specattn", "inspect", str(tmp_path / "source")])
    with pytest.raises(Exception, match="hidden_size"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ConnectError("[Errno -2] Name or service not known"), "the Hub could not be reached (ConnectError)"),
        (httpx.ReadTimeout("timed out"), "the Hub could not be reached (ReadTimeout): check the connection"),
        (LocalTokenNotFoundError("no token"), "the Hub refused (LocalTokenNotFoundError)"),
        (
            PermissionError(13, "Permission denied", "/some/file"),
            "/some/file: Permission denied. Check that it is there",
        ),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "Install it: pip install jinja2."),
        (RecursionError("maximum recursion depth exceeded"), "restore it from its source"),
        (KeyError("metadata"), "KeyError: 'metadata'. Something in the checkpoint is not as"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_whatever_is_raised_is_one_message(error, message, specattn, conditioned, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(publishing, "publish", fail)
    code, _, err = specattn("push", conditioned, "me/x")
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert SECRET not in err


def test_links_out_of_a_checkpoint_are_neither_copied_nor_published(specattn, source, conditioned, tmp_path):
    private = tmp_path / "private.txt"
    private.write_text("mine")
    for origin, command in ((source, "convert"), (conditioned, "fold")):
        folder = tmp_path / command
        shutil.copytree(origin, folder)
        (folder / "vocab.txt").symlink_to(private)
        for arguments in ((command, folder, tmp_path / "new"), ("push", folder, "me/x", "--dry-run", "--new-card")):
            code, _, err = specattn(*arguments)
            assert code == 1
            assert f"vocab.txt is a link to a file outside of the checkpoint, {private}" in err
        assert not (tmp_path / "new").exists()


def test_links_into_the_hubs_cache_are_its_way_to_keep_files(specattn, source, tmp_path):
    blobs, snapshot = (tmp_path / "models--org--tiny" / name for name in ("blobs", "snapshots/abc"))
    blobs.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    (snapshot / "merges.txt").write_text("a b\n")
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert specattn("convert", snapshot, tmp_path / "new")[0] == 0
    assert (tmp_path / "new" / "merges.txt").read_text() == "a b\n"
    assert not (tmp_path / "new" / "merges.txt").is_symlink()


def test_the_destination_is_no_part_of_the_source(specattn, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    before = sorted(path.name for path in (tmp_path / "source").iterdir())
    for destination in ("source/new", "source/a/b", "source/../source/new"):
        code, _, err = specattn("convert", tmp_path / "source", tmp_path / destination)
        assert code == 1
        assert "lies in SRC" in err
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == before


def test_corrections_of_a_stock_checkpoint_are_noticed(specattn, conditioned, source, tmp_path):
    shutil.copytree(conditioned, tmp_path / "source")
    shutil.copy(source / "config.json", tmp_path / "source" / "config.json")
    code, _, err = specattn("inspect", tmp_path / "source")
    assert code == 1
    assert "has the config.json of a stock bert, and 6 correction(s) of a conditioned model" in err
    with pytest.raises(ValueError, match=r"has the config.json of a stock model, and 6 correction\(s\)"):
        AutoModel.from_pretrained(tmp_path / "source", spectral_conditioning=True, spectral_method="svd")


def test_both_spellings_of_flags_and_the_home_folder(specattn, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    status, told, _ = specattn("convert", source, "~/a", "--lambda_", "2", "--base_model", "owner/name")
    assert status == 0, told
    assert json.loads((tmp_path / "a" / "config.json").read_text())["lambda_"] == 2
    status, told, wrong = specattn("convert", source, tmp_path / "b", "--granularit", "head")
    assert status == 2
    assert "--granularity" in told + wrong


def test_folders_are_written_to_first(specattn, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hf_specattn.diagnostics.command.AutoModel", None)
    status, _, wrong = specattn("report", source, "--output-dir", tmp_path / "file")
    assert (status, "is a file, not a folder" in wrong) == (1, True)
    status, _, wrong = specattn("push", source, "owner/name", "--dry-run", "--card_dir", tmp_path / "file")
    assert (status, "--card-dir" in wrong and "is a file, not a folder" in wrong) == (1, True)
    status, _, wrong = specattn("convert", source, tmp_path / "file" / "a")
    assert (status, "The folder of DST," in wrong) == (1, True)


@pytest.mark.parametrize(
    ("word", "message"),
    [("", "an argument is empty"), (os.fsdecode(b"new\xff"), r"'new\udcff' is not UTF-8: rename it")],
)
def test_names_that_no_file_could_be_written_under_are_refused_first(
    word, message, specattn, source, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for command in (("convert", source, word, "--overwrite"), ("inspect", word)):
        code, out, err = specattn(*command)
        assert (code, out) == (2, "")
        assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_utf8_ends_no_command(source, tmp_path):
    command = [sys.executable, "-c", "from specattn import main; main()", "convert", str(source)]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "ü–λ")], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
