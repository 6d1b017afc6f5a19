"""Token ids of GLUE's examples: single texts as pairs with an empty second one, the cache, and padded batches."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer

from recipes.glue import features
from recipes.glue.features import (
    Collator,
    load_tokens,
    prepare_tokens,
    tokenize,
    tokenizer_fingerprint,
)
from recipes.glue.glue_files import Examples, GlueDataError
from recipes.text.documents import Document
from recipes.text.tokenization import train_wordpiece

WORDS = "the cat sat on a mat and the dog did not sit there at all"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("a", WORDS)], 200)


def examples_of(*texts, labels=None):
    rows = [(text,) if isinstance(text, str) else text for text in texts]
    return Examples(rows, labels, [str(number) for number in range(len(rows))], "here")


def tokens_of(tokenizer, tokens):
    return [tokenizer.convert_ids_to_tokens(tokens.rows([index])["input_ids"][0]) for index in range(len(tokens))]


def test_a_single_text_is_fed_as_a_pair_with_an_empty_second_one(tokenizer):
    """Crammed BERT's protocol. The tokenizer's own call on one such pair drops the second [SEP], so this can go wrong."""
    assert tokenizer("the cat", "")["input_ids"] == tokenizer("the cat")["input_ids"]
    tokens = tokenize(examples_of("the cat", "a dog sat"), tokenizer, 32, empty_second=True)
    assert tokens_of(tokenizer, tokens) == [
        ["[CLS]", "the", "cat", "[SEP]", "[SEP]"],
        ["[CLS]", "a", "dog", "sat", "[SEP]", "[SEP]"],
    ]
    assert tokens.rows([0])["token_type_ids"] == [[0, 0, 0, 0, 1]]
    one_alone = tokenize(examples_of("the cat"), tokenizer, 32, empty_second=True)
    assert tokens_of(tokenizer, one_alone) == [["[CLS]", "the", "cat", "[SEP]", "[SEP]"]]


def test_single_texts_alone_and_pairs(tokenizer):
    alone = tokenize(examples_of("the cat"), tokenizer, 32)
    assert tokens_of(tokenizer, alone) == [["[CLS]", "the", "cat", "[SEP]"]]
    for empty_second in (False, True):  # which says nothing about pairs
        pairs = tokenize(examples_of(("the cat", "a dog"), ("sat", "")), tokenizer, 32, empty_second=empty_second)
        assert tokens_of(tokenizer, pairs) == [
            ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"],
            ["[CLS]", "sat", "[SEP]", "[SEP]"],
        ]


def test_truncation_takes_the_longer_text_first_and_keeps_the_special_tokens(tokenizer):
    tokens = tokenize(examples_of((WORDS, "a dog"), ("sat", WORDS)), tokenizer, 10)
    assert tokens.lengths.tolist() == [10, 10]
    first, second = tokens_of(tokenizer, tokens)
    assert first == ["[CLS]", "the", "cat", "sat", "on", "a", "[SEP]", "a", "dog", "[SEP]"]
    assert second == ["[CLS]", "sat", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "[SEP]"]
    cut = tokenize(examples_of(WORDS), tokenizer, 8, empty_second=True)
    assert tokens_of(tokenizer, cut) == [["[CLS]", "the", "cat", "sat", "on", "a", "[SEP]", "[SEP]"]]


def test_more_examples_than_one_call_takes(tokenizer, monkeypatch):
    texts = [" ".join(WORDS.split()[: 1 + number % 7]) for number in range(25)]
    labels = np.arange(25)
    whole = tokenize(examples_of(*texts, labels=labels), tokenizer, 32)
    monkeypatch.setattr(features, "EXAMPLES_PER_CALL", 4)
    parts = tokenize(examples_of(*texts, labels=labels), tokenizer, 32)
    assert len(parts) == 25
    assert parts.rows(range(25)) == whole.rows(range(25))
    assert parts.rows([3, 1]) == tokenizer([texts[3], texts[1]], return_attention_mask=False)
    assert parts.labels.tolist() == labels.tolist()


def test_a_tokenizer_without_the_tokenizers_library():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokens = tokenize(examples_of("ab"), tokenizer, 16, empty_second=True)
    assert tokens_of(tokenizer, tokens) == [["a", "b", "</s>", "</s>"]]
    other = ByT5Tokenizer(extra_ids=3)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(other)


def test_a_tokenizer_that_drops_an_empty_second_text_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "num_special_tokens_to_add", lambda self, pair=False: 4)
    with pytest.raises(
        GlueDataError, match="makes 4 tokens of a text with an empty second one, and a pair should have 5"
    ):
        tokenize(examples_of("the cat"), tokenizer, 16, empty_second=True)
    assert len(tokenize(examples_of(("the", "cat")), tokenizer, 16, empty_second=True)) == 1


@pytest.mark.parametrize("empty_second", [False, True])
def test_real_texts_as_the_tokenizer_itself_does_them(minilm_path, empty_second):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    texts = ["Bill whistled past the house.", "It's “probable” — 90 % café.", "", "a " * 200]
    tokens = tokenize(examples_of(*texts), tokenizer, 128, empty_second=empty_second)
    for index, text in enumerate(texts):
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [tokenizer.sep_token_id] * (1 + empty_second)
        expected = [tokenizer.cls_token_id, *inner[: 128 - 1 - len(ends)], *ends]
        assert tokens.rows([index])["input_ids"] == [expected]


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_gives_back_what_was_made_without_making_it_again(tokenizer, tmp_path, monkeypatch):
    examples = examples_of(("the cat", "sat"), ("on", "a mat"), labels=np.array([0.5, 4.0]))
    path = prepare_tokens(examples, tokenizer, 32, tmp_path / "cache", "stsb-train")
    assert path.name.startswith("stsb-train-")
    made = tokenize(examples, tokenizer, 32)
    monkeypatch.setattr(features, "tokenize", lambda *_, **__: pytest.fail("tokenized again"))
    assert prepare_tokens(examples, tokenizer, 32, tmp_path / "cache", "stsb-train") == path
    loaded = load_tokens(path)
    assert loaded.rows([0, 1]) == made.rows([0, 1])
    assert loaded.labels.tolist() == [0.5, 4.0]
    assert loaded.indices == ["0", "1"]
    assert loaded.lengths.tolist() == made.lengths.tolist()


def test_a_test_set_has_no_labels(tokenizer, tmp_path):
    assert load_tokens(prepare_tokens(examples_of("the cat"), tokenizer, 32, tmp_path, "t")).labels is None


def test_whatever_changes_the_tokens_has_a_file_of_its_own(tokenizer, tmp_path):
    examples = examples_of("the cat", "sat")
    other_rows = Examples(examples.texts, None, ["7", "8"], "here")
    other_tokenizer = BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    paths = {
        prepare_tokens(examples, tokenizer, 32, tmp_path, "t"),
        prepare_tokens(examples, tokenizer, 16, tmp_path, "t"),
        prepare_tokens(examples, tokenizer, 32, tmp_path, "t", empty_second=True),
        prepare_tokens(examples_of("the cat", "sat on"), tokenizer, 32, tmp_path, "t"),
        prepare_tokens(other_rows, tokenizer, 32, tmp_path, "t"),
        prepare_tokens(examples, other_tokenizer, 32, tmp_path, "t"),
        prepare_tokens(examples, tokenizer, 32, tmp_path, "u"),
    }
    assert len(paths) == 7


def test_calls_do_not_change_the_fingerprint_of_a_tokenizer(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["the cat"], truncation=True, max_length=9, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize("damage", [b"", b"no archive", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_made_anew(tokenizer, tmp_path, warning_log, damage):
    examples = examples_of("the cat", "sat")
    path = prepare_tokens(examples, tokenizer, 32, tmp_path, "t")
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] if damage is None else damage)
    with pytest.raises(GlueDataError, match="is damaged"):
        load_tokens(path)
    assert prepare_tokens(examples, tokenizer, 32, tmp_path, "t") == path
    assert path.read_bytes() == good
    assert any("is damaged and is rebuilt" in message for message in warning_log.messages)


def test_a_cache_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlueDataError, match=r"cannot be written: .*choose another --cache_dir"):
        prepare_tokens(examples_of("the cat"), tokenizer, 32, tmp_path / "file" / "cache", "t")


# ----------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_padded_to_its_longest(tokenizer):
    tokens = tokenize(examples_of(("the cat", "sat"), ("on", "a mat and"), ("dog", "did")), tokenizer, 32)
    collate = Collator(tokenizer, ["input_ids", "attention_mask", "token_type_ids", "labels"], CPU)
    batch = collate(tokens, [2, 0])
    expected = tokenizer(["dog", "the cat"], ["did", "sat"], padding=True, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_inputs_that_the_model_does_not_take_are_left_out(tokenizer):
    tokens = tokenize(examples_of("the cat"), tokenizer, 32)
    assert Collator(tokenizer, ["input_ids", "attention_mask"], CPU)(tokens, [0]).keys() == {
        "input_ids",
        "attention_mask",
    }


def test_no_flipped_bit_changes_what_is_read(tokenizer, tmp_path):
    examples = examples_of("the cat sat", "on a mat", "and the dog", labels=np.array([0, 1, 0]))
    path = prepare_tokens(examples, tokenizer, 16, tmp_path, "rte-train")
    content, expected = path.read_bytes(), load_tokens(path)
    refused = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            found = load_tokens(path)
        except GlueDataError:
            refused += 1
            continue
        assert {name: values.tolist() for name, values in found.columns.items()} == {
            name: values.tolist() for name, values in expected.columns.items()
        }
        assert found.offsets.tolist() == expected.offsets.tolist()
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.indices == expected.indices
    assert refused > len(content) / 7 / 3
