"""GLUE's metrics, as scikit-learn and SciPy compute them, and the scores of a task by them.

scikit-learn brings pandas along, and no flag is wrong sooner for it: both are imported where they are needed.

`glue_metric` offers the same scores through the API of the `evaluate` library.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .tasks import HIGHEST_SIMILARITY, LOWEST_SIMILARITY, GlueTask


class UndefinedScoreError(ValueError):
    """The metric has no value for these predictions and labels; the message says why."""


def require_packages() -> None:
    """Refuse, before any work, an installation without what computes the scores.

    Raises:
        ImportError: naming what is missing.
    """
    if missing := [name for name in ("sklearn", "scipy") if find_spec(name) is None]:
        raise ImportError(
            f"GLUE's scores need {' and '.join(missing)}, which is not installed: pip install 'hf_specattn[train]'."
        )


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of predictions that equal their label."""
    from sklearn import metrics

    return float(metrics.accuracy_score(labels, predictions))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The harmonic mean of precision and recall of class 1 of two; 0 where neither predictions nor labels have a 1."""
    from sklearn import metrics

    return float(metrics.f1_score(labels, predictions, zero_division=0.0))


def matthews_correlation(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of two binary variables (Matthews, 1975); 0 where one of them is constant."""
    from sklearn import metrics

    constant = len(np.unique(np.asarray(labels))) == 1  # scikit-learn warns of a single label
    return 0.0 if constant else float(metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation.

    Raises:
        UndefinedScoreError: if all predictions or all labels are equal, or there is one example only.
    """
    from scipy import stats

    return float(stats.pearsonr(*_scores(predictions, labels)).statistic)


def spearmanr(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks.

    Raises:
        UndefinedScoreError: as in `pearson`.
    """
    from scipy import stats

    return float(stats.spearmanr(*_scores(predictions, labels)).statistic)


FUNCTIONS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}


def score(task: GlueTask, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return all metrics of a task, by name, as fractions of 1.

    Args:
        task: From `TASKS`.
        predictions, labels: `(examples,)`: class numbers, or scores for a regression.

    Raises:
        UndefinedScoreError: where a metric has no value for these predictions; the message says why.
        ValueError: for unequal numbers of both, a class that the task does not have, nan and infinities.
    """
    if not task.is_regression:
        _require_classes_below(task, predictions, "predictions")
        _require_classes_below(task, labels, "labels")
    try:
        return {name: FUNCTIONS[name](predictions, labels) for name in task.metrics}
    except UndefinedScoreError as error:
        raise UndefinedScoreError(f"{task.title}: {error}") from error


def best_constant_score(task: GlueTask, labels: NDArray[Any]) -> float | None:
    """Return the main metric of the best answer that is the same for all examples; None for a correlation, which has none."""
    if task.is_regression:
        return None
    metric = FUNCTIONS[task.main_metric]
    return max(metric(np.full_like(labels, number), labels) for number in range(len(task.labels)))


def predictions_from_logits(task: GlueTask, logits: NDArray[np.floating]) -> NDArray[Any]:
    """Return what a model predicts, `(examples,)`, from `(examples, outputs)`: the class of the largest logit, or the score.

    Scores of a regression are cut to the range of its labels, as submissions must be.
    """
    if task.is_regression:
        return np.clip(logits[:, 0].astype(np.float64), LOWEST_SIMILARITY, HIGHEST_SIMILARITY)
    return logits.argmax(axis=1)


def _require_classes_below(task: GlueTask, values: ArrayLike, name: str) -> None:
    classes = np.asarray(values)
    if not (classes.min() >= 0 and classes.max() < len(task.labels)):
        raise ValueError(
            f"{task.title} has the classes 0 to {len(task.labels) - 1}, but the {name} reach from {classes.min()} to "
            f"{classes.max()}."
        )


def _scores(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted, expected = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    if predicted.shape != expected.shape:  # SciPy broadcasts
        raise ValueError(f"Predictions have the shape {predicted.shape} and labels {expected.shape}.")
    for name, values in (("predictions", predicted), ("labels", expected)):
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} {name} are nan or infinite.")
        if (values == values[0]).all():
            raise UndefinedScoreError(
                f"all {values.size} {name} are {values[0]:g}, and a correlation with a constant is not defined"
            )
    return predicted, expected
