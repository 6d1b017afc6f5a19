"""Where the data of the five tasks lie, in which form, and reading them: token ids and labels, example by example.

Forms: LRA's own files (`lra_release`), those that are usual elsewhere, and those made by the generators. A form is recognized
by the names of its files. Whatever is wrong with a file is an error that names it, with the line or row.
"""

import gzip
import io
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..images.decoding import decode
from .listops import UNKNOWN, encode
from .pathfinder import FOLDER, WINDOW

logger = logging.getLogger(__name__)

Ids = NDArray[np.uint16]
# One sequence, or the two of a pair; and the label.
Example = tuple[tuple[Ids, ...], int]

CLASSES = {"listops": 10, "text": 2, "retrieval": 2, "image": 10, "pathfinder": 2}
IMAGE_SIDE = 32
# Of red, green and blue.
GRAY = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)
# Folders below the one given in which LRA's release has its files.
RELEASE = (".", "lra_release", "lra_release/lra_release")


class LraDataError(ValueError):
    """The data of a task cannot be used as they are; the message names which, why, and what to do."""


@dataclass(frozen=True)
class Source:
    """Data of a form that was recognized.

    Attributes:
        form: In words.
        files: What is read; with their sizes and times they decide whether a cache is good.
        read: Part -> the function that reads it. Parts are "train", "validation", "test", or "all" where nobody split it.
    """

    form: str
    files: tuple[Path, ...]
    read: Mapping[str, Callable[[], Iterator[Example]]]


def find_source(task: str, folder: Path) -> Source:
    """Recognize the data of a task in a folder.

    Raises:
        LraDataError: where there are none of a known form.
    """
    if not folder.is_dir():
        raise LraDataError(f"--data_dir {folder} is not a folder; name the one that holds the data of {task}.")
    finders, expected = FINDERS[task]
    for find in finders:
        if (source := find(folder)) is not None:
            return source
    raise LraDataError(f"--data_dir {folder} holds no data of {task} in a known form. Looked for: {expected}.")


def checked_label(task: str, label: Any, where: str) -> int:
    """The label as a number.

    Raises:
        LraDataError: for one that is outside of the task's classes.
    """
    if isinstance(label, bytes):
        label = label.decode(errors="replace")
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = -1.0
    if number not in range(CLASSES[task]):
        raise LraDataError(f"{where}: the label {label!r} is none of 0 to {CLASSES[task] - 1}, those of {task}.")
    return int(number)


# --- files of lines --------------------------------------------------------------------------------------------------


def rows_of(file: Path, columns: int, header: tuple[str, ...] | None = None) -> Iterator[tuple[str, list[bytes]]]:
    """Rows of a file of columns separated by tabs, also gzipped, without any quoting, each with its place in words.

    Raises:
        LraDataError: for another header or number of columns, and for a file that cannot be read.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                row, where = line.rstrip(b"\r\n").split(b"\t"), f"{file}, line {number}"
                if len(row) != columns:
                    raise LraDataError(f"{where}: {len(row)} columns separated by tabs; {columns} are needed.")
                if number > 1 or header is None:
                    yield where, row
                elif (found := tuple(name.decode(errors="replace") for name in row)) != header:
                    raise LraDataError(f"{file}: the header is {', '.join(found)}; needed is {', '.join(header)}.")
    except (OSError, EOFError, zlib.error) as error:
        raise LraDataError(f"{file} cannot be read: {error}") from error


def table_rows(file: Path, columns: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, list[Any]]]:
    """Rows of a Parquet file: one column of each of the groups of names, each with its place in words.

    Raises:
        LraDataError: for a file without them, or that cannot be read.
    """
    # Here, because no other form needs them.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        present, names = table.schema_arrow.names, []
        for meaning, possible in columns.items():
            names.append(next((name for name in possible if name in present), None))
            if present.count(names[-1]) != 1:
                found = "no" if names[-1] is None else "more than one"
                raise LraDataError(
                    f"{file} has {found} column of {meaning} ({' or '.join(possible)}); it has {', '.join(present)}."
                )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=names):
            for values in zip(*(batch.column(name).to_pylist() for name in names)):
                number += 1
                yield f"{file}, row {number}", list(values)
    except (OSError, pa.ArrowException) as error:
        raise LraDataError(f"{file} cannot be read: {error}") from error


def byte_ids(text: bytes) -> Ids:
    """Bytes as token ids, one more than the byte; 0 is padding."""
    return np.frombuffer(text, dtype=np.uint8).astype(np.uint16) + np.uint16(1)


def places(folder: Path, *below: str) -> Iterator[Path]:
    """The folder, those of LRA's release in it, and what of each is named in `below`."""
    for release in RELEASE:
        for name in (".", *below):
            if (place := folder / release / name).is_dir():
                yield place


def with_gz(place: Path, stem: str) -> Path | None:
    """A file of that name, or its gzipped form; None where there is neither."""
    return next((file for file in (place / stem, place / f"{stem}.gz") if file.is_file()), None)


def three_parts(
    place: Path, names: Mapping[str, str], read: Callable[[Path], Iterator[Example]], form: str
) -> Source | None:
    """A source of one file for each part; None where there is none of them.

    Raises:
        LraDataError: where there are some and not others.
    """
    files = {part: with_gz(place, name) for part, name in names.items()}
    missing = [names[part] for part, file in files.items() if file is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise LraDataError(
            f"{place} has {form} but for {', '.join(missing)}; all of {', '.join(names.values())} are needed."
        )
    present = {part: file for part, file in files.items() if file is not None}
    return Source(form, tuple(present.values()), {part: partial(read, file) for part, file in present.items()})


# --- ListOps ---------------------------------------------------------------------------------------------------------


def _expression(text: bytes, where: str) -> Ids:
    ids = encode(text.decode(errors="replace"))
    if not len(ids) or (ids == UNKNOWN).any():
        raise LraDataError(f"{where}: {text[:50]!r} is not an expression such as [MAX 4 [MIN 2 9 ] 0 ].")
    return ids


def find_listops(folder: Path) -> Source | None:
    def read(file: Path) -> Iterator[Example]:
        for where, (expression, label) in rows_of(file, 2, ("Source", "Target")):
            yield (_expression(expression, where),), checked_label("listops", label, where)

    names = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
    for place in places(folder, "listops-1000"):
        if (source := three_parts(place, names, read, "LRA's files of ListOps")) is not None:
            return source
    return None


def find_original_listops(folder: Path) -> Source | None:
    def read(file: Path) -> Iterator[Example]:
        for where, (label, expression) in rows_of(file, 2):
            yield (_expression(expression, where),), checked_label("listops", label, where)

    train, test = (with_gz(folder, f"{part}_d20s.tsv") for part in ("train", "test"))
    if test is None:
        return None
    if train is None:
        return Source("the original ListOps, its test file alone", (test,), {"all": partial(read, test)})
    return Source("the original ListOps", (train, test), {"train": partial(read, train), "test": partial(read, test)})


# --- Text ------------------------------------------------------------------------------------------------------------


def find_imdb_folders(folder: Path) -> Source | None:
    for place in (folder, folder / "aclImdb"):
        if (place / "train" / "pos").is_dir():
            folders = tuple(place / part / name for part in ("train", "test") for name in ("neg", "pos"))
            if missing := [str(each) for each in folders if not each.is_dir()]:
                raise LraDataError(f"{missing[0]} is missing; IMDb has train/pos, train/neg, test/pos and test/neg.")
            return Source(
                "IMDb's folders", folders, {part: partial(_reviews, place / part) for part in ("train", "test")}
            )
    return None


def _reviews(folder: Path) -> Iterator[Example]:
    for label, name in enumerate(("neg", "pos")):
        # A Mac writes hidden files beside those that it copies.
        if not (files := sorted((folder / name).glob("[!.]*.txt"))):
            raise LraDataError(
                f"{folder / name} holds no .txt file; IMDb has train/pos, train/neg, test/pos and test/neg."
            )
        for file in files:
            try:
                yield (byte_ids(file.read_bytes()),), label
            except OSError as error:
                raise LraDataError(f"{file} cannot be read: {error}") from error


def find_imdb_tables(folder: Path) -> Source | None:
    def read_lines(file: Path) -> Iterator[Example]:
        for where, (label, _, _, text) in rows_of(file, 4, ("label", "rating", "id", "text")):
            yield (byte_ids(text),), checked_label("text", label, where)

    def read_tables(files: Iterable[Path]) -> Iterator[Example]:
        for file in files:
            for where, (text, label) in table_rows(file, {"texts": ("text",), "labels": ("label",)}):
                if not isinstance(text, str):
                    raise LraDataError(f"{where}: {str(text)[:50]} ({type(text).__name__}) is not a text.")
                yield (byte_ids(text.encode()),), checked_label("text", label, where)

    names = {"train": "train.tsv", "test": "test.tsv"}
    return three_parts(folder, names, read_lines, "IMDb as TSV") or _parquet(folder, read_tables, "IMDb as Parquet")


def _parquet(folder: Path, read: Callable[[Iterable[Path]], Iterator[Example]], form: str) -> Source | None:
    """Parquet files whose names begin with their part, in the folder or in `data` or `plain_text` below it."""
    for place in (folder, folder / "data", folder / "plain_text"):
        files = {part: tuple(sorted(place.glob(f"{part}*.parquet"))) for part in ("train", "test")}
        if all(files.values()):
            reading = {part: partial(read, found) for part, found in files.items()}
            return Source(form, files["train"] + files["test"], reading)
    return None


# --- Retrieval -------------------------------------------------------------------------------------------------------


def find_aan(folder: Path) -> Source | None:
    def read(file: Path) -> Iterator[Example]:
        for where, (label, _, _, one, two) in rows_of(file, 5):
            yield (byte_ids(one), byte_ids(two)), checked_label("retrieval", label, where)

    names = {part: f"new_aan_pairs.{name}.tsv" for part, name in zip(PARTS, ("train", "eval", "test"))}
    for place in places(folder, "tsv_data"):
        if (source := three_parts(place, names, read, "AAN's pairs")) is not None:
            return source
    return None


def find_citations(folder: Path) -> Source | None:
    papers = with_gz(folder, "papers.tsv")
    if papers is None:
        return None

    def read(file: Path) -> Iterator[Example]:
        texts: dict[bytes, Ids] = {}
        for where, (name, text) in rows_of(papers, 2, ("id", "text")):
            if name in texts:
                raise LraDataError(f"{where}: a second paper {name.decode(errors='replace')}; ids must differ.")
            texts[name] = byte_ids(text)
        for where, (label, *pair) in rows_of(file, 3, ("label", "id1", "id2")):
            if unknown := [name.decode(errors="replace") for name in pair if name not in texts]:
                raise LraDataError(f"{where}: {papers} has no paper {', '.join(unknown)}.")
            yield (texts[pair[0]], texts[pair[1]]), checked_label("retrieval", label, where)

    names = {part: f"{name}.tsv" for part, name in zip(PARTS, ("train", "dev", "test"))}
    source = three_parts(folder, names, read, "pairs of ACL papers")
    return None if source is None else Source(source.form, (*source.files, papers), source.read)


# --- Image -----------------------------------------------------------------------------------------------------------


def gray_ids(pixels: NDArray[np.uint8]) -> Ids:
    """Red, green and blue (32, 32, 3) as LRA's gray, 0-255, row after row: black is 0, the id of padding."""
    share = (pixels.astype(np.float32) / np.float32(255)) @ GRAY
    return np.floor(share * np.float32(255.5)).astype(np.uint16).ravel()


def find_cifar_tables(folder: Path) -> Source | None:
    def read(files: Iterable[Path]) -> Iterator[Example]:
        for file in files:
            for where, (image, label) in table_rows(file, {"images": ("image", "img"), "labels": ("label",)}):
                content = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(content, bytes):
                    raise LraDataError(
                        f"{where}: {str(image)[:50]} is not an image: the bytes of its file are needed."
                    )
                pixels = decoded(io.BytesIO(content), where, "RGB", IMAGE_SIDE)
                yield (gray_ids(pixels),), checked_label("image", label, where)

    return _parquet(folder, read, "CIFAR-10 as Parquet")


def find_cifar_binary(folder: Path) -> Source | None:
    def read(files: Iterable[Path]) -> Iterator[Example]:
        for file in files:
            content, size = file.read_bytes(), 1 + 3 * IMAGE_SIDE**2
            if len(content) % size:
                raise LraDataError(
                    f"{file} has {len(content)} bytes, which is not a multiple of the {size} bytes of an image of CIFAR-10."
                )
            for number, row in enumerate(np.frombuffer(content, np.uint8).reshape(-1, size)):
                label = checked_label("image", row[0], f"{file}, image {number + 1}")
                yield (gray_ids(row[1:].reshape(3, IMAGE_SIDE, IMAGE_SIDE).transpose(1, 2, 0)),), label

    for place in (folder, folder / "cifar-10-batches-bin"):
        train, test = tuple(sorted(place.glob("data_batch_*.bin"))), place / "test_batch.bin"
        if train and test.is_file():
            reading = {"train": partial(read, train), "test": partial(read, [test])}
            return Source("CIFAR-10's binary files", (*train, test), reading)
    return None


def find_cifar_pickles(folder: Path) -> Source | None:
    for root in (folder, folder.parent):
        place = root / "cifar-10-batches-py"
        if place.is_dir() and (root == folder or place == folder):
            files = tuple(sorted(file for file in place.iterdir() if "batch" in file.name))
            return Source(
                "CIFAR-10's Python files", files, {part: partial(_pickled, root, part) for part in ("train", "test")}
            )
    return None


def _pickled(root: Path, part: str) -> Iterator[Example]:
    # Here, because it takes a second. It unpickles nothing but the published files, which it knows by their checksums.
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(str(root), train=part == "train")
    except RuntimeError as error:
        raise LraDataError(f"{root / 'cifar-10-batches-py'} is not CIFAR-10 as published: {error}") from error
    for pixels, label in zip(images.data, images.targets):
        yield (gray_ids(pixels),), checked_label("image", label, part)


def decoded(file: Any, where: str, mode: str, side: int) -> NDArray[np.uint8]:
    """An image's pixels.

    Raises:
        LraDataError: for one that cannot be read, or is of another size.
    """
    try:
        with Image.open(file) as image:
            size = image.size
            pixels = np.asarray(decode(image, mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LraDataError(f"{where}: the image cannot be read: {error}") from error
    if size != (side, side):
        raise LraDataError(f"{where}: the image is of {size[0]} x {size[1]} pixels; {side} x {side} are needed.")
    return pixels


# --- Pathfinder ------------------------------------------------------------------------------------------------------


def find_pathfinder(folder: Path) -> Source | None:
    for place in places(folder, f"pathfinder{WINDOW}/{FOLDER}", FOLDER):
        metadata = tuple(sorted((place / "metadata").glob("*.npy"), key=lambda file: (len(file.name), file.name)))
        if metadata:
            return Source(f"Pathfinder, {place.name}", metadata, {"all": partial(_curves, place, metadata)})
    return None


def _curves(place: Path, metadata: Iterable[Path]) -> Iterator[Example]:
    """Images in the order of the metadata; empty files, of which the release has some, are left out."""
    empty = 0
    for file in metadata:
        for number, (folder, name, _, label, *_) in enumerate(_metadata(file), start=1):
            image = place / folder / name
            if image.is_file() and image.stat().st_size == 0:
                empty += 1
                continue
            where = f"{file}, line {number}"
            pixels = decoded(image, f"{where}: {image}", "L", WINDOW)
            yield (pixels.astype(np.uint16).ravel(),), checked_label("pathfinder", label, where)
    if empty:
        logger.warning(f"{place}: left {empty:,} empty image file(s) out.")


def _metadata(file: Path) -> list[list[str]]:
    """Rows of plain text, as in the release, or of a NumPy array, as the original program writes it."""
    content = file.read_bytes()
    try:
        if content.startswith(b"\x93NUMPY"):
            rows = np.load(file).astype(str).tolist()
        else:
            rows = [line.split() for line in content.decode().splitlines()]
    except ValueError as error:
        raise LraDataError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) < 4:
            raise LraDataError(f"{file}, line {number}: {len(row)} columns; folder, file, index and label are needed.")
    return rows


PARTS = ("train", "validation", "test")
# The forms of each task, in the order in which they are looked for, and their files in words.
FINDERS: dict[str, tuple[tuple[Callable[[Path], Source | None], ...], str]] = {
    "listops": (
        (find_listops, find_original_listops),
        "basic_train.tsv, basic_val.tsv and basic_test.tsv (LRA's), or train_d20s.tsv and test_d20s.tsv (the original)",
    ),
    "text": (
        (find_imdb_folders, find_imdb_tables),
        "IMDb as aclImdb/train/pos/*.txt, as train.tsv and test.tsv (label, rating, id, text), or as train*.parquet and "
        "test*.parquet (text, label)",
    ),
    "retrieval": (
        (find_aan, find_citations),
        "new_aan_pairs.train.tsv, .eval.tsv and .test.tsv (LRA's), or papers.tsv with train.tsv, dev.tsv and test.tsv "
        "(label, id1, id2)",
    ),
    "image": (
        (find_cifar_tables, find_cifar_binary, find_cifar_pickles),
        "CIFAR-10 as train*.parquet and test*.parquet (image or img, label), as cifar-10-batches-bin, or as "
        "cifar-10-batches-py",
    ),
    "pathfinder": ((find_pathfinder,), f"pathfinder{WINDOW}/{FOLDER} with imgs and metadata"),
}
