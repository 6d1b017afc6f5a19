"""What the model card of a checkpoint says of GLUE: means over seeds, one file for each model in the results."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult

from hf_specattn.checkpoints.evaluations_file import write_evaluations

from .glue_arguments import folder_name
from .glue_results import RunRecord
from .tasks import DEFAULT_DATASET, METRIC_TITLES, TASKS

GLUE_EVALUATIONS = "evaluations_glue-*.json"


def write_glue_evaluations(records: Sequence[RunRecord], folder: str | Path) -> None:
    """Write `evaluations_glue-<model>.json` for each model that has a score, to be copied beside that model's checkpoint."""
    scored = [record for record in records if record.scores]
    for model in dict.fromkeys(record.model for record in scored):
        results = glue_evaluations([record for record in scored if record.model == model])
        write_evaluations(folder, model, results, GLUE_EVALUATIONS.replace("*", folder_name(model)))


def glue_evaluations(records: Sequence[RunRecord]) -> list[EvalResult]:
    """Return the scores of one model, as fractions of 1: for each metric of each development set the mean over its runs.

    Args:
        records: Of finished runs.
    """
    found = []
    for task in TASKS.values():
        runs = [record for record in records if record.task == task.name]
        for split, scores in runs[0].scores.items() if runs else ():
            for metric in scores:
                values = [run.scores[split][metric] for run in runs]
                found.append(
                    EvalResult(
                        task_type="text-classification",
                        dataset_type=DEFAULT_DATASET,
                        dataset_name=f"GLUE {task.title}",
                        dataset_config=task.name,
                        dataset_split=split,
                        metric_type=metric,
                        metric_name=f"{METRIC_TITLES.get(metric, metric)}, mean of {len(values)} seed(s)",
                        metric_value=sum(values) / len(values),
                    )
                )
    return found
