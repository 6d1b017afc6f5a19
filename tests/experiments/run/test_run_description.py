from models import ARCHITECTURES, WIDTH

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition
from recipes.run.run_description import model_description


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
