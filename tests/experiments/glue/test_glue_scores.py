"""Every metric against its definition, on random and on degenerate predictions; and the same through `evaluate`."""

import importlib.util
import math
import warnings

import numpy as np
import pytest
from scipy.stats import rankdata

from recipes.glue.glue_scores import (
    FUNCTIONS,
    UndefinedScoreError,
    predictions_from_logits,
    score,
)
from recipes.glue.tasks import METRICS, TASKS


def counts(labels, predictions):
    """True and false positives, false and true negatives, as unbounded integers."""
    pairs = list(zip(map(int, labels), map(int, predictions)))
    return [sum(pair == wanted for pair in pairs) for wanted in ((1, 1), (0, 1), (1, 0), (0, 0))]


def f1_by_definition(labels, predictions):
    right, too_many, missed, _ = counts(labels, predictions)
    return 2 * right / (2 * right + too_many + missed) if right else 0.0


def matthews_by_definition(labels, predictions):
    right, too_many, missed, rightly_not = counts(labels, predictions)
    product = (right + too_many) * (right + missed) * (rightly_not + too_many) * (rightly_not + missed)
    return (right * rightly_not - too_many * missed) / math.sqrt(product) if product else 0.0


CLASSIFICATION = {
    "accuracy": lambda labels, predictions: float(np.mean(np.equal(labels, predictions))),
    "f1": f1_by_definition,
    "matthews_correlation": matthews_by_definition,
}
REGRESSION = {
    "pearson": lambda labels, predictions: np.corrcoef(labels, predictions)[0, 1],
    "spearmanr": lambda labels, predictions: np.corrcoef(rankdata(labels), rankdata(predictions))[0, 1],
}
DEGENERATE = {
    "all right, one class": ([1, 1, 1], [1, 1, 1]),
    "all right, the other class": ([0, 0, 0], [0, 0, 0]),
    "all wrong": ([1, 0, 1], [0, 1, 0]),
    "one class predicted": ([1, 1, 1, 1], [1, 0, 1, 0]),
    "the other class predicted": ([0, 0, 0, 0], [1, 0, 1, 0]),
    "one class in the labels": ([1, 0, 1, 0], [1, 1, 1, 1]),
    "the other class in the labels": ([1, 0, 1, 0], [0, 0, 0, 0]),
    "constant and wrong": ([1, 1, 1], [0, 0, 0]),
    "one example": ([1], [1]),
}


def test_all_metrics_are_compared():
    assert set(FUNCTIONS) == set(METRICS) == {*CLASSIFICATION, *REGRESSION}
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("seed", range(5))
def test_random_classes(name, seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 500))
    labels = (random.random(size) < random.random()).astype(np.int64)
    predictions = np.where(random.random(size) < 0.3, 1 - labels, labels)
    assert FUNCTIONS[name](predictions, labels) == pytest.approx(CLASSIFICATION[name](labels, predictions), abs=1e-12)


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_classes(name, case):
    predictions, labels = DEGENERATE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FUNCTIONS[name](predictions, labels)
    assert found == pytest.approx(CLASSIFICATION[name](labels, predictions), abs=1e-15)


def test_accuracy_of_three_classes():
    random = np.random.default_rng(0)
    predictions, labels = random.integers(0, 3, (2, 1000))
    assert score(TASKS["mnli"], predictions, labels) == {
        "accuracy": pytest.approx(CLASSIFICATION["accuracy"](labels, predictions), abs=1e-15)
    }


def test_large_counts_do_not_overflow():
    """The four factors under Matthews' root multiply to 1e22 here, beyond 64-bit integers."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400_000)
    predictions = np.where(random.random(len(labels)) < 0.1, 1 - labels, labels)
    expected = matthews_by_definition(labels, predictions)
    assert FUNCTIONS["matthews_correlation"](predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(5))
def test_random_scores(name, ties, seed):
    random = np.random.default_rng(seed)
    labels = random.uniform(0, 5, int(random.integers(3, 500)))
    predictions = labels + random.normal(0, 2, len(labels))
    if ties:
        labels, predictions = labels.round(), predictions.round()
    assert FUNCTIONS[name](predictions, labels) == pytest.approx(REGRESSION[name](labels, predictions), abs=1e-12)


@pytest.mark.parametrize("name", REGRESSION)
def test_extreme_scores(name):
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    assert FUNCTIONS[name](labels * 3 - 1, labels) == pytest.approx(1.0, abs=1e-15)
    assert FUNCTIONS[name](-labels, labels) == pytest.approx(-1.0, abs=1e-15)
    assert FUNCTIONS[name]([1e-200, 2e-200, 3e-200, 4e-200], labels) == pytest.approx(1.0, abs=1e-12)
    assert FUNCTIONS[name]([2.0, 1.0], [0.0, 1.0]) == pytest.approx(-1.0, abs=1e-15)
    nearly_constant = np.float32(2.5) + np.array([0, 1, 2, 4], dtype=np.float32) * np.float32(2**-22)
    assert len(np.unique(nearly_constant)) == 4
    expected = REGRESSION[name](labels, nearly_constant.astype(np.float64))
    assert FUNCTIONS[name](nearly_constant, labels) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([2.5, 2.5, 2.5], [1.0, 2.0, 3.0], "all 3 predictions are 2.5"),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], "all 3 labels are 4"),
        ([1.0], [1.0], "all 1 predictions are 1"),
    ],
    ids=["predictions", "labels", "one example"],
)
def test_a_correlation_with_a_constant_says_why_it_is_undefined(name, predictions, labels, message):
    with pytest.raises(UndefinedScoreError, match=message):
        FUNCTIONS[name](predictions, labels)
    with pytest.raises(UndefinedScoreError, match=f"STS-B: {message}"):
        score(TASKS["stsb"], predictions, labels)


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("mrpc", [1, 0], [1], r"inconsistent numbers of samples: \[1, 2\]"),
        ("stsb", [1.0, 0.0, 2.0], [1.0, 2.0], r"shape \(3,\) and labels \(2,\)"),
        ("cola", [1, 2], [1, 0], "the classes 0 to 1, but the predictions reach from 1 to 2"),
        ("mnli", [1, 2], [-1, 0], "the classes 0 to 2, but the labels reach from -1 to 0"),
        ("mrpc", [0.5, 1.0], [1, 0], "mix of binary and continuous"),
        ("stsb", [1.0, float("nan"), 2.0], [1.0, 2.0, 3.0], "1 of 3 predictions are nan or infinite"),
        ("stsb", [1.0, 2.0], [float("inf"), 2.0], "1 of 2 labels are nan or infinite"),
    ],
)
def test_bad_input(task, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        score(TASKS[task], predictions, labels)


def test_binary_metrics_refuse_a_third_class():
    with pytest.raises(ValueError, match="Target is multiclass but average='binary'"):
        FUNCTIONS["f1"]([0, 1, 2], [0, 1, 1])


def test_predictions_from_logits():
    logits = np.array([[0.1, 0.3, 0.2], [9.0, -1.0, 2.0]], dtype=np.float32)
    assert predictions_from_logits(TASKS["mnli"], logits).tolist() == [1, 0]
    assert predictions_from_logits(TASKS["stsb"], np.array([[-1.0], [2.5], [7.0]])).tolist() == [0.0, 2.5, 5.0]


# ---------------------------------------------------------------------------------------------------------- evaluate


def data_for(task, size=50):
    random = np.random.default_rng(0)
    if task.is_regression:
        labels = random.uniform(0, 5, size)
        return labels + random.normal(0, 1, size), labels
    labels = random.integers(0, len(task.labels), size)
    return np.where(random.random(size) < 0.3, random.integers(0, len(task.labels), size), labels), labels


@pytest.fixture
def metric_path():
    pytest.importorskip("evaluate")
    return importlib.util.find_spec("recipes.glue.glue_metric").origin


@pytest.mark.parametrize("name", TASKS)
def test_the_metric_of_evaluate_gives_the_same(name, metric_path):
    from recipes.glue.glue_metric import GlueMetric

    task = TASKS[name]
    predictions, labels = data_for(task)
    expected = score(task, predictions, labels)
    metric = GlueMetric(task.name, keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=labels) == expected
    for start in range(0, len(labels), 7):  # in batches, of which the last is smaller
        metric.add_batch(predictions=predictions[start : start + 7], references=labels[start : start + 7])
    assert metric.compute() == expected


def test_it_loads_as_a_script_without_the_hub(metric_path, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(metric_path, "mrpc", cache_dir=str(tmp_path / "cache"))
    assert metric.compute(predictions=[1, 1, 0], references=[1, 0, 0]) == {
        "f1": pytest.approx(2 / 3),
        "accuracy": pytest.approx(2 / 3),
    }


def test_the_metric_refuses_an_unknown_task_and_passes_errors_on(metric_path):
    from recipes.glue.glue_metric import GlueMetric

    with pytest.raises(ValueError, match="'wnli' is not a task of GLUE; choose one of mnli"):
        GlueMetric("wnli")
    with pytest.raises(UndefinedScoreError, match="all 2 predictions are 1"):
        GlueMetric("stsb", keep_in_memory=True).compute(predictions=[1.0, 1.0], references=[1.0, 2.0])
