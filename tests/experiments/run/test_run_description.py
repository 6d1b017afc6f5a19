import numpy as np
from models import ARCHITECTURES, WIDTH
from transformers import BertTokenizer

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition
from recipes.run import run_description
from recipes.run.run_description import model_description, sequences_fingerprint
from recipes.text.mlm_data import MlmData
from recipes.text.streams import file_stream
from recipes.text.token_cache import TokenCache, prepare_tokens


def test_a_fingerprint_tells_shapes_and_values_apart_and_not_integer_widths(monkeypatch):
    array = np.arange(60, dtype=np.uint16).reshape(10, 6)
    same = sequences_fingerprint(array)
    assert sequences_fingerprint(array.astype(np.int64)) == same
    assert sequences_fingerprint(np.asfortranarray(array)) == same
    changed = array.copy()
    changed[9, 5] += 1
    others = [changed, array.reshape(6, 10), array[:-1], array[::-1]]
    assert len({same, *(sequences_fingerprint(other) for other in others)}) == 5
    monkeypatch.setattr(run_description, "ROWS_AT_ONCE", 3)
    assert sequences_fingerprint(array) == same


def test_data_in_memory_and_in_a_cache_have_one_fingerprint(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "b"]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary)})
    (tmp_path / "text.txt").write_text("a b a b a b a b . a . a . b . b . . .")
    cache = prepare_tokens(file_stream([tmp_path / "text.txt"]), tokenizer, 4, cache_dir=tmp_path / "cache")
    array = cache[:]
    assert len(array) > 2
    data = MlmData(tokenizer, array, array, "")
    assert sequences_fingerprint(cache) == sequences_fingerprint(array) == data.validation_fingerprint
    assert sequences_fingerprint(TokenCache(cache.folder, "published")) == f"{cache.fingerprint} in published order"


def test_a_model_is_described_by_what_it_computes(tmp_path):
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config())
    stock = model_description(model.config)
    assert (stock["hidden_size"], stock["model_type"]) == (WIDTH, "crammed_bert")
    model.save_pretrained(tmp_path)
    assert model_description(CrammedBertForMaskedLM.from_pretrained(tmp_path).config) == stock
    condition(model, SpectralConfig(lambda_=2.0))
    conditioned = model_description(model.config)
    assert conditioned["lambda_"] == 2.0
    assert conditioned.keys() >= stock.keys()
