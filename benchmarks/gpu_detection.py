"""A training step of the paper's detectors, Mask R-CNN on XCiT-S12 and Swin-B, stock and conditioned, on a GPU, for `gpu.py`.

Bodies, heads and the size of the images are those of `train_detection.py --preset`; weights, images and objects are random.
Neither COCO nor pycocotools is needed. XCiT attends between channels, which leaves no heads to precondition.
"""

import json
from pathlib import Path
from typing import Any

import torch
from bench_step import BenchArguments, TrainingStep  # first: it lets the recipes be found
from gpu_parts import Options, Outcome, Part
from gpu_steps import COLUMNS, Case, StepTimings, listed
from torch import Tensor

from recipes.run.preset_files import read_yaml

PRESETS = Path(__file__).resolve().parents[1] / "scripts" / "recipes" / "detection" / "detection_presets.yaml"
# The detectors by the names of their presets, and of `gpu_steps.GROUPS` what is measured of each.
MEASURED = {
    "xcit_s12_p16": ("identity", "svd, products"),
    "swin_b": ("identity", "svd, products", "preconditioned"),
}
BATCH = 2  # the published one of each GPU
HEIGHT, WIDTH = 800, 1088  # what most images of COCO become under the presets, and 32 divides
OBJECTS, CLASSES = 8, 80
SETTINGS = ("fpn_channels", "box_head_size", "mask_layers", "anchor_sizes", "min_size", "max_size")
TINY_SIDE = 128
TINY_BODIES: dict[str, dict[str, Any]] = {
    "xcit_s12_p16": {"body": "xcit_nano_12_p16_224", "body_args": '{"embed_dim": 32, "depth": 12, "num_heads": 2}'},
    "swin_b": {"body_args": '{"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4}'},
}
TINY_HEADS: dict[str, Any] = {"fpn_channels": 16, "box_head_size": 16, "mask_layers": [16]}
TINY_HEADS |= {"anchor_sizes": [8, 16, 32, 64, 96], "min_size": TINY_SIDE, "max_size": TINY_SIDE}


class DetectionStep(TrainingStep):
    """A step of Mask R-CNN, whose heads compute in float32 as in the script."""

    def build(self, model: str, arguments: BenchArguments) -> tuple[Any, dict[str, Any]]:
        """A detector of random weights on the CPU, and its batch on the device."""
        from recipes.detection import detector  # needs timm, an extra

        detector.register_detector()
        tiny = arguments.scale == "tiny"
        values = read_yaml(PRESETS)["published"][model] | (TINY_BODIES[model] | TINY_HEADS if tiny else {})
        # Without stochastic depth: what it draws would decide the time of a step.
        body = detector.describe_body(values["body"], json.loads(values["body_args"] or "{}"), values["out_indices"])
        names = [str(number) for number in range(CLASSES)]
        config = detector.detector_config(body, names, **{name: values[name] for name in SETTINGS})
        torch.manual_seed(arguments.seed)
        built = detector.Detector(config).train()
        built.freeze_batch_norm()  # as a pretrained body's on one GPU
        generator = torch.Generator().manual_seed(arguments.seed)
        size = (TINY_SIDE, TINY_SIDE) if tiny else (HEIGHT, WIDTH)
        examples = [example(*size, generator) for _ in range(arguments.batch_size)]
        return built, {
            "images": [image.to(arguments.device) for image, _ in examples],
            "targets": [{key: value.to(arguments.device) for key, value in found.items()} for _, found in examples],
        }


def example(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of noise, and boxes on it that their masks fill, as a [`Detector`] takes them."""
    corners = torch.rand(OBJECTS, 2, generator=generator) / 2
    sides = 0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=generator)
    boxes = (torch.cat([corners, corners + sides], dim=1) * torch.tensor([width, height] * 2)).round()
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=generator)
    return torch.rand(3, height, width, generator=generator), {"boxes": boxes, "labels": labels, "masks": masks}


class DetectionTimings(StepTimings):
    """Steps of detectors in place of classifiers'."""

    step_of = DetectionStep
    batch_sizes = dict.fromkeys(MEASURED, BATCH)
    rounds = 10


def parts(options: Options) -> list[Part]:
    """The parts of the item "detection"."""
    try:
        import timm  # noqa: F401  an extra
    except ImportError as error:
        why = f"timm is not installed ({error})"
        return [Part("detection", lambda: Outcome("Detectors", COLUMNS, [], None, notes=[why]))]
    cases = [(Case(name, "eager"), group) for name, groups in MEASURED.items() for group in groups]
    if options.tiny:
        cases = [cases[1], cases[-1]]
    return listed(DetectionTimings(options), cases)
