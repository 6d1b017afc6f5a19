import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hf_specattn.training import packing
from hf_specattn.training.documents import CorpusError, Document
from hf_specattn.training.packing import pack_documents, require_sequences, token_dtype
from hf_specattn.training.tokenization import train_wordpiece

DOCUMENTS = [Document(f"d:{index}", f"word{index} and\nsome more\n\nlines, {index}!") for index in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 100, max_seq_length=8)


def stream(tokenizer, documents):
    ids = []
    for document in documents:
        ids += [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    return ids


@pytest.mark.parametrize("length", [8, 7, 50])
def test_documents_run_on_with_separators_and_the_remainder_is_dropped(tokenizer, length):
    expected = stream(tokenizer, DOCUMENTS)
    packed = pack_documents(DOCUMENTS, tokenizer, length)
    assert packed.dtype == np.uint16
    assert packed.shape == (len(expected) // length, length)
    assert packed.flatten().tolist() == expected[: packed.size]
    assert tokenizer.cls_token_id not in packed


@pytest.mark.parametrize("piece", [1, 10, 25])
def test_long_documents_in_pieces_give_the_same_tokens(tokenizer, monkeypatch, piece):
    expected = pack_documents(DOCUMENTS, tokenizer, 8)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(packing, "PIECES_PER_CALL", 3)
    assert np.array_equal(pack_documents(DOCUMENTS, tokenizer, 8), expected)


@pytest.mark.parametrize(
    "text", ["x" * 95, "ab " * 30, "a" * 30 + " b\n" + "c" * 30 + "\n d " * 5, " \n" * 40, "end\n"]
)
def test_lines_longer_than_a_piece_are_cut_at_spaces(tokenizer, monkeypatch, text):
    expected = pack_documents([Document("d", text)], tokenizer, 1)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 10)
    pieces = list(packing.text_pieces([Document("d", text)], cut=True))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert np.array_equal(pack_documents([Document("d", text)], tokenizer, 1), expected)
    assert list(packing.text_pieces([Document("d", text)], cut=False)) == [(text, True)]


def test_only_tokenizers_that_work_word_by_word_see_pieces():
    wordwise = Tokenizer(models.WordPiece())
    assert not packing.works_wordwise(wordwise)
    wordwise.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert packing.works_wordwise(wordwise)
    wordwise.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    wordwise.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    assert packing.works_wordwise(wordwise)
    wordwise.normalizer = normalizers.Prepend("x")
    assert not packing.works_wordwise(wordwise)
    for other in (pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace(), pre_tokenizers.Digits()):
        wordwise.normalizer, wordwise.pre_tokenizer = None, other
        assert not packing.works_wordwise(wordwise)


def test_text_that_spells_a_special_token_is_text(tokenizer):
    document = Document("d", "and [MASK] and [SEP] some")
    ids = pack_documents([document], tokenizer, 1).flatten().tolist()
    assert tokenizer.mask_token_id not in ids
    assert ids.count(tokenizer.sep_token_id) == 1
    # The tokenizer itself is left as it was.
    assert tokenizer.mask_token_id in tokenizer(document.text)["input_ids"]


def test_a_short_text_gives_no_row(tokenizer):
    assert pack_documents([Document("d", "some")], tokenizer, 8).shape == (0, 8)
    assert pack_documents([], tokenizer, 8).shape == (0, 8)


def test_token_dtype_holds_the_vocabulary():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.int32


def test_too_few_sequences_are_counted():
    require_sequences(np.zeros((4, 128)), 4, "a.txt", "one batch of 4 sequences")
    with pytest.raises(
        CorpusError, match=r"a\.txt is too short: it has 384 tokens .*\(3 of 128 tokens\), and one batch .* needs 512"
    ):
        require_sequences(np.zeros((3, 128)), 4, "a.txt", "one batch of 4 sequences")
