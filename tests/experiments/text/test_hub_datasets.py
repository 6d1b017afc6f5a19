import json
import sys

import pytest

from recipes.text.documents import CorpusError
from recipes.text.hub_datasets import hub_stream

datasets = pytest.importorskip("datasets")

ROWS = ["one", None, "two\nlines", "  ", "three"]
EXPECTED = [("corpus:train:0", "one"), ("corpus:train:2", "two\nlines"), ("corpus:train:4", "three")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(params=["json", "parquet"])
def folder(request, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, texts in {"train": ROWS, "validation": ["held out"]}.items():
        rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
        if request.param == "json":
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def read(stream):
    return [(document.name, document.text) for document in stream.documents()]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_a_split_can_be_read_again(folder, streaming):
    stream = hub_stream(str(folder), streaming=streaming)
    assert read(stream) == EXPECTED
    assert read(stream) == EXPECTED
    assert read(hub_stream(str(folder), split="validation", streaming=streaming)) == [
        ("corpus:validation:0", "held out")
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_max_documents(folder, streaming):
    stream = hub_stream(str(folder), streaming=streaming, max_documents=2)
    assert read(stream) == EXPECTED[:2]
    assert read(hub_stream(str(folder), streaming=streaming, max_documents=5)) == EXPECTED


def test_ingredients_follow_the_content_and_the_settings_but_not_the_place(folder):
    first = hub_stream(str(folder)).ingredients
    moved = folder.parent / "elsewhere" / "corpus"
    moved.parent.mkdir()
    folder.rename(moved)
    assert hub_stream(str(moved), streaming=True).ingredients == first
    others = [
        hub_stream(str(moved), split="validation").ingredients,
        hub_stream(str(moved), text_column="number").ingredients,
        hub_stream(str(moved), max_documents=2).ingredients,
    ]
    file = next(moved.glob("train.*"))
    file.write_bytes(file.read_bytes().replace(b"three", b"THREE"))
    others.append(hub_stream(str(moved)).ingredients)
    assert all([first, *others].count(one) == 1 for one in [first, *others])
    json.dumps(others)


@pytest.mark.parametrize("streaming", [False, True])
def test_column_errors_name_the_columns(folder, streaming):
    with pytest.raises(CorpusError, match=r"no column 'body'; the columns are 'number', 'text'.*--text_column"):
        read(hub_stream(str(folder), text_column="body", streaming=streaming))
    with pytest.raises(CorpusError, match=r"'number' holds int.* not text.*--text_column"):
        read(hub_stream(str(folder), text_column="number", streaming=streaming))


def test_an_unknown_split_names_the_splits(folder):
    for split in ("test", "train[:10%]"):
        with pytest.raises(CorpusError, match=r"no split .*it has 'train', 'validation'.*--max_documents"):
            hub_stream(str(folder), split=split)


def test_an_unknown_configuration_or_dataset(folder):
    with pytest.raises(CorpusError, match=r"configuration 'nope'.*cannot be loaded.*--dataset_config_name"):
        hub_stream(str(folder), "nope")
    with pytest.raises(CorpusError, match=r"'owner/nothing'.*cannot be loaded.*--train_file"):
        hub_stream("owner/nothing")


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_data_is_one_of_our_errors(tmp_path, streaming):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(CorpusError, match="cannot be loaded"):
        read(hub_stream(str(tmp_path / "corpus"), streaming=streaming))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        CorpusError, match=r"--dataset_name.* needs the `datasets` library.*pip install 'hf_specattn\[train\]'"
    ):
        hub_stream("owner/name")
