"""The flag on configurations, in `from_config`, beside `config=` and on stock classes: it conditions, or says how to."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from models import ARCHITECTURES, add_correction, assert_bit_equal, each_architecture, identity_by_numpy, outputs_of
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, T5Config

import hf_specattn
from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.layers import spectral_layers

pytestmark = pytest.mark.integration

FLAGS = {"spectral_conditioning": True, "lambda_": 0.5}
BERT = ARCHITECTURES["bert"]


def conditioned_name(tiny, auto_name="AutoModel"):
    return f"Spec{tiny.classes[auto_name]}"


def assert_computes_w_plus_c(tiny, model, path):
    """The stock checkpoint's weights, with `0.5 * I` added by NumPy, compute the same."""
    stock = tiny.stock_class().from_pretrained(path, dtype=torch.float64).eval()
    expected = outputs_of(add_correction(tiny, stock, identity_by_numpy(0.5)), tiny.batch())
    outputs = outputs_of(model.eval(), tiny.batch())
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=1e-12)


# --- from scratch ----------------------------------------------------------------------------------------------------

FROM_SCRATCH = {
    "configuration": lambda tiny: AutoModel.from_config(tiny.config(**FLAGS)),
    "for_model": lambda tiny: AutoModel.from_config(AutoConfig.for_model(tiny.model_type, **FLAGS, **tiny.settings)),
    "from_config": lambda tiny: AutoModel.from_config(tiny.config(), **FLAGS),
    "constructor": lambda tiny: tiny.stock_class()(tiny.config(), **FLAGS),
}


@each_architecture
@pytest.mark.parametrize("place", FROM_SCRATCH)
def test_a_model_from_scratch_is_conditioned_and_starts_from_the_stock_weights(tiny, place):
    torch.manual_seed(0)
    stock = AutoModel.from_config(tiny.config())
    torch.manual_seed(0)
    model = FROM_SCRATCH[place](tiny)
    assert type(model).__name__ == conditioned_name(tiny)
    assert isinstance(model, tiny.stock_class())
    assert model.config.spectral_config == SpectralConfig(lambda_=0.5)
    assert len(list(spectral_layers(model))) == len({name for name, _, _ in tiny.projections(stock)})
    assert_bit_equal(model.state_dict(), stock.state_dict())
    assert_bit_equal(fold(model).state_dict(), add_correction(tiny, stock, identity_by_numpy(0.5)).state_dict())


def test_a_saved_model_from_scratch_says_what_it_is_and_loads_as_it_was(tmp_path):
    model = AutoModelForMaskedLM.from_config(BERT.config(**FLAGS)).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["lambda_"]) == ("specattn_bert", 0.5)
    assert_bit_equal(
        outputs_of(AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), BERT.batch()),
        outputs_of(model, BERT.batch()),
    )


def test_a_composite_model_conditions_the_part_whose_configuration_says_so(tmp_path):
    vit, bert = ARCHITECTURES["vit"], ARCHITECTURES["bert"]
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit.config(**FLAGS), bert.config())
    model = transformers.VisionEncoderDecoderModel(config)
    names = [name for name, _ in spectral_layers(model)]
    assert len(names) == 3 * vit.layers
    assert all(name.startswith("encoder.") for name in names)
    model.save_pretrained(tmp_path)
    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert [name for name, _ in spectral_layers(again)] == names


def test_a_part_given_by_its_fields_alone_is_conditioned():
    text = {"model_type": "llama", **ARCHITECTURES["llama"].settings, **FLAGS}
    config = transformers.LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model"})
    assert type(config.text_config).__name__ == "SpecLlamaConfig"
    assert config.text_config.lambda_ == 0.5


# --- from a stock checkpoint -----------------------------------------------------------------------------------------

FROM_PRETRAINED = {
    "flag": lambda tiny, path: AutoModel.from_pretrained(path, dtype=torch.float64, **FLAGS),
    "beside config=": lambda tiny, path: AutoModel.from_pretrained(
        path, config=AutoConfig.from_pretrained(path), dtype=torch.float64, **FLAGS
    ),
    "config= alone": lambda tiny, path: AutoModel.from_pretrained(
        path, config=AutoConfig.from_pretrained(path, **FLAGS), dtype=torch.float64
    ),
    "config= and the same flag": lambda tiny, path: AutoModel.from_pretrained(
        path, config=AutoConfig.from_pretrained(path, **FLAGS), dtype=torch.float64, **FLAGS
    ),
    "stock class": lambda tiny, path: tiny.stock_class().from_pretrained(path, dtype=torch.float64, **FLAGS),
    "stock class and config=": lambda tiny, path: tiny.stock_class().from_pretrained(
        path, config=AutoConfig.from_pretrained(path, **FLAGS), dtype=torch.float64
    ),
    "stock configuration class": lambda tiny, path: AutoModel.from_pretrained(
        path, config=tiny.config_class.from_pretrained(path, **FLAGS), dtype=torch.float64
    ),
}


@each_architecture
@pytest.mark.parametrize("place", FROM_PRETRAINED)
def test_a_stock_checkpoint_is_conditioned_wherever_the_flag_is(tiny, place, stock_checkpoint, warning_log):
    path = stock_checkpoint(tiny)
    model = FROM_PRETRAINED[place](tiny, path)
    assert type(model).__name__ == conditioned_name(tiny)
    assert_computes_w_plus_c(tiny, model, path)
    assert not any("to instantiate a model of type" in message for message in warning_log.messages)


def test_how_weights_enter_is_taken_beside_a_configuration(stock_checkpoint):
    path = stock_checkpoint(BERT)
    config = AutoConfig.from_pretrained(path)
    model = AutoModel.from_pretrained(
        path, config=config, dtype=torch.float64, spectral_init="preserve", **FLAGS
    ).eval()
    stock = BertModel.from_pretrained(path, dtype=torch.float64).eval()
    for name, value in outputs_of(stock, BERT.batch()).items():
        torch.testing.assert_close(outputs_of(model, BERT.batch())[name], value, rtol=0, atol=1e-12)
    assert "spectral_conditioning" not in vars(config)  # the caller's object stays what it was


def test_a_pipeline_takes_the_flag(stock_checkpoint, tmp_path):
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    pipe = transformers.pipeline(
        "fill-mask",
        model=str(stock_checkpoint(BERT, "AutoModelForMaskedLM")),
        tokenizer=tokenizer,
        model_kwargs=dict(FLAGS),
    )
    assert type(pipe.model).__name__ == "SpecBertForMaskedLM"
    assert pipe.model.config.lambda_ == 0.5


def test_other_settings_than_the_configuration_beside_them_are_refused(stock_checkpoint):
    path = stock_checkpoint(BERT)
    config = AutoConfig.from_pretrained(path, **FLAGS)
    with pytest.raises(ValueError, match=r"lambda_=2.0.*lambda_=0.5"):
        AutoModel.from_pretrained(path, config=config, spectral_conditioning=True, lambda_=2.0)


# --- refused ---------------------------------------------------------------------------------------------------------


def late(config):
    config.spectral_conditioning = True
    return config


def updated(config):
    config.update({"spectral_conditioning": True})
    return config


@pytest.mark.parametrize("change", [late, updated])
@pytest.mark.parametrize("make", [AutoModel.from_config, BertModel, AutoModelForMaskedLM.from_config])
def test_an_attribute_set_afterwards_is_refused_with_the_way(change, make):
    with pytest.raises(ValueError, match=r"setting the attribute afterwards.*hf_specattn.condition\(model"):
        make(change(BERT.config()))


def test_an_attribute_set_afterwards_beside_a_checkpoint_is_refused(stock_checkpoint):
    path = stock_checkpoint(BERT)
    with pytest.raises(ValueError, match="BertConfig\\(spectral_conditioning=True"):
        AutoModel.from_pretrained(path, config=late(AutoConfig.from_pretrained(path)))


@pytest.mark.parametrize("stock_class", [BertModel, BertForMaskedLM])
def test_a_stock_class_refuses_a_conditioned_configuration(stock_class):
    with pytest.raises(ValueError, match=r"hf_specattn.modeling.SpecBertModel"):
        stock_class(BERT.config(**FLAGS))


def test_a_stock_class_refuses_a_conditioned_checkpoint(tmp_path):
    AutoModel.from_config(BERT.config(**FLAGS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hf_specattn.modeling.SpecBertModel"):
        BertModel.from_pretrained(tmp_path)


class OwnHead(transformers.PreTrainedModel):
    """A model of a user, around whatever `make_encoder` makes."""

    config_class = BertConfig
    make_encoder = staticmethod(AutoModel.from_config)

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.make_encoder(config)
        self.post_init()


class OwnHeadOfStockClass(OwnHead):
    make_encoder = BertModel


def test_a_users_model_around_an_auto_class_is_conditioned_inside():
    assert len(list(spectral_layers(OwnHead(BERT.config(**FLAGS))))) == 3 * BERT.layers


def test_a_users_model_around_a_stock_class_is_refused():
    with pytest.raises(ValueError, match="BertModel says spectral_conditioning=True"):
        OwnHeadOfStockClass(BERT.config(**FLAGS))


T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 20}
WITHOUT_FLAG = {
    "configuration": lambda path: T5Config(**T5, spectral_conditioning=True),
    "for_model": lambda path: AutoConfig.for_model("t5", **T5, spectral_conditioning=True),
    "from_config": lambda path: AutoModel.from_config(T5Config(**T5), spectral_conditioning=True),
    "from_pretrained": lambda path: AutoModel.from_pretrained(path, spectral_conditioning=True),
    "config=": lambda path: AutoModel.from_pretrained(path, config=T5Config(**T5), spectral_conditioning=True),
    "stock class": lambda path: transformers.T5Model.from_pretrained(path, spectral_conditioning=True),
    "attribute": lambda path: AutoModel.from_config(late(T5Config(**T5))),
}


@pytest.mark.parametrize("place", WITHOUT_FLAG)
def test_a_type_without_the_flag_says_what_to_do(place, tmp_path):
    transformers.T5Model(T5Config(**T5)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no conditioned class.*hf_specattn.condition\(model, SpectralConfig\(\.\.\.\)\)"
    ):
        WITHOUT_FLAG[place](tmp_path)


@pytest.mark.parametrize("flag", [False, None])
def test_a_flag_that_says_no_changes_nothing(flag, stock_checkpoint, tmp_path):
    path = stock_checkpoint(BERT)
    transformers.T5Model(T5Config(**T5)).save_pretrained(tmp_path)
    no = {"spectral_conditioning": flag}
    for model in (
        AutoModel.from_pretrained(path, **no),
        AutoModel.from_pretrained(path, config=AutoConfig.from_pretrained(path, **no), **no),
        BertModel.from_pretrained(path, **no),
        AutoModel.from_pretrained(tmp_path, **no),
    ):
        assert type(model) in (BertModel, transformers.T5Model)
        assert next(spectral_layers(model), None) is None


@pytest.mark.parametrize("name", ["lambda_", "spectral_method", "spectral_init"])
def test_settings_without_the_flag_are_refused(name, stock_checkpoint):
    path = stock_checkpoint(BERT)
    stray = {name: {"lambda_": 1.0, "spectral_method": "svd", "spectral_init": "preserve"}[name]}
    for call in (
        lambda: AutoModel.from_pretrained(path, **stray),
        lambda: AutoModel.from_pretrained(path, config=BERT.config(), **stray),
        lambda: BertModel.from_pretrained(path, **stray),
        lambda: BertConfig(**stray),
        lambda: AutoModel.from_config(BERT.config(), **stray),
    ):
        with pytest.raises(ValueError, match=f"{name}=.* does nothing without spectral_conditioning=True"):
            call()


def test_other_peoples_configurations_may_have_such_fields():
    class Annealed(transformers.PreTrainedConfig):
        model_type = "annealed"
        lambda_: float = 1.0

    assert Annealed(lambda_=2.0).lambda_ == 2.0


@pytest.mark.parametrize(
    "fields",
    [
        {"spectral_conditioning": True},
        {"spectral_conditioning": True, "lambda_": 1.0, "spectral_method": "identity"},
        {"spectral_conditioning": False, "lambda_": 1.0},
        {"spectral_method": "svd"},
        {"spectral_conditioning": "yes"},
    ],
)
def test_a_stock_config_json_with_spectral_fields_is_refused(fields, tmp_path):
    BertModel(BERT.config()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for call in (AutoConfig.from_pretrained, AutoModel.from_pretrained, BertModel.from_pretrained):
        for flags in ({}, FLAGS):
            with pytest.raises(ValueError, match=r"remove these fields from config.json|must be True or False"):
                call(tmp_path, **flags)


def test_a_stock_config_json_that_says_no_is_stock(tmp_path):
    BertModel(BERT.config(spectral_conditioning=False)).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is BertModel


# --- what others see -------------------------------------------------------------------------------------------------


def test_the_stock_classes_stay_what_transformers_has_under_their_types():
    for model_type in ARCHITECTURES:
        found = transformers.CONFIG_MAPPING[model_type]
        assert found is ARCHITECTURES[model_type].config_class
        assert pickle.loads(pickle.dumps(found)) is found
        assert isinstance(AutoConfig.for_model(model_type), found)


def test_conditioned_configurations_pickle_and_copy():
    config = BERT.config(**FLAGS)
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(again) is type(config)
        assert again.to_dict() == config.to_dict()
    model = AutoModel.from_config(config)
    assert_bit_equal(pickle.loads(pickle.dumps(model)).state_dict(), model.state_dict())


def test_the_base_class_holds_any_config_json(tmp_path):
    """transformers looks into files with it: the Trainer on resuming."""
    BERT.config(**FLAGS).save_pretrained(tmp_path)
    base = transformers.PreTrainedConfig
    for read in (lambda: base.from_json_file(tmp_path / "config.json"), lambda: base.from_pretrained(tmp_path)):
        assert type(config := read()) is base
        assert config.spectral_conditioning is True
        assert config.lambda_ == FLAGS["lambda_"]
    with pytest.raises(ValueError, match=r"PreTrainedConfig .* has no conditioned class"):
        base.from_pretrained(tmp_path, spectral_conditioning=True)


def test_registering_again_changes_nothing():
    before = [vars(transformers.PreTrainedConfig)["from_dict"], vars(transformers.PreTrainedModel)["post_init"]]
    hf_specattn.auto.register()
    assert [
        vars(transformers.PreTrainedConfig)["from_dict"],
        vars(transformers.PreTrainedModel)["post_init"],
    ] == before


def test_a_model_conditioned_in_memory_is_the_one_that_the_flag_makes(stock_checkpoint):
    path = stock_checkpoint(BERT)
    model = BertModel.from_pretrained(path, dtype=torch.float64)
    condition(model, SpectralConfig(lambda_=0.5))
    assert type(model) is type(AutoModel.from_config(BERT.config(**FLAGS)))
    assert_computes_w_plus_c(BERT, model, path)
