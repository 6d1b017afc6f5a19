"""Fields that are misspelled, lost, or have no effect: an error that names them, wherever they are given."""

import importlib.util
import json
import shutil

import pytest
from models import ARCHITECTURES, outputs_of, relative_difference
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.config_fields import FIELDS
from hf_specattn.modeling import SpecBertConfig, SpecBertModel

BERT = ARCHITECTURES["bert"]
FLAG = {"spectral_conditioning": True}
MISSPELT = {
    "spectral_lambda": "lambda_",
    "lamda_": "lambda_",
    "lambda": "lambda_",
    "spectral_targts": "spectral_targets",
    "spectral_target": "spectral_targets",
    "spectral_granularty": "spectral_granularity",
    "preconditioner_epsilon": "preconditioner_eps",
    "atention_preconditioner": "attention_preconditioner",
    "SPECTRAL_METHOD": "spectral_method",
    "spectral": "no field in particular",
}


def edited(source, folder, **changes):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(("name", "meant"), MISSPELT.items())
def test_misspelt_fields_are_named_wherever_they_are_given(name, meant, stock_checkpoint, tmp_path):
    path, stray = stock_checkpoint(BERT), {name: 0.3}
    edited(path, tmp_path / "edited", **stray)
    for use in (
        lambda: AutoModel.from_pretrained(path, **FLAG, **stray),
        lambda: AutoConfig.from_pretrained(path, **FLAG, **stray),
        lambda: AutoConfig.from_pretrained(path, **stray),
        lambda: AutoConfig.for_model("bert", **FLAG, **stray),
        lambda: BertConfig(**FLAG, **stray),
        lambda: BertConfig(**stray),
        lambda: BertModel.from_pretrained(path, **FLAG, **stray),
        lambda: SpecBertConfig(**stray),
        lambda: SpecBertModel.from_pretrained(path, **stray),
        lambda: AutoModel.from_config(BERT.config(), **FLAG, **stray),
        lambda: AutoModel.from_pretrained(tmp_path / "edited"),
        lambda: AutoModel.from_pretrained(tmp_path / "edited", **FLAG),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}=.* is not a field of conditioning\. (Did you mean {meant}\? )?The fields"
        ):
            use()


def test_the_flag_itself_misspelt(stock_checkpoint):
    for name in ("spectral_conditionning", "spectral_condition", "spectal_conditioning"):
        with pytest.raises(ValueError, match=rf"{name}=True is not a field of conditioning"):
            AutoModel.from_pretrained(stock_checkpoint(BERT), **{name: True})


def test_names_of_other_peoples_fields_stay(stock_checkpoint):
    config = BertConfig(lambda_init=0.8, preconditioning="none", layer_norm_eps=1e-5, spectrum=3, gamma=1)
    assert (config.lambda_init, config.preconditioning, config.spectrum) == (0.8, "none", 3)
    assert AutoConfig.from_pretrained(stock_checkpoint(BERT), **FLAG, gamma_=2).lambda_ == 10.0


def test_spectral_init_is_no_field(stock_checkpoint, tmp_path):
    path, stray = stock_checkpoint(BERT), {"spectral_init": "preserve"}
    model = AutoModel.from_pretrained(path, **FLAG, **stray)  # but an argument here
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(BERT.model(), BERT.batch())) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    edited(tmp_path / "saved", tmp_path / "conditioned", **stray)
    edited(path, tmp_path / "stock", **stray)
    for use in (
        lambda: BertConfig(**FLAG, **stray),
        lambda: SpecBertConfig(**stray),
        lambda: AutoConfig.from_pretrained(path, **FLAG, **stray),
        lambda: AutoConfig.for_model("bert", **FLAG, **stray),
        lambda: AutoModel.from_pretrained(tmp_path / "conditioned"),
        lambda: AutoModel.from_pretrained(tmp_path / "stock"),
    ):
        with pytest.raises(ValueError, match=r"spectral_init='preserve' is an argument of a model's from_pretrained"):
            use()


@pytest.mark.parametrize("lost", FIELDS)
def test_a_conditioned_checkpoint_without_one_of_its_fields_is_damaged(lost, tmp_path):
    model = BERT.model()
    condition(model, SpectralConfig("svd"))
    precondition(model, PreconditionerConfig(scale="match"))
    model.save_pretrained(tmp_path / "whole")
    assert AutoModel.from_pretrained(tmp_path / "whole").config.spectral_config == SpectralConfig("svd")
    edited(tmp_path / "whole", tmp_path / "edited", **{lost: ...})
    message = (
        rf"lacks {lost}, which save_pretrained writes|{FIELDS[7]}.* does nothing without attention_preconditioner"
    )
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path / "edited")


@pytest.mark.parametrize(
    "norms", ["abc", [1.0, "x"], [1.0, -1.0], [1.0, float("nan")], [], {"0": 1.0}, [True, True], 3]
)
def test_norms_that_cannot_be(norms, tmp_path):
    model = BERT.model()
    precondition(model, PreconditionerConfig(scale="match"))
    model.save_pretrained(tmp_path / "whole")
    edited(tmp_path / "whole", tmp_path / "edited", preconditioner_norms=norms)
    with pytest.raises(ValueError, match=r"preconditioner_norms=.* must be a list of finite numbers > 0"):
        AutoModel.from_pretrained(tmp_path / "edited")


def test_norms_belong_to_match(tmp_path):
    model = BERT.model()
    precondition(model, PreconditionerConfig())
    model.save_pretrained(tmp_path / "whole")
    edited(tmp_path / "whole", tmp_path / "edited", preconditioner_norms=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"belongs to preconditioner_scale='match'"):
        AutoModel.from_pretrained(tmp_path / "edited")


def test_sentence_transformers(minilm_path, tmp_path):
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("the package sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    def made(path=minilm_path, **settings):
        return SentenceTransformer(str(path), device="cpu", model_kwargs=settings)

    text = ["The cat sat on the mat."]
    stock = made().encode(text)
    changed = made(**FLAG, lambda_=0.1)
    assert abs(changed.encode(text) - stock).max() > 1e-4
    assert abs(made(**FLAG, lambda_=0.1, spectral_init="preserve").encode(text) - stock).max() < 1e-5
    changed.save(str(tmp_path / "saved"))
    assert abs(made(tmp_path / "saved").encode(text) - changed.encode(text)).max() == 0
    with pytest.raises(ValueError, match="Did you mean lambda_"):
        made(**FLAG, spectral_lambda=0.1)
    with pytest.raises(ValueError, match="does nothing without spectral_conditioning=True"):
        made(lambda_=0.1)
