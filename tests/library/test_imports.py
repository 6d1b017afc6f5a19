"""What imports what: the library nothing of the experiments, its traveling files little, `import hf_specattn` not much."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts_loading import REPOSITORY
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hf_specattn
from hf_specattn.checkpoints.remote_code import source_files

LIBRARY = Path(hf_specattn.__file__).parent
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(file: Path, library: Path = LIBRARY) -> Iterator[str]:
    """The modules of a file's import statements, anywhere in it, by absolute name; "..." begins one outside the package."""
    package = (library.name, *file.parent.relative_to(library).parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            start = ".".join(base) if base or not node.level else "..."
            yield ".".join(filter(None, (start, node.module)))


def imported_by_call(file: Path) -> Iterator[str]:
    """The first argument of each call of `import_module` and `__import__`, as it stands there."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.unparse(node.args[0])


# --- one direction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(LIBRARY).as_posix())
def test_the_library_imports_nothing_of_the_experiments(file):
    roots = {name.partition(".")[0] for name in imported(file)}
    assert not roots & {"recipes", "scripts", "tests", "benchmarks", ""}
    assert not [name for name in imported_by_call(file) if re.search(r"recipes|scripts|^f?['\"]\.\.", name)]


def test_the_walk_sees_every_kind_of_import(tmp_path):
    file = tmp_path / "hf_specattn" / "checkpoints" / "example.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b, c\nfrom .source_checkpoint import x\nfrom ..layers import y\nfrom .. import z\n"
        "from ...recipes import run\n"
        'def f():\n    from recipes.run import w\n    importlib.import_module("peft.utils")\n    __import__("d")\n'
    )
    assert sorted(imported(file, tmp_path / "hf_specattn")) == [
        "....recipes", "a.b", "c", "hf_specattn", "hf_specattn.checkpoints.source_checkpoint", "hf_specattn.layers",
        "recipes.run",
    ]  # fmt: skip
    assert list(imported_by_call(file)) == ["'peft.utils'", "'d'"]


# --- what a checkpoint carries ---------------------------------------------------------------------------------------

# transformers asks for every absolute import of a checkpoint's files that stands outside of a `try`. It needs these
# itself.
CARRIED = {
    "specattn_bert": [
        "architectures", "checksums", "compat", "conditioning", "config", "config_fields", "corrections", "crammed_bert",
        "existing_adapters", "layers", "loading", "modeling", "ordinary", "polar", "preconditioner", "preconditioning",
        "products", "projection_report", "projections", "refreshing",
    ],
    "crammed_bert": ["crammed_bert"],
}  # fmt: skip
FOREIGN = {"checksums": {"safetensors"}, "polar": {"numpy"}, "crammed_bert": {"huggingface_hub"}}


@pytest.mark.integration
@pytest.mark.parametrize("model_type", CARRIED)
def test_what_a_checkpoint_carries_imports_transformers_and_torch(model_type):
    files = source_files(model_type)
    assert sorted(file.stem for file in files) == CARRIED[model_type]
    for file in files:
        assert file.parent == LIBRARY
        # transformers finds them by a regular expression, which sees neither `from . import x` nor `from .x import (` of
        # a line that goes on before its `import`.
        siblings = {name for name in imported(file) if name.partition(".")[0] == LIBRARY.name}
        assert siblings == {f"{LIBRARY.name}.{name}" for name in get_relative_imports(file)}, file.name
        outside = set(get_imports(file)) - set(sys.stdlib_module_names)
        assert outside <= {"torch", "transformers"} | FOREIGN.get(file.stem, set()), file.name


# --- what `import hf_specattn` loads ---------------------------------------------------------------------------------

ADDED = """
import json, sys
from transformers import PreTrainedModel, AutoModel
before = set(sys.modules)
import hf_specattn
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = re.compile(
    r"transformers\.(trainer|training_args|generation|pipelines|data)"
    r"|transformers\.models\.(?!auto\.)\w+\.(modeling|tokenization|image_processing|processing)_"
)


def test_the_import_is_light():
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, check=True, timeout=120)
    added = json.loads(done.stdout.splitlines()[-1])
    assert "hf_specattn" in added
    roots = Counter(name.partition(".")[0] for name in added)
    # tokenizers: with the layers of transformers that Crammed BERT is made of.
    assert set(roots) - set(sys.stdlib_module_names) <= {"hf_specattn", "transformers", "tokenizers"}
    assert [name for name in added if HEAVY.match(name)] == []


def test_every_public_name_resolves():
    assert len(set(hf_specattn.__all__)) == len(hf_specattn.__all__)
    assert set(hf_specattn.__all__) <= set(dir(hf_specattn))
    for name in dir(hf_specattn):
        getattr(hf_specattn, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_specattn.no_such_name  # noqa: B018


# --- names of the tests ----------------------------------------------------------------------------------------------


def test_no_test_hides_a_module():
    """pytest puts the folder of each test first on the path, as Python does with a script's, and knows tests by file name."""
    tests = REPOSITORY / "tests"
    names = Counter(file.stem for file in tests.rglob("*.py"))
    # pytest itself tells one conftest.py from another.
    assert [name for name, count in names.items() if count > 1 and name != "conftest"] == []
    assert "__init__" not in names
    scripts = {path.stem for path in (REPOSITORY / "scripts").glob("*.py")}
    folders = {path.name for path in tests.rglob("*") if path.is_dir()}
    assert not names.keys() & {*scripts, "scripts", "recipes", "hf_specattn"}
    assert not folders & {"recipes", "hf_specattn"}
