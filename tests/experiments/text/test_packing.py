import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from recipes.text import token_cache
from recipes.text.documents import Document
from recipes.text.token_cache import text_pieces, token_dtype
from recipes.text.tokenization import plain_encoder, train_wordpiece, works_wordwise

DOCUMENTS = [Document(f"d:{index}", f"word{index} and\nsome more\n\nlines, {index}!") for index in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 100, max_seq_length=8)


def ids_of(tokenizer, texts):
    return [identifier for text in texts for identifier in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_each_document_ends_with_its_last_piece(monkeypatch):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 10)
    pieces = [piece for document in DOCUMENTS for piece in text_pieces(document.text, cut=True)]
    texts = "".join(text + "|" * last for text, last in pieces).split("|")
    assert texts == [*(document.text for document in DOCUMENTS), ""]
    assert len(pieces) > 2 * len(DOCUMENTS)
    assert list(text_pieces(DOCUMENTS[0].text, cut=False)) == [(DOCUMENTS[0].text, True)]


@pytest.mark.parametrize("piece", [1, 10, 25])
@pytest.mark.parametrize(
    "text",
    [DOCUMENTS[0].text, "x" * 95, "ab " * 30, "a" * 30 + " b\n" + "c" * 30 + "\n d " * 5, " \n" * 40, "end\n"],
)
def test_pieces_join_to_the_text_and_give_its_tokens(tokenizer, monkeypatch, text, piece):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", piece)
    pieces = list(text_pieces(text, cut=True))
    assert "".join(part for part, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert ids_of(tokenizer, [part for part, _ in pieces]) == ids_of(tokenizer, [text])


def test_pieces_are_no_longer_than_they_need_to_be(monkeypatch):
    """Beyond the limit goes only what has no place to be cut at."""
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 10)
    text = "some words and " + "x" * 15 + " and\nmore\nlines of words"
    assert [part for part, _ in text_pieces(text, cut=True)] == [
        "some ",
        "words and ",
        "x" * 15 + " ",
        "and\nmore\n",
        "lines of ",
        "words",
    ]


def test_only_tokenizers_that_work_word_by_word_see_pieces():
    wordwise = Tokenizer(models.WordPiece())
    assert not works_wordwise(wordwise)
    wordwise.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert works_wordwise(wordwise)
    wordwise.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    wordwise.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    assert works_wordwise(wordwise)
    wordwise.normalizer = normalizers.Prepend("x")
    assert not works_wordwise(wordwise)
    for other in (pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace(), pre_tokenizers.Digits()):
        wordwise.normalizer, wordwise.pre_tokenizer = None, other
        assert not works_wordwise(wordwise)


def test_text_that_spells_a_special_token_is_text():
    tokenizer = train_wordpiece([*DOCUMENTS, Document("brackets", "[ mask sep ]")], 100)
    text = "and [MASK] and [SEP] some"
    ids = plain_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert not {tokenizer.mask_token_id, tokenizer.sep_token_id} & {*ids}
    assert tokenizer.decode(ids).replace(" ", "") == "and[mask]and[sep]some"
    # The tokenizer itself is left as it was.
    assert tokenizer.mask_token_id in tokenizer(text)["input_ids"]


def test_the_encoder_neither_truncates_nor_pads(tokenizer):
    short, long = DOCUMENTS[0].text, DOCUMENTS[0].text * 9
    assert len(ids_of(tokenizer, [long])) > 8
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    try:
        encodings = plain_encoder(tokenizer).encode_batch_fast([short, long], add_special_tokens=False)
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 8
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    assert [encoding.ids for encoding in encodings] == [ids_of(tokenizer, [short]), ids_of(tokenizer, [long])]


def test_token_dtype_holds_the_vocabulary():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.int32
