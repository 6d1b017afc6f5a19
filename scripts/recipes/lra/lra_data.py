"""The data of an LRA task as a run reads them: examples in a memory-mapped cache, three splits, and what guessing gives.

<cache folder>/lra-<task>-<key>/         <part>.ids.bin, <part>.npz; manifest.json comes last
<cache folder>/listops-<key>/            expressions that were made, as LRA's files
<cache folder>/pathfinder-seed-<seed>/   images that were made, in LRA's layout
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray

from hf_specattn.files import checksum, replace_folder, temporary_name, write_bytes, write_json

from ..run.randomness import Purpose, random_words
from .listops import guesses, make_trees
from .lra_sources import CLASSES, PARTS, Example, LraDataError, Source, find_source
from .pathfinder import write_images

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the cache's files change: older ones are then made again
MANIFEST_FILE = "manifest.json"
# Training, validation and test examples of the published size, of the tasks whose data can be made.
GENERATED = {"listops": (96_000, 2_000, 2_000), "pathfinder": (160_000, 20_000, 20_000)}
PROTOCOLS = ("lra", "clean")
# Of the training part, where the data have no validation part.
HELD_OUT = 0.1


@dataclass(frozen=True)
class LraDataSettings:
    """What decides the data.

    Attributes:
        task: A key of `CLASSES`.
        data_dir: Folder with the data; None makes them, which ListOps and Pathfinder allow.
        protocol: "lra": as published; Text is then validated on its test part. "clean": on a tenth of the training part.
        max_length: Longer sequences are cut; expressions that are made are shorter.
        listops_min_length: Expressions that are made are longer.
        train_samples, validation_samples, test_samples: So many of each split, drawn at random; None: all, or as many as
            were published of data that are made.
        data_seed: Decides what is made, held out and drawn.
        cache_dir: Folder of the caches; None: `hf_specattn` in the home of the Hugging Face libraries.
        preprocessing_num_workers: Processes that make data.
    """

    task: str
    data_dir: str | None = None
    protocol: str = "lra"
    max_length: int = 2000
    listops_min_length: int = 500
    train_samples: int | None = None
    validation_samples: int | None = None
    test_samples: int | None = None
    data_seed: int = 0
    cache_dir: str | None = None
    preprocessing_num_workers: int = 1

    @property
    def caches(self) -> Path:
        """The folder of the caches."""
        return Path(HF_HOME) / "hf_specattn" if self.cache_dir is None else Path(self.cache_dir)

    @property
    def counts(self) -> dict[str, int | None]:
        """Split -> how many examples; None: all."""
        asked = (self.train_samples, self.validation_samples, self.test_samples)
        published = (None,) * 3 if self.data_dir is not None else GENERATED[self.task]
        return {part: given or usual for part, given, usual in zip(PARTS, asked, published)}


class Part:
    """Examples in files, all of one part of the data: `labels` (examples,) and ids, cut at the greatest length."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        with np.load(folder / f"{name}.npz") as arrays:
            self.labels, self.bounds = arrays["labels"], arrays["bounds"]  # bounds: (examples, sequences + 1)

    @cached_property
    def ids(self) -> NDArray[np.uint16]:
        """The ids of all examples, end to end."""
        return np.memmap(self.folder / f"{self.name}.ids.bin", dtype=np.uint16, mode="r")

    def sequences(self, example: int) -> Iterator[NDArray[np.uint16]]:
        """The one or two sequences of an example."""
        bounds = self.bounds[example].tolist()
        return (self.ids[begin:end] for begin, end in pairwise(bounds))


@dataclass(frozen=True, eq=False)
class Split:
    """Some examples of a part: `rows` (examples,)."""

    part: Part
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(examples,)."""
        return self.part.labels[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids and labels."""
        digest = hashlib.sha256()
        for row in self.rows.tolist():
            for ids in self.part.sequences(row):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def firsts(self) -> Iterator[NDArray[np.uint16]]:
        """The sequence of each example, of a pair the first."""
        return (next(self.part.sequences(row)) for row in self.rows.tolist())

    def batch(self, indices: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids padded to a length, (rows, length), or (rows, 2, length) of pairs; and labels (rows,)."""
        rows = self.rows[indices]
        sequences = self.part.bounds.shape[1] - 1
        padded = np.zeros((len(rows), sequences, length), dtype=np.int64)
        for place, row in enumerate(rows.tolist()):
            for number, ids in enumerate(self.part.sequences(row)):
                padded[place, number, : len(ids)] = ids
        return padded[:, 0] if sequences == 1 else padded, self.part.labels[rows]


@dataclass(frozen=True)
class LraData:
    """Attributes: the splits, `origin` in words, and `classes`, their number."""

    train: Split
    validation: Split
    test: Split
    origin: str
    classes: int

    def baselines(self) -> dict[str, float]:
        """Test accuracy of what needs no model: the most frequent class, and for ListOps the guesses that do not nest."""
        majority = np.bincount(self.train.labels, minlength=self.classes).argmax()
        found = {"majority": float((self.test.labels == majority).mean())}
        if self.origin.startswith("ListOps"):
            found |= guesses(self.train.firsts(), self.train.labels, self.test.firsts(), self.test.labels)
        return found


def load_lra_data(settings: LraDataSettings) -> LraData:
    """Find or make the data, and cache their ids.

    Raises:
        LraDataError: where they cannot be used as they are.
    """
    task = settings.task
    source = find_source(task, _made(settings) if settings.data_dir is None else Path(settings.data_dir))
    form = f"made from seed {settings.data_seed}" if settings.data_dir is None else source.form
    parts = _cached(source, settings)
    splits = _splits(task, parts, settings)
    origin = f"{task.capitalize().replace('ops', 'Ops')} ({form}, protocol {settings.protocol})"
    return LraData(splits["train"], splits["validation"], splits["test"], origin, CLASSES[task])


# --- splits ----------------------------------------------------------------------------------------------------------


def _splits(task: str, parts: dict[str, Part], settings: LraDataSettings) -> dict[str, Split]:
    rows = {name: (part, np.arange(len(part.labels))) for name, part in parts.items()}
    if "all" in rows:
        part, every = rows["all"]
        counts = settings.counts
        if settings.data_dir is None:
            bounds = np.cumsum([counts[name] for name in PARTS])[:-1]
        else:  # LRA reads the first 80 % of Pathfinder, the next 10 %, the last 10 %
            bounds = len(every) * np.array([8, 9]) // 10
        rows = {name: (part, some) for name, some in zip(PARTS, np.split(every, bounds))}
    if "validation" not in rows:
        part, every = rows["train"]
        if task == "text" and settings.protocol == "lra":
            rows["validation"] = rows["test"]
        else:
            held_out = round(HELD_OUT * len(every))
            # LRA reads the last tenth of CIFAR-10; files of text are sorted by label.
            order = every if task == "image" else _shuffled(every, settings.data_seed)
            rows["train"], rows["validation"] = (part, order[:-held_out]), (part, order[-held_out:])
    return {name: _drawn(name, *rows[name], settings) for name in PARTS}


def _drawn(name: str, part: Part, rows: NDArray[np.int64], settings: LraDataSettings) -> Split:
    count = settings.counts[name]
    if len(rows) < (1 if count is None else count):
        raise LraDataError(
            f"--{name}_samples {count}: the data of {settings.task} have {len(rows):,} there; ask for fewer."
        )
    return Split(part, rows if count in (None, len(rows)) else np.sort(_shuffled(rows, settings.data_seed)[:count]))


def _shuffled(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    return rows[np.argsort(random_words(seed, 0, Purpose.DATA_SPLIT, 0, len(rows)), kind="stable")]


# --- data that are made ----------------------------------------------------------------------------------------------


def _made(settings: LraDataSettings) -> Path:
    """The folder with the data that the settings ask for, made where they are not there yet."""
    counts = [count or 0 for count in settings.counts.values()]
    processes = settings.preprocessing_num_workers
    if settings.task == "pathfinder":
        # Images are a function of the seed and their number: more of them go on where fewer end.
        folder = settings.caches / f"pathfinder-seed-{settings.data_seed}"
        with _lock(folder):
            write_images(folder, settings.data_seed, sum(counts), processes)
        return folder
    limits = (settings.data_seed, settings.listops_min_length, settings.max_length)
    folder = settings.caches / f"listops-{_key([*counts, *limits])}"
    with _lock(folder):
        if not folder.is_dir():
            logger.info(f"Making {sum(counts):,} expressions of ListOps.")
            try:
                trees = make_trees(sum(counts), *limits, processes)
            except ValueError as error:
                raise LraDataError(str(error)) from error
            temporary = folder.with_name(temporary_name(folder.name))
            temporary.mkdir(parents=True, exist_ok=True)
            for name, count in zip(("train", "val", "test"), counts):
                lines = ["Source\tTarget", *(f"{text}\t{value}" for text, value in trees[:count])]
                write_bytes(temporary / f"basic_{name}.tsv", ("\n".join(lines) + "\n").encode())
                trees = trees[count:]
            replace_folder(temporary, folder)
    return folder


# --- the cache of ids ------------------------------------------------------------------------------------------------


def _cached(source: Source, settings: LraDataSettings) -> dict[str, Part]:
    """The parts of a source, encoded where they are not yet."""
    files = [[str(file.resolve()), _state(file)] for file in source.files]
    key = _key([FORMAT, settings.task, source.form, files, settings.max_length])
    folder = settings.caches / f"lra-{settings.task}-{key}"
    with _lock(folder):
        if not _is_whole(folder):
            if folder.exists():
                logger.warning(f"{folder} is damaged; it is made again.")
            logger.info(f"Reading {source.form}.")
            temporary = folder.with_name(temporary_name(folder.name))
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                for name, read in source.read.items():
                    _write_part(temporary, name, read(), settings.max_length, source)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sums = {file.name: checksum(file) for file in temporary.iterdir()}
            write_json(temporary / MANIFEST_FILE, {"form": source.form, "files": files, "crc32": sums})
            replace_folder(temporary, folder)
    return {name: Part(folder, name) for name in source.read}


def _write_part(folder: Path, name: str, examples: Iterator[Example], max_length: int, source: Source) -> None:
    labels: list[int] = []
    bounds: list[list[int]] = []
    end = 0
    with (folder / f"{name}.ids.bin").open("wb") as stream:
        for sequences, label in examples:
            bounds.append([end])
            for ids in sequences:
                stream.write(ids[:max_length].tobytes())
                end += min(len(ids), max_length)
                bounds[-1].append(end)
            labels.append(label)
    if not end:
        raise LraDataError(
            f"The {name} part of {source.form} has no example, or only empty ones: {', '.join(map(str, source.files[:3]))}."
        )
    np.savez(folder / f"{name}.npz", labels=np.array(labels, dtype=np.int64), bounds=np.array(bounds, dtype=np.int64))


def _state(path: Path) -> str:
    """What changes with a file, or with any of those in a folder: sizes and times."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise LraDataError(f"{path} cannot be read: {error}") from error
    return _key(states)


def _is_whole(folder: Path) -> bool:
    try:
        sums: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["crc32"]
        return bool(sums) and all(checksum(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _key(ingredients: list[Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]
