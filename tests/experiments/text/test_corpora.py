"""Which documents a run reads, and how they are held out, for each way of naming a corpus."""

import json
import os
import sysconfig
from pathlib import Path

import pytest
from reference import load_corpora

from recipes.text import corpora as sources
from recipes.text.corpora import corpus_streams, embedded_stream, separate_validation_stream, training_stream
from recipes.text.documents import CorpusError, Document
from recipes.text.embedded_corpus import EMBEDDED_CORPUS_NAME, embedded_documents
from recipes.text.mlm_data import MlmDataSettings
from recipes.text.streams import CorpusStream
from recipes.text.text_files import file_documents

LIBRARY = {
    "pydoc_data/topics.py": 'topics = {"while": "The while statement.\\n", "assert": "The assert statement.\\n"}\n',
    "module.py": '"""Module words."""\n',
    "package/sub.py": '"""Package words."""\ndef f():\n    "Sub words."\n',
    "site-packages/other.py": '"""Third party."""',
    "test/test_it.py": '"""A test."""',
}


@pytest.fixture
def library(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "library"


@pytest.fixture
def files(tmp_path):
    """A training file of 40 documents and a validation file of 3."""
    for name, count in (("train", 40), ("val", 3)):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(f"{name} document {index}" for index in range(count)))
    return [str(tmp_path / "train.txt")], [str(tmp_path / "val.txt")]


def read(*streams):
    return [list(stream.documents()) for stream in streams]


# --- the embedded corpus ---------------------------------------------------------------------------------------------


def test_the_embedded_stream_is_the_embedded_documents(library):
    stream = embedded_stream(library)
    expected = list(embedded_documents(library))
    assert [document.name for document in expected] == [
        "topic:assert",
        "topic:while",
        "module:module",
        "module:package/sub",
    ]
    assert read(stream, stream) == [expected, expected]
    assert stream.origin == EMBEDDED_CORPUS_NAME


def test_the_library_is_parsed_once_and_not_before_it_is_read(library, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        sources, "embedded_documents", lambda folder: parsed.append(folder) or iter([Document("d", "")])
    )
    stream = embedded_stream(library)
    assert parsed == []
    readings = read(stream, stream, stream)
    assert parsed == [library]
    assert readings == [[Document("d", "")]] * 3


def test_ingredients_follow_the_files_that_are_read(library, tmp_path):
    first = embedded_stream(library).ingredients
    assert json.loads(json.dumps(first)) == first

    def changed(action):
        action()
        return embedded_stream(library).ingredients

    module, added = library / "module.py", library / "added.py"
    steps = [
        lambda: module.write_text(LIBRARY["module.py"].replace("words", "WORDS")),  # of the same size
        lambda: added.write_text('"""More."""'),
        lambda: added.rename(library / "package" / "added.py"),
        lambda: (library / "package" / "sub.py").unlink(),
        lambda: (library / "pydoc_data" / "topics.py").write_text("topics = {}\n"),
    ]
    found = [first, *(changed(step) for step in steps)]
    assert all(found.count(one) == 1 for one in found)


def test_ingredients_are_those_of_the_same_library_elsewhere(library, tmp_path):
    first = embedded_stream(library).ingredients
    (library / "site-packages" / "other.py").write_text('"""Another version."""')
    (library / "site-packages" / "new.py").write_text('"""Installed later."""')
    (library / "test" / "test_it.py").unlink()
    (library / "module.pyc").write_bytes(b"compiled")
    os.utime(library / "module.py", (1, 1))
    library.rename(tmp_path / "moved")
    assert embedded_stream(tmp_path / "moved").ingredients == first


def test_another_python_reads_another_corpus(library, monkeypatch):
    """What a docstring is, and how it is cleaned, depends on it."""
    first = embedded_stream(library).ingredients
    monkeypatch.setattr(sources.sys, "version", "3.99.0")
    assert embedded_stream(library).ingredients != first


def test_the_library_of_the_running_python_is_the_default():
    assert embedded_stream().ingredients == embedded_stream(Path(sysconfig.get_paths()["stdlib"])).ingredients


def test_a_stripped_library_is_refused_when_it_is_read(tmp_path):
    stream = embedded_stream(tmp_path)
    with pytest.raises(CorpusError, match=r"topics.py is missing.*--train_file"):
        read(stream)


# --- which corpus ----------------------------------------------------------------------------------------------------


def test_without_files_or_a_dataset_it_is_the_embedded_corpus(library, monkeypatch):
    monkeypatch.setattr(sources, "embedded_stream", lambda: embedded_stream(library))
    settings = MlmDataSettings(validation_fraction=0.5)
    assert read(training_stream(settings)) == [list(embedded_documents(library))]
    train, validation, origin = corpus_streams(settings)
    monkeypatch.setattr("reference.embedded_documents", lambda: embedded_documents(library))
    expected = load_corpora(validation_fraction=0.5)
    assert read(train, validation) == [expected.train, expected.validation]
    assert origin == f"{EMBEDDED_CORPUS_NAME}; 0.5 of its documents held out by the hash of their names"


def test_a_share_of_the_documents_is_held_out(files):
    (path,), _ = files
    train, validation, origin = corpus_streams(MlmDataSettings([path], validation_fraction=0.25))
    expected = load_corpora(path, validation_fraction=0.25)
    assert read(train, validation) == [expected.train, expected.validation]
    assert len(expected.validation) > 2
    assert origin == f"{path}; 0.25 of its documents held out by the hash of their names"


def test_the_first_documents_are_held_out(files):
    (path,), _ = files
    documents = list(file_documents(path))
    train, validation, origin = corpus_streams(MlmDataSettings([path], validation_documents=4))
    assert read(train, validation) == [documents[4:], documents[:4]]
    assert origin == f"{path}; its first 4 documents held out"


def test_documents_held_out_count_among_the_first_ones(files):
    (path,), _ = files
    documents = list(file_documents(path))
    train, validation, _ = corpus_streams(MlmDataSettings([path], validation_documents=4, max_documents=10))
    assert read(train, validation) == [documents[4:10], documents[:4]]
    train, validation, _ = corpus_streams(MlmDataSettings([path], validation_fraction=0.5, max_documents=10))
    parts = read(train, validation)
    assert sorted(parts[0] + parts[1], key=documents.index) == documents[:10]


def test_a_validation_file_leaves_the_training_corpus_whole(files):
    train_file, validation_file = files
    settings = MlmDataSettings(train_file, validation_file, validation_fraction=0.5, max_documents=2)
    train, validation, origin = corpus_streams(settings)
    expected = load_corpora(*train_file, *validation_file)
    assert read(train, validation) == [
        expected.train[:2],
        expected.validation,
    ]  # the limit is that of the training part
    assert origin == f"{train_file[0]}; validation on {validation_file[0]}"


def test_several_files_follow_each_other(files):
    train_file, validation_file = files
    both = [*validation_file, *train_file]
    train, validation, _ = corpus_streams(MlmDataSettings(both, both[::-1]))
    parts = [load_corpora(path, path).train for path in both]
    assert read(train, validation) == [parts[0] + parts[1], parts[1] + parts[0]]


def test_the_text_column_is_that_of_both_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"text {index}", "text": "no"}) for index in range(3)))
    train, validation, _ = corpus_streams(MlmDataSettings([str(path)], [str(path)], text_column="body"))
    texts = [[document.text for document in documents] for documents in read(train, validation)]
    assert texts == [["text 0", "text 1", "text 2"]] * 2


def test_missing_files_are_named_before_anything_is_read(files, tmp_path):
    train_file, validation_file = files
    gone = [str(tmp_path / "gone.txt")]
    for settings in (MlmDataSettings(gone), MlmDataSettings(train_file, gone), MlmDataSettings(gone, validation_file)):
        with pytest.raises(CorpusError, match=r"gone\.txt does not exist"):
            corpus_streams(settings)


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What is asked of `hub_stream`, which then holds three documents."""
    calls = []

    def stream(*args, **kwargs):
        calls.append((args, kwargs))
        documents = [Document(f"{kwargs['split']}:{index}", "text") for index in range(3)]
        return CorpusStream(lambda: iter(documents), {"split": kwargs["split"]}, f"dataset ({kwargs['split']})")

    monkeypatch.setattr(sources, "hub_stream", stream)
    return calls


def test_a_dataset_is_asked_for_as_the_settings_say(asked):
    settings = MlmDataSettings(
        dataset_name="owner/name",
        dataset_config_name="small",
        dataset_revision="v1",
        dataset_split="all",
        dataset_validation_split="some",
        streaming=True,
        max_documents=2,
        text_column="body",
    )
    train, validation, origin = corpus_streams(settings, show_progress=True)
    common = {"text_column": "body", "streaming": True, "revision": "v1", "show_progress": True}
    assert asked == [
        (("owner/name", "small"), common | {"split": "all", "max_documents": 2}),
        (("owner/name", "small"), common | {"split": "some", "max_documents": None}),
    ]
    assert (train.origin, validation.origin) == ("dataset (all)", "dataset (some)")
    assert origin == "dataset (all); validation on dataset (some)"


def test_the_defaults_hold_out_of_the_training_split(asked):
    settings = MlmDataSettings(dataset_name="owner/name", validation_documents=1)
    assert separate_validation_stream(settings) is None
    train, validation, origin = corpus_streams(settings)
    (call,) = asked
    assert call == (
        ("owner/name", None),
        {
            "split": "train",
            "text_column": "text",
            "streaming": False,
            "revision": None,
            "max_documents": None,
            "show_progress": False,
        },
    )
    names = [[document.name for document in documents] for documents in read(train, validation)]
    assert names == [["train:1", "train:2"], ["train:0"]]
    assert origin == "dataset (train); its first 1 documents held out"


def test_a_dataset_may_be_validated_on_files(asked, files):
    _, validation_file = files
    _, validation, origin = corpus_streams(MlmDataSettings(None, validation_file, dataset_name="owner/name"))
    assert read(validation) == [list(file_documents(validation_file[0]))]
    assert origin == f"dataset (train); validation on {validation_file[0]}"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_in_the_layout_of_the_hub(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, count in (("train", 5), ("validation", 2)):
        rows = [json.dumps({"text": f"{split} {index}"}) for index in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    settings = MlmDataSettings(
        dataset_name=str(folder), dataset_validation_split="validation", streaming=streaming, max_documents=3
    )
    train, validation, _ = corpus_streams(settings)
    texts = [[document.text for document in documents] for documents in read(train, validation)]
    assert texts == [["train 0", "train 1", "train 2"], ["validation 0", "validation 1"]]
