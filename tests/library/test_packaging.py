"""The wheel: what is in it, and that it works from another directory; the model cards' templates in both installations."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts_loading import REPOSITORY

from hf_specattn.version import __version__

TEMPLATES = ("balanced.md", "conditioned.md", "folded.md", "preconditioner.md")
# Whatever the tests' environment installs or has on its path does not help.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


# What the tests' environment has beyond the declared dependencies is as good as absent.
USE_IT = """
import importlib.resources, json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
import torch
from transformers import AutoModel, BertConfig, BertModel
import hf_specattn
from hf_specattn import SpectralConfig, condition, fold

torch.manual_seed(0)
sizes = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
BertModel(BertConfig(**sizes)).save_pretrained("stock")
tokens = torch.arange(6)[None]

def run(model):
    with torch.no_grad():
        return model.eval()(tokens).last_hidden_state

off = AutoModel.from_pretrained("stock", spectral_conditioning=False)
on = AutoModel.from_pretrained("stock", spectral_conditioning=True, lambda_=2.0)
by_hand = BertModel.from_pretrained("stock")
reports = condition(by_hand, SpectralConfig(lambda_=2.0))
on.save_pretrained("conditioned")
names = [type(model).__name__ for model in (off, on, by_hand)]
outputs = run(on)
found = {
    "names": names,
    "reports": len(reports),
    "the flag changes the function": not torch.allclose(outputs, run(off), atol=1e-3),
    "condition is the flag": torch.equal(outputs, run(by_hand)),
}
fold(on)
found |= {"folded": type(on).__name__, "fold keeps the function": torch.equal(outputs, run(on))}
template = importlib.resources.files("hf_specattn.model_cards") / "conditioned.md"
found["template"] = template.read_text(encoding="utf-8")
found["modules"] = sorted(
    module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "hf_specattn"
)
print(json.dumps(found))
"""


def run(*command: object, folder: Path, path: Path | None = None) -> str:
    """Run a command in a folder, with `path` first on Python's, and return what it printed."""
    environment = ENVIRONMENT | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def modules() -> set[str]:
    return {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hf_specattn").rglob("*.py")}


def required(wheel: Path) -> set[str]:
    """The distributions that installing the wheel without extras brings, by what their metadata says, with all theirs."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"hf_specattn-{__version__}.dist-info/METADATA").decode()
    waiting = re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
    return found


def beyond(names: set[str]) -> list[str]:
    """The modules of installed distributions that are not among these."""
    homes = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, home in homes.items()
        if module not in ("hf_specattn", "specattn") and not names & set(map(canonicalize_name, home))
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without the network from a copy, which no earlier build has touched."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, folder / "checkout", ignore=left_out)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", folder / "checkout", *offline, "--wheel-dir", folder, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", wheel, *offline, "--target", target, folder=target)
    return target


def test_every_package_is_named():
    """The list in pyproject.toml is written by hand, because the templates lie elsewhere."""
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "hf_specattn").rglob("__init__.py")]
    assert sorted(packages) == sorted([*(".".join(folder.parts) for folder in folders), "hf_specattn.model_cards"])


@pytest.mark.slow
def test_the_wheel_has_the_library_and_nothing_else(wheel):
    info = f"hf_specattn-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    cards = {f"hf_specattn/model_cards/{name}" for name in ("__init__.py", *TEMPLATES)}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert len(names) == len(set(names))
    assert set(names) == modules() | {"specattn.py", "hf_specattn/py.typed"} | cards | {
        f"{info}/{name}" for name in about
    }
    assert entry_points.split() == ["[console_scripts]", "specattn", "=", "specattn:main"]


@pytest.mark.slow
def test_the_wheel_works_from_another_directory_with_its_dependencies_alone(wheel, installed, tmp_path):
    absent = beyond(required(wheel))
    assert {"datasets", "matplotlib", "peft", "pytest", "scipy", "timm"} <= set(absent)
    assert not {"torch", "transformers", "typer", "numpy", "yaml"} & set(absent)
    used = run(sys.executable, "-c", USE_IT, json.dumps(absent), folder=tmp_path, path=installed)
    found = json.loads(used.splitlines()[-1])
    # Not from this checkout, though an editable installation knows it.
    assert {Path(file).is_relative_to(installed) for file in found.pop("modules")} == {True}
    assert found == {
        "names": ["BertModel", "SpecBertModel", "SpecBertModel"],
        "reports": 6,
        "the flag changes the function": True,
        "condition is the flag": True,
        "folded": "BertModel",
        "fold keeps the function": True,
        "template": (REPOSITORY / "model_cards" / "conditioned.md").read_text(encoding="utf-8"),
    }
    command = installed / "bin" / "specattn"
    text = run(command, "inspect", tmp_path / "conditioned", folder=tmp_path, path=installed)
    assert text.count("encoder.layer.0.attention.self.query") == 1
    assert run(command, "--version", folder=tmp_path, path=installed).startswith(f"hf_specattn {__version__}\n")


def test_the_templates_are_found_in_an_editable_installation(tmp_path):
    """From another directory: setuptools maps the package to a folder at the top level."""
    # A build leaves metadata in the checkout too, which do not say where from.
    found = importlib.metadata.distributions(name="hf_specattn")
    origins = [json.loads(origin) for each in found if (origin := each.read_text("direct_url.json"))]
    if {"dir_info": {"editable": True}, "url": REPOSITORY.as_uri()} not in origins:
        pytest.skip("this checkout is not installed in editable mode (`make env` does it)")
    code = "import importlib.resources as r, json; f = r.files('hf_specattn.model_cards');"
    code += f"print(json.dumps([str(f), *((f / n).read_text(encoding='utf-8') for n in {TEMPLATES!r})]))"
    folder, *texts = json.loads(run(sys.executable, "-c", code, folder=tmp_path).splitlines()[-1])
    assert Path(folder) == REPOSITORY / "model_cards"
    assert texts == [(REPOSITORY / "model_cards" / name).read_text(encoding="utf-8") for name in TEMPLATES]
