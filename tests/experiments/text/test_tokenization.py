import os
import subprocess
import sys
from itertools import islice

import pytest
from transformers import AutoTokenizer, BertTokenizer

from hf_specattn import CrammedBertConfig
from recipes.text.documents import CorpusError, Document
from recipes.text.embedded_corpus import embedded_documents
from recipes.text.tokenization import SPECIAL_TOKENS, load_tokenizer, train_wordpiece

WORDS = ("Tokenizing", "tokens", "Café", "naïve", "under_score", "3.14", "it's", "走走", "tokenized", "£5", "x²")
DOCUMENTS = [Document(f"d:{index}", " ".join(WORDS[index % 7 :] * 5)) for index in range(40)]

PRINT_VOCABULARY = """
import hashlib, json
from recipes.text.embedded_corpus import embedded_documents
from recipes.text.tokenization import train_wordpiece
vocabulary = train_wordpiece(list(embedded_documents())[:60], 600).get_vocab()
print(hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 120, max_seq_length=64)


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= 120


def test_text_is_lowercased_without_accents_and_split_at_punctuation(tokenizer):
    assert tokenizer.tokenize("CAFÉ") == tokenizer.tokenize("cafe") != ["[UNK]"]
    assert tokenizer.decode(tokenizer("it's", add_special_tokens=False)["input_ids"]) == "it ' s"
    assert tokenizer.tokenize("走走") == ["走", "走"]
    assert tokenizer.tokenize("ω") == ["[UNK]"]


def test_pieces_join_to_the_words_of_the_corpus(tokenizer):
    for word in ("tokenizing", "naive", "score", "£5"):
        pieces = tokenizer.tokenize(word)
        assert pieces[0] + "".join(piece.removeprefix("##") for piece in pieces[1:]) == word


def test_pairs_and_single_texts(tokenizer):
    pair = tokenizer("tokens", "tokens")["input_ids"]
    inner = tokenizer("tokens", add_special_tokens=False)["input_ids"]
    assert pair == [2, *inner, 3, *inner, 3]
    assert tokenizer("tokens")["input_ids"] == [2, *inner, 3]


def test_order_of_documents_does_not_matter(tokenizer):
    assert train_wordpiece(DOCUMENTS[::-1], 120).get_vocab() == tokenizer.get_vocab()


def test_training_again_finds_the_same_vocabulary():
    # The trainer's hash tables are seeded anew each time, and left to itself it gives another vocabulary each time.
    documents = list(islice(embedded_documents(), 60))
    vocabularies = [train_wordpiece(documents, 600).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


@pytest.mark.slow
def test_another_process_finds_the_same_vocabulary():
    command = [sys.executable, "-c", PRINT_VOCABULARY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # where `recipes` is
    found = {
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)
    }
    assert len(found) == 1


def test_saved_beside_a_config_the_auto_class_finds_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    CrammedBertConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, BertTokenizer)
    assert loaded.model_max_length == 64
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "Naïve TOKENS it's [MASK]"
    assert loaded(text, "Café")["input_ids"] == tokenizer(text, "Café")["input_ids"]
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_below_the_alphabet_is_refused():
    with pytest.raises(CorpusError, match=r"--vocab_size 20 is too small.*take \d+"):
        train_wordpiece(DOCUMENTS, 20)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="No tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path))


def test_words_without_end_have_no_say():
    plain = [Document("d", "some words, and some more words")]
    endless = [*plain, Document("e", "x" * 5000 + " " + "some,more," * 500)]
    tokenizer = train_wordpiece(endless, 60)
    assert "x" not in tokenizer.get_vocab()
    assert {"some", "words", ","} <= set(tokenizer.get_vocab())
