"""GLUE's scores through the API of the `evaluate` library, with nothing to fetch.

`evaluate.load("glue", "mrpc")` needs the Hub. This metric is the same call on this file's path,
`evaluate.load(glue_metric.__file__, "mrpc")`, or simply `GlueMetric("mrpc")`.
"""

import datasets
import evaluate

from recipes.glue.glue_scores import score
from recipes.glue.tasks import TASKS

_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task.

    Args:
        config_name: The task, such as "mrpc".
        kwargs: As for every `evaluate.Metric`.

    Raises:
        ValueError: for an unknown task; from `compute`, as `score` does.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise ValueError(f"{self.config_name!r} is not a task of GLUE; choose one of {', '.join(TASKS)}.")
        task = TASKS[self.config_name]
        kind = "float64" if task.is_regression else "int64"
        return evaluate.MetricInfo(
            description=f"GLUE's metrics for {task.title}: {', '.join(task.metrics)}, as fractions of 1.",
            citation=_CITATION,
            inputs_description="One class number, or one score for STS-B, per example in predictions and references.",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions, references):
        return score(TASKS[self.config_name], predictions, references)
