"""The embedded data: circles, squares and triangles on noise, with polygons, in COCO's format. Generated in a second.

Each image has one to four shapes of 16 to 56 pixels, of any color that stands out from the gray behind it. A shape that
hides more than a fifth of another is not drawn. Masks are of what is seen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths

from .coco_files import DetectionSplit

SIZE = 128
CLASSES = ("circle", "square", "triangle")
# As COCO's, the ids have gaps.
CATEGORY_IDS = (1, 3, 7)
LEAST, MOST = 16, 56  # of a side, in pixels
SEEDS = {"train": 1, "validation": 2}
COUNTS = {"train": 400, "validation": 100}


def shapes(part: str) -> DetectionSplit:
    """Draw the images of a part, "train" or "validation": always the same."""
    # NumPy guarantees its stream for good, which it does not of newer generators.
    generator = np.random.RandomState(SEEDS[part])
    pictures: dict[int, Image.Image] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, COUNTS[part] + 1):
        pictures[number], found = _draw(generator)
        images.append({"id": number, "file_name": f"{part}-{number}.png", "height": SIZE, "width": SIZE})
        for category, mask in found:
            run = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [float(value) for value in run_lengths.toBbox(run)],
                    "area": float(run_lengths.area(run)),
                    "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}

    def opened(image: Mapping[str, Any]) -> Image.Image:
        return pictures[image["id"]]

    return DetectionSplit(content, opened, f"shapes ({part})")


def _draw(generator: np.random.RandomState) -> tuple[Image.Image, list[tuple[int, NDArray[np.bool_]]]]:
    """One image, and the category and visible mask of each shape on it."""
    level = int(generator.randint(60, 196))
    background = np.clip(level + generator.normal(0, 12, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(background)
    found: list[tuple[int, NDArray[np.bool_]]] = []
    for _ in range(int(generator.randint(1, 5))):
        kind, side = int(generator.randint(3)), int(generator.randint(LEAST, MOST + 1))
        x, y = (int(value) for value in generator.randint(0, SIZE - side, 2))
        color = _color(generator, level)
        canvas = Image.new("1", (SIZE, SIZE))
        _shape(ImageDraw.Draw(canvas), kind, x, y, side, 1)
        mask = np.asarray(canvas)
        seen = [(category, earlier & ~mask) for category, earlier in found]
        if any(after.sum() < 0.8 * before.sum() for (_, after), (_, before) in zip(seen, found)):
            continue
        _shape(ImageDraw.Draw(picture), kind, x, y, side, color)
        found = [*seen, (CATEGORY_IDS[kind], mask)]
    return picture, found


def _color(generator: np.random.RandomState, level: int) -> tuple[int, int, int]:
    """A color with a channel at least 60 away from the gray."""
    while True:
        red, green, blue = (int(value) for value in generator.randint(0, 256, 3))
        if max(abs(value - level) for value in (red, green, blue)) >= 60:
            return red, green, blue


def _shape(draw: ImageDraw.ImageDraw, kind: int, x: int, y: int, side: int, fill: Any) -> None:
    right, bottom = x + side - 1, y + side - 1
    if kind == 0:
        draw.ellipse((x, y, right, bottom), fill=fill)
    elif kind == 1:
        draw.rectangle((x, y, right, bottom), fill=fill)
    else:
        draw.polygon([(x + side // 2, y), (right, bottom), (x, bottom)], fill=fill)
