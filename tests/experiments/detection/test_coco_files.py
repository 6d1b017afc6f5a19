"""COCO's files: what is read of them, and what is refused before training."""

import json

import numpy as np
import pytest
import torch
from detection_files import annotation, coco_content, write_coco
from PIL import Image
from pycocotools import mask as run_lengths

from recipes.detection.coco_files import DetectionDataError, check_images, counts_of, encoded, mask_of, read_coco
from recipes.detection.detection_arguments import parse_arguments
from recipes.detection.detection_task import load_splits
from recipes.detection.shapes import COUNTS, SIZE, shapes


def read(folder, split="train2017"):
    found = read_coco(folder / "annotations" / f"instances_{split}.json", folder / split)
    check_images(found, folder / split, "decode")
    return found


def changed(tmp_path, change):
    content = coco_content()
    change(content)
    return write_coco(tmp_path, content)


def test_what_is_on_each_image(tmp_path):
    split = read(write_coco(tmp_path))
    assert len(split) == 3
    assert (split.category_ids, split.class_names) == ([3, 90], ["car", "toothbrush"])
    pixels, target = split.load(0)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 40), torch.uint8)
    assert target["boxes"].tolist() == [[4, 6, 14, 18], [20, 8, 28, 16]]
    assert target["labels"].tolist() == [1, 2]  # no crowd
    expected = np.zeros((2, 32, 40), dtype=np.uint8)
    expected[0, 6:18, 4:14] = 1
    expected[1, 8:16, 20:28] = 1
    assert np.array_equal(target["masks"].numpy(), expected)
    _, empty = split.load(2)
    assert [tuple(empty[name].shape) for name in ("boxes", "labels", "masks")] == [(0, 4), (0,), (0, 32, 40)]


def test_run_lengths_and_polygons_are_the_same_masks():
    by_hand = np.zeros((4, 5), dtype=np.uint8)
    by_hand[1:3, 2:4] = 1
    counts = [9, 2, 2, 2, 5]  # column by column
    assert np.array_equal(mask_of({"size": [4, 5], "counts": counts}, 4, 5), by_hand)
    assert np.array_equal(mask_of([[2, 1, 4, 1, 4, 3, 2, 3]], 4, 5), by_hand)
    assert np.array_equal(mask_of(encoded({"size": [4, 5], "counts": counts}, 4, 5), 4, 5), by_hand)


def test_compressed_run_lengths_are_those_that_were_compressed():
    generator = np.random.default_rng(0)
    for size in ((4, 5), (40, 60), (300, 200)):
        for share in (0.01, 0.5, 0.9):
            mask = np.asfortranarray((generator.random(size) < share).astype(np.uint8))
            flat = mask.flatten(order="F")
            edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
            expected = np.diff([0, *edges, flat.size]).tolist()
            assert counts_of(run_lengths.encode(mask)["counts"].decode()) == expected


def test_the_first_images_alone(tmp_path):
    split = read(write_coco(tmp_path))
    first = split.take(1)
    assert [each["id"] for each in first.content["annotations"]] == [5, 6, 8]
    assert first.class_names == split.class_names
    assert first.fingerprint != split.fingerprint
    assert split.take(None) is split


def test_boxes_without_extent_are_counted_and_left_out_of_training(tmp_path):
    def change(content):
        content["annotations"] += [annotation(77, 9, 3, [5, 5, 0, 4], [[5, 5, 5, 9, 5, 7]])]

    split = read(changed(tmp_path, change))
    assert split.degenerate == (77,)
    assert split.load(1)[1]["labels"].tolist() == [2]
    assert len(split.content["annotations"]) == 5  # COCO's evaluation knows it


def remove(*path):
    def change(content):
        part = content
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]

    return change


def put(*path, value):
    def change(content):
        part = content
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("annotations"), r"instances_train2017.json has no annotations; it must be a file such as COCO's"),
        (put("annotations", value=[]), r"has no annotations"),
        (
            remove("annotations", 0, "bbox"),
            r"entry 0 of its annotations is not as in COCO's format \(KeyError: 'bbox'\)",
        ),
        (
            put("annotations", 1, "category_id", value=4),
            r"annotation 6 is of the category 4, which is not among the 2",
        ),
        (put("annotations", 1, "image_id", value=4), r"annotation 6 is of the image 4, which the file does not list"),
        (put("annotations", 1, "id", value=5), r"two of the annotations have the id 5; ids must differ"),
        (
            put("annotations", 0, "bbox", value=[1, 2, 3]),
            r"annotation 5 has the box \[1, 2, 3\]; it must be x, y, width",
        ),
        (
            put("annotations", 0, "bbox", value=[30, 2, 30, 3]),
            r"annotation 5, whose box reaches from \(30, 2\) to \(60, 5\)",
        ),
        (
            put("annotations", 3, "segmentation", value=[[2, 2, 99, 2, 32, 22]]),
            r"annotation 9, whose mask reaches from \(2, 2\) to \(99, 22\), outside its image of 40 x 32 pixels",
        ),
        (
            put("annotations", 3, "segmentation", value=[[2, 2, 9, 2]]),
            r"annotation 9, whose mask is not a list of polygons",
        ),
        (
            put("annotations", 2, "segmentation", "size", value=[40, 32]),
            r"annotation 8, whose mask is of \[40, 32\] pixels, and not of its image's \[32, 40\]",
        ),
        (
            put("annotations", 2, "segmentation", "counts", value=[0, 32, 32 * 40]),
            r"whose mask has run lengths that cover 1,312 pixels, and its image has 1,280",
        ),
        (
            put("annotations", 2, "segmentation", "counts", value="0PP4"),
            r"annotation 8, whose mask has run lengths that cover 4,096 pixels",
        ),
        (
            put("annotations", 3, "segmentation", value=[[2, 2, 9, float("nan"), 9, 9]]),
            r"annotation 9, whose mask has corners",
        ),
        (
            put("annotations", 3, "segmentation", value=[[2, 2, 9, "x", 9, 9]]),
            r"entry 3 of its annotations is not as in COCO's",
        ),
        (put("images", 1, "height", value="tall"), r"entry 1 of its images is not as in COCO's format"),
        (remove("categories", 0, "name"), r"entry 0 of its categories is not as in COCO's format"),
        (put("images", 1, "id", value=7), r"two of the images have the id 7"),
        (put("categories", 0, "id", value="3"), r"entry 1 of its categories is not as in COCO's format"),
        (put("annotations", 0, "bbox", value=["4", "6", "10", "12"]), r"annotation 5 has the box .*, as numbers"),
        (put("annotations", 0, "bbox", value=[4, 6, 10, 10**400]), r"entry 0 of its annotations is not as in COCO's"),
        (
            put("annotations", 0, "bbox", value=[14, 18, -10, -12]),
            r"annotation 5 has the box .* negative width or height",
        ),
        (put("annotations", 0, "area", value=None), r"annotation 5 has area None; it must be a number"),
        (put("annotations", 0, "area", value="120"), r"annotation 5 has area '120'; it must be a number"),
        (put("annotations", 0, "area", value=10**400), r"annotation 5 has area 1000"),
        (
            put("annotations", 0, "iscrowd", value="0"),
            r"annotation 5 has iscrowd '0'; it must be a number from 0 to 1",
        ),
    ],
)
def test_annotations_that_cannot_be_are_named(change, message, tmp_path):
    folder = write_coco(tmp_path)
    file = folder / "annotations" / "instances_train2017.json"
    content = coco_content()
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DetectionDataError, match=message):
        read(folder)


def test_a_byte_order_mark_and_deep_json(tmp_path):
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    plain = read(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read(tmp_path).fingerprint == plain.fingerprint
    file.write_text('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DetectionDataError, match="cannot be read as COCO's JSON"):
        read(tmp_path)


def test_images_without_any_object_are_refused(tmp_path):
    arguments, _ = parse_arguments(
        ["--coco_dir", str(tmp_path), "--validation_split", "train2017", "--max_validation_samples", "1"], ""
    )
    write_coco(tmp_path)
    _, validation = load_splits(arguments)
    assert len(validation.annotations) == 1
    for content in (changed_by(put("annotations", value=coco_content()["annotations"][-1:])), changed_by(all_crowds)):
        write_coco(tmp_path, content)
        with pytest.raises(DetectionDataError, match=r"has no object on its \d images"):
            load_splits(arguments)


def changed_by(change):
    content = coco_content()
    change(content)
    return content


def all_crowds(content):
    for each in content["annotations"]:
        each["iscrowd"] = 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = write_coco(tmp_path)
    image = folder / "train2017" / "9.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DetectionDataError, match=r"1 of the 3 images of (?s:.)*9.jpg: image file is truncated"):
        read(folder)
    image.unlink()
    with pytest.raises(DetectionDataError, match=r"9.jpg: no such file"):
        read(folder)
    Image.new("RGB", (32, 40)).save(image)
    with pytest.raises(DetectionDataError, match=r"9.jpg: \(32, 40\) pixels wide and high, not \(40, 32\)"):
        read(folder)
    Image.new("I", (40, 32)).save(image, "PNG")
    with pytest.raises(DetectionDataError, match=r"9.jpg: more than 8 bits per channel"):
        read(folder)
    (folder / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DetectionDataError, match="cannot be read as COCO's JSON"):
        read(folder)
    with pytest.raises(DetectionDataError, match="cannot be read as COCO's JSON"):
        read(folder, "test2017")


def test_real_images_of_coco(shared_data):
    """73 and 53 images, three of them without objects, 15 crowds."""
    folder = shared_data / "coco-permissive"
    if not folder.is_dir():
        pytest.skip("there is no coco-permissive in ../shared/data")
    counts = {"train2017": (73, 715, 8, 1), "val2017": (53, 489, 7, 2)}
    for name, (images, annotations, crowds, empty) in counts.items():
        split = read(folder, name)
        objects = [len(split.load(index)[1]["labels"]) for index in range(len(split))]
        assert (len(split), sum(objects)) == (images, annotations - crowds)
        assert sum(image["id"] not in split.annotations for image in split.content["images"]) == empty
        assert len(split.class_names) == 80
        assert max(split.category_ids) == 90
        assert split.degenerate == ()


def test_shapes_are_the_same_each_time():
    train, validation = shapes("train"), shapes("validation")
    assert (len(train), len(validation)) == (COUNTS["train"], COUNTS["validation"])
    assert (train.fingerprint, validation.fingerprint) == (
        shapes("train").fingerprint,
        shapes("validation").fingerprint,
    )
    assert train.fingerprint != validation.fingerprint
    assert train.class_names == ["circle", "square", "triangle"]
    seen = set()
    for index in range(30):
        pixels, target = train.load(index)
        assert pixels.shape == (3, SIZE, SIZE)
        for box, label, mask in zip(target["boxes"].tolist(), target["labels"].tolist(), target["masks"]):
            seen.add(label)
            rows, columns = mask.nonzero(as_tuple=True)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [float(corner) for corner in corners]
            # One color, on noise.
            assert pixels[:, mask.bool()].float().std(1).max() == 0
    assert seen == {1, 2, 3}
