"""COCO's evaluation: average precision worked out by hand, the ground truth as predictions, results as they are saved."""

import importlib.util
import json

import pytest
import torch
from detection_files import coco_content, tiny_detector, write_coco

from recipes.detection import coco_evaluation
from recipes.detection.coco_evaluation import MEASURES, as_results, evaluate_detector, evaluate_results
from recipes.detection.coco_files import DetectionSplit, read_coco
from recipes.detection.shapes import shapes


def split_of(content):
    return DetectionSplit(content, lambda image: None, "a test")


def true_results(split):
    """The ground truth, crowds left out, as a detector would give it."""
    numbers = range(len(split))
    targets = [split.load(number)[1] for number in numbers]
    detections = [
        {**target, "masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["labels"]))}
        for target in targets
    ]
    return as_results(split, numbers, detections)


def test_the_ground_truth_scores_one(tmp_path):
    folder = write_coco(tmp_path)
    split = read_coco(folder / "annotations" / "instances_val2017.json", folder / "val2017")
    results = true_results(split)
    assert [(each["image_id"], each["category_id"], each["bbox"]) for each in results] == [
        (7, 3, [4, 6, 10, 12]),
        (7, 90, [20, 8, 8, 8]),
        (9, 90, [2, 2, 30, 20]),
    ]
    assert evaluate_results(split, results) == pytest.approx(dict.fromkeys(MEASURES, 1.0))
    assert evaluate_results(split, []) == dict.fromkeys(MEASURES, 0.0)
    assert evaluate_results(shapes("validation"), true_results(shapes("validation"))) == pytest.approx(
        dict.fromkeys(MEASURES, 1.0)
    )


def test_the_ground_truth_of_coco_scores_one(shared_data):
    folder = shared_data / "coco-permissive"
    if not folder.is_dir():
        pytest.skip("there is no coco-permissive in ../shared/data")
    split = read_coco(folder / "annotations" / "instances_val2017.json", folder / "val2017")
    assert evaluate_results(split, true_results(split)) == pytest.approx(dict.fromkeys(MEASURES, 1.0))


def box(image, category, corners, score):
    x, y, width, height = corners
    polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return {
        "image_id": image,
        "category_id": category,
        "bbox": corners,
        "score": score,
        "segmentation": coco_evaluation.run_lengths.merge(coco_evaluation.run_lengths.frPyObjects(polygon, 32, 40)),
    }


def test_average_precision_by_hand():
    """One category, two objects. A hit of IoU 1, a miss, a hit of IoU 0.6: precision 1 up to recall 1/2, then 2/3.

    COCO's mean is over 101 recalls: 51 of them up to 1/2. At IoU thresholds above 0.6 the third does not count.
    """
    content = coco_content()
    content["annotations"] = [
        {**each, "category_id": 3, "bbox": corners, "area": corners[2] * corners[3], "id": number, "iscrowd": 0}
        for number, (each, corners) in enumerate(zip(content["annotations"], ([4, 6, 10, 12], [20, 8, 10, 10])))
    ]
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        each["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    assert content["annotations"][0]["id"] == 0  # which COCO's own code takes for "no match"
    results = [box(7, 3, [4, 6, 10, 12], 0.9), box(9, 3, [0, 0, 5, 5], 0.8), box(7, 3, [20, 8, 10, 6], 0.7)]
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    found = evaluate_results(split_of(content), results)
    # 0.50, 0.55 and 0.60 of the ten thresholds count the third; 0.6 is met exactly.
    expected = {"ap": (3 * both + 7 * one) / 10, "ap50": both, "ap75": one}
    for kind in ("box", "mask"):
        for name, value in expected.items():
            assert found[f"{kind}_{name}"] == pytest.approx(value, abs=1e-9), (kind, name)


def test_a_crowd_excuses_what_is_found_in_it():
    content = coco_content()
    inside = box(7, 3, [0, 4, 1, 10], 0.95)  # within the crowd's column
    hit = box(7, 3, [4, 6, 10, 12], 0.9)
    content["categories"] = [content["categories"][1]]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] == 3]
    assert evaluate_results(split_of(content), [inside, hit])["box_ap"] == pytest.approx(1)
    outside = box(7, 3, [30, 4, 5, 10], 0.95)
    assert evaluate_results(split_of(content), [outside, hit])["box_ap"] == pytest.approx(0.5)


def test_an_evaluation_writes_its_results_and_repeats_itself(tmp_path):
    split = shapes("validation").take(5)
    detector = tiny_detector(seed=4).train()
    state = torch.get_rng_state()
    values = evaluate_detector(detector, split, batch_size=2, output_dir=str(tmp_path))
    assert detector.training
    assert torch.equal(torch.get_rng_state(), state)
    saved = json.loads((tmp_path / "detections.json").read_text())
    assert {each["category_id"] for each in saved} <= {1, 3, 7}
    assert evaluate_results(split, saved) == {name: values[f"validation_{name}"] for name in MEASURES}
    assert evaluate_detector(detector, split, batch_size=2) == values
    assert values["validation_loss"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "detections.json"]


@pytest.mark.skipif(importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed")
def test_the_faster_evaluation_is_taken_where_it_is_installed():
    assert coco_evaluation.coco_classes()[1].__name__ == "COCOeval_faster"
