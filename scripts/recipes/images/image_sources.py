"""Where labeled images come from: scikit-learn's digits, IDX files, folders, datasets on the Hub.

Images stay on the disk until they are needed, except for small sets that are arrays anyway.
"""

import gzip
import hashlib
import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.utils import logging

from hf_specattn import compat_extras

from ..run.command_line import flag
from ..run.hub_loading import datasets_library, warn_of_unread_files
from ..run.messages import one_line
from ..run.randomness import Purpose, random_words
from .decoding import decode

logger = logging.get_logger(__name__)

# Files in folders of classes that are taken for images; of others a warning says that they are left out.
IMAGE_ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
# What the four files of MNIST, Fashion-MNIST and their like are called, after `train-` and `t10k-`; also gzipped.
IDX_IMAGES, IDX_LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
IDX_UNSIGNED_BYTES = 8  # the third byte of the magic number; the fourth is the number of dimensions

# The digits have no published split: every fifth one, of a fixed shuffle, is for validation.
DIGITS_SPLIT_SEED = 20230713
DIGITS_VALIDATION_SHARE = 5

NAMED_AT_MOST = 10


class ImageDataError(ValueError):
    """The images cannot be used as they are; the message names which, why, and what to do."""


class Images(Protocol):
    """Something that opens images by their place."""

    def open(self, index: int) -> Image.Image:
        """Return one image, decoded or not; raises whatever its reader raises where it is damaged."""
        ...

    def name(self, index: int) -> str:
        """Return what a user knows the image by."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory: `pixels` is `(images, height, width)` or `(images, height, width, 3)`, uint8."""

    pixels: NDArray[np.uint8] = field(repr=False)
    origin: str

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"{self.origin}, image {index}"


@dataclass(frozen=True)
class FileImages:
    """Images that are one file each."""

    paths: tuple[Path, ...] = field(repr=False)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


@dataclass(frozen=True)
class HubImages:
    """The images of one split of a dataset of the `datasets` library, in a column of type Image that is not decoded."""

    rows: Any = field(repr=False)
    column: str
    origin: str

    def open(self, index: int) -> Image.Image:
        value = self.rows[index][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("there is no image: the value is null")
        return Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))

    def name(self, index: int) -> str:
        return f"{self.origin}, row {index}"


@dataclass(frozen=True)
class ImageSplit:
    """Labeled images.

    Attributes:
        images: What opens them.
        labels: The class of each, `(images,)`, int64.
        fingerprint: Tells these images and labels from others.
        rows: The place of each in `images`, `(images,)`, int64; None: all of them in order.
    """

    images: Images
    labels: NDArray[np.int64] = field(repr=False)
    fingerprint: str
    rows: NDArray[np.int64] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return one image, decoded or not; raises whatever its reader raises where it is damaged."""
        return self.images.open(self._place(index))

    def name(self, index: int) -> str:
        """Return what a user knows the image by."""
        return self.images.name(self._place(index))

    def load(self, index: int, mode: str) -> Image.Image:
        """Return one image as `decode` does, in PIL's mode "L" (gray) or "RGB".

        Raises:
            ImageDataError: naming the image, where it cannot be read.
        """
        try:
            with self.open(index) as image:
                return decode(image, mode)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise ImageDataError(
                f"{self.name(index)} cannot be read ({one_line(error)}). Replace or remove it, then start the run "
                "again, or leave such images out with --skip_unreadable_images."
            ) from error

    def take(self, indices: NDArray[np.int64]) -> "ImageSplit":
        """Return some of them, in that order."""
        digest = hashlib.sha256(self.fingerprint.encode() + np.ascontiguousarray(indices, "<i8").tobytes())
        rows = indices if self.rows is None else self.rows[indices]
        return ImageSplit(self.images, self.labels[indices], digest.hexdigest()[:16], rows)

    def _place(self, index: int) -> int:
        return int(index if self.rows is None else self.rows[index])


@dataclass(frozen=True)
class ImageData:
    """What a run trains on and is measured on.

    Attributes:
        train, validation: The two splits.
        class_names: The name of each class, by its number.
        size: Height and width where all images have the same, which needs no resizing; None for files of any size.
        channels: 1 for gray images, 3 for color.
        origin: Where the data come from, in words.
        skipped: The unreadable images that were left out, by name.
    """

    train: ImageSplit
    validation: ImageSplit
    class_names: tuple[str, ...]
    size: tuple[int, int] | None
    channels: int
    origin: str
    skipped: tuple[str, ...] = ()


@dataclass
class ImageDataSettings:
    """Which images, by flags; one of `idx_dir`, `train_dir` and `dataset_name`, or none for scikit-learn's digits."""

    idx_dir: str | None = flag(None, "Folder with the four IDX files of MNIST, Fashion-MNIST, ..., plain or .gz.")
    train_dir: str | None = flag(
        None, "Folder with one folder of images per class. Without any of the three: the digits."
    )
    validation_dir: str | None = flag(None, "The same, to validate on.")
    dataset_name: str | None = flag(None, "Dataset on the Hub with a column of images and one of class labels.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of the dataset.")
    train_split: str = flag("train", "Split of the dataset to train on.")
    validation_split: str = flag("validation", "Split of the dataset to validate on.")
    image_column: str = flag("image", "Column of the dataset with the images.")
    label_column: str = flag("label", "Column of the dataset with the labels.")
    max_train_samples: int | None = flag(
        None, "Number of images to train on, the first of each class in turn. None: all."
    )
    max_validation_samples: int | None = flag(None, "The same, to validate on.")
    held_out_share: float | None = flag(
        None,
        "Validate on this share of the training images, which are then not trained on, instead of the validation "
        "images: for choosing settings. None: the validation images.",
    )
    check_images: str = flag(
        "decode",
        "Before training, read every image file (decode), or only its header (header).",
        ["decode", "header"],
    )
    skip_unreadable_images: bool = flag(
        False, "Leave unreadable images out, with a warning, instead of ending the run."
    )


def read_digits() -> ImageData:
    """Read the 1,797 handwritten digits, 8 x 8 with 17 gray levels, that ship with scikit-learn (UCI, E. Alpaydin).

    Raises:
        ImageDataError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImageDataError(
            "The default data are scikit-learn's digits, and it is not installed: pip install 'hf_specattn[train]', "
            "or name your own data with --idx_dir, --train_dir or --dataset_name."
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    shuffled = np.argsort(random_words(DIGITS_SPLIT_SEED, 0, Purpose.DATA_SPLIT, 0, len(labels)), kind="stable")
    held_out, whole = shuffled[::DIGITS_VALIDATION_SHARE], _array_split(pixels, labels, "digits")
    train, validation = (whole.take(np.sort(rows)) for rows in (np.setdiff1d(shuffled, held_out), held_out))
    names = tuple(str(name) for name in digits.target_names)
    return ImageData(train, validation, names, (8, 8), 1, "the digits of scikit-learn")


def read_idx_folder(folder: str | Path) -> ImageData:
    """Read the four IDX files of MNIST's format: `train-` and `t10k-` `images-idx3-ubyte` and `labels-idx1-ubyte`.

    Raises:
        ImageDataError: if one is missing or damaged, the counts of images and labels differ, or the splits' sizes do.
    """
    folder = Path(folder)
    splits = []
    for prefix in ("train-", "t10k-"):
        pixels = read_idx(_idx_file(folder, prefix + IDX_IMAGES), dimensions=3)
        labels = read_idx(_idx_file(folder, prefix + IDX_LABELS), dimensions=1)
        if len(pixels) != len(labels):
            raise ImageDataError(
                f"{folder}: {prefix}{IDX_IMAGES} has {len(pixels):,} images and {prefix}{IDX_LABELS} {len(labels):,} "
                "labels; they do not belong to one data set. Get both again."
            )
        if not len(pixels):
            raise ImageDataError(f"{folder}: {prefix}{IDX_IMAGES} has no image; get it again.")
        splits.append((pixels, labels.astype(np.int64), prefix.rstrip("-")))
    (train_pixels, *_), (validation_pixels, *_) = splits
    if train_pixels.shape[1:] != validation_pixels.shape[1:]:
        raise ImageDataError(
            f"{folder}: the training images are {_by(train_pixels.shape[1:])} pixels and those for validation "
            f"{_by(validation_pixels.shape[1:])}; both must have one size."
        )
    classes = int(max(labels.max() for _, labels, _ in splits)) + 1
    train, validation = (_array_split(pixels, labels, f"{folder.name}/{part}") for pixels, labels, part in splits)
    height, width = train_pixels.shape[1:]
    return ImageData(
        train, validation, tuple(map(str, range(classes))), (height, width), 1, f"the IDX files in {folder}"
    )


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, plain or gzipped: two zero bytes, type, dimensions, their sizes, the data.

    Raises:
        ImageDataError: for anything else.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ImageDataError(f"{file} cannot be read ({one_line(error)}); get it again.") from error
    header = 4 + 4 * dimensions
    expected = bytes([0, 0, IDX_UNSIGNED_BYTES, dimensions])
    if len(content) < header or content[:4] != expected:
        raise ImageDataError(
            f"{file} begins with {content[:4].hex(' ')} instead of {expected.hex(' ')}: not an IDX file of unsigned bytes in "
            f"{dimensions} dimension(s). Give the files of MNIST's format."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    values = np.frombuffer(content, np.uint8, offset=header)
    if values.size != int(np.prod(shape)):
        raise ImageDataError(
            f"{file} announces {_by(shape)} bytes and has {values.size:,}: it is truncated or damaged. Get it again."
        )
    return values.reshape(shape)


def read_image_folders(train_dir: str | Path, validation_dir: str | Path) -> ImageData:
    """Find the images of two folders that hold one folder per class, named like it; subfolders belong to their class.

    Raises:
        ImageDataError: if a folder is missing, has no class, or a class has no image.
    """
    found = [_classes_in(Path(folder)) for folder in (train_dir, validation_dir)]
    names = tuple(sorted({name for classes in found for name in classes}))
    splits: list[ImageSplit] = []
    for folder, classes in zip((train_dir, validation_dir), found):
        pairs = [(path, names.index(name)) for name in sorted(classes) for path in classes[name]]
        digest = hashlib.sha256()
        for path, label in pairs:
            size = path.stat().st_size if path.exists() else 0  # a link that leads nowhere is found unreadable later
            line = f"{path.relative_to(folder).as_posix()}\0{size}\0{names[label]}\n"
            digest.update(line.encode(errors="surrogateescape"))  # a name need not be UTF-8
        labels = np.array([label for _, label in pairs], dtype=np.int64)
        splits.append(ImageSplit(FileImages(tuple(path for path, _ in pairs)), labels, digest.hexdigest()[:16]))
    train, validation = splits
    return ImageData(train, validation, names, None, 3, f"the images in {train_dir}, validated on {validation_dir}")


def read_hub_dataset(settings: ImageDataSettings) -> ImageData:
    """Load two splits of a dataset with a column of images and one of class labels.

    Raises:
        ImageDataError: if `datasets` is missing, or the dataset, a split, or a column is, or has another type.
    """
    name = settings.dataset_name
    what = f"The dataset {name!r} (configuration {settings.dataset_config_name!r})"
    instead = "give folders of images with --train_dir and --validation_dir"
    with datasets_library(what, ImageDataError, "--dataset_name, --dataset_config_name", instead) as datasets:
        builder = datasets.load_dataset_builder(
            str(name), settings.dataset_config_name, revision=settings.dataset_revision
        )
        warn_of_unread_files(str(name), builder)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    splits: list[ImageSplit] = []
    classes: tuple[str, ...] | None = None
    for option, split in (("train_split", settings.train_split), ("validation_split", settings.validation_split)):
        if split not in loaded:
            raise ImageDataError(
                f"--{option} {split}: the dataset {name!r} has the splits {', '.join(loaded)}; name one of them."
            )
        rows = loaded[split]
        _check_columns(rows, settings, datasets)
        classes = classes or tuple(rows.features[settings.label_column].names)
        values = rows[settings.label_column][:]
        if without := [row for row, label in enumerate(values) if label is None or not 0 <= label < len(classes)]:
            raise ImageDataError(
                f"--{option} {split} of {name!r} has {len(without):,} images without a label, in the rows "
                f"{some_of(without)}; name a split that has labels, or leave those rows out of it."
            )
        labels = np.asarray(values, dtype=np.int64)
        images = rows.cast_column(settings.image_column, datasets.Image(decode=False))
        images = images.select_columns([settings.image_column])
        splits.append(
            ImageSplit(
                HubImages(images, settings.image_column, f"{name}, {split}"), labels, compat_extras.fingerprint(rows)
            )
        )
    assert classes is not None
    train, validation = splits
    return ImageData(train, validation, classes, None, 3, f"the dataset {name}")


def _check_columns(rows: Any, settings: ImageDataSettings, datasets: Any) -> None:
    for option, kind in (("image_column", datasets.Image), ("label_column", datasets.ClassLabel)):
        column = getattr(settings, option)
        if not isinstance(rows.features.get(column), kind):
            described = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
            raise ImageDataError(
                f"--{option} {column}: it must name a column of type {kind.__name__}; {settings.dataset_name!r} has "
                f"{described}."
            )


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ImageDataError(f"{folder} is not a folder; name one that holds a folder of images for each class.")
    names = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    if not names:
        raise ImageDataError(
            f"{folder} holds no folder; put the images of each class into a folder of its name there."
        )
    classes: dict[str, list[Path]] = {name: [] for name in names}
    others: Counter[str] = Counter()
    for path in _files_below(folder):
        kind = path.suffix.lower()
        if path.parent != folder and kind in IMAGE_ENDINGS:
            classes[path.relative_to(folder).parts[0]].append(path)
        else:
            others["in no class's folder" if path.parent == folder else kind or "without an ending"] += 1
    if empty := [name for name, paths in classes.items() if not paths]:
        raise ImageDataError(
            f"{folder}: no image in the folder(s) {some_of(empty)} (endings looked for: {', '.join(IMAGE_ENDINGS)}). Add "
            "images, or remove the class from both splits."
        )
    if others:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
        logger.warning(
            f"{folder}: {others.total():,} files are left out ({counts}). Images are files in the classes' folders that end "
            f"in {', '.join(IMAGE_ENDINGS)}."
        )
    return classes


def _files_below(folder: Path) -> list[Path]:
    """Every file below a folder, through links to folders too, but for what is hidden; a link that leads nowhere is one."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that it lies in, or that was read already
            raise ImageDataError(
                f"{place} leads to a folder whose images are already read by another path. Remove the link."
            )
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _idx_file(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise ImageDataError(
        f"{folder} has neither {name} nor {name}.gz; it must hold the four IDX files of the data set."
    )


def _array_split(pixels: NDArray[np.uint8], labels: NDArray[np.int64], origin: str) -> ImageSplit:
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes() + labels.astype("<i8").tobytes())
    return ImageSplit(ArrayImages(pixels, origin), labels, digest.hexdigest()[:16])


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def some_of(names: Sequence[Any], separator: str = ", ") -> str:
    more = len(names) - NAMED_AT_MOST
    listed = [*map(str, names[:NAMED_AT_MOST]), *([f"... and {more:,} more"] if more > 0 else [])]
    return separator.join(listed)
