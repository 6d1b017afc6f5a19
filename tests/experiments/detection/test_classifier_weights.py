"""From an ImageNet classifier to the body of a detector: equal features, corrections carried along."""

import json
from dataclasses import asdict

import pytest
import timm
import torch
from accelerate import Accelerator
from detection_files import SIZES, SWIN, XCIT
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, fold, precondition
from hf_specattn.layers import spectral_layers
from recipes.detection.classifier_weights import load_into_body, read_classifier
from recipes.detection.detection_arguments import DetectionArguments
from recipes.detection.detector import DetectorError, build_body, describe_body, features_of
from recipes.detection.detector_building import build_detector
from recipes.run.conditioned_model import ConditioningError
from recipes.run.spectral_arguments import SpectralArguments

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
# So large that the classifier, too, cuts the coarsest stage into shifted windows, as the backbone does at any size.
LARGE = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
CONDITIONED = {"identity": SpectralConfig("identity", 2.0), "svd": SpectralConfig("svd")}


def timm_classifier():
    torch.manual_seed(5)
    config = TimmWrapperConfig(architecture="xcit_nano_12_p8_224", model_args={**XCIT, "img_size": 64}, num_labels=7)
    model = TimmWrapperForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def swin_classifier():
    torch.manual_seed(5)
    return SwinForImageClassification(SwinConfig(image_size=256, num_labels=7, **SWIN)).eval()


def detector_from(path, spectral=None, **flags):
    arguments = DetectionArguments(classifier=str(path), **SIZES, **flags)
    spectral = SpectralArguments() if spectral is None else spectral
    samples = {"images": [torch.rand(3, 64, 64)]}
    return build_detector(arguments, spectral, ["one", "two"], samples, Accelerator(cpu=True)).eval()


@torch.no_grad()
def outputs_of_stages(swin, images):
    """What leaves the last block of each stage, before anything that only a backbone or only a classifier has."""
    found = []
    hooks = [
        layer.blocks[-1].register_forward_hook(
            lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in swin.encoder.layers
    ]
    swin(images)
    for hook in hooks:
        hook.remove()
    return found


def assert_equal(features, expected, atol=1e-6):
    assert len(features) == len(expected) == 4
    for one, other in zip(features, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@torch.no_grad()
def test_a_classifier_of_timm_enters_the_body(tmp_path):
    classifier = timm_classifier()
    classifier.save_pretrained(tmp_path)
    body = detector_from(tmp_path).body
    expected = classifier.timm_model.forward_intermediates(IMAGES, indices=4, norm=False, intermediates_only=True)
    assert_equal(features_of(body, IMAGES), expected)


@pytest.mark.parametrize("method", [None, *CONDITIONED])
def test_a_classifier_of_transformers_enters_with_its_corrections(method, tmp_path):
    classifier = swin_classifier()
    if method is not None:
        condition(classifier, CONDITIONED[method])
        with torch.no_grad():  # trained since: the corrections are not those of the weights any more
            for _, layer in spectral_layers(classifier):
                layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    classifier.save_pretrained(tmp_path)
    detector = detector_from(tmp_path)
    expected = outputs_of_stages(classifier.swin, LARGE)
    assert_equal(outputs_of_stages(detector.body.swin, LARGE), expected)
    if method is None:
        assert type(detector).__name__ == "Detector"
        return
    assert detector.config.spectral_config == CONDITIONED[method]
    own, carried = classifier.state_dict(), detector.body.state_dict()
    corrections = [name for name in own if name.endswith("correction")]
    assert len(corrections) == (15 if method == "svd" else 0)
    assert all(torch.equal(carried[name], own[name]) for name in corrections)
    fold(detector)
    assert_equal(outputs_of_stages(detector.body.swin, LARGE), expected)


@pytest.mark.parametrize("method", CONDITIONED)
@torch.no_grad()
def test_a_checkpoint_of_a_conditioned_model_of_timm_keeps_w_and_c_apart(method, tmp_path):
    classifier = timm_classifier()
    condition(classifier, CONDITIONED[method])
    for _, layer in spectral_layers(classifier):
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    folder = tmp_path / "checkpoint-000010"
    folder.mkdir()
    save_file(classifier.state_dict(), folder / "model.safetensors")
    flags = {"lambda_": "2.0"} if method == "identity" else {"spectral_method": "svd"}
    recorded = asdict(SpectralArguments(spectral_conditioning=True, **flags))
    recorded |= {"timm_model": "xcit_nano_12_p8_224", "timm_model_args": json.dumps(XCIT)}
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": recorded}))
    detector = detector_from(folder)
    expected = classifier.timm_model.forward_intermediates(IMAGES, indices=4, norm=False, intermediates_only=True)
    assert_equal(features_of(detector.body, IMAGES), expected)
    assert detector.config.spectral_config == CONDITIONED[method]
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(DetectorError, match=r"has no config.json, and .*metrics.json does not say which run"):
        read_classifier(str(folder))


def test_a_conditioned_classifier_is_not_conditioned_otherwise(tmp_path):
    classifier = swin_classifier()
    condition(classifier, CONDITIONED["identity"])
    classifier.save_pretrained(tmp_path)
    same = SpectralArguments(spectral_conditioning=True, lambda_="2.0")
    assert detector_from(tmp_path, same).config.spectral_config == CONDITIONED["identity"]
    other = SpectralArguments(spectral_conditioning=True, lambda_="3.0")
    with pytest.raises(ConditioningError, match=r"ask for .*3.0.* trained with .*2.0"):
        detector_from(tmp_path, other)


def test_a_preconditioned_classifier_stays_one(tmp_path):
    classifier = swin_classifier()
    condition(classifier, CONDITIONED["identity"])
    precondition(classifier, PreconditionerConfig("row"))
    classifier.save_pretrained(tmp_path)
    detector = detector_from(tmp_path, attention_preconditioner="row")
    assert_equal(outputs_of_stages(detector.body.swin, LARGE), outputs_of_stages(classifier.swin, LARGE))
    assert detector.config.preconditioner_config == PreconditionerConfig("row")
    with pytest.raises(DetectorError, match=r"was trained with the preconditioner row.*give the same by"):
        detector_from(tmp_path)


def test_a_stock_classifier_is_conditioned_now(tmp_path):
    classifier = swin_classifier()
    classifier.save_pretrained(tmp_path)
    spectral = SpectralArguments(spectral_conditioning=True, spectral_method="svd", spectral_init="preserve")
    detector = detector_from(tmp_path, spectral)
    expected = outputs_of_stages(classifier.swin, LARGE)
    assert_equal(outputs_of_stages(detector.body.swin, LARGE), expected, atol=1e-5)
    assert detector.config.spectral_method == "svd"


def test_a_body_whose_stages_timm_flattens_finds_its_weights():
    torch.manual_seed(2)
    arguments = {"img_size": (64, 96), "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    name = "swin_tiny_patch4_window7_224"
    classifier = timm.create_model(name, num_classes=5, **arguments).eval()
    body = build_body(describe_body(name, arguments)).eval()
    read = type("Read", (), {"path": "it", "weights": classifier.state_dict()})
    assert set(load_into_body(body, read)) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    with torch.no_grad():
        expected = classifier.forward_intermediates(IMAGES, indices=4, norm=False, intermediates_only=True)
        assert_equal(features_of(body, IMAGES), expected)


def test_another_architecture_is_refused(tmp_path):
    swin_classifier().save_pretrained(tmp_path / "swin")
    with pytest.raises(
        DetectorError, match=r"is of another architecture than the body: .* and .* more of the body have"
    ):
        detector_from(tmp_path / "swin", body="swin", body_args=json.dumps({**SWIN, "embed_dim": 16}))
    vit = ViTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=64)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(DetectorError, match="body vit"):
        detector_from(tmp_path / "vit")
    with pytest.raises(
        DetectorError, match=r"--classifier .*nothing cannot be loaded as a model for ImageClassification"
    ):
        detector_from(tmp_path / "nothing")


def test_a_body_begins_with_frozen_batch_norms_where_it_is_pretrained(tmp_path):
    timm_classifier().save_pretrained(tmp_path)
    assert detector_from(tmp_path).freezes_batch_norm
    assert not detector_from(tmp_path, batch_norm="train").freezes_batch_norm
    with pytest.raises(DetectorError, match="sync needs GPUs"):
        detector_from(tmp_path, batch_norm="sync")


def test_what_no_feature_depends_on_is_not_trained(tmp_path):
    swin_classifier().save_pretrained(tmp_path)
    detector = detector_from(tmp_path)
    frozen = [name for name, each in detector.named_parameters() if not each.requires_grad]
    assert frozen == [f"mask_rcnn.backbone.body.swin.layernorm.{kind}" for kind in ("weight", "bias")]
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 7
