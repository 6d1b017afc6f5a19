"""Tokenizer and packed parts of a run, against the same corpus read whole, split and packed in memory."""

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.constants import HF_HOME
from reference import Corpora, load_corpora, pack_documents, sequences_fingerprint

from recipes.text import corpora as sources
from recipes.text import streams
from recipes.text.cleaning import normalize_text
from recipes.text.documents import CorpusError, Document
from recipes.text.mlm_data import MlmDataSettings, prepare_mlm_data
from recipes.text.text_files import file_documents
from recipes.text.token_cache import TokenCache
from recipes.text.tokenization import train_wordpiece

LENGTH, VOCABULARY = 16, 120


@pytest.fixture
def corpus(tmp_path):
    """A function: a name and texts -> the path of a corpus file."""

    def write(name, texts):
        path = tmp_path / name
        path.write_text("\n\n\n".join(texts))
        return str(path)

    return write


@pytest.fixture
def train_file(corpus):
    texts = [f"Word{index} and some more. " * (3 + index % 5) + "end. " * (index % 3) for index in range(60)]
    return corpus("train.txt", texts)


@pytest.fixture
def validation_file(corpus):
    return corpus("val.txt", [f"more of some words {index}, and an end " * 4 for index in range(10)])


@pytest.fixture
def prepare(tmp_path):
    """A function: settings -> what is prepared, in a cache of this test."""

    def run(*files, training_sequences=4, **settings):
        common = {"vocab_size": VOCABULARY, "max_seq_length": LENGTH, "cache_dir": str(tmp_path / "cache")}
        return prepare_mlm_data(MlmDataSettings(*files, **common | settings), training_sequences=training_sequences)

    return run


def assert_holds(data, corpora):
    """That it is what packing these documents in memory gives, the tokenizer trained on the training part."""
    tokenizer = train_wordpiece(corpora.train, VOCABULARY, max_seq_length=LENGTH)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert data.tokenizer.model_max_length == LENGTH
    for found, documents in ((data.train, corpora.train), (data.validation, corpora.validation)):
        packed = pack_documents(documents, tokenizer, LENGTH)
        assert len(packed) > 4
        assert np.array_equal(found[np.arange(len(found))], packed)
        assert found.tokens.dtype == packed.dtype
    assert data.validation.fingerprint == sequences_fingerprint(packed)


# --- against the reference -------------------------------------------------------------------------------------------


def test_two_files(prepare, train_file, validation_file):
    data = prepare([train_file], [validation_file])
    assert_holds(data, load_corpora(train_file, validation_file))
    assert data.origin == f"{train_file}; validation on {validation_file}"


def test_a_share_held_out(prepare, train_file):
    data = prepare([train_file], validation_fraction=0.3)
    assert_holds(data, load_corpora(train_file, validation_fraction=0.3))
    assert data.origin == f"{train_file}; 0.3 of its documents held out by the hash of their names"


def test_the_first_documents_held_out_of_so_many(prepare, train_file):
    data = prepare([train_file], validation_documents=8, max_documents=50)
    documents = list(file_documents(train_file))
    assert_holds(data, Corpora(documents[8:50], documents[:8]))


def test_several_files(prepare, train_file, validation_file):
    both = [train_file, validation_file]
    documents = [document for path in both for document in file_documents(path)]
    assert_holds(prepare(both, both[::-1]), Corpora(documents, documents[60:] + documents[:60]))


def test_a_long_document_in_parts(prepare, corpus, monkeypatch):
    monkeypatch.setattr(streams, "PART_CHARACTERS", 50)
    train_file, validation_file = (corpus(name, ["some words\nof a line. " * 40] * 3) for name in ("a.txt", "b.txt"))
    assert_holds(prepare([train_file], [validation_file]), load_corpora(train_file, validation_file))


def test_the_embedded_corpus(prepare, monkeypatch):
    documents = [Document(f"topic:{index}", f"The statement number {index} says it. " * 4) for index in range(40)]
    for module in ("recipes.text.corpora", "reference"):
        monkeypatch.setattr(f"{module}.embedded_documents", lambda *_: iter(documents))
    monkeypatch.setattr(sources, "_library_state", lambda library: "state")
    assert_holds(prepare(validation_fraction=0.3), load_corpora(validation_fraction=0.3))


def test_cleaning_of_both_parts(prepare, corpus):
    """What is normalized teaches the tokenizer, and what it cannot shorten is left out of both parts."""
    words = [f"Wörds and mOre  words {index} " * 6 for index in range(40)]
    trash = ["0 1 2 3 4 5 6 7 8 9 " * 5]
    train_file = corpus("train.txt", words[:20] + trash + words[20:])
    validation_file = corpus("val.txt", trash + words[::-1])
    limit = 0.4
    data = prepare([train_file], [validation_file], normalize_text=True, max_tokens_per_character=limit)

    raw = load_corpora(train_file, validation_file)
    cleaned = Corpora(
        *([Document(one.name, normalize_text(one.text)) for one in part] for part in (raw.train, raw.validation))
    )
    tokenizer = train_wordpiece(cleaned.train, VOCABULARY)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    parts = ((data.train, raw.train, cleaned.train), (data.validation, raw.validation, cleaned.validation))
    for found, raw_documents, documents in parts:
        tokens = [len(tokenizer(one.text, add_special_tokens=False)["input_ids"]) for one in documents]
        kept = [one for one, count, whole in zip(documents, tokens, raw_documents) if count < limit * len(whole.text)]
        assert len(kept) == 40
        assert np.array_equal(found.tokens, pack_documents(kept, tokenizer, LENGTH))


def test_the_published_order_is_that_of_training_alone(prepare, train_file, validation_file):
    shuffled = prepare([train_file], [validation_file])
    published = prepare([train_file], [validation_file], sequence_order="published")
    packed = np.array(shuffled.train.tokens)
    period = shuffled.tokenizer.convert_tokens_to_ids(".")
    expected = sorted(range(len(packed)), key=lambda row: -(packed[row] == period).sum())
    assert expected != list(range(len(packed)))
    everything = np.arange(len(packed))
    assert np.array_equal(published.train[everything], packed[expected])
    assert np.array_equal(shuffled.train[everything], packed)
    assert published.validation.order == "shuffled"
    assert published.validation.fingerprint == shuffled.validation.fingerprint


def test_a_saved_tokenizer_is_used_again(prepare, train_file, validation_file, tmp_path):
    whole = prepare([train_file], [validation_file])
    whole.tokenizer.save_pretrained(tmp_path / "tokenizer")
    # The other way round: one trained on this training part would have another vocabulary.
    swapped = prepare([validation_file], [train_file], tokenizer_name=str(tmp_path / "tokenizer"))
    assert swapped.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert np.array_equal(swapped.train.tokens, whole.validation.tokens)
    assert swapped.validation.fingerprint == sequences_fingerprint(np.array(whole.train.tokens))


# --- the cache -------------------------------------------------------------------------------------------------------


def prepared(tmp_path):
    return sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").glob("t*"))


def test_a_second_time_nothing_is_read(prepare, train_file, monkeypatch, tmp_path):
    first = prepare([train_file])
    assert prepared(tmp_path) == ["tokenizer", "tokens", "tokens"]
    monkeypatch.setattr(streams, "file_documents", lambda *_, **__: pytest.fail("read again"))
    second = prepare([train_file])
    assert isinstance(second.train, TokenCache)
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert (second.train.fingerprint, second.validation.fingerprint) == (
        first.train.fingerprint,
        first.validation.fingerprint,
    )


def test_evaluation_prepares_no_training_part(prepare, train_file, tmp_path):
    data = prepare([train_file], training_sequences=0)
    assert prepared(tmp_path) == ["tokenizer", "tokens"]
    assert data.train is None
    assert data.validation.fingerprint == prepare([train_file]).validation.fingerprint


def test_other_settings_are_other_data(prepare, train_file):
    one = prepare([train_file])
    others = [
        prepare([train_file], max_seq_length=8),
        prepare([train_file], vocab_size=80),
        prepare([train_file], validation_fraction=0.5),
        prepare([train_file], validation_documents=5),
        prepare([train_file], max_documents=30),
        prepare([train_file], max_tokens_per_character=0.26),
    ]
    fingerprints = [(data.train.fingerprint, data.validation.fingerprint) for data in (one, *others)]
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_folder_of_the_cache(tmp_path):
    assert MlmDataSettings().resolved_cache_dir() == Path(HF_HOME) / "hf_specattn"
    assert MlmDataSettings(cache_dir=str(tmp_path)).resolved_cache_dir() == tmp_path


# --- what is too short -----------------------------------------------------------------------------------------------


def test_short_parts_are_named(prepare, train_file, validation_file):
    needed = 1000 * LENGTH
    with pytest.raises(
        CorpusError, match=rf"train\.txt is too short: .*one batch of 1000 sequences needs {needed} .*--max_seq_length"
    ):
        prepare([train_file], [validation_file], training_sequences=1000)
    with pytest.raises(CorpusError, match=r"val\.txt is too short: .*less than one sequence of 900.*--max_seq_length"):
        prepare([train_file], [validation_file], max_seq_length=900, training_sequences=1)


def test_just_enough_sequences_are_enough(prepare, train_file):
    rows = len(prepare([train_file]).train)
    assert len(prepare([train_file], training_sequences=rows).train) == rows
    with pytest.raises(CorpusError, match=rf"\({rows} of {LENGTH} tokens\).*\({rows + 1} sequences\)"):
        prepare([train_file], training_sequences=rows + 1)


def test_holding_everything_out_is_refused(prepare, train_file):
    with pytest.raises(CorpusError, match=r"train\.txt has 60 documents.*--validation_documents 60 holds out"):
        prepare([train_file], validation_documents=60)


def test_a_single_document_cannot_be_held_out(prepare, corpus):
    with pytest.raises(CorpusError, match=r"book\.txt is a single document.*--validation_file"):
        prepare([corpus("book.txt", ["some words and more " * 50])])
