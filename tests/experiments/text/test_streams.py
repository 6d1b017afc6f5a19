"""Streams of documents: from files, cut short, divided and sampled."""

import gzip
import os

import numpy as np
import pytest
from reference import split_documents

from recipes.text import streams
from recipes.text.documents import CorpusError, Document
from recipes.text.streams import (
    CorpusStream,
    estimated_characters,
    file_digest,
    file_stream,
    limit_documents,
    name_hash,
    split_first,
    split_stream,
    training_sample,
)
from recipes.text.text_files import file_documents

TEXTS = [f"Word{index} and more.\n" + "some lines, \n" * (index % 7) for index in range(60)]
DOCUMENTS = [Document(f"d:{index}", text) for index, text in enumerate(TEXTS)]


def memory_stream(documents=DOCUMENTS):
    characters = sum(len(document.text) for document in documents)
    return CorpusStream(lambda: iter(documents), {"memory": len(documents)}, "memory", characters)


def parts_of(documents):
    """Each document in parts, a line each."""
    return [Document(document.name, line) for document in documents for line in document.text.splitlines(True)]


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
    parts = parts_of(DOCUMENTS)
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


def test_name_hash_is_fixed_for_all_time():
    # SHA-256 of "abc" begins with ba7816bf8f01cfea.
    assert name_hash("abc") == 0xBA7816BF8F01CFEA / 2**64


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 7, 60])
def test_split_of_a_stream_is_that_of_a_list(fraction, count):
    train, validation = split_stream(memory_stream(DOCUMENTS[:count]), fraction)
    expected = split_documents(DOCUMENTS[:count], fraction)
    assert (list(train.documents()), list(validation.documents())) == expected


def test_split_holds_out_about_the_fraction_and_loses_nothing():
    documents = [Document(f"d:{index}", "x") for index in range(4000)]
    parts = [list(part.documents()) for part in split_stream(memory_stream(documents), 0.1)]
    assert abs(len(parts[1]) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert sorted(parts[0] + parts[1], key=lambda document: int(document.name[2:])) == documents
    assert all(name_hash(document.name) < 0.1 for document in parts[1])


def test_split_of_a_document_does_not_depend_on_the_others():
    _, few = split_stream(memory_stream(DOCUMENTS[:30]), 0.3)
    _, many = split_stream(memory_stream(DOCUMENTS[::-1]), 0.3)
    assert len(list(few.documents())) > 3
    assert [document for document in many.documents() if document in DOCUMENTS[:30]] == list(few.documents())[::-1]


def test_the_parts_of_a_split_are_told_apart():
    whole = memory_stream()
    train, validation = split_stream(whole, 0.25)
    ingredients = [whole.ingredients, train.ingredients, validation.ingredients]
    ingredients += [part.ingredients for part in split_stream(whole, 0.5)]
    ingredients += [part.ingredients for part in split_stream(memory_stream(DOCUMENTS[:7]), 0.25)]
    assert all(ingredients.count(one) == 1 for one in ingredients)
    assert [part.characters for part in (train, validation)] == [
        round(0.75 * whole.characters),
        round(0.25 * whole.characters),
    ]


def test_a_single_document_in_parts_cannot_be_split():
    parts = [Document("d", "a\n"), Document("d", "b\n")]
    train, _ = split_stream(memory_stream(parts), 0.5)
    with pytest.raises(CorpusError, match=r"memory is a single document.*--validation_file"):
        list(train.documents())


@pytest.mark.parametrize("count", [1, 7, 59])
def test_the_first_documents_are_held_out_with_all_their_parts(count):
    for documents in (DOCUMENTS, parts_of(DOCUMENTS)):
        train, validation = split_first(memory_stream(documents), count)
        first = [document for document in documents if int(document.name[2:]) < count]
        for _ in range(2):  # both can be read again
            assert list(validation.documents()) == first
            assert list(train.documents()) == documents[len(first) :]


def test_holding_out_the_first_documents_reads_one_document_further():
    """That a document has no more parts shows at the next one."""
    read = []

    def documents():
        for document in DOCUMENTS:
            read.append(document)
            yield document

    _, validation = split_first(CorpusStream(documents, {}, "download"), 3)
    assert not read
    assert list(validation.documents()) == DOCUMENTS[:3]
    assert read == DOCUMENTS[:4]


@pytest.mark.parametrize("count", [60, 1000])
def test_holding_out_all_documents_is_refused(count):
    for documents in (DOCUMENTS, parts_of(DOCUMENTS)):
        train, validation = split_first(memory_stream(documents), count)
        with pytest.raises(CorpusError, match=rf"memory has 60 documents.*--validation_documents {count} holds out"):
            list(train.documents())
        assert list(validation.documents()) == documents


def test_the_parts_of_a_split_by_place_are_told_apart():
    whole = memory_stream()
    streams_of = [whole, *split_stream(whole, 0.1), *split_first(whole, 3), *split_first(whole, 4)]
    streams_of += split_first(memory_stream(DOCUMENTS[:7]), 3)
    ingredients = [stream.ingredients for stream in streams_of]
    assert all(ingredients.count(one) == 1 for one in ingredients)
    train, validation = split_first(whole, 3)
    assert train.ingredients == split_first(memory_stream(), 3)[0].ingredients
    # Of a download nobody knows how large its first documents are; of the rest, that is all but the same.
    assert (train.characters, validation.characters) == (whole.characters, None)
    assert all(whole.origin in stream.origin for stream in streams_of)


def test_the_sample_is_spread_over_the_corpus():
    documents = [Document(f"d:{index}", "x" * 100) for index in range(1000)]
    numbers = [int(document.name[2:]) for document in training_sample(memory_stream(documents), 10_000)]
    assert len(numbers) == 100
    assert max(np.diff(numbers)) <= 11
    assert numbers[-1] > 950
    assert list(training_sample(memory_stream(documents), 10**9)) == documents
    unknown = CorpusStream(lambda: iter(documents), {}, "stream")
    assert list(training_sample(unknown, 1000)) == documents[:10]
