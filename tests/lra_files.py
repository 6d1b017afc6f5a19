"""Small data of the five tasks in every form that is read, written into a folder."""

import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from recipes.lra.pathfinder import FOLDER

GENERATOR = np.random.default_rng(0)


def images(count):
    """Random pictures (count, 32, 32, 3), and labels that repeat 0 to 9."""
    return GENERATOR.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


def encoded(pixels, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def listops_release(folder, rows=("( ( ( [MAX 4 ) 0 ) ] )\t4", "( ( ( [SM 9 ) 9 ) ] )\t8")):
    for name in ("train", "val", "test"):
        write(folder / f"basic_{name}.tsv", "\n".join(["Source\tTarget", *rows]) + "\n")


def listops_original(folder, parts=("train", "test"), count=20, ending=".gz"):
    for part in parts:
        rows = [f"{number % 10}\t( ( ( [MAX 0 ) {number % 10} ) ] )" for number in range(count)]
        write(folder / f"{part}_d20s.tsv{ending}", "\n".join(rows) + "\n")


def imdb_folders(folder):
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            for number in range(4):
                write(folder / part / name / f"{number}_1.txt", f"{part} {name} {number} é")


def imdb_lines(folder, rows=None):
    for part in ("train", "test"):
        texts = rows or [f"{number % 2}\t7\t{number}\t{part} {number} é" for number in range(20)]
        write(folder / f"{part}.tsv.gz", "\n".join(["label\trating\tid\ttext", *texts]) + "\n")


def imdb_tables(folder):
    for part in ("train", "test"):
        texts = pa.table({"text": [f"{part} {number}" for number in range(20)], "label": [0, 1] * 10})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(texts, folder / f"{part}-00000-of-00001.parquet")


def aan(folder):
    for name in ("train", "eval", "test"):
        rows = [f'{number % 2}.0\ta{number}\tb{number}\tfirst "{number}\tsecond {number}' for number in range(6)]
        write(folder / f"new_aan_pairs.{name}.tsv", "\n".join(rows) + "\n")


def citations(folder, pairs=("1\tA1\tA2", "0\tA2\tA1")):
    write(folder / "papers.tsv.gz", "id\ttext\nA1\tone é\nA2\ttwo\n")
    for name in ("train", "dev", "test"):
        write(folder / f"{name}.tsv.gz", "\n".join(["label\tid1\tid2", *pairs]) + "\n")


def cifar_tables(folder, name="image", labels=None, content=None):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part in ("train", "test"):
        pixels, usual = written[part] = images(20)
        cells = [content or encoded(each) for each in pixels]
        table = pa.table({name: cells, "label": usual if labels is None else labels})
        pq.write_table(table, folder / f"{part}.parquet")
    return written


def cifar_binary(folder):
    written = {}
    for part, names in (("train", ("data_batch_1.bin", "data_batch_2.bin")), ("test", ("test_batch.bin",))):
        pixels, labels = written[part] = images(10 * len(names))
        rows = [bytes([label]) + each.transpose(2, 0, 1).tobytes() for each, label in zip(pixels, labels)]
        for number, name in enumerate(names):
            write(folder / name, b"".join(rows[10 * number : 10 * (number + 1)]))
    return written


def pathfinder(folder, as_array=False, count=20):
    """Images of noise in two chunks; returns pixels and labels."""
    place = folder / FOLDER
    pixels, labels = GENERATOR.integers(0, 256, (count, 32, 32), dtype=np.uint8), np.arange(count) % 2
    for chunk, numbers in enumerate(np.split(np.arange(count), 2)):
        rows = []
        for index, number in enumerate(numbers):
            write(place / f"imgs/{chunk}/sample_{index}.png", encoded(pixels[number]))
            rows.append([f"imgs/{chunk}", f"sample_{index}.png", str(index), str(labels[number]), "1.0", "14"])
        (place / "metadata").mkdir(exist_ok=True)
        with (place / "metadata" / f"{chunk}.npy").open("wb") as stream:
            if as_array:
                np.save(stream, np.array(rows))
            else:
                stream.write(("\n".join(map(" ".join, rows)) + "\n").encode())
    return pixels, labels
