import ast
import pathlib

import pytest

from recipes.text.documents import CorpusError, Document
from recipes.text.embedded_corpus import embedded_documents

TOPICS = '# generated\ntopics = {"while": "The while statement.\\n", "assert": "The assert statement.\\n"}\n'

MODULE = '''
"""Module words."""
raise SystemExit("importing this would end the program")
class A:
    """Class words."""
    def method(self):
        """
        Method words,
            indented.
        """
        def inner():
            """Inner words."""
    async def other(self):
        """Method two."""
def nothing():
    pass
def repeated():
    """Class words."""
'''


@pytest.fixture
def library(tmp_path: pathlib.Path) -> pathlib.Path:
    files = {
        "pydoc_data/topics.py": TOPICS,
        "zmodule.py": MODULE,
        "package/__init__.py": '"""Package words."""',
        "package/sub.py": '"""Package words."""\ndef f():\n    "Sub words."\n',
        "package/bare.py": "x = 1\n",
        "package/tests/test_it.py": '"""A test."""',
        "site-packages/other.py": '"""Third party."""',
        "lib2to3/grammar.py": 'print "not Python 3"',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_topics_come_first_then_the_docstrings_of_each_module(library):
    assert list(embedded_documents(library)) == [
        Document("topic:assert", "The assert statement."),
        Document("topic:while", "The while statement."),
        Document("module:package/__init__", "Package words."),
        Document("module:package/sub", "Sub words."),
        Document(
            "module:zmodule",
            "Module words.\n\nClass words.\n\nMethod words,\n    indented.\n\nInner words.\n\nMethod two.",
        ),
    ]


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"topics.py is missing.*zipped or stripped.*--train_file"):
        list(embedded_documents(tmp_path))


def test_a_module_that_does_not_parse_is_named(library):
    (library / "broken.py").write_text("def f(:\n")
    with pytest.raises(CorpusError, match=r"broken.py of the standard library does not parse"):
        list(embedded_documents(library))


def test_topics_of_another_form_are_refused(library):
    (library / "pydoc_data" / "topics.py").write_text("first = {}\nsecond = {}\n")
    with pytest.raises(CorpusError, match="one dictionary of topics"):
        list(embedded_documents(library))


def test_the_running_python_gives_some_megabytes_with_unique_names():
    documents = list(embedded_documents())
    names = [document.name for document in documents]
    assert len(names) == len(set(names))
    assert 1e6 < sum(len(document.text) for document in documents) < 1e7
    by_name = dict(zip(names, (document.text for document in documents)))
    assert "assert" in by_name["topic:assert"]
    assert ast.get_docstring(ast.parse(pathlib.Path(ast.__file__).read_text())) in by_name["module:ast"]
    assert not any("test" in name.split("/") for name in names)
