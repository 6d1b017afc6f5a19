"""GLUE's examples, from the official TSV files or from the Hub, as texts, labels and row numbers.

Both sources give the same examples in the same order, and are checked alike: a missing column, a row without its columns or
a label that the task does not have is an error that names the place.
"""

import gzip
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from ..run.hub_loading import datasets_library
from ..run.messages import one_line
from ..run.randomness import Purpose, random_words
from .tasks import DEFAULT_DATASET, HIGHEST_SIMILARITY, LOWEST_SIMILARITY, GlueSplit, GlueTask

logger = logging.get_logger(__name__)

# A part of a training or development set is the same for every run, model and seed, so that their scores compare.
SUBSET_SEED = 20180420

# The original distribution of MRPC, whose development set is a list of pairs of its training file.
MRPC_FILES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
MRPC_DEV_IDS = "dev_ids.tsv"
MRPC_ID_COLUMNS = ("#1 ID", "#2 ID")


class GlueDataError(ValueError):
    """GLUE data that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Examples:
    """The examples of one split, in the order of their source.

    Attributes:
        texts: One or two texts per example.
        labels: `(examples,)`: int64 class numbers, or float64 scores for a regression; None for a test set.
        indices: What numbers the rows in a submission.
        origin: The file, or the dataset and split, for messages.
    """

    texts: Sequence[tuple[str, ...]]
    labels: NDArray[Any] | None
    indices: Sequence[str]
    origin: str

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Return a hash of texts and labels, which does not depend on where they came from."""
        digest = hashlib.sha256()
        for row, texts in enumerate(self.texts):
            label = "" if self.labels is None else repr(self.labels[row].item())
            digest.update("\x1f".join((*texts, label)).encode() + b"\x1e")
        return digest.hexdigest()[:16]

    def subset(self, count: int | None) -> "Examples":
        """Return `count` of the examples, drawn at random but always the same, in their order; all of them for None.

        (The first ones would not do: CoLA's files, for one, are sorted by the book that the sentences come from.)
        """
        if count is None or count >= len(self):
            return self
        words = random_words(SUBSET_SEED, 0, Purpose.BATCH_ORDER, 0, len(self))
        chosen = np.sort(np.argsort(words, kind="stable")[:count])
        return Examples(
            [self.texts[row] for row in chosen],
            None if self.labels is None else self.labels[chosen],
            [self.indices[row] for row in chosen],
            self.origin,
        )


def read_examples(
    task: GlueTask, split: GlueSplit, data_dir: str | Path | None = None, dataset_name: str = DEFAULT_DATASET
) -> Examples:
    """Read one split of a task of `TASKS`.

    Args:
        task, split: Which.
        data_dir: Folder with the official layout, such as `CoLA/train.tsv`, each file plain or as `.tsv.gz`. None reads from
            the Hub.
        dataset_name: A dataset of the Hub, or a folder, with the configurations, splits and columns of `nyu-mll/glue`.

    Raises:
        GlueDataError: for data that is missing, damaged, without a needed column, or with a label that the task does not
            have; and if the `datasets` library is missing where it is needed.
    """
    try:
        examples = read_hub(task, split, dataset_name) if data_dir is None else read_tsv(task, split, data_dir)
    except GlueDataError:
        raise
    except Exception as error:  # of whatever kind a reader raises for what stands in a file
        where = dataset_name if data_dir is None else Path(data_dir) / task.title
        raise GlueDataError(
            f"{where}: the {split.name} examples of {task.title} cannot be read: {one_line(error)}. Fetch the data again."
        ) from error
    if len(examples) == 0:
        raise GlueDataError(f"{examples.origin} holds no example; fetch it again.")
    return examples


# ------------------------------------------------------------------------------------------------- official TSV files


def read_tsv(task: GlueTask, split: GlueSplit, data_dir: str | Path) -> Examples:
    """Read an official file. Quotes are ordinary characters in all of them; see `read_examples` for the rest."""
    folder = Path(data_dir) / task.title
    path = _existing(folder / f"{split.stem}.tsv")
    if path is not None:
        rows = _tsv_rows(path, task, split)
    elif task.name == "mrpc" and _mrpc_file(folder, split) is not None:
        rows = _mrpc_rows(folder, task, split)
        path = _mrpc_file(folder, split)
    else:
        raise GlueDataError(_missing_file(task, split, Path(data_dir)))
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    indices: list[str] = []
    for row in rows:
        texts.append(tuple(row.values[column] for column in task.tsv_text_columns))
        indices.append(row.values.get(task.index_column, str(row.number)))
        if split.kind != "test":
            labels.append(_parse_label(task, row.values[task.tsv_label_column], row.place))
    return Examples(texts, None if split.kind == "test" else _label_array(task, labels), indices, str(path))


@dataclass(frozen=True)
class _Row:
    """A row: its number among the examples of the file (from 0), its fields by column, and where it stands."""

    number: int
    values: dict[str, str]
    place: str


def _existing(path: Path) -> Path | None:
    """Return the path, or that of its gzipped form, whichever is a file."""
    zipped = path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, zipped) if candidate.is_file()), None)


def _missing_file(task: GlueTask, split: GlueSplit, data_dir: Path) -> str:
    path = data_dir / task.title / f"{split.stem}.tsv"
    if not data_dir.is_dir():
        return f"--data_dir {data_dir} is not a folder; name the one that holds {task.title}/{split.stem}.tsv and the like."
    present = sorted(folder.name for folder in data_dir.iterdir() if folder.is_dir())
    return (
        f"{path} is missing, and so is {path.name}.gz. --data_dir needs the official layout of GLUE ({data_dir} has the "
        f"folders {', '.join(present) or 'none'}); leave out --tasks {task.name}, or --data_dir to read from the Hub."
    )


def _lines(path: Path) -> Iterator[str]:
    """Decode a (gzipped) file line by line. Lines end at a newline alone: texts hold other separators of lines, too."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream):
                # The byte-order mark of MRPC's files is not part of the first column's name.
                yield line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise GlueDataError(
            f"{path}, line {number + 1}, is not UTF-8: {error.reason}. Fetch the file again, or convert it."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise GlueDataError(f"{path} cannot be read: {error}. Fetch it again, or check its permissions.") from error


def _tsv_rows(path: Path, task: GlueTask, split: GlueSplit) -> Iterator[_Row]:
    """Yield the rows of a file that have all columns that are needed; see `GlueTask.may_be_incomplete` for the others."""
    needed = [*task.tsv_text_columns, task.index_column if split.kind == "test" else task.tsv_label_column]
    lines = _lines(path)
    header, first = task.headerless_columns, 1
    if header is None or split.kind == "test":
        header, first = tuple(next(lines, "").split("\t")), 2
        if missing := [column for column in needed if column not in header]:
            raise GlueDataError(
                f"{path} lacks the column {', '.join(map(repr, missing))}; its first line names "
                f"{', '.join(map(repr, header))}. It is not {task.title}'s official {split.stem}.tsv: fetch that."
            )
    if len(set(header)) != len(header):
        twice = [column for column, count in Counter(header).items() if count > 1]
        raise GlueDataError(
            f"{path} has the column {', '.join(map(repr, twice))} more than once: fetch the official file."
        )
    number = incomplete = 0
    for line_number, line in enumerate(lines, start=first):
        fields = line.split("\t")
        place = f"{path}, line {line_number}"
        if len(fields) != len(header):
            if line == "":  # at a file's end
                continue
            if len(fields) > len(header) or not task.may_be_incomplete or split.kind == "test":
                # A tab too many shifts the columns behind it; read from the left, another text or label would be taken.
                raise GlueDataError(
                    f"{place}: {len(fields)} columns where {task.title} has {len(header)} ({', '.join(header)}). The "
                    f"line begins {line[:60]!r}. Fetch the official file again, or take the tabs out of its texts."
                )
            incomplete += 1
            continue
        yield _Row(number, dict(zip(header, fields)), place)
        number += 1
    if incomplete:
        logger.warning(f"{path}: {incomplete} of {number + incomplete} rows lack columns and are left out.")


def _mrpc_file(folder: Path, split: GlueSplit) -> Path | None:
    return _existing(folder / MRPC_FILES["test" if split.kind == "test" else "train"])


def _mrpc_rows(folder: Path, task: GlueTask, split: GlueSplit) -> Iterator[_Row]:
    """Yield the rows of MRPC's original files; its training file holds GLUE's development set."""
    path = _mrpc_file(folder, split)
    assert path is not None  # the caller looked
    # The original test file has labels and no index, as the training file; GLUE numbers its rows.
    rows = _tsv_rows(path, task, GlueSplit(split.name, path.name, "train", split.title))
    if split.kind == "test":
        yield from rows
        return
    id_file = _existing(folder / MRPC_DEV_IDS)
    if id_file is None:
        raise GlueDataError(
            f"{folder / MRPC_DEV_IDS} is missing, which says which rows of {path.name} are MRPC's development set. Add it, "
            "or train.tsv and dev.tsv."
        )
    held_out = {tuple(line.split("\t")) for line in _lines(id_file)}
    wanted = split.kind == "validation"
    for row in rows:
        try:
            pair = tuple(row.values[column] for column in MRPC_ID_COLUMNS)
        except KeyError as error:
            raise GlueDataError(f"{path} lacks the column {error}, by which {MRPC_DEV_IDS} names rows.") from error
        if (pair in held_out) == wanted:
            yield row


def _parse_label(task: GlueTask, text: str, place: str) -> float:
    """Return a class number, or the score of a regression."""
    if not task.is_regression:
        if text not in task.labels:
            raise GlueDataError(
                f"{place}: the label {text!r} is none of {task.title}'s, which are {', '.join(map(repr, task.labels))}. "
                "Fetch the official file again."
            )
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    _check_score(task, score, repr(text), place)
    return score


def _check_score(task: GlueTask, score: float, text: str, place: str) -> None:
    if not LOWEST_SIMILARITY <= score <= HIGHEST_SIMILARITY:
        raise GlueDataError(
            f"{place}: the score {text} is none of {task.title}'s, which lie between {LOWEST_SIMILARITY:g} and "
            f"{HIGHEST_SIMILARITY:g}. Fetch the official file again."
        )


def _label_array(task: GlueTask, labels: Sequence[float]) -> NDArray[Any]:
    return np.asarray(labels, dtype=np.float64 if task.is_regression else np.int64)


# --------------------------------------------------------------------------------------------------------------- Hub


def read_hub(task: GlueTask, split: GlueSplit, dataset_name: str = DEFAULT_DATASET) -> Examples:
    """Read a split through the `datasets` library, from the Hub, its cache, or a folder; see `read_examples`."""
    origin = f"{dataset_name}, {task.name}, {split.name}"
    with datasets_library(
        origin, GlueDataError, "--dataset_name", "give the official files with --data_dir"
    ) as datasets:
        dataset = datasets.load_dataset(dataset_name, task.name, split=split.name)
    needed = [*task.hub_text_columns, *(() if split.kind == "test" else ("label",))]
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise GlueDataError(
            f"{origin}: there is no column {', '.join(map(repr, missing))}; the columns are "
            f"{', '.join(map(repr, dataset.column_names))}. Give a dataset with the columns of {DEFAULT_DATASET}."
        )
    columns = [dataset[column][:] for column in task.hub_text_columns]
    for name, column in zip(task.hub_text_columns, columns):
        if (row := next((row for row, text in enumerate(column) if not isinstance(text, str)), None)) is not None:
            raise GlueDataError(f"{origin}, row {row}: the column {name!r} holds {column[row]!r}, not text.")
    indices = dataset["idx"][:] if "idx" in dataset.column_names else range(len(dataset))
    labels = None if split.kind == "test" else _hub_labels(task, dataset, origin)
    return Examples(list(zip(*columns)), labels, [str(index) for index in indices], origin)


def _hub_labels(task: GlueTask, dataset: Any, origin: str) -> NDArray[Any]:
    values = dataset["label"][:]
    if task.is_regression:
        for row, value in enumerate(values):
            _check_score(task, math.nan if value is None else float(value), repr(value), f"{origin}, row {row}")
        return _label_array(task, values)
    # A dataset may number its classes in another order, and says so.
    names = getattr(dataset.features["label"], "names", None) or list(task.label_names)
    if sorted(names) != sorted(task.label_names):
        raise GlueDataError(
            f"{origin}: the classes are {', '.join(map(repr, names))}, but {task.title} has "
            f"{', '.join(map(repr, task.label_names))}. Give a dataset with the classes of {DEFAULT_DATASET}."
        )
    numbers = [task.label_names.index(name) for name in names]
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(numbers):
            raise GlueDataError(
                f"{origin}, row {row}: the label {value!r} is none of {task.title}'s, which are the numbers 0 to "
                f"{len(numbers) - 1}."
            )
    return _label_array(task, [numbers[value] for value in values])
