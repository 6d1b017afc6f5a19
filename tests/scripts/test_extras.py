"""Whatever a script imports, a dependency or an extra of the package brings."""

import ast
import pathlib
import re
import sys

import pytest
from scripts_loading import REPOSITORY

if sys.version_info < (3, 11):
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)
import tomllib

# Distributions by what they are imported as, where the names differ.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "hf_specattn": None,
    "specattn": None,
    "recipes": None,
}
# Used in place of pycocotools where it is there.
DISTRIBUTIONS["faster_coco_eval"] = "pycocotools"
# What a named distribution itself needs, in the words of its own metadata.
BROUGHT = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "filelock": "transformers",
    "pyyaml": "transformers",
    "packaging": "transformers",
    "regex": "transformers",
    "pyarrow": "datasets",
    "pandas": "datasets",
}


def imported(file: pathlib.Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    return {module for module in modules if module not in sys.stdlib_module_names}


def test_extras_cover_every_import_of_the_scripts():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: found for name, found in project["optional-dependencies"].items() if name != "dev"}
    wanted = [*project["dependencies"], *(line for found in extras.values() for line in found)]
    offered = {re.split(r"[\[<>=~!;]", line)[0].strip().lower().replace("_", "-") for line in wanted}
    missing = {}
    for file in sorted((REPOSITORY / "scripts").rglob("*.py")):
        for module in imported(file):
            name = DISTRIBUTIONS.get(module, module)
            name = None if name is None else BROUGHT.get(name, name)
            if name is not None and name.lower().replace("_", "-") not in offered:
                missing[module] = file.relative_to(REPOSITORY).as_posix()
    assert not missing
