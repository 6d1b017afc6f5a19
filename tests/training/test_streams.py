"""Streams of documents: from files, cut short, divided and sampled."""

import gzip
import os

import numpy as np
import pytest

from hf_specattn.training import streams
from hf_specattn.training.corpora import split_documents
from hf_specattn.training.documents import CorpusError, Document
from hf_specattn.training.streams import (
    CorpusStream,
    estimated_characters,
    file_digest,
    file_stream,
    limit_documents,
    split_stream,
    training_sample,
)
from hf_specattn.training.text_files import file_documents

TEXTS = [f"Word{index} and more.\n" + "some lines, \n" * (index % 7) for index in range(60)]
DOCUMENTS = [Document(f"d:{index}", text) for index, text in enumerate(TEXTS)]


def memory_stream(documents=DOCUMENTS):
    characters = sum(len(document.text) for document in documents)
    return CorpusStream(lambda: iter(documents), {"memory": len(documents)}, "memory", characters)


def corpus_file(path, texts=TEXTS):
    path.write_text("\n\n\n".join(texts))
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def test_several_files_follow_each_other(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [corpus_file(tmp_path / "a.txt"), corpus_file(tmp_path / "other" / "a.txt", TEXTS[::-1])]
    paths.append(tmp_path / "b.txt.gz")
    paths[2].write_bytes(gzip.compress(b"zipped. " * 50))
    stream = file_stream(paths)
    expected = [document.text for path in paths for document in file_documents(path)]
    for _ in range(2):  # it can be read again
        documents = list(stream.documents())
        assert [document.text for document in documents] == expected
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    assert (names[0], names[60], names[120]) == ("a.txt:0", "1/a.txt:0", "b.txt.gz:0")
    sizes = [path.stat().st_size for path in paths]
    assert [estimated_characters(path) for path in paths] == [sizes[0], sizes[1], 3 * sizes[2]]
    assert stream.characters == sizes[0] + sizes[1] + 3 * sizes[2]
    assert file_stream(paths, max_documents=3).characters is None


def test_a_long_document_of_a_file_comes_in_parts(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    monkeypatch.setattr(streams, "PART_CHARACTERS", 50)
    parts = list(file_stream([path]).documents())
    assert len(parts) > 20
    assert {part.name for part in parts} == {"a.txt:0"}
    (whole,) = file_documents(path)
    assert "".join(part.text for part in parts) == whole.text


def test_the_first_documents_with_all_their_parts(tmp_path):
    parts = [Document(document.name, line) for document in DOCUMENTS for line in document.text.splitlines(True)]
    assert list(limit_documents(parts, 5)) == [part for part in parts if int(part.name[2:]) < 5]
    assert list(limit_documents(parts, None)) == parts
    path = corpus_file(tmp_path / "a.txt")
    assert list(file_stream([path], max_documents=5).documents()) == list(file_documents(path))[:5]


def test_a_missing_file_is_named_at_once(tmp_path):
    with pytest.raises(CorpusError, match=r"gone\.txt does not exist"):
        file_stream([corpus_file(tmp_path / "a.txt"), tmp_path / "gone.txt"])


def test_large_files_are_told_apart_by_blocks_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "WHOLE_DIGEST_BYTES", 1000)
    monkeypatch.setattr(streams, "DIGEST_BLOCK_BYTES", 64)
    path = tmp_path / "a.txt"
    digests = []
    for content, changed in ((b"a" * 50_000, 1), (b"a" * 50_001, 1), (b"a" * 50_000, 2), (b"a" * 49_999 + b"b", 1)):
        path.write_bytes(content)
        os.utime(path, (changed, changed))
        digests.append(file_digest(path))
    assert len(set(digests)) == 4
    path.write_bytes(b"a" * 50_000)
    os.utime(path, (1, 1))
    assert file_digest(path) == digests[0]


# --- parts of a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 7, 60])
def test_split_of_a_stream_is_that_of_a_list(fraction, count):
    train, validation = split_stream(memory_stream(DOCUMENTS[:count]), fraction)
    expected = split_documents(DOCUMENTS[:count], fraction)
    assert (list(train.documents()), list(validation.documents())) == expected


def test_a_single_document_in_parts_cannot_be_split():
    parts = [Document("d", "a\n"), Document("d", "b\n")]
    train, _ = split_stream(memory_stream(parts), 0.5)
    with pytest.raises(CorpusError, match=r"memory is a single document.*--validation_file"):
        list(train.documents())


def test_the_sample_is_spread_over_the_corpus():
    documents = [Document(f"d:{index}", "x" * 100) for index in range(1000)]
    numbers = [int(document.name[2:]) for document in training_sample(memory_stream(documents), 10_000)]
    assert len(numbers) == 100
    assert max(np.diff(numbers)) <= 11
    assert numbers[-1] > 950
    assert list(training_sample(memory_stream(documents), 10**9)) == documents
    unknown = CorpusStream(lambda: iter(documents), {}, "stream")
    assert list(training_sample(unknown, 1000)) == documents[:10]
