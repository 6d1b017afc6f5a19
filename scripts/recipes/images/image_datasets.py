"""The images of a run: found, looked at, limited; the two splits have the same classes, and every image can be read."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers.utils import logging

from ..run.messages import one_line
from .decoding import REMARKS, decode, remarks
from .image_sources import (
    ImageData,
    ImageDataError,
    ImageDataSettings,
    ImageSplit,
    read_digits,
    read_hub_dataset,
    read_idx_folder,
    read_image_folders,
    some_of,
)

logger = logging.get_logger(__name__)

CHECKING_THREADS = 16


def load_image_data(
    settings: ImageDataSettings, show_progress: bool = False, once: Callable[[Callable[[], Any]], Any] | None = None
) -> ImageData:
    """Find the images, refuse what cannot be trained on, and leave unreadable ones out where that is asked for.

    `once` calls a function on one of several processes and returns its result on all; None calls it.

    Raises:
        ImageDataError: as in `find_images`, and for unreadable images, all of which are counted.
    """
    data = find_images(settings)
    if data.size is not None:
        return data
    splits, skipped = [], []
    for split, part in ((data.train, "training"), (data.validation, "validation")):

        def check(split: ImageSplit = split) -> tuple[dict[int, str], dict[str, list[int]]]:
            return look_at_images(split, settings.check_images, show_progress)

        problems, found = check() if once is None else once(check)
        for words, which in found.items():
            first = split.name(which[0])
            logger.warning(f"{len(which):,} of the {len(split):,} {part} images {words}. The first is {first}.")
        splits.append(_without_unreadable(split, part, problems, settings.skip_unreadable_images))
        skipped += [split.name(index) for index in problems]
    checked = replace(data, train=splits[0], validation=splits[1], skipped=tuple(skipped))
    _refuse_missing_classes(checked)
    return checked


def find_images(settings: ImageDataSettings) -> ImageData:
    """Find the images of both splits and cut them to the size asked for; files are listed, not read.

    Raises:
        ImageDataError: for files that are missing or damaged, a class that one split has and the other has not, and a
            limit that leaves a class without images.
    """
    if settings.idx_dir is not None:
        data = read_idx_folder(settings.idx_dir)
    elif settings.train_dir is not None:
        assert settings.validation_dir is not None
        data = read_image_folders(settings.train_dir, settings.validation_dir)
    elif settings.dataset_name is not None:
        data = read_hub_dataset(settings)
    else:
        data = read_digits()
    _refuse_missing_classes(data)
    classes = len(data.class_names)
    data = hold_out(data, settings.held_out_share)
    train = limit_samples(data.train, settings.max_train_samples, "--max_train_samples", classes)
    validation = limit_samples(data.validation, settings.max_validation_samples, "--max_validation_samples", classes)
    return replace(data, train=train, validation=validation)


def hold_out(data: ImageData, share: float | None) -> ImageData:
    """Put a share of the training images, the same in every run, in the place of the validation images."""
    if share is None:
        return data
    shuffled = np.random.default_rng(0).permutation(len(data.train))
    held = round(share * len(shuffled))
    train, validation = (data.train.take(np.sort(part)) for part in (shuffled[held:], shuffled[:held]))
    held_out = replace(data, train=train, validation=validation)
    _refuse_missing_classes(held_out)
    return held_out


# --- checks ----------------------------------------------------------------------------------------------------------


def limit_samples(split: ImageSplit, limit: int | None, flag: str, classes: int) -> ImageSplit:
    """Keep `limit` images, equally many of each class as far as there are: the first of each class in turn.

    Raises:
        ImageDataError: for fewer images than classes.
    """
    if limit is None or limit >= len(split):
        return split
    if limit < classes:
        raise ImageDataError(f"{flag} {limit} leaves some of the {classes} classes without an image; take more.")
    rounds = np.empty(len(split), dtype=np.int64)  # the how-manieth of its class each image is
    for label in range(classes):
        rows = np.flatnonzero(split.labels == label)
        rounds[rows] = np.arange(len(rows))
    chosen = np.lexsort((split.labels, rounds))[:limit]
    return split.take(np.sort(chosen))


def _refuse_missing_classes(data: ImageData) -> None:
    if len(data.class_names) < 2:
        raise ImageDataError(
            f"There is one class, {', '.join(data.class_names)}, in {data.origin}: every answer would be right. Add "
            "images of another."
        )
    for split, part in ((data.train, "training"), (data.validation, "validation")):
        present = np.bincount(split.labels, minlength=len(data.class_names)) > 0
        missing = [name for name, there in zip(data.class_names, present) if not there]
        if missing:
            raise ImageDataError(
                f"The {part} images of {data.origin} have none of the class(es) {some_of(missing)}, {len(missing)} of "
                f"{len(data.class_names)}, which the other split has. Add images of them, or take the classes out of both."
            )


def _without_unreadable(split: ImageSplit, part: str, problems: Mapping[int, str], skip: bool) -> ImageSplit:
    if not problems:
        return split
    listed = some_of([f"{split.name(index)} ({why})" for index, why in problems.items()], separator="\n  ")
    count = f"{len(problems):,} of the {len(split):,} {part} images cannot be read:\n  {listed}"
    if not skip:
        raise ImageDataError(
            f"{count}\nReplace or remove them, or leave them out with --skip_unreadable_images; nothing was trained."
        )
    logger.warning(f"{count}\nThey are left out (--skip_unreadable_images).")
    return split.take(np.setdiff1d(np.arange(len(split)), list(problems)))


def look_at_images(
    split: ImageSplit, how: str, show_progress: bool = False
) -> tuple[dict[int, str], dict[str, list[int]]]:
    """Return which images cannot be read, and why; and which are read with something taken from them, in words.

    Several threads read them: decoders leave Python's lock. "decode" decodes each image, JPEG at an eighth of its size, which
    is where its time goes; "header" only opens it.
    """

    def look(index: int) -> str | list[str]:
        try:
            with split.open(index) as image:
                found = remarks(image)
                if how == "decode":
                    image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
                    decode(image, "RGB")
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            return one_line(error)
        return found

    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        looks = pool.map(look, range(len(split)))
        bar = tqdm(looks, total=len(split), desc="Checking images", unit="image", disable=not show_progress)
        found = list(bar)
    problems = {index: why for index, why in enumerate(found) if isinstance(why, str)}
    altered = {words: [index for index, words_of in enumerate(found) if words in words_of] for words in REMARKS}
    return problems, {words: which for words, which in altered.items() if which}
