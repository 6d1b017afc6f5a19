import dataclasses

import numpy as np
import pytest

from hf_specattn.training.documents import CorpusError
from hf_specattn.training.mlm_data import MlmData, MlmDataSettings, prepare_cached_mlm_data, prepare_mlm_data
from hf_specattn.training.streams import file_stream


@pytest.fixture
def settings(tmp_path):
    train, validation = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("\n\n\n".join(f"document {index} has some words" for index in range(40)))
    validation.write_text("words some document has\n" * 6)
    return MlmDataSettings(str(train), str(validation), vocab_size=120, max_seq_length=8)


def test_preparation_is_deterministic_and_complete(settings):
    first, second = (prepare_mlm_data(settings, training_sequences=4) for _ in range(2))
    assert np.array_equal(first.train, second.train)
    assert first.validation_fingerprint == second.validation_fingerprint
    words = first.tokenizer.decode(first.train.flatten()).split("[SEP]")
    assert words[0].strip() == "document 0 has some words"
    assert first.tokenizer.decode(first.validation[0]).startswith("words some document has words some")


def test_evaluation_needs_no_training_part(settings):
    whole = prepare_mlm_data(settings, training_sequences=4)
    part = prepare_mlm_data(settings, training_sequences=0)
    assert part.train.shape == (0, 8)
    assert part.validation_fingerprint == whole.validation_fingerprint


def test_a_saved_tokenizer_is_used_again(settings, tmp_path):
    whole = prepare_mlm_data(settings, training_sequences=4)
    whole.tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = dataclasses.replace(settings, tokenizer_name=str(tmp_path / "tokenizer"))
    assert np.array_equal(prepare_mlm_data(named, training_sequences=4).train, whole.train)


def test_short_parts_are_named(settings):
    with pytest.raises(CorpusError, match=r"train\.txt is too short: .* one batch of 1000 sequences needs 8000"):
        prepare_mlm_data(settings, training_sequences=1000)
    with pytest.raises(CorpusError, match=r"val\.txt is too short"):
        prepare_mlm_data(dataclasses.replace(settings, max_seq_length=40), training_sequences=4)


def test_the_fingerprint_reads_tokens_and_shape_alone():
    def fingerprint(validation: np.ndarray) -> str:
        return MlmData(None, validation, validation, "").validation_fingerprint  # type: ignore[arg-type]

    tokens = np.arange(12)
    reference = fingerprint(tokens.reshape(3, 4).astype(np.uint16))
    assert fingerprint(tokens.reshape(3, 4).astype(np.int32)) == reference
    assert fingerprint(tokens.reshape(4, 3)) != reference
    assert fingerprint(tokens[::-1].reshape(3, 4)) != reference


@pytest.mark.parametrize("held_out", [False, True])
def test_through_the_cache_comes_the_same_data(tmp_path, held_out):
    texts = [f"word{index} and some more. " * 20 for index in range(60)]
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("\n\n\n".join(texts))
    files = {"train_file": str(tmp_path / "train.txt")}
    if not held_out:
        files["validation_file"] = str(tmp_path / "val.txt")
    settings = MlmDataSettings(**files, vocab_size=120, max_seq_length=16)
    expected = prepare_mlm_data(settings, training_sequences=4)
    streams = [file_stream([path]) for path in files.values()]
    train, validation = (streams[0], None) if held_out else streams
    found = prepare_cached_mlm_data(settings, train, validation, cache_dir=tmp_path / "cache", training_sequences=4)
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert np.array_equal(found.train.tokens, expected.train)
    assert found.validation_fingerprint == expected.validation_fingerprint
    with pytest.raises(CorpusError, match=r"too short.*one batch of 100000 sequences"):
        prepare_cached_mlm_data(settings, train, validation, cache_dir=tmp_path / "cache", training_sequences=100_000)
