"""Images with boxes and masks in COCO's format, and everything that is checked before they are used.

https://cocodataset.org/#format-data: `images`, `annotations` (polygons, or run lengths for crowds) and `categories`, whose
ids have gaps. Classes are numbered from 1 here, in the order of the ids; 0 is the background.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ..run.messages import one_line

CHECKING_THREADS = 8
NAMED_AT_MOST = 5
OPTIONAL_NUMBERS = {"iscrowd": 1, "area": 1e10}  # of an annotation, and what COCO's evaluation takes at most
SLACK = 1.0  # pixels by which published polygons and boxes may lie outside their image

Example = tuple[Tensor, dict[str, Tensor]]


class DetectionDataError(ValueError):
    """The images or annotations cannot be used; the message says which, and what to do."""


@dataclass(frozen=True)
class DetectionSplit:
    """Images and what is on them.

    Attributes:
        content: As in the JSON: `images`, `annotations`, `categories`.
        open: From an entry of `images` to its pixels.
        origin: Where it is from.
        degenerate: Ids of annotations whose box has no width or height; training leaves them out.
    """

    content: Mapping[str, list[dict[str, Any]]]
    open: Callable[[Mapping[str, Any]], Image.Image] = field(repr=False)
    origin: str
    degenerate: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.content["images"])

    @cached_property
    def category_ids(self) -> list[int]:
        """COCO's id of each class: that of class 1 comes first."""
        return sorted(category["id"] for category in self.content["categories"])

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, that of class 1 first."""
        names = {category["id"]: str(category["name"]) for category in self.content["categories"]}
        return [names[number] for number in self.category_ids]

    @cached_property
    def annotations(self) -> dict[int, list[dict[str, Any]]]:
        """What is learned of each image, by its id: no crowds, nothing degenerate."""
        found, without = defaultdict(list), set(self.degenerate)
        for annotation in self.content["annotations"]:
            if not annotation.get("iscrowd") and annotation["id"] not in without:
                found[annotation["image_id"]].append(annotation)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the annotations and the images' names."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def load(self, index: int) -> Example:
        """Return an image (3, h, w), uint8, and `boxes` (objects, 4), `labels` (objects,), `masks` (objects, h, w)."""
        image = self.content["images"][index]
        pixels = pil_to_tensor(self.open(image).convert("RGB"))
        found = self.annotations.get(image["id"], [])
        number = {category: label for label, category in enumerate(self.category_ids, start=1)}
        size = image["height"], image["width"]
        masks = [mask_of(annotation["segmentation"], *size) for annotation in found]
        boxes = torch.tensor([annotation["bbox"] for annotation in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # COCO's are x, y, width, height
        return pixels, {
            "boxes": boxes,
            "labels": torch.tensor([number[annotation["category_id"]] for annotation in found], dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.uint8),
        }

    def take(self, count: int | None) -> "DetectionSplit":
        """The first `count` images."""
        if count is None or count >= len(self):
            return self
        images = self.content["images"][:count]
        kept = {image["id"] for image in images}
        annotations = [each for each in self.content["annotations"] if each["image_id"] in kept]
        return DetectionSplit(
            {**self.content, "images": images, "annotations": annotations}, self.open, self.origin, self.degenerate
        )


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask (height, width) of polygons, or of run lengths, compressed or not."""
    return run_lengths.decode(encoded(segmentation, height, width))


def encoded(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return the compressed run lengths of polygons, or of run lengths."""
    if isinstance(segmentation, list):
        return run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return run_lengths.frPyObjects(segmentation, height, width)
    return segmentation


# --- files -----------------------------------------------------------------------------------------------------------


def read_coco(annotation_file: str | Path, image_dir: str | Path) -> DetectionSplit:
    """Read and check a file of annotations; its images lie in a folder, and are not looked at.

    Raises:
        DetectionDataError: for what cannot be used, naming it.
    """
    file, folder = Path(annotation_file), Path(image_dir)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except (OSError, ValueError, RecursionError) as error:
        raise DetectionDataError(f"{file} cannot be read as COCO's JSON of annotations: {one_line(error)}") from error
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise DetectionDataError(
                f"{file} has no {part}; it must be a file such as COCO's instances_train2017.json."
            )
    content = {part: content[part] for part in ("images", "annotations", "categories")}
    degenerate = _check_annotations(content, file)
    return DetectionSplit(content, lambda image: _open(folder / image["file_name"]), str(file), tuple(degenerate))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        # COCO's annotations are of the pixels as they are stored, whatever a camera noted.
        image.load()
        return image


def _check_annotations(content: Mapping[str, list[dict[str, Any]]], file: Path) -> list[int]:
    """Refuse annotations that cannot be; return the ids of those whose box has no width or height."""
    sizes: dict[int, tuple[int, int]] = {}
    categories: dict[int, str] = {}
    boxes: dict[int, list[float]] = {}

    def check(part: str, entry: Mapping[str, Any]) -> None:
        parts: dict[str, dict[int, Any]] = {"images": sizes, "categories": categories, "annotations": boxes}
        known = parts[part]
        if entry["id"] in known:
            raise DetectionDataError(f"{file}: two of the {part} have the id {entry['id']}; ids must differ.")
        if part == "images":
            Path(entry["file_name"])
            known[entry["id"]] = int(entry["height"]), int(entry["width"])
        elif part == "categories":
            known[entry["id"]] = str(entry["name"])
            sorted(known)  # the order of the classes
        else:
            known[entry["id"]] = _checked_box(entry, sizes, categories, f"{file}: annotation {entry['id']}")

    for part in ("images", "categories", "annotations"):
        for place, entry in enumerate(content[part]):
            try:
                check(part, entry)
            except DetectionDataError:
                raise
            except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise DetectionDataError(
                    f"{file}: entry {place} of its {part} is not as in COCO's format ({one_line(error)})."
                ) from error
    return [number for number, box in boxes.items() if 0 in box[2:]]


def _checked_box(
    annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]], categories: Mapping[int, str], name: str
) -> list[float]:
    if annotation["category_id"] not in categories:
        raise DetectionDataError(
            f"{name} is of the category {annotation['category_id']}, which is not among the {len(categories)} of the file; "
            "add it there, or take the annotation out."
        )
    if annotation["image_id"] not in sizes:
        raise DetectionDataError(f"{name} is of the image {annotation['image_id']}, which the file does not list.")
    for key, highest in OPTIONAL_NUMBERS.items():
        if not (isinstance(value := annotation.get(key, 0), (int, float)) and 0 <= value <= highest):
            raise DetectionDataError(
                f"{name} has {key} {value!r}; it must be a number from 0 to {highest:g}, or left out."
            )
    height, width = sizes[annotation["image_id"]]
    box = annotation["bbox"]
    if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box) or not math.isfinite(sum(box)):
        raise DetectionDataError(f"{name} has the box {box}; it must be x, y, width, height, as numbers.")
    if min(box[2:]) < 0:
        raise DetectionDataError(f"{name} has the box {box}, with a negative width or height. Correct the annotation.")
    _check_inside(f"{name}, whose box", [box[0], box[0] + box[2]], [box[1], box[1] + box[3]], height, width)
    _check_segmentation(f"{name}, whose mask", annotation["segmentation"], height, width)
    return box


def _check_segmentation(name: str, segmentation: Any, height: int, width: int) -> None:
    if isinstance(segmentation, list):
        if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            raise DetectionDataError(f"{name} is not a list of polygons of three or more points each.")
        for polygon in segmentation:
            _check_inside(name, polygon[0::2], polygon[1::2], height, width)
        return
    if list(segmentation["size"]) != [height, width]:
        raise DetectionDataError(
            f"{name} is of {segmentation['size']} pixels, and not of its image's [{height}, {width}]."
        )
    counts = segmentation["counts"]
    counts = counts if isinstance(counts, list) else counts_of(counts)
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise DetectionDataError(
            f"{name} has run lengths that cover {sum(counts):,} pixels, and its image has {height * width:,}."
        )


def counts_of(text: str) -> list[int]:
    """Return the run lengths in COCO's compressed text, which its own code decodes without looking whether they fit.

    Five bits a character, the lowest first; the sixth says that more follow, and the fifth of the last is the sign. From the
    third run on the difference to the last but one is written.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits & 0x10) << (shift - 4) if bits & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def _check_inside(name: str, xs: Sequence[float], ys: Sequence[float], height: int, width: int) -> None:
    if not math.isfinite(sum(xs) + sum(ys)):
        raise DetectionDataError(f"{name} has corners that are not numbers. Correct the annotation.")
    if min(*xs, *ys) < -SLACK or max(xs) > width + SLACK or max(ys) > height + SLACK:
        raise DetectionDataError(
            f"{name} reaches from ({min(xs):g}, {min(ys):g}) to ({max(xs):g}, {max(ys):g}), outside its image of "
            f"{width} x {height} pixels. Mend the annotation, or the image's width and height."
        )


def check_images(split: DetectionSplit, image_dir: str | Path, how: str) -> None:
    """Refuse images that are missing, cannot be read, or have another size than the annotations say.

    Args:
        how: "decode" reads every image; "header" only its beginning, with the size.

    Raises:
        DetectionDataError: naming the first of them.
    """
    folder = Path(image_dir)

    def problem(image: Mapping[str, Any]) -> str | None:
        path = folder / image["file_name"]
        try:
            with Image.open(path) as found:
                if found.size != (image["width"], image["height"]):
                    return f"{path}: {found.size} pixels wide and high, not {(image['width'], image['height'])}"
                if found.mode.startswith(("I", "F")):
                    return f"{path}: more than 8 bits per channel; convert it to 8"
                if how == "decode":
                    found.draft("RGB", (max(found.width // 8, 1), max(found.height // 8, 1)))
                    found.load()
        except FileNotFoundError:
            return f"{path}: no such file"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{path}: {one_line(error)}"
        return None

    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        problems = [why for why in pool.map(problem, split.content["images"]) if why is not None]
    if problems:
        listed = "\n  ".join([*problems[:NAMED_AT_MOST], *(["..."] if len(problems) > NAMED_AT_MOST else [])])
        raise DetectionDataError(
            f"{len(problems):,} of the {len(split):,} images of {split.origin} cannot be used:\n  {listed}\nGet them, or "
            "take them out of the file; nothing was trained."
        )
