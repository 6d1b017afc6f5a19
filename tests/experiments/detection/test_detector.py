"""Mask R-CNN as a model of transformers: body, pyramid, precision, conditioning, saving and loading."""

import copy

import numpy as np
import pytest
import torch
from detection_files import BODIES, SIZES, square_target, tiny_detector
from models import identity_by_numpy, svd_by_numpy
from safetensors.torch import load_file, save_file
from torch import nn

from hf_specattn import SpectralConfig, condition, fold
from recipes.detection.detector import (
    Detector,
    DetectorError,
    describe_body,
    detector_config,
    features_of,
    load_detector,
    to_stride,
)

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
CORRECTIONS = {
    "identity": (SpectralConfig("identity", 2.0), identity_by_numpy(2.0)),
    "svd": (SpectralConfig("svd"), svd_by_numpy),
}


def batch():
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
    return images, [square_target(8, 8, 40, 48, size=(64, 96)), square_target(16, 4, 60, 30, size=(64, 64), label=3)]


@torch.no_grad()
def with_corrections_by_hand(detector, correction):
    """A stock body whose query, key and value weights become W + C by NumPy; XCiT's lie in one tensor, one under another."""
    body = copy.deepcopy(detector.body)
    count = 0
    for name, parameter in body.named_parameters():
        matrix = parameter.numpy()
        if name.endswith("attn.qkv.weight"):
            for block in np.split(matrix, 3):
                block += correction(block, "").astype(np.float32)
                count += 1
        elif name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "v_proj", "query", "key", "value") and matrix.ndim == 2:
            matrix += correction(matrix, "").astype(np.float32)
            count += 1
    return body, count


@torch.no_grad()
def difference(features, expected):
    return max(float((one - other).abs().max()) for one, other in zip(features, expected, strict=True))


@pytest.mark.parametrize("method", CORRECTIONS)
@pytest.mark.parametrize("body", BODIES)
def test_a_conditioned_body_computes_with_w_plus_c(body, method):
    detector = tiny_detector(body).eval()
    config, correction = CORRECTIONS[method]
    by_hand, count = with_corrections_by_hand(detector, correction)
    stock = features_of(detector.body, IMAGES)
    reports = condition(detector, config)
    assert len(reports) == count == {"swin": 15}.get(body, 12)
    features = features_of(detector.body, IMAGES)
    assert difference(features, features_of(by_hand, IMAGES)) < 1e-5
    assert difference(features, stock) > 1e-2
    fold(detector)
    assert type(detector) is Detector
    assert difference(features_of(detector.body, IMAGES), features) == 0


@pytest.mark.parametrize("method", CORRECTIONS)
def test_preserving_conditions_without_changing_what_is_found(method):
    detector = tiny_detector("swin").eval()
    stock = features_of(detector.body, IMAGES)
    condition(detector, CORRECTIONS[method][0], init="preserve")
    assert difference(features_of(detector.body, IMAGES), stock) < 1e-5


@pytest.mark.parametrize("method", [None, *CORRECTIONS])
@pytest.mark.parametrize("body", ["xcit_p8", "swin"])
def test_a_saved_detector_is_loaded_as_it_was(body, method, tmp_path):
    detector = tiny_detector(body).eval()
    if method is not None:
        condition(detector, CORRECTIONS[method][0])
    detector.save_pretrained(tmp_path)
    loaded = load_detector(tmp_path)
    assert type(loaded).__name__ == ("Detector" if method is None else "SpecDetector")
    assert loaded.config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    images, targets = batch()
    with torch.no_grad():
        expected, found = detector(images, targets), loaded(images)
    for one, other in zip(found.detections, expected.detections, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores", "masks"))
    assert len(found.detections[0]["boxes"])


def test_a_damaged_detector_is_refused(tmp_path):
    tiny_detector().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["mask_rcnn.rpn.head.cls_logits.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DetectorError, match=r"lacks 1 weights of a Detector \(mask_rcnn.rpn.head.cls_logits.bias"):
        load_detector(tmp_path)
    with pytest.raises(DetectorError, match="cannot be loaded as a model for InstanceSegmentation"):
        load_detector(tmp_path / "nothing")


@pytest.mark.parametrize("body", BODIES)
def test_the_pyramid_has_five_levels_of_stride_4_to_64(body):
    detector = tiny_detector(body).eval()
    with torch.no_grad():
        levels = detector.mask_rcnn.backbone(torch.rand(1, 3, 64, 128))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 16, 64 // s, 128 // s) for s in (4, 8, 16, 32, 64)
    ]
    assert detector.config.strides == {"xcit_p8": [8] * 4, "xcit_p16": [16] * 4, "swin": [4, 8, 16, 32]}[body]


def test_the_steps_of_the_pyramid_are_the_published_ones():
    twice = to_stride(6, 16, 4)
    assert [type(each) for each in twice] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d]
    assert [type(each) for each in to_stride(6, 8, 4)] == [nn.ConvTranspose2d]
    assert type(to_stride(6, 16, 16)) is nn.Identity
    pooled = to_stride(6, 8, 32)
    assert type(pooled) is nn.MaxPool2d
    assert pooled.kernel_size == 4


def test_losses_can_be_measured_outside_training():
    """The same detections come with them, and every part stays in evaluation."""
    detector = tiny_detector().eval()
    images, targets = batch()
    with torch.no_grad():
        torch.manual_seed(3)
        both, alone = detector(images, targets), detector(images)
    assert alone.loss is None
    names = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    assert set(both.losses) == set(names)
    assert float(both.loss) == pytest.approx(sum(map(float, both.losses.values())))
    assert torch.equal(both.detections[0]["masks"], alone.detections[0]["masks"])
    assert not any(module.training for module in detector.modules())


def test_autocast_reaches_the_backbone_in_training_alone():
    detector = tiny_detector()
    seen = {}
    for name in ("backbone", "rpn", "roi_heads"):
        part = getattr(detector.mask_rcnn, name)
        part.register_forward_hook(lambda _m, inputs, output, name=name: seen.__setitem__(name, (inputs, output)))
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = detector.train()(images, targets).loss
    assert seen["backbone"][1]["0"].dtype == torch.bfloat16
    assert seen["rpn"][1][0][0].dtype == torch.float32
    assert {level.dtype for level in seen["roi_heads"][0][0].values()} == {torch.float32}
    assert loss.dtype == torch.float32
    detector.eval()
    with torch.no_grad():
        plain = detector(images).detections
        with torch.autocast("cpu", torch.bfloat16):
            cast = detector(images).detections
    assert torch.equal(plain[0]["boxes"], cast[0]["boxes"])
    assert seen["backbone"][1]["0"].dtype == torch.float32


def test_frozen_batch_norms_stay_as_they_are():
    detector = tiny_detector("xcit_p16")
    norms = [module for module in detector.body.modules() if isinstance(module, nn.BatchNorm2d)]
    others = [m for m in detector.mask_rcnn.backbone.pyramid.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert len(others) == 1
    detector.freeze_batch_norm()
    before = [module.running_mean.clone() for module in norms + others]
    images, targets = batch()
    detector.train()(images, targets).loss.backward()
    after = [module.running_mean for module in norms + others]
    assert [torch.equal(*pair) for pair in zip(before, after)] == [True] * 8 + [False]
    assert {norm.weight.grad for norm in norms} == {None}


def test_images_without_objects_train_every_parameter():
    detector = tiny_detector().train()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    loss = detector([torch.rand(3, 64, 64)], [nothing]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, each in detector.named_parameters() if each.grad is None] == []


def test_a_body_of_channels_last_is_turned():
    body = describe_body(
        "swin_tiny_patch4_window7_224", {"img_size": (128, 192), "embed_dim": 16, "depths": [1, 1, 1, 1]}
    )
    config = detector_config(body, ["one"], **SIZES)
    assert (config.channels, config.strides) == ([16, 32, 64, 128], [4, 8, 16, 32])


@pytest.mark.parametrize(
    ("name", "arguments", "indices", "message"),
    [
        ("no_such_body", {}, None, "--body no_such_body: neither a model of timm"),
        ("swin", {}, [1], "--out_indices is of timm's models"),
        ("xcit_nano_12_p8_224", {"no_such": 1}, None, "cannot be built"),
        ("xcit_nano_12_p8_224", {}, [1, 2], "gives 2 feature maps at strides"),
        ("bert", {}, None, "The body bert cannot be built"),
        ("vit_tiny_patch16_224", {}, None, "does not read images of 128 x 192 pixels"),
    ],
)
def test_a_body_that_cannot_be_is_named(name, arguments, indices, message):
    with pytest.raises(DetectorError, match=message):
        detector_config(describe_body(name, arguments, indices), ["one"])
