"""The files of GLUE's results for model cards: one per model, with means over seeds."""

import pytest

from hf_specattn.checkpoints.evaluations_file import read_evaluations
from recipes.glue.glue_evaluations import write_glue_evaluations
from recipes.glue.glue_results import FAILED, RunRecord


def record(model, task, seed, status="finished", **scores):
    return RunRecord(model, task, seed, {}, {}, status, scores=scores)


def test_each_model_has_a_file_with_means_over_its_seeds(tmp_path):
    records = [
        record("svd, lambda 1", "rte", 0, validation={"accuracy": 0.5}),
        record(
            "svd, lambda 1", "mnli", 0, validation_matched={"accuracy": 0.4}, validation_mismatched={"accuracy": 0.3}
        ),
        record("svd, lambda 1", "rte", 1, validation={"accuracy": 0.7}),
        record("svd, lambda 1", "rte", 2, FAILED),
        record("stock", "stsb", 0, validation={"pearson": 0.25, "spearmanr": 0.125}),
        record("broken", "rte", 0, FAILED),
    ]
    write_glue_evaluations(records, tmp_path)
    names = {"svd, lambda 1": "evaluations_glue-svd-lambda-1.json", "stock": "evaluations_glue-stock.json"}
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())

    found = {}
    for model, name in names.items():
        (tmp_path / model).mkdir()  # as a user copies it beside the checkpoint
        (tmp_path / name).rename(tmp_path / model / name)
        found[model] = [
            (item.dataset_name, item.dataset_config, item.dataset_split, item.metric_name, item.metric_value)
            for item in read_evaluations(tmp_path / model)
        ]
    assert found["stock"] == [
        ("GLUE STS-B", "stsb", "validation", "Pearson, mean of 1 seed(s)", 0.25),
        ("GLUE STS-B", "stsb", "validation", "Spearman, mean of 1 seed(s)", 0.125),
    ]
    assert found["svd, lambda 1"] == [
        ("GLUE MNLI", "mnli", "validation_matched", "accuracy, mean of 1 seed(s)", 0.4),
        ("GLUE MNLI", "mnli", "validation_mismatched", "accuracy, mean of 1 seed(s)", 0.3),
        ("GLUE RTE", "rte", "validation", "accuracy, mean of 2 seed(s)", pytest.approx(0.6)),
    ]
    kinds = {(item.task_type, item.dataset_type) for item in read_evaluations(tmp_path / "stock")}
    assert kinds == {("text-classification", "nyu-mll/glue")}
