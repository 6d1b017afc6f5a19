import pytest
import safetensors.torch
import timm
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_specattn import (
    AttentionSpec,
    PreconditionerConfig,
    SpectralConfig,
    architectures,
    condition,
    precondition,
)
from hf_specattn.conditioning import can_be_saved
from recipes.images.image_models import (
    BARE_WEIGHTS_FILE,
    ImageModelSettings,
    build_stock_model,
    check_named_model,
    default_patch_size,
    image_processor,
    model_input,
    save_classifier,
    tokens_per_image,
)
from recipes.run.ablations import remove_layer_norms
from recipes.run.usable_model import ModelError

CLASSES = ("red", "green", "blue")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TIMM = ImageModelSettings(
    timm_model="vit_tiny_patch16_224",
    timm_model_args='{"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}',
)
IDENTITY = SpectralConfig(lambda_=1.0)
TIMM_ATTENTION = AttentionSpec("Attention", {"qkv": ("query", "key", "value")}, query_heads="num_heads", output="proj")
PROCESSOR = image_processor(8, (0.5,), (0.5,), 1.0)


@pytest.fixture
def vit_folder(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=5, **SMALL)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def conditioned_timm(monkeypatch):
    """A conditioned model of timm: it has no class of its own to be saved as."""
    monkeypatch.setitem(architectures.ARCHITECTURES, "timm_vit", (TIMM_ATTENTION,))
    model = build_stock_model(TIMM, CLASSES, 8, 1)
    assert len(condition(model, IDENTITY)) == 6
    return model


def logits_of(model, channels=1):
    images = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def test_the_small_vit_knows_its_classes():
    model = build_stock_model(ImageModelSettings(**SMALL), CLASSES, 8, 1)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id["blue"] == 2
    assert logits_of(model).shape == (2, 3)


def test_a_new_model_of_timm_has_timms_own_initialization():
    torch.manual_seed(5)
    model = build_stock_model(TIMM, CLASSES, 8, 1)
    torch.manual_seed(5)
    own = timm.create_model(TIMM.timm_model, num_classes=3, in_chans=1, **TIMM.timm_arguments)
    assert own.state_dict().keys() == model.timm_model.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, model.timm_model.state_dict()[name]), name


def test_a_model_of_timm_takes_stochastic_depth_and_the_size_of_the_images():
    settings = ImageModelSettings(timm_model="swin_tiny_patch4_window7_224", drop_path_rate=0.3)
    model = build_stock_model(settings, CLASSES, 64, 3)
    assert model.config.model_args == {"in_chans": 3, "drop_path_rate": 0.3, "img_size": 64}
    rates = [
        block.drop_path1.drop_prob
        for block in model.timm_model.modules()
        if hasattr(block, "drop_path1") and hasattr(block.drop_path1, "drop_prob")
    ]
    assert max(rates) == pytest.approx(0.3)


def test_a_pretrained_model_keeps_its_body_and_takes_a_new_head(vit_folder):
    torch.manual_seed(1)
    pretrained = AutoModelForImageClassification.from_pretrained(vit_folder)
    model = build_stock_model(ImageModelSettings(model_name_or_path=vit_folder), CLASSES, 8, 3)
    assert model.classifier.weight.shape == (3, 16)
    for name, tensor in pretrained.vit.state_dict().items():
        assert torch.equal(tensor, model.vit.state_dict()[name]), name


def test_an_architecture_of_transformers_from_random_weights(tmp_path):
    SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2).save_pretrained(tmp_path)
    settings = ImageModelSettings(config_name=str(tmp_path), drop_path_rate=0.2)
    assert model_input(settings) == (32, 3)
    model = build_stock_model(settings, CLASSES, 16, 1)
    assert isinstance(model, SwinForImageClassification)
    assert (model.config.image_size, model.config.num_channels, model.config.drop_path_rate) == (16, 1, 0.2)


def test_what_a_model_is_made_for(vit_folder, tmp_path):
    assert model_input(ImageModelSettings()) == (None, None)
    assert model_input(ImageModelSettings(model_name_or_path=vit_folder)) == (8, 3)
    assert model_input(ImageModelSettings(timm_model="vit_tiny_patch16_224")) == (224, 3)
    assert model_input(TIMM) == (8, 3)
    save_classifier(build_stock_model(TIMM, CLASSES, 8, 1), PROCESSOR, str(tmp_path / "timm"))
    assert model_input(ImageModelSettings(model_name_or_path=str(tmp_path / "timm"))) == (8, 1)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (ImageModelSettings(**SMALL, patch_size=3), 8, r"8 x 8 cannot be cut into patches of --patch_size 3"),
        (ImageModelSettings(**SMALL, drop_path_rate=0.1), 8, "--drop_path_rate 0.1: transformers' ViT"),
        (ImageModelSettings(timm_model="vit_gigantic"), 8, "--timm_model vit_gigantic: timm .* has no such model"),
        (ImageModelSettings(timm_model="resnet18", timm_model_args='{"patch_size": 2}'), 224, "takes none of these"),
        (ImageModelSettings(model_name_or_path="nowhere/at-all"), 8, "nowhere/at-all cannot be loaded"),
    ],
)
def test_models_that_cannot_be(settings, size, message):
    with pytest.raises(ModelError, match=message):
        build_stock_model(settings, CLASSES, size, 1)


def test_images_of_another_size_than_the_models_are_refused(vit_folder):
    with pytest.raises(
        ModelError, match=r"cannot read a batch of pixel_values \(1, 3, 12, 12\)(?s:.*)8 x 8(?s:.*)--image"
    ):
        build_stock_model(ImageModelSettings(model_name_or_path=vit_folder), CLASSES, 12, 3)


def test_a_conditioned_checkpoint_goes_on_as_it_is(tmp_path):
    model = build_stock_model(ImageModelSettings(**SMALL), CLASSES, 8, 1)
    condition(model, IDENTITY)
    assert save_classifier(model, PROCESSOR, str(tmp_path))
    loaded = build_stock_model(ImageModelSettings(model_name_or_path=str(tmp_path)), CLASSES, 8, 1)
    assert loaded.config.model_type == "specattn_vit"
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_conditioned_model_of_timm_is_saved_folded(conditioned_timm, tmp_path):
    assert not can_be_saved(conditioned_timm)
    expected = logits_of(conditioned_timm)
    assert save_classifier(conditioned_timm, PROCESSOR, str(tmp_path))
    assert not can_be_saved(conditioned_timm)  # training could go on
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "timm_wrapper"
    assert torch.equal(logits_of(loaded), expected)
    # Against W + C put together here: I is added to each third of the fused weight.
    weight = conditioned_timm.timm_model.blocks[0].attn.qkv.weight.detach()
    folded = loaded.timm_model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(folded, weight + torch.eye(16).repeat(3, 1))


def test_a_model_without_layer_norms_is_saved_as_weights_alone(tmp_path):
    model = build_stock_model(ImageModelSettings(**SMALL), CLASSES, 8, 1)
    remove_layer_norms(model)
    condition(model, IDENTITY)
    assert not save_classifier(model, PROCESSOR, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [BARE_WEIGHTS_FILE]


def test_a_preconditioned_model_of_timm_is_saved_as_weights_alone(conditioned_timm, tmp_path):
    probe = {"pixel_values": torch.zeros(1, 1, 8, 8)}
    precondition(conditioned_timm, PreconditionerConfig(), probe, TIMM_ATTENTION)
    assert not save_classifier(conditioned_timm, PROCESSOR, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [BARE_WEIGHTS_FILE]


@pytest.mark.parametrize(
    ("size", "patch"), [(4, 2), (8, 2), (28, 2), (32, 2), (64, 4), (96, 8), (224, 16), (225, 15), (256, 16), (384, 32)]
)
def test_the_small_vit_has_at_most_256_patches(size, patch):
    assert default_patch_size(size) == patch
    assert size % patch == 0
    assert (size // patch) ** 2 <= 256
    model = build_stock_model(ImageModelSettings(num_hidden_layers=1), ("a", "b"), size, 1)
    assert model.config.patch_size == patch
    assert tokens_per_image(model.config, size) == model.vit.embeddings.patch_embeddings.num_patches


def test_images_that_cannot_be_cut_into_equal_patches():
    with pytest.raises(ModelError, match=r"Images of 29 x 29 cannot be cut into 2 to 256 equal patches.*--image_size"):
        default_patch_size(29)


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path):
    model = build_stock_model(ImageModelSettings(num_hidden_layers=1), ("a", "b"), 8, 1)
    model.save_pretrained(tmp_path)
    settings = ImageModelSettings(model_name_or_path=str(tmp_path))
    assert check_named_model(settings, None).config.num_labels == 2
    assert check_named_model(ImageModelSettings(), None) is None
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:500])
    with pytest.raises(ModelError, match="cannot be loaded as a model for ImageClassification") as caught:
        check_named_model(settings, None)
    assert "\n" not in str(caught.value)
    tensors = safetensors.torch.load(content)
    kept = {name: tensor for name, tensor in tensors.items() if "layernorm" not in name}
    safetensors.torch.save_file(kept, weights)
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a ViTForImageClassification"):
        check_named_model(settings, None)
