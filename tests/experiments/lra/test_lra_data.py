"""Reading the data of the five tasks: every form, the splits of both protocols, the cache, and what is refused."""

import pickle
import shutil

import lra_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.lra import lra_data
from recipes.lra.listops import encode
from recipes.lra.lra_data import LraDataSettings, load_lra_data
from recipes.lra.lra_sources import LraDataError, find_source, gray_ids
from recipes.lra.pathfinder import FOLDER


def load(task, folder, tmp_path, **settings):
    return load_lra_data(
        LraDataSettings(task, None if folder is None else str(folder), cache_dir=str(tmp_path / "cache"), **settings)
    )


def rows_of(split, length=40):
    ids, labels = split.batch(np.arange(len(split)), length)
    return ids, labels.tolist()


def as_ids(text, length=40):
    return np.pad(np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 1, (0, length - len(text.encode())))


# --- forms ---


@pytest.mark.parametrize("below", [".", "listops-1000", "lra_release/lra_release/listops-1000"])
def test_listops_of_the_release(below, tmp_path):
    lra_files.listops_release(tmp_path / "data" / below)
    data = load("listops", tmp_path / "data", tmp_path)
    for split in (data.train, data.validation, data.test):
        ids, labels = rows_of(split, 6)
        assert labels == [4, 8]
        assert ids.tolist() == [[*encode("[MAX 4 0 ]"), 0, 0], [*encode("[SM 9 9 ]"), 0, 0]]


def test_the_original_listops_is_split_where_it_has_one_file(tmp_path):
    lra_files.listops_original(tmp_path / "both")
    both = load("listops", tmp_path / "both", tmp_path)
    assert [len(split) for split in (both.train, both.validation, both.test)] == [18, 2, 20]
    lra_files.listops_original(tmp_path / "test", ("test",), ending="")
    alone = load("listops", tmp_path / "test", tmp_path)
    assert [len(split) for split in (alone.train, alone.validation, alone.test)] == [16, 2, 2]
    assert alone.baselines()["root_literals"] == 1
    for data in (both, alone):
        assert data.train.labels.tolist() == [row[2] - 1 for row in data.train.batch(np.arange(len(data.train)), 4)[0]]


@pytest.mark.parametrize("form", ["folders", "lines", "tables"])
def test_imdb_in_three_forms(form, tmp_path):
    folder = {"folders": "data/aclImdb", "lines": "data", "tables": "data/plain_text"}[form]
    getattr(lra_files, f"imdb_{form}")(tmp_path / folder)
    data = load("text", tmp_path / "data", tmp_path)
    ids, labels = rows_of(data.train)
    count = {"folders": 8, "lines": 20, "tables": 20}[form]
    assert len(labels) == count
    first = {"folders": "train neg 0 é", "lines": "train 0 é", "tables": "train 0"}[form]
    assert ids[0].tolist() == as_ids(first).tolist()
    assert labels[0] == 0
    assert sum(labels) == count / 2
    # As published: the validation part is the test part.
    assert data.validation.fingerprint == data.test.fingerprint
    assert rows_of(data.test)[0][0].tolist() == as_ids(first.replace("train", "test")).tolist()


@pytest.mark.parametrize("below", [".", "tsv_data", "lra_release/lra_release/tsv_data"])
def test_pairs_of_the_release(below, tmp_path):
    lra_files.aan(tmp_path / "data" / below)
    data = load("retrieval", tmp_path / "data", tmp_path, max_length=9)
    ids, labels = rows_of(data.validation, 16)
    assert labels == [0, 1, 0, 1, 0, 1]
    assert ids.shape == (6, 2, 16)
    assert ids[3].tolist() == [as_ids('first "3', 16).tolist(), as_ids("second 3", 16).tolist()]
    assert (
        rows_of(load("retrieval", tmp_path / "data", tmp_path, max_length=5).validation, 8)[0][3, 1].tolist()
        == as_ids("secon", 8).tolist()
    )


def test_citations_as_a_substitute(tmp_path):
    lra_files.citations(tmp_path / "data")
    ids, labels = rows_of(load("retrieval", tmp_path / "data", tmp_path).test)
    assert labels == [1, 0]
    assert ids[0].tolist() == [as_ids("one é").tolist(), as_ids("two").tolist()]
    assert ids[1].tolist() == ids[0, ::-1].tolist()


def gray_by_hand(pixels):
    red, green, blue = (pixels[..., channel].astype(np.float64) for channel in range(3))
    return np.floor((0.2989 * red + 0.5870 * green + 0.1140 * blue) / 255 * 255.5)


def test_gray_is_that_of_lra():
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    difference = gray_ids(pixels).reshape(32, 32) - gray_by_hand(pixels)
    assert np.abs(difference).max() <= 1  # roundoff of float32 at whole numbers
    assert (difference != 0).mean() < 0.01
    white = np.full((32, 32, 3), 255, np.uint8)
    assert set(gray_ids(white).tolist()) == {255}
    assert set(gray_ids(0 * white).tolist()) == {0}


@pytest.mark.parametrize("form", ["image", "img", "binary"])
def test_cifar_in_its_forms(form, tmp_path):
    if form == "binary":
        written = lra_files.cifar_binary(tmp_path / "data" / "cifar-10-batches-bin")
    else:
        written = lra_files.cifar_tables(tmp_path / "data" / "data", form)
    data = load("image", tmp_path / "data", tmp_path, max_length=1024)
    pixels, labels = written["train"]
    # The first 90 % train, the last 10 % validate.
    for split, rows in ((data.train, slice(0, 18)), (data.validation, slice(18, 20))):
        ids, found = rows_of(split, 1024)
        assert found == labels[rows].tolist()
        assert ids.tolist() == [gray_ids(each).tolist() for each in pixels[rows]]
    assert data.baselines() == {"majority": 0.1}


def test_cifar_as_pickles_is_read_by_torchvision_alone(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    pixels, labels = lra_files.images(60)
    place = tmp_path / "data" / "cifar-10-batches-py"
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        rows = slice(10 * number, 10 * (number + 1))
        content = {"data": pixels[rows].transpose(0, 3, 1, 2).reshape(10, -1), "labels": labels[rows].tolist()}
        lra_files.write(place / name, pickle.dumps(content))
    lra_files.write(place / "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    for folder in (tmp_path / "data", place):
        with pytest.raises(LraDataError, match="not CIFAR-10 as published"):  # the checksums are of other files
            load("image", folder, tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    data = load("image", tmp_path / "data", tmp_path, max_length=1024)
    assert rows_of(data.train, 1024)[0].tolist() == [gray_ids(each).tolist() for each in pixels[:45]]
    assert rows_of(data.test, 1024)[1] == labels[50:].tolist()


@pytest.mark.parametrize("as_array", [False, True])
def test_pathfinder_of_the_release_and_of_the_original(as_array, tmp_path, warning_log):
    pixels, labels = lra_files.pathfinder(tmp_path / "data" / "pathfinder32", as_array, count=22)
    for name in ("0/sample_3.png", "1/sample_0.png"):
        (tmp_path / "data" / "pathfinder32" / FOLDER / "imgs" / name).write_bytes(b"")
    data = load("pathfinder", tmp_path / "data", tmp_path, max_length=1024)
    kept = [number for number in range(22) if number not in (3, 11)]
    for split, rows in ((data.train, kept[:16]), (data.validation, kept[16:18]), (data.test, kept[18:])):
        ids, found = rows_of(split, 1024)
        assert found == labels[rows].tolist()
        assert ids.tolist() == pixels[rows].reshape(len(rows), -1).tolist()
    assert any("left 2 empty image file(s) out" in message for message in warning_log.messages)


def test_real_data_can_be_read(shared_data, tmp_path):
    data = load("retrieval", shared_data / "acl-citations", tmp_path, max_length=4000)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [4364, 694, 484]
    assert data.baselines()["majority"] == 0.5
    assert data.train.part.ids.max() <= 256


# --- splits ---


def test_the_clean_protocol_holds_training_data_out(tmp_path):
    lra_files.imdb_lines(tmp_path / "data")
    data = load("text", tmp_path / "data", tmp_path, protocol="clean")
    train, validation = (set(split.rows.tolist()) for split in (data.train, data.validation))
    assert len(validation) == 2
    assert train | validation == set(range(20))
    assert data.train.part is data.validation.part
    assert data.test.part is not data.train.part
    again, other = (load("text", tmp_path / "data", tmp_path, protocol="clean", data_seed=seed) for seed in (0, 1))
    assert again.validation.fingerprint == data.validation.fingerprint
    assert other.validation.rows.tolist() != data.validation.rows.tolist()


def test_samples_are_drawn_at_random_and_are_the_same_for_a_seed(tmp_path):
    lra_files.imdb_lines(tmp_path / "data")
    counts = {"train_samples": 7, "validation_samples": 3, "test_samples": 4}
    data = load("text", tmp_path / "data", tmp_path, **counts)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [7, 3, 4]
    assert data.train.rows.tolist() != list(range(7))
    assert load("text", tmp_path / "data", tmp_path, **counts).train.fingerprint == data.train.fingerprint
    with pytest.raises(LraDataError, match="--test_samples 21: the data of text have 20 there"):
        load("text", tmp_path / "data", tmp_path, test_samples=21)


def test_made_expressions_and_images(tmp_path, monkeypatch):
    counts = {"train_samples": 30, "validation_samples": 5, "test_samples": 6}
    data = load("listops", None, tmp_path, max_length=40, listops_min_length=10, **counts)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [30, 5, 6]
    lengths = [len(ids) for split in (data.train, data.test) for ids in split.firsts()]
    assert min(lengths) > 10
    assert max(lengths) < 40
    assert set(data.baselines()) == {"majority", "root_operator", "root_literals"}
    # 6 images are made of chunks of 4; a later request for more goes on from them.
    monkeypatch.setattr(lra_data.write_images, "__defaults__", (4,))
    few = load("pathfinder", None, tmp_path, max_length=1024, train_samples=4, validation_samples=1, test_samples=1)
    assert [len(split) for split in (few.train, few.validation, few.test)] == [4, 1, 1]
    more = load("pathfinder", None, tmp_path, max_length=1024, train_samples=6, validation_samples=2, test_samples=2)
    assert rows_of(more.train, 1024)[0][:4].tolist() == rows_of(few.train, 1024)[0].tolist()
    assert more.baselines()["majority"] in (0, 0.5, 1)


# --- the cache ---


def test_the_cache_is_read_again_and_made_again_where_it_must_be(tmp_path, monkeypatch):
    lra_files.imdb_lines(tmp_path / "data")
    first = load("text", tmp_path / "data", tmp_path)
    reads = []
    original = lra_data._write_part
    monkeypatch.setattr(lra_data, "_write_part", lambda *arguments: reads.append(arguments[1]) or original(*arguments))
    assert load("text", tmp_path / "data", tmp_path, protocol="clean").train.part.folder == first.train.part.folder
    assert reads == []
    (first.train.part.folder / "test.ids.bin").write_bytes(b"damaged")
    again = load("text", tmp_path / "data", tmp_path)
    assert sorted(reads) == ["test", "train"]
    assert again.test.fingerprint == first.test.fingerprint
    lra_files.imdb_lines(tmp_path / "data", [f"{number % 2}\t7\t{number}\tother {number}" for number in range(30)])
    assert len(load("text", tmp_path / "data", tmp_path).train) == 30
    assert len(reads) == 4


def test_an_edited_review_and_a_flipped_bit_are_noticed(tmp_path, warning_log):
    lra_files.imdb_folders(tmp_path / "data")
    before = load("text", tmp_path / "data", tmp_path)
    (tmp_path / "data" / "train" / "pos" / "0_1.txt").write_text("another one")
    edited = load("text", tmp_path / "data", tmp_path)
    assert edited.train.fingerprint != before.train.fingerprint
    file = edited.train.part.folder / "train.ids.bin"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert load("text", tmp_path / "data", tmp_path).train.fingerprint == edited.train.fingerprint
    assert any("is damaged; it is made again" in line for line in warning_log.messages)


def test_hidden_files_are_no_reviews(tmp_path):
    lra_files.imdb_folders(tmp_path / "data")
    before = load("text", tmp_path / "data", tmp_path)
    (tmp_path / "data" / "train" / "pos" / "._0_1.txt").write_bytes(b"\0\5\x16\7")
    assert load("text", tmp_path / "data", tmp_path).train.fingerprint == before.train.fingerprint


def test_pictures_of_16_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)
    place = tmp_path / "data" / "pathfinder32" / FOLDER
    lra_files.write(place / "imgs/0/sample_0.png", lra_files.encoded(values))
    lra_files.write(place / "metadata/0.npy", "imgs/0 sample_0.png 0 1 1\n" * 10)
    data = load("pathfinder", tmp_path / "data", tmp_path, max_length=1024)
    assert rows_of(data.train, 1024)[0][0].tolist() == np.round(values / 257).astype(int).ravel().tolist()


# --- what is refused ---


def parquet(columns, names, place):
    place.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        pq.write_table(
            pa.Table.from_arrays([pa.array(column) for column in columns], names=names), place / f"{part}.parquet"
        )


PAPERS = "id\ttext\np1\tx\np2\ty\n"


@pytest.mark.parametrize(
    ("task", "write", "message"),
    [
        (
            "listops",
            lambda place: lra_files.listops_release(place, ["hello world\t4"]),
            r"line 2: .* is not an expression",
        ),
        (
            "listops",
            lambda place: lra_files.listops_release(place, ["[max 4 2 ]\t4"]),
            r"line 2: .* is not an expression",
        ),
        ("listops", lambda place: lra_files.listops_release(place, ["\t4"]), r"line 2: b'' is not an expression"),
        (
            "text",
            lambda place: parquet([["a", None], [0, 1]], ["text", "label"], place),
            r"row 2: None \(NoneType\) is not",
        ),
        ("text", lambda place: parquet([[7, 8], [0, 1]], ["text", "label"], place), r"row 1: 7 \(int\) is not a text"),
        ("text", lambda place: parquet([["", ""], [0, 1]], ["text", "label"], place), r"or only empty ones"),
        (
            "text",
            lambda place: parquet([["a"], ["b"], [0]], ["text", "text", "label"], place),
            r"has more than one column of texts",
        ),
        ("image", lambda place: parquet([["x.png"], [0]], ["img", "label"], place), r"row 1: x.png is not an image"),
        ("image", lambda place: parquet([[None], [0]], ["img", "label"], place), r"row 1: None is not an image"),
        (
            "retrieval",
            lambda place: [
                lra_files.write(place / "papers.tsv", f"{PAPERS}p1\tz\n"),
                *(
                    lra_files.write(place / f"{part}.tsv", "label\tid1\tid2\n1\tp1\tp2\n")
                    for part in ("train", "dev", "test")
                ),
            ],
            r"papers.tsv, line 4: a second paper p1",
        ),
        (
            "retrieval",
            lambda place: [
                lra_files.write(place / f"new_aan_pairs.{part}.tsv", b"\xff\t1\t2\tone\ttwo\n")
                for part in ("train", "eval", "test")
            ],
            r"line 1: the label .* is none of 0 to 1",
        ),
        (
            "text",
            lambda place: [lra_files.imdb_folders(place), shutil.rmtree(place / "train" / "neg")],
            r"train/neg is missing; IMDb has",
        ),
        (
            "text",
            lambda place: [lra_files.imdb_folders(place), (place / "test/pos/9_1.txt").mkdir()],
            r"9_1.txt cannot be read",
        ),
    ],
)
def test_values_that_cannot_be_are_named(task, write, message, tmp_path):
    write(tmp_path / "data")
    with pytest.raises(LraDataError, match=message):
        load(task, tmp_path / "data", tmp_path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    lra_files.listops_original(tmp_path / "data")
    file = tmp_path / "data" / "train_d20s.tsv.gz"
    content = bytearray(file.read_bytes())
    content[20:40] = b"\xff" * 20
    file.write_bytes(content)
    with pytest.raises(LraDataError, match=r"train_d20s.tsv.gz cannot be read"):
        load("listops", tmp_path / "data", tmp_path)


def broken():
    """Case -> what writes it into a folder."""
    return {
        "listops header": lambda place: lra_files.write(place / "basic_train.tsv", "Source\tValue\n"),
        "listops columns": lambda place: lra_files.listops_release(place, ["( [MAX 4 ] )\t4\t5"]),
        "listops label": lambda place: lra_files.listops_release(place, ["( [MAX 4 ] )\t10"]),
        "text label": lambda place: lra_files.imdb_lines(place, ["pos\t7\t1\ttext"]),
        "text columns": lambda place: lra_files.imdb_lines(place, ["1\t7\ttext"]),
        "text folder": lambda place: [
            lra_files.imdb_folders(place),
            [f.unlink() for f in (place / "test/pos").iterdir()],
        ],
        "retrieval paper": lambda place: lra_files.citations(place, ["1\tA1\tA3"]),
        "image label": lambda place: lra_files.cifar_tables(place, labels=[10] * 20),
        "image column": lambda place: lra_files.cifar_tables(place, "picture"),
        "image size": lambda place: lra_files.cifar_tables(
            place, content=lra_files.encoded(np.zeros((28, 28, 3), np.uint8))
        ),
        "image content": lambda place: lra_files.cifar_tables(place, content=b"no image"),
        "pathfinder size": lambda place: [
            lra_files.pathfinder(place),
            (place / FOLDER / "imgs/0/sample_0.png").write_bytes(lra_files.encoded(np.zeros((16, 32), np.uint8))),
        ],
    }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("listops header", r"basic_val.tsv, basic_test.tsv; all of"),
        ("listops columns", r"basic_train.tsv, line 2: 3 columns separated by tabs; 2 are needed"),
        ("listops label", r"basic_train.tsv, line 2: the label '10' is none of 0 to 9"),
        ("text label", r"train.tsv.gz, line 2: the label 'pos' is none of 0 to 1"),
        ("text columns", r"train.tsv.gz, line 2: 3 columns"),
        ("text folder", r"test/pos holds no .txt file"),
        ("retrieval paper", r"train.tsv.gz, line 2: .*papers.tsv.gz has no paper A3"),
        ("image label", r"train.parquet, row 1: the label 10 is none of 0 to 9"),
        ("image column", r"train.parquet has no column of images \(image or img\); it has picture, label"),
        ("image size", r"train.parquet, row 1: the image is of 28 x 28 pixels; 32 x 32 are needed"),
        ("image content", r"train.parquet, row 1: the image cannot be read"),
        ("pathfinder size", r"0.npy, line 1: .*sample_0.png: the image is of 32 x 16 pixels"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(case, message, tmp_path):
    task = case.split()[0]
    (tmp_path / "data").mkdir()
    broken()[case](tmp_path / "data")
    with pytest.raises(LraDataError, match=message):
        load(task, tmp_path / "data", tmp_path, max_length=1024)
    left = (tmp_path / "cache").iterdir() if (tmp_path / "cache").exists() else ()
    assert [path.name for path in left if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv.gz", b"not gzip", r"train.tsv.gz cannot be read"),
        ("train.tsv.gz", None, r"The train part of IMDb as TSV has no example"),
    ],
)
def test_damaged_and_empty_files(name, content, message, tmp_path):
    lra_files.imdb_lines(tmp_path / "data")
    if content is None:
        lra_files.write(tmp_path / "data" / name, "label\trating\tid\ttext\n")
    else:
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(LraDataError, match=message):
        load("text", tmp_path / "data", tmp_path)


def test_a_header_of_other_columns_is_named(tmp_path):
    lra_files.listops_release(tmp_path)
    lra_files.write(tmp_path / "basic_train.tsv", "Source\tValue\n( [MAX 4 ] )\t4\n")
    with pytest.raises(LraDataError, match="the header is Source, Value; needed is Source, Target"):
        load("listops", tmp_path, tmp_path)


@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_a_folder_without_known_files_says_what_was_looked_for(task, tmp_path):
    with pytest.raises(LraDataError, match=f"holds no data of {task} in a known form. Looked for: "):
        find_source(task, tmp_path)
    with pytest.raises(LraDataError, match="is not a folder"):
        find_source(task, tmp_path / "absent")
