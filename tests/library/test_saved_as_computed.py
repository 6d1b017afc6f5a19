"""A checkpoint is of the function that the model computes, or saving it is refused: whatever happened to model and config."""

import copy

import pytest
import torch
from models import ARCHITECTURES, outputs_of
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, fold, precondition
from hf_specattn.layers import spectral_layers

BERT = ARCHITECTURES["bert"]
CONFIGS = {"identity": SpectralConfig(lambda_=2.0), "svd": SpectralConfig("svd")}


def conditioned(method="identity"):
    model = BERT.model(dtype=torch.float32)
    condition(model, CONFIGS[method])
    return model


def outputs(model):
    return next(iter(outputs_of(model.eval(), BERT.batch(dtype=torch.float32)).values()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {method: tmp_path_factory.mktemp(method) for method in CONFIGS}
    for method, folder in folders.items():
        conditioned(method).save_pretrained(folder)
    folders["stock"] = tmp_path_factory.mktemp("stock")
    BERT.model(dtype=torch.float32).save_pretrained(folders["stock"])
    return folders


def reload_equals(model, folder):
    before = outputs(model)
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder)
    assert torch.equal(outputs(loaded), before)
    return loaded


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("identity", "lambda_", 5.0),
        ("identity", "lambda_", "5"),
        ("identity", "spectral_targets", ["query"]),
        ("identity", "spectral_granularity", "head"),
        ("identity", "spectral_conditioning", False),
        ("identity", "attention_preconditioner", "row"),
        ("svd", "spectral_method", "identity"),
        ("svd", "spectral_refresh_every", 5),
    ],
)
def test_an_edited_configuration_changes_no_model_and_is_not_saved(method, name, value, tmp_path, caplog):
    model = conditioned(method)
    true = copy.deepcopy(model.config)
    setattr(model.config, name, value)
    loaded = reload_equals(model, tmp_path)
    assert f"{name}={value!r}" in caplog.text
    assert loaded.config.spectral_config == true.spectral_config == model.config.spectral_config
    assert loaded.config.preconditioner_config is None


def test_another_configuration_object(tmp_path):
    model = conditioned()
    model.config = model.config.to_stock()
    assert reload_equals(model, tmp_path).config.lambda_ == 2.0


@pytest.mark.parametrize("order", [[1, 0], [1], [0, 0]], ids=["exchanged", "taken out", "twice"])
def test_layers_that_moved_keep_their_corrections_and_norms(order, tmp_path, caplog):
    model = conditioned("svd")
    precondition(model, PreconditionerConfig(scale="match"))
    norms = model.config.preconditioner_norms
    assert norms[0] != norms[1]
    layers = [copy.deepcopy(model.encoder.layer[number]) for number in order]
    model.encoder.layer = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(order)
    assert reload_equals(model, tmp_path).config.preconditioner_norms == [norms[number] for number in order]
    assert "is saved. An attribute set" not in caplog.text


def stock_layer(model):
    model.encoder.layer[0] = BERT.model(dtype=torch.float32).encoder.layer[0]


def stock_attention(model):
    model.encoder.layer[0].attention.self = BertSelfAttention(model.config)


def layer_of_another_model(model):
    other = BERT.model(dtype=torch.float32)
    condition(other, SpectralConfig(lambda_=7.0))
    model.encoder.layer[1] = other.encoder.layer[1]


@pytest.mark.parametrize("change", [stock_layer, stock_attention, layer_of_another_model])
def test_layers_that_differ_have_no_checkpoint_until_they_are_folded(change, tmp_path):
    model = conditioned()
    change(model)
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.[01]\.attention\.self\.\w+ is not conditioned as the other proj"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    before = outputs(model)
    folded = reload_equals(fold(model), tmp_path)
    assert type(folded) is BertModel
    torch.testing.assert_close(outputs(folded), before)


def test_nothing_is_conditioned_any_more(tmp_path):
    model = conditioned()
    model.encoder.layer = BERT.model(dtype=torch.float32).encoder.layer
    with pytest.raises(ValueError, match="cannot be saved: no projection is conditioned"):
        model.save_pretrained(tmp_path)


def test_a_preconditioned_layer_that_was_replaced(tmp_path):
    model = BERT.model(dtype=torch.float32)
    precondition(model, PreconditionerConfig())
    stock_layer(model)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.attention\.output\.dense"):
        model.save_pretrained(tmp_path)


# --- parts of other models -------------------------------------------------------------------------------------------


def clip():
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**text, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


def head_with_a_conditioned_base(saved):
    head = BERT.model("AutoModelForSequenceClassification", dtype=torch.float32)
    head.bert = AutoModel.from_pretrained(saved["identity"])
    return head


def part_of_an_encoder_decoder(saved):
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(saved["stock"]), str(saved["stock"]))
    condition(model.encoder, CONFIGS["identity"])
    return model


def part_of_two_towers(saved):
    model = VisionTextDualEncoderModel(vision_model=vit(), text_model=AutoModel.from_pretrained(saved["svd"]))
    condition(model.vision_model, CONFIGS["identity"])
    return model


def part_of_clip(saved):
    model = clip()
    condition(model.vision_model, CONFIGS["identity"])
    return model


def preconditioned_part(saved):
    model = part_of_an_encoder_decoder(saved)
    fold(model.encoder)
    precondition(model.encoder, PreconditionerConfig())
    return model


@pytest.mark.parametrize(
    "make",
    [head_with_a_conditioned_base, part_of_an_encoder_decoder, part_of_two_towers, part_of_clip, preconditioned_part],
)
def test_a_part_that_the_configuration_does_not_tell_of_is_not_saved(make, saved, tmp_path):
    model = make(saved)
    with pytest.raises(ValueError, match=r"is conditioned, and \w+Config does not say so"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_ways_out_of_it(saved, tmp_path):
    model = head_with_a_conditioned_base(saved)
    before = outputs(model)
    fold(model).save_pretrained(tmp_path / "folded")
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(outputs(folded), before)

    towers = VisionTextDualEncoderModel(vision_model=vit(), text_model=AutoModel.from_pretrained(saved["svd"]))
    towers.save_pretrained(tmp_path / "towers")
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path / "towers")
    assert torch.equal(outputs(loaded.text_model), outputs(towers.text_model))


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("loader", "form"), [(AutoModel, "object"), (BertModel, "object"), (BertModel, "path")])
def test_a_stock_configuration_beside_a_conditioned_checkpoint_is_refused(method, loader, form, saved):
    config = BERT.config() if form == "object" else str(saved["stock"])
    with pytest.raises(ValueError, match=r"conditioned checkpoint .* would compute with W instead of W \+ C"):
        loader.from_pretrained(saved[method], config=config)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_decoder_begins_with_a_new_cross_attention(method, saved, tmp_path):
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(saved[method]), str(saved[method]))
    assert torch.equal(outputs(model.encoder), outputs(AutoModel.from_pretrained(saved[method])))
    projections = dict(spectral_layers(model.decoder))
    new = [layer for name, layer in projections.items() if "crossattention" in name]
    assert len(new) == 3 * model.config.decoder.num_hidden_layers
    if method == "svd":
        for layer in new:
            u, s, vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
            torch.testing.assert_close(layer.correction.double(), s[0] * u @ vh, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    batch = {**BERT.batch(dtype=torch.float32)}
    batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.parametrize("change", [pruned, parametrizations.weight_norm])
def test_a_checkpoint_of_computed_weights_is_not_loaded_with_random_ones(change, tmp_path):
    model = conditioned()
    change(model.encoder.layer[0].attention.self.query)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.weight, which would be random"):
        AutoModel.from_pretrained(tmp_path)
