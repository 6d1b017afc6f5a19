"""What a detector finds, drawn on the images: boxes, masks, classes, scores."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from hf_specattn.figures import COLORS
from hf_specattn.files import write_bytes

from .coco_evaluation import MASK_THRESHOLD
from .coco_files import DetectionSplit
from .detection_batches import as_input
from .detector import Detector

LEAST_SCORE = 0.5
LEAST_SIDE = 384  # pixels: smaller images are enlarged, so that the words can be read


@torch.no_grad()
def draw_detections(model: Detector, split: DetectionSplit, count: int, folder: Path) -> int:
    """Write `<place>.png` for each of the first images, with what is found on it; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    images = range(min(count, len(split)))
    for number in images:
        pixels, _ = split.load(number)
        (found,) = model([as_input(pixels)]).detections or []
        picture = draw(pixels, {name: value.cpu() for name, value in found.items()}, split.class_names)
        write_bytes(folder / f"{number:04d}.png", bytes(encode_png(picture).numpy()))
    model.train(training)
    return len(images)


def draw(pixels: Tensor, found: dict[str, Tensor], class_names: list[str]) -> Tensor:
    """Return the image (3, height, width), enlarged by a whole factor where it is small, with all objects of enough score."""
    factor = max(1, -(-LEAST_SIDE // min(pixels.shape[-2:])))
    size = [side * factor for side in pixels.shape[-2:]]
    picture = F.resize(pixels, size, interpolation=F.InterpolationMode.NEAREST)
    kept = torch.where(found["scores"] >= LEAST_SCORE)[0].flip(0)  # the surest last, over the others
    if not len(kept):
        return picture
    masks = F.resize(found["masks"][kept, 0], size) > MASK_THRESHOLD
    colors = [COLORS[int(label) % len(COLORS)] for label in found["labels"][kept]]
    labels = zip(found["labels"][kept].tolist(), found["scores"][kept].tolist())
    words = [f"{class_names[label - 1]} {score:.2f}" for label, score in labels]
    picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colors)
    boxes = found["boxes"][kept] * factor
    font = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return draw_bounding_boxes(
        picture, boxes, words, colors, width=2, font=font, font_size=13, label_colors="white", fill_labels=True
    )
