"""Evaluations beside a checkpoint: what is written is read back, of several files, and what is wrong is named."""

import json
import math

import pytest
from huggingface_hub import EvalResult

from hf_specattn.checkpoints.evaluations_file import EVALUATIONS, read_evaluations, write_evaluations


def result(metric="perplexity", value=7.389, split="validation", **more):
    return EvalResult("fill-mask", "org/books", "Books", metric, value, dataset_split=split, **more)


GLUE = EvalResult(
    "text-classification",
    "nyu-mll/glue",
    "GLUE RTE",
    "accuracy",
    0.6,
    dataset_config="rte",
    dataset_split="validation",
)


def test_what_was_written_is_read_in_the_order_of_the_files(tmp_path):
    assert read_evaluations(tmp_path) == []
    own = [result(metric_name="Perplexity"), result("loss", 2.0, metric_name="Loss")]
    write_evaluations(tmp_path, "mine", [GLUE], "evaluations_glue-mine.json")
    assert write_evaluations(tmp_path, "mine", own) == tmp_path / EVALUATIONS
    (tmp_path / "results.json").write_text("[]")
    assert read_evaluations(tmp_path) == [*own, GLUE]
    assert json.loads((tmp_path / EVALUATIONS).read_text()) == [
        {
            "name": "mine",
            "results": [
                {
                    "task": {"type": "fill-mask"},
                    "dataset": {"name": "Books", "type": "org/books", "split": "validation"},
                    "metrics": [
                        {"type": "perplexity", "value": 7.389, "name": "Perplexity"},
                        {"type": "loss", "value": 2.0, "name": "Loss"},
                    ],
                }
            ],
        }
    ]


def test_a_number_that_json_lacks_is_refused_and_the_old_file_stays(tmp_path):
    write_evaluations(tmp_path, "mine", [GLUE])
    with pytest.raises(ValueError, match="nan"):
        write_evaluations(tmp_path, "mine", [result(value=math.nan)])
    assert read_evaluations(tmp_path) == [GLUE]


def test_the_same_metric_in_two_files_is_refused(tmp_path):
    write_evaluations(tmp_path, "stock", [GLUE, result()], "evaluations_glue-stock.json")
    write_evaluations(tmp_path, "mine", [result(split="test"), result("loss")])
    assert len(read_evaluations(tmp_path)) == 4  # other splits and metrics are other evaluations
    write_evaluations(tmp_path, "svd", [GLUE], "evaluations_glue-svd.json")
    with pytest.raises(ValueError, match=r"-stock\.json and .*-svd\.json both have the accuracy of GLUE RTE, valid"):
        read_evaluations(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", "[1]", '[{"name": "x"}]', '[{"name": "x", "results": [{"task": {}}]}]', "\udcff"]
)
def test_a_damaged_file_is_named(content, tmp_path):
    file = tmp_path / "evaluations_mine.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"evaluations_mine\.json is damaged .*move it away, or restore it"):
        read_evaluations(tmp_path)
