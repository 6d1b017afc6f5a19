import os
import shutil

import datasets
import numpy as np
import pytest
from image_files import idx_bytes, write_folders, write_idx
from PIL import Image
from sklearn.datasets import load_digits

from recipes.images.image_datasets import find_images, limit_samples, load_image_data
from recipes.images.image_sources import ImageDataError, ImageDataSettings, read_digits, read_idx


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "train", 12), write_folders(tmp_path / "validation", 6, seed=1)


def settings_of(folders, **changes):
    return ImageDataSettings(train_dir=str(folders[0]), validation_dir=str(folders[1]), **changes)


def test_digits_are_those_of_scikit_learn_split_without_overlap():
    data, digits = read_digits(), load_digits()
    assert (len(data.train), len(data.validation), data.size, data.channels) == (1437, 360, (8, 8), 1)
    rows = np.concatenate([data.train.rows, data.validation.rows])
    assert sorted(rows) == list(range(1797))
    for split in (data.train, data.validation):
        assert np.bincount(split.labels).min() > len(split) // 14
        for index in (0, 7):
            row = split.rows[index]
            assert split.labels[index] == digits.target[row]
            pixels = np.asarray(split.load(index, "L"))
            np.testing.assert_array_equal(pixels, np.round(digits.images[row] * 255 / 16))


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    data = find_images(ImageDataSettings(idx_dir=str(write_idx(tmp_path, zipped=zipped))))
    expected = np.random.default_rng(0).integers(0, 256, (12, 6, 6))
    assert (len(data.train), len(data.validation), data.size) == (12, 6, (6, 6))
    np.testing.assert_array_equal(np.asarray(data.train.load(5, "L")), expected[5])
    assert data.train.labels.tolist() == [0, 1, 2] * 4


def test_fashion_mnist(shared_data):
    data = find_images(ImageDataSettings(idx_dir=str(shared_data / "fashion-mnist")))
    assert (len(data.train), len(data.validation), data.size, len(data.class_names)) == (12000, 2000, (28, 28), 10)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"announces 12 x 6 x 6 bytes and has 431"),
        (lambda content: b"\x89PNG" + content[4:], r"begins with 89 50 4e 47 instead of 00 00 08 03"),
        (lambda content: content[:3], r"not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, damage, message):
    file = write_idx(tmp_path, zipped=False) / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ImageDataError, match=message):
        read_idx(file, 3)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    write_idx(tmp_path, zipped=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(11)))
    with pytest.raises(ImageDataError, match="12 images and train-labels-idx1-ubyte 11 labels"):
        find_images(ImageDataSettings(idx_dir=str(tmp_path)))
    labels.unlink()
    with pytest.raises(ImageDataError, match=r"neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
        find_images(ImageDataSettings(idx_dir=str(tmp_path)))


def test_folders_of_images(folders):
    data = load_image_data(settings_of(folders))
    assert data.class_names == ("blue", "green", "red")
    assert (len(data.train), len(data.validation), data.size, data.channels) == (12, 6, None, 3)
    for index in range(12):
        path = data.train.images.paths[index]
        assert path.parent.name == data.class_names[data.train.labels[index]]
        np.testing.assert_array_equal(np.asarray(data.train.load(index, "RGB")), np.asarray(Image.open(path)))


def test_fingerprints_tell_images_and_labels_apart(folders):
    before = find_images(settings_of(folders))
    assert before.train.fingerprint == find_images(settings_of(folders)).train.fingerprint
    (folders[0] / "red" / "000.png").rename(folders[0] / "blue" / "000.png")
    after = find_images(settings_of(folders))
    assert after.train.fingerprint != before.train.fingerprint
    assert after.validation.fingerprint == before.validation.fingerprint


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_unreadable_images_are_named_and_counted(tmp_path, ending, warning_log):
    folders = write_folders(tmp_path / "a", 12, 40, ending=ending), write_folders(tmp_path / "b", 6, 40, seed=1)
    cut, text = folders[0] / "red" / f"000.{ending}", folders[0] / "green" / "note.png"
    cut.write_bytes(cut.read_bytes()[: -len(cut.read_bytes()) // 3])
    text.write_text("no image")
    with pytest.raises(
        ImageDataError, match=r"2 of the 13 training images cannot be read(?s:.*)note\.png(?s:.*)000\."
    ):
        load_image_data(settings_of(folders))
    # By the beginning of the file only the text is known not to be an image.
    with pytest.raises(ImageDataError, match=r"1 of the 13 training images(?s:.*)note\.png"):
        load_image_data(settings_of(folders, check_images="header"))
    data = load_image_data(settings_of(folders, skip_unreadable_images=True))
    assert len(data.train) == 11
    assert set(data.skipped) == {str(cut), str(text)}
    assert "2 of the 13 training images" in warning_log.messages[-1]
    assert str(cut) in warning_log.messages[-1]
    assert {data.train.name(index) for index in range(11)}.isdisjoint(data.skipped)


def test_an_image_that_fails_while_training_is_named(folders):
    data = load_image_data(settings_of(folders))
    path = data.train.images.paths[0]
    path.write_bytes(b"gone")
    with pytest.raises(ImageDataError, match=path.name):
        data.train.load(0, "RGB")


def test_one_class_alone_is_refused(folders):
    for folder in folders:
        for name in sorted(path.name for path in folder.iterdir())[1:]:
            shutil.rmtree(folder / name)
    with pytest.raises(ImageDataError, match=r"There is one class, \w+, in .*: every answer would be right"):
        load_image_data(settings_of(folders))


def test_a_name_that_is_not_utf8(folders):
    before = load_image_data(settings_of(folders))
    path = next((folders[0] / "red").iterdir())
    os.link(path, os.fsencode(path.parent) + b"/caf\xe9.png")
    after = load_image_data(settings_of(folders))
    assert len(after.train) == len(before.train) + 1
    assert after.train.fingerprint != before.train.fingerprint


def test_a_class_that_one_split_lacks_is_named(folders):
    for path in (folders[1] / "red").iterdir():
        path.unlink()
    (folders[1] / "red").rmdir()
    with pytest.raises(ImageDataError, match=r"validation images .* none of the class\(es\) red, 1 of 3"):
        find_images(settings_of(folders))
    (folders[1] / "red").mkdir()
    with pytest.raises(ImageDataError, match=r"no image in the folder\(s\) red"):
        find_images(settings_of(folders))


def test_folders_that_are_none(tmp_path, folders):
    with pytest.raises(ImageDataError, match="nowhere is not a folder"):
        find_images(settings_of((tmp_path / "nowhere", folders[1])))
    with pytest.raises(ImageDataError, match="holds no folder"):
        find_images(settings_of((folders[0] / "red", folders[1])))


def test_limits_take_the_first_of_each_class_in_turn():
    data = read_digits()
    limited = limit_samples(data.train, 25, "--max_train_samples", 10)
    assert sorted(np.bincount(limited.labels)) == [2] * 5 + [3] * 5
    firsts = np.sort([np.flatnonzero(data.train.labels == label)[0] for label in range(10)])
    assert set(data.train.rows[firsts]) <= set(limited.rows)
    with pytest.raises(ImageDataError, match="--max_train_samples 9 leaves some of the 10 classes"):
        limit_samples(data.train, 9, "--max_train_samples", 10)


def test_a_dataset_in_the_layout_of_the_hub(folders, tmp_path):
    root = tmp_path / "hub"
    root.mkdir()
    folders[0].rename(root / "train")
    folders[1].rename(root / "validation")
    data = load_image_data(ImageDataSettings(dataset_name=str(root)))
    assert data.class_names == ("blue", "green", "red")
    assert (len(data.train), len(data.validation), data.channels) == (12, 6, 3)
    pixels = np.asarray(data.train.load(0, "RGB"))
    brightest = pixels.reshape(-1, 3).mean(0).argmax()
    assert ("red", "green", "blue")[brightest] == data.class_names[data.train.labels[0]]
    with pytest.raises(ImageDataError, match=r"--validation_split test: .* splits train, validation"):
        find_images(ImageDataSettings(dataset_name=str(root), validation_split="test"))
    with pytest.raises(ImageDataError, match=r"--label_column image: it must name a column of type ClassLabel"):
        find_images(ImageDataSettings(dataset_name=str(root), label_column="image"))


def test_without_datasets_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, datasets.__name__, None)
    with pytest.raises(ImageDataError, match=r"pip install 'hf_specattn\[train\]'"):
        find_images(ImageDataSettings(dataset_name="somebody/images"))


def test_a_share_of_the_training_images_takes_the_place_of_the_validation_images():
    whole = find_images(ImageDataSettings())
    held = find_images(ImageDataSettings(held_out_share=0.25))
    assert len(held.validation) == round(0.25 * len(whole.train))
    assert len(held.train) + len(held.validation) == len(whole.train)
    assert held.train.fingerprint == find_images(ImageDataSettings(held_out_share=0.25)).train.fingerprint
    pictures = {np.asarray(whole.train.load(index, "L")).tobytes() for index in range(len(whole.train))}
    parts = [
        {np.asarray(split.load(index, "L")).tobytes() for index in range(len(split))}
        for split in (held.train, held.validation)
    ]
    assert parts[0] | parts[1] == pictures
    limited = find_images(ImageDataSettings(held_out_share=0.25, max_train_samples=20, max_validation_samples=10))
    assert (len(limited.train), len(limited.validation)) == (20, 10)
