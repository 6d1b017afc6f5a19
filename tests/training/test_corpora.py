import pytest

from hf_specattn.training import corpora
from hf_specattn.training.corpora import load_corpora, name_hash, split_documents
from hf_specattn.training.documents import CorpusError, Document


def documents(count: int, prefix: str = "d") -> list[Document]:
    return [Document(f"{prefix}:{index}", f"text {index}") for index in range(count)]


def test_name_hash_is_fixed_for_all_time():
    # SHA-256 of "abc" begins with ba7816bf8f01cfea.
    assert name_hash("abc") == 0xBA7816BF8F01CFEA / 2**64


def test_split_holds_out_about_the_fraction_and_loses_nothing():
    train, validation = split_documents(documents(4000), 0.1)
    assert abs(len(validation) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert sorted([*train, *validation], key=lambda item: int(item.name[2:])) == documents(4000)
    assert all(name_hash(document.name) < 0.1 for document in validation)


def test_split_of_a_document_does_not_depend_on_the_others():
    _, few = split_documents(documents(500), 0.1)
    _, many = split_documents(documents(1000), 0.1)
    assert [item for item in many if item in documents(500)] == few
    _, reversed_order = split_documents(documents(500)[::-1], 0.1)
    assert reversed_order == few[::-1]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_leaves_no_side_empty(fraction):
    train, validation = split_documents(documents(5), fraction)
    ranked = sorted(documents(5), key=lambda document: name_hash(document.name))
    if fraction < 0.5:
        assert validation == ranked[:1]
    else:
        assert train == ranked[-1:]


def test_a_single_document_cannot_be_split():
    with pytest.raises(CorpusError, match=r"book.txt is a single document.*--validation_file"):
        split_documents(documents(1), 0.1, "book.txt")


def test_corpora_from_two_files(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\n\ntwo\n")
    (tmp_path / "val.txt").write_text("three\n")
    loaded = load_corpora(str(tmp_path / "train.txt"), str(tmp_path / "val.txt"))
    assert [item.text.strip() for item in loaded.train] == ["one", "two"]
    assert [item.text.strip() for item in loaded.validation] == ["three"]
    assert "validation on" in loaded.origin


def test_corpora_from_one_file_say_what_was_held_out(tmp_path):
    (tmp_path / "train.txt").write_text("\n\n\n".join(f"text {index}" for index in range(50)))
    loaded = load_corpora(str(tmp_path / "train.txt"), validation_fraction=0.2)
    assert len(loaded.train) + len(loaded.validation) == 50
    assert f"{len(loaded.validation)} of 50 documents held out" in loaded.origin


def test_validation_file_alone_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="validation file without a training file"):
        load_corpora(None, str(tmp_path / "val.txt"))


def test_embedded_corpus_is_the_default(monkeypatch):
    monkeypatch.setattr(corpora, "embedded_documents", lambda: iter(documents(30)))
    loaded = load_corpora(validation_fraction=0.3)
    assert "embedded" in loaded.origin
    assert (loaded.train, loaded.validation) == split_documents(documents(30), 0.3)
