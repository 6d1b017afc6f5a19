"""A cache whose files are not those that were written is made again, whatever the difference."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from recipes.text.documents import CorpusError, Document
from recipes.text.prepared_folders import MANIFEST_FILE
from recipes.text.streams import CorpusStream
from recipes.text.token_cache import prepare_tokens
from recipes.text.tokenization import prepare_tokenizer

DOCUMENTS = [Document(f"d:{number}", f"some words, {number} of them. And a second sentence.") for number in range(40)]


class Counted:
    """A corpus that counts how often it is read."""

    def __init__(self):
        self.readings = 0
        self.stream = CorpusStream(self.documents, {"memory": 1}, "memory")

    def documents(self):
        self.readings += 1
        yield from DOCUMENTS


@pytest.fixture
def corpus():
    return Counted()


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    file.write_bytes(bytes(content))


def vocabulary_of(tokenizer):
    return tokenizer.get_vocab(), tokenizer.model_max_length


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["tokens.bin", "order.npy"])
def test_a_flipped_bit_in_the_tokens(corpus, tmp_path, warning_log, name, place):
    tokenizer = prepare_tokenizer(corpus.stream, 80, cache_dir=tmp_path)
    cache = prepare_tokens(corpus.stream, tokenizer, 8, cache_dir=tmp_path)
    expected, order, before = np.array(cache.tokens), cache.in_order("published")[:], corpus.readings
    del cache
    (folder,) = tmp_path.glob("tokens-*")
    flip(folder / name, place)
    again = prepare_tokens(corpus.stream, tokenizer, 8, cache_dir=tmp_path)
    assert corpus.readings == before + 1
    np.testing.assert_array_equal(again.tokens, expected)
    np.testing.assert_array_equal(again.in_order("published")[:], order)
    assert any(f"is damaged ({name} is not what was written); it is rebuilt" in text for text in warning_log.messages)
    prepare_tokens(corpus.stream, tokenizer, 8, cache_dir=tmp_path)
    assert corpus.readings == before + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: flip(folder / "tokenizer.json", 0.5),
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        lambda folder: (folder / MANIFEST_FILE).unlink(),
        lambda folder: (folder / MANIFEST_FILE).write_text("[]"),
        lambda folder: (folder / MANIFEST_FILE).write_text('{"crc32": {}}'),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
    ids=["no vocabulary", "a flipped bit", "no settings", "no manifest", "a list", "no checksums", "empty"],
)
def test_a_damaged_tokenizer(corpus, tmp_path, warning_log, damage):
    tokenizer = prepare_tokenizer(corpus.stream, 80, cache_dir=tmp_path, max_seq_length=8)
    (folder,) = tmp_path.glob("tokenizer-*")
    before = corpus.readings
    prepare_tokenizer(corpus.stream, 80, cache_dir=tmp_path, max_seq_length=8)
    assert corpus.readings == before
    damage(folder)
    again = prepare_tokenizer(corpus.stream, 80, cache_dir=tmp_path, max_seq_length=8)
    assert corpus.readings == before + 1
    assert vocabulary_of(again) == vocabulary_of(tokenizer)
    assert any("is damaged" in text and "rebuilt" in text for text in warning_log.messages)
    assert set(json.loads((folder / MANIFEST_FILE).read_text())["crc32"]) >= {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_a_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"--cache_dir, or below HF_HOME.* cannot be written: .* is a file"):
        prepare_tokenizer(corpus.stream, 80, cache_dir=tmp_path / "file" / "cache")
    assert corpus.readings == 0
