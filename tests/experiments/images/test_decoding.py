import io

import numpy as np
import pytest
from image_files import write_folders
from PIL import Image
from transformers.image_utils import load_image

from recipes.images.decoding import decode, remarks
from recipes.images.image_datasets import load_image_data
from recipes.images.image_sources import ImageDataError, ImageDataSettings

RAMP = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (8, 1))
EIGHT_BITS = np.arange(16, dtype=np.uint8) * 17


def stored(image, kind, **options):
    """An image as a file of that kind gives it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_16_bits_are_scaled(kind, mode):
    image = stored(Image.fromarray(RAMP), kind)
    assert [words.split(",")[0] for words in remarks(image)] == ["have 16 bits or floats per channel"]
    row = np.asarray(decode(image, mode))[0]
    np.testing.assert_array_equal(row if mode == "L" else row[:, 0], EIGHT_BITS)


def test_big_endian_and_12_bits():
    big = Image.frombytes("I;16B", (16, 8), RAMP.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode(big, "L"))[3], EIGHT_BITS)
    image = stored(Image.fromarray(np.array([[0, 4095, 2048]], dtype=np.uint16)), "TIFF")
    image.tag_v2[258] = (12,)
    assert np.asarray(decode(image, "L")).tolist() == [[0, 255, 128]]


def test_floats_from_0_to_1_are_scaled_and_others_refused():
    shares = (RAMP / 65535).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(decode(stored(Image.fromarray(shares), "TIFF"), "L"))[0], EIGHT_BITS)
    for wrong, text in ((shares * 2, "from 0 to 2"), (shares - 1, "from -1 to 0"), (shares * np.nan, "nan")):
        with pytest.raises(ValueError, match=rf"its values go .*{text}.*convert it to 8 bits"):
            decode(stored(Image.fromarray(wrong), "TIFF"), "L")


def test_integers_of_no_known_range_are_refused():
    for array in (RAMP.astype(np.int32), (RAMP // 2).astype(np.int16)):
        mode_i = stored(Image.fromarray(array.astype(np.int32)), "TIFF")
        with pytest.raises(ValueError, match=r"32 bits, or 16 with a sign.*convert it to 8 bits"):
            decode(mode_i, "RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("wide", [False, True])
def test_every_exif_orientation_stands_upright(orientation, wide):
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if wide else Image.fromarray(pixels)
    upright = np.asarray(decode(stored(image, "PNG", exif=exif), "L"))
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels.T[:, ::-1],
        7: pixels.T[::-1, ::-1],
        8: pixels.T[::-1],
    }
    np.testing.assert_array_equal(upright, turns[orientation])


def test_what_is_taken_from_a_picture_is_said():
    cmyk = stored(Image.new("CMYK", (4, 4), (10, 200, 30, 40)), "TIFF")
    assert remarks(cmyk) == ["are CMYK, converted without their color profile"]
    assert np.asarray(decode(cmyk, "RGB"))[0, 0].tolist() == [207, 46, 190]
    clear = stored(Image.new("RGBA", (4, 4), (10, 200, 30, 0)), "PNG")
    assert remarks(clear) == ["have transparency, which is dropped: the colors below it show"]
    assert np.asarray(decode(clear, "RGB"))[0, 0].tolist() == [10, 200, 30]
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (40, 90)]
    film = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert remarks(film) == ["have several frames, of which the first is read"]
    assert np.asarray(decode(film, "L"))[0, 0] == 40
    assert remarks(stored(frames[0], "PNG")) == []


def pictures(root, **files):
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for stem, image in files.items():
                image.save(root / split / name / stem.replace("_", "."))
    return ImageDataSettings(train_dir=str(root / "train"), validation_dir=str(root / "validation"))


def test_folders_are_read_as_the_saved_model_is_served(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 3
    half = np.concatenate([np.full((8, 16, 3), 255, np.uint8), np.zeros((8, 16, 3), np.uint8)])
    settings = pictures(tmp_path, plain_png=Image.fromarray(half))
    for path in tmp_path.rglob("plain.png"):
        Image.fromarray(half).save(path.with_name("turned.png"), exif=exif)
        path.unlink()
    served = np.asarray(load_image(str(tmp_path / "train/a/turned.png")))
    np.testing.assert_array_equal(np.asarray(load_image_data(settings).train.load(0, "RGB")), served)
    assert served[0, 0, 0] == 0
    of_hub = load_image_data(ImageDataSettings(dataset_name=str(tmp_path)))
    np.testing.assert_array_equal(np.asarray(of_hub.train.load(0, "RGB")), served)


def test_what_is_altered_is_counted_once(tmp_path, warning_log):
    settings = pictures(tmp_path, wide_png=Image.fromarray(RAMP), clear_png=Image.new("RGBA", (4, 4)))
    load_image_data(settings)
    assert [message.split(". ")[0] for message in warning_log.messages if "training images" in message] == [
        "2 of the 4 training images have 16 bits or floats per channel, scaled to 8 bits by the range of their kind",
        "2 of the 4 training images have transparency, which is dropped: the colors below it show",
    ]


def test_hidden_files_links_and_other_endings(tmp_path, warning_log):
    root, validation = write_folders(tmp_path / "train", 6), write_folders(tmp_path / "validation", 6)
    settings = ImageDataSettings(train_dir=str(root), validation_dir=str(validation))
    (root / ".ipynb_checkpoints").mkdir()
    (root / "red" / ".ipynb_checkpoints").mkdir()
    for place in (".ipynb_checkpoints", "red/.ipynb_checkpoints"):
        Image.new("RGB", (4, 4)).save(root / place / "copy.png")
    (root / "red" / "._000.png").write_bytes(b"the resource fork of another system")
    store = tmp_path / "store"
    store.mkdir()
    Image.new("RGB", (4, 4)).save(store / "linked.jfif", "JPEG")
    (root / "red" / "more").symlink_to(store)
    (root / "red" / "photo.heic").write_bytes(b"heic")
    (root / "loose.png").write_bytes(b"png")
    data = load_image_data(settings)
    names = [data.train.name(index) for index in range(len(data.train))]
    assert len(names) == 7
    assert [name for name in names if "linked" in name] == [str(root / "red" / "more" / "linked.jfif")]
    assert not any("copy" in name or "._" in name for name in names)
    (message,) = [message for message in warning_log.messages if "left out" in message]
    assert "2 files are left out (1 .heic, 1 in no class's folder)" in message

    (root / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageDataError, match=r"1 of the 8 training images cannot be read(?s:.*)gone\.png"):
        load_image_data(settings)
    (root / "red" / "round").symlink_to(root / "red")
    with pytest.raises(ImageDataError, match=r"round leads to a folder whose images are already read by another path"):
        load_image_data(settings)


def test_a_folder_of_the_hub_says_what_it_leaves_out(tmp_path, warning_log):
    write_folders(tmp_path / "train", 6)
    write_folders(tmp_path / "validation", 6)
    (tmp_path / "train" / "red" / "list.txt").write_text("no image")
    (tmp_path / "README.md").write_text("# images")
    load_image_data(ImageDataSettings(dataset_name=str(tmp_path)))
    assert any("leaves out 1 (1 .txt; the first is" in message for message in warning_log.messages)


def test_nulls_and_classes_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = {"bytes": buffer.getvalue(), "path": None}

    def written(name, row):
        folder = tmp_path / name
        folder.mkdir()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        for split in ("train", "validation"):
            rows = [{"image": png, "label": number % 2} for number in range(4)] + [row]
            table = datasets.Dataset.from_list(rows, features=features)
            table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return str(folder)

    name = written("image", {"image": None, "label": 0})
    with pytest.raises(ImageDataError, match=r"train, row 4 \(there is no image: the value is null\)"):
        load_image_data(ImageDataSettings(dataset_name=name))
    data = load_image_data(ImageDataSettings(dataset_name=name, skip_unreadable_images=True))
    assert (len(data.train), data.train.labels.tolist(), len(data.skipped)) == (4, [0, 1, 0, 1], 2)
    name = written("label", {"image": png, "label": None})
    with pytest.raises(ImageDataError, match=r"1 images without a label, in the rows 4; name a split"):
        load_image_data(ImageDataSettings(dataset_name=name))


def test_whatever_a_decoder_raises_names_the_image(tmp_path, monkeypatch):
    settings = pictures(tmp_path, plain_png=Image.new("RGB", (4, 4)))
    data = load_image_data(settings)

    def broken(image, mode):
        raise IndexError("index out of range")

    for module in ("image_datasets", "image_sources"):
        monkeypatch.setattr(f"recipes.images.{module}.decode", broken)
    with pytest.raises(ImageDataError, match=r"plain\.png cannot be read \(IndexError: index out of range\)"):
        data.train.load(0, "RGB")
    with pytest.raises(ImageDataError, match=r"2 of the 2 training images cannot be read(?s:.*)IndexError"):
        load_image_data(settings)
