"""Scores of predictions through `evaluate` where it is installed, and the score of answering without reading."""

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .glue_scores import FUNCTIONS, score
from .tasks import GlueTask


def compute_scores(task: GlueTask, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return all metrics of a task, by name, as fractions of 1.

    They are computed through the API of `evaluate` by a metric that this package carries, and where `evaluate` is not
    installed by the same functions without it.

    Args:
        task: From `TASKS`.
        predictions, labels: `(examples,)`.

    Raises:
        UndefinedScoreError, ValueError: as `score`.
    """
    if importlib.util.find_spec("evaluate") is None or importlib.util.find_spec("datasets") is None:
        return score(task, predictions, labels)
    from .glue_metric import GlueMetric

    # In memory: `evaluate` would write predictions to its cache on the disk, which processes share.
    return GlueMetric(task.name, keep_in_memory=True).compute(predictions=predictions, references=labels)


def best_constant_score(task: GlueTask, labels: NDArray[Any]) -> float | None:
    """Return the main metric of the best answer that is the same for all examples; None where it is not defined.

    A regression has no such score: the correlation with a constant is not defined.
    """
    if task.is_regression:
        return None
    metric = FUNCTIONS[task.main_metric]
    return max(metric(np.full_like(labels, number), labels) for number in range(len(task.labels)))
