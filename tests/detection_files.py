"""Tiny detectors, and COCO's layout in small, for the tests of `recipes.detection`."""

import json

import numpy as np
import torch
from PIL import Image

from hf_specattn import modeling
from hf_specattn.architectures import ARCHITECTURES
from hf_specattn.conditioning import CONDITIONED_CLASSES
from hf_specattn.modeling import OUTSIDE
from recipes.detection.detector import Detector, DetectorConfig, describe_body, detector_config, register_detector

XCIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "eta": 1.0, "cls_attn_layers": 1, "drop_path_rate": 0.0}
SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "drop_path_rate": 0.0}
BODIES = {
    "xcit_p8": ("xcit_nano_12_p8_224", XCIT),
    "xcit_p16": ("xcit_nano_12_p16_224", XCIT),
    "swin": ("swin", SWIN),
}
SIZES = {
    "fpn_channels": 16,
    "box_head_size": 16,
    "mask_layers": [16],
    "anchor_sizes": [8, 16, 32, 64, 96],
    "min_size": 64,
    "max_size": 96,
}


def tiny_detector(body="xcit_p8", classes=("circle", "square", "triangle"), seed=0):
    torch.manual_seed(seed)
    register_detector()
    return Detector(detector_config(describe_body(*BODIES[body]), classes, **SIZES))


def unregister():
    """Others walk the whole table."""
    OUTSIDE.pop("mask_rcnn", None)
    ARCHITECTURES.pop("mask_rcnn", None)
    modeling.CONDITIONED_CONFIGS.pop(DetectorConfig, None)
    modeling.CONDITIONED_MODELS.pop("mask_rcnn", None)
    CONDITIONED_CLASSES.pop(Detector, None)
    for name in ("SpecDetector", "SpecDetectorConfig"):
        vars(modeling).pop(name, None)


def square_target(*corners, size, label=1):
    """One square, as a model is given it."""
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    left, top, right, bottom = corners
    mask[0, top:bottom, left:right] = 1
    boxes = torch.tensor([corners], dtype=torch.float32)
    return {"boxes": boxes, "labels": torch.tensor([label]), "masks": mask}


def coco_content():
    """Three images of 40 x 32 pixels: two objects and a crowd, one object, none. The ids have gaps."""
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 32, "width": 40} for number in (7, 9, 30)]
    crowd = {"size": [32, 40], "counts": [0, 32, 32 * 39]}  # the first column
    annotations = [
        annotation(5, 7, 3, [4, 6, 10, 12], [[4, 6, 14, 6, 14, 18, 4, 18]]),
        annotation(6, 7, 90, [20, 8, 8, 8], [[20, 8, 28, 8, 28, 16, 20, 16]]),
        annotation(8, 7, 3, [0, 0, 1, 32], crowd, iscrowd=1),
        annotation(9, 9, 90, [2, 2, 30, 20], [[2, 2, 32, 2, 32, 22, 2, 22]]),
    ]
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotation(number, image, category, box, segmentation, iscrowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "segmentation": segmentation,
        "iscrowd": iscrowd,
    }


def write_coco(folder, content=None, splits=("train2017", "val2017")):
    """Write splits of the same images; returns the folder."""
    content = coco_content() if content is None else content
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split in splits:
        (folder / split).mkdir(exist_ok=True)
        for image in content["images"]:
            pixels = generator.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / image["file_name"])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder
