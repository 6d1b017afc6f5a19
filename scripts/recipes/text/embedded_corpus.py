"""A corpus that every CPython carries: the language reference's topics and the standard library's docstrings.

It needs no network and no file of ours, and is large enough (some 2.5 MB of English about Python) for a demonstration.
Sources are parsed with `ast` and never imported. What it holds depends on the Python version, so losses compare between
runs on one version only.
"""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from .documents import CorpusError, Document

EMBEDDED_CORPUS_NAME = "embedded (Python documentation)"

# Test suites, third-party packages and the two vendored grammars hold fixtures rather than prose.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "_bundled", "__pycache__"}
)


def embedded_documents(library: Path | None = None) -> Iterator[Document]:
    """Yield one document per `pydoc` topic and one per standard-library module with docstrings, in a fixed order.

    A module's document is its docstring followed by those of its classes and functions in source order. A docstring
    that stood in an earlier module is left out, so that the same words do not fall on both sides of a split.

    Args:
        library: The folder of the standard library's sources; by default that of the running interpreter.

    Raises:
        CorpusError: if the sources are not there as files (a zipped or stripped installation).
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    topics_file = library / "pydoc_data" / "topics.py"
    if not topics_file.is_file():
        raise CorpusError(
            f"The embedded corpus reads the sources of Python's standard library, and {topics_file} is missing: the "
            f"library of this Python {sys.version_info.major}.{sys.version_info.minor} is zipped or stripped. Use a "
            "Python with its sources, or give a corpus of your own with --train_file."
        )
    yield from _topic_documents(topics_file)
    yield from _docstring_documents(library)


def _topic_documents(topics_file: Path) -> Iterator[Document]:
    tables = [node.value for node in _parse(topics_file).body if isinstance(node, ast.Assign)]
    topics = ast.literal_eval(tables[0]) if len(tables) == 1 else None
    if not isinstance(topics, dict):
        raise CorpusError(f"{topics_file} does not hold the one dictionary of topics that CPython ships there.")
    for topic in sorted(topics):
        yield Document(f"topic:{topic}", topics[topic].strip())


def _docstring_documents(library: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        # dict.fromkeys: a docstring repeated within the module counts once, too.
        docstrings = [text for text in dict.fromkeys(_docstrings(_parse(path))) if text not in seen]
        if docstrings:
            seen.update(docstrings)
            yield Document(f"module:{relative.with_suffix('').as_posix()}", "\n\n".join(docstrings))


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in the library's own strings
        try:
            return ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError) as error:
            raise CorpusError(f"{path} of the standard library does not parse as Python: {error}.") from error


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)
