"""What a run makes of its flags: optimizer, learning rate, the plan, and what is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from detection_files import tiny_detector, write_coco
from PIL import Image
from torch import nn

from recipes.detection.coco_files import DetectionDataError
from recipes.detection.detection_arguments import parse_arguments
from recipes.detection.detection_plan import describe_plan
from recipes.detection.detection_task import describe_split, load_splits
from recipes.detection.detector_building import (
    build_detector,
    milestone_factor,
    parameter_groups,
    set_batch_norm,
)
from recipes.detection.drawing import draw, draw_detections
from recipes.detection.shapes import shapes


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def parse(*flags):
    return parse_arguments([*flags, "--show_plan"], "a test")


@pytest.mark.parametrize("body", ["xcit_p16", "swin"])
def test_norms_and_position_tables_do_not_decay(body):
    detector = tiny_detector(body)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    decayed, exempt = parameter_groups(detector, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    exempt_names = {names[id(parameter)] for parameter in exempt["params"]}
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    norms = {
        f"{name}.{kind}"
        for name, module in detector.named_modules()
        if isinstance(module, kinds)
        for kind in ("weight", "bias")
    }
    tables = {name for name in names.values() if "relative_position_bias_table" in name}
    assert len(tables) == (5 if body == "swin" else 0)
    assert exempt_names == norms | tables
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert any(name.endswith("fc6.bias") for name in (names[id(parameter)] for parameter in decayed["params"]))


def test_the_published_learning_rate():
    factor = [milestone_factor(step, [1000, 1500], 500, 0.001) for step in (0, 250, 500, 999, 1000, 1499, 1500, 3000)]
    assert factor == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_stock_and_conditioned_detectors_of_a_seed_begin_alike(accelerator):
    samples = {"images": [torch.rand(3, 64, 64)]}
    weights = []
    for flags in ((), ("--spectral_conditioning",), ("--spectral_conditioning", "--spectral_method", "svd")):
        torch.manual_seed(7)
        weights.append(build_detector(*parse(*flags), ["one", "two"], samples, accelerator).state_dict())
    stock, identity, svd = weights
    assert stock.keys() == identity.keys()
    assert all(torch.equal(stock[name], identity[name]) for name in stock)
    assert all(torch.equal(stock[name], svd[name]) for name in stock)
    assert len(svd) - len(stock) == 4  # a correction for each fused weight


def test_batch_norms_are_synchronized_over_gpus():
    detector = tiny_detector("xcit_p16")
    names = list(detector.state_dict())
    set_batch_norm(detector, None, True, SimpleNamespace(device=torch.device("cuda"), num_processes=2))
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert len(norms) == 9
    assert not detector.freezes_batch_norm
    assert list(detector.state_dict()) == names


def test_a_plan_without_the_data():
    arguments = parse("--preset", "xcit_s12_p16", "--learning_rate", "2e-4")
    lines = describe_plan(*arguments, processes=1, mixed_precision="bf16")
    text = "\n".join(lines)
    assert "Mask R-CNN on timm xcit_small_12_p16_384, from timm/xcit_small_12_p16_384.fb_dist_in1k; 44," in text
    assert "Steps: 266,146 of 16 images, 36 passes." in text
    assert "a tenth after passes 27, 33" in text
    assert lines[lines.index("Deviations from the published recipe:") + 1 : -1] == [
        "  - learning_rate: 0.0002 (published: 0.0001)",
        "  - mixed precision bf16, in body and FPN alone (published: fp16)",
    ]


def test_a_plan_of_shapes_says_what_is_conditioned():
    flags = ("--spectral_conditioning", "--spectral_method", "svd", "--projection_init", "orthogonal")
    lines = describe_plan(*parse(*flags), processes=1, mixed_precision="no")
    assert "Mask R-CNN on timm xcit_nano_12_p8_224, from random weights; 1,275,407 parameters, 3 classes" in lines[0]
    assert "svd" in lines[0]
    assert "query, key and value weights orthogonal" in lines[0]
    assert "300 of 4 images, 3 passes" in lines[2]
    assert "a cosine" in lines[3]


def test_splits_of_different_classes_are_refused(accelerator, tmp_path):
    folder = write_coco(tmp_path)
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("toothbrush", "hair drier"))
    with pytest.raises(DetectionDataError, match=r"has the classes car, toothbrush, .* both files must list the same"):
        load_splits(parse("--coco_dir", str(folder))[0], accelerator)


def test_a_split_in_words(accelerator, tmp_path):
    arguments, _ = parse("--coco_dir", str(write_coco(tmp_path)), "--max_train_samples", "1")
    train, validation = load_splits(arguments, accelerator)
    assert describe_split(train).endswith("1 images, 2 objects of 2 classes, 1 crowds, 0 images without objects.")
    assert describe_split(validation).endswith("3 images, 3 objects of 2 classes, 1 crowds, 1 images without objects.")


def test_boxes_masks_and_words_are_drawn_where_they_are():
    pixels = torch.zeros(3, 100, 100, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 100, 100)
    masks[0, 0, 40:60, 20:50] = 0.9
    masks[1, 0, 80:90, 80:90] = 0.9
    found = {
        "boxes": torch.tensor([[20.0, 40, 50, 60], [80, 80, 90, 90]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.1]),
        "masks": masks,
    }
    picture = draw(pixels, found, ["circle", "square"])
    assert picture.shape == (3, 400, 400)
    lit = (picture.sum(0) > 0).nonzero()
    # Nothing of the second, which is not sure enough; the word stands at the top of the box.
    (top, left), (bottom, right) = lit.min(0).values.tolist(), lit.max(0).values.tolist()
    assert (left, bottom) == (80, 240)
    assert 150 <= top <= 160
    assert 200 <= right < 300
    inside = picture[:, 200, 140]
    assert inside.sum() > 0
    assert torch.equal(draw(pixels, {**found, "scores": torch.zeros(2)}, ["circle"]), torch.zeros(3, 400, 400).byte())


def test_pictures_of_the_first_images(tmp_path):
    split = shapes("validation").take(3)
    assert draw_detections(tiny_detector().train(), split, 2, tmp_path / "predictions") == 2
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png"]
    shown = np.asarray(Image.open(files[0]))
    assert shown.shape == (384, 384, 3)
    assert np.array_equal(shown[::3, ::3], split.load(0)[0].permute(1, 2, 0).numpy())  # nothing found
