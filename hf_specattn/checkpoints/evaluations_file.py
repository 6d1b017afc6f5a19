"""Evaluations of a checkpoint, in files next to it: experiments write them, the model card shows them.

A file has the format of the Hub's `model-index`, as in a model card's metadata. There may be several evaluations:
`evaluations.json` of the training run, `evaluations_glue-<model>.json` of `eval_glue.py`, and others of your own.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..files import write_json

EVALUATIONS = "evaluations.json"
EVALUATION_FILES = "evaluations*.json"


def write_evaluations(
    folder: str | Path, model_name: str, results: Sequence[EvalResult], file_name: str = EVALUATIONS
) -> Path:
    """Write evaluation results of a model into a checkpoint's folder.

    Args:
        model_name: of the model that was evaluated; the card has its own name.
        file_name: a name that `evaluations*.json` matches.

    Returns:
        The file.

    Raises:
        ValueError: for nan and infinities, which JSON does not have.
    """
    file = Path(folder) / file_name
    write_json(file, eval_results_to_model_index(model_name, list(results)))
    return file


def read_evaluations(folder: str | Path) -> list[EvalResult]:
    """The content of all files `evaluations*.json` in a folder, in the order of their names; empty if there are none.

    Raises:
        ValueError: for a damaged file, and for two files with the same metric of the same data.
    """
    found: list[EvalResult] = []
    origin: dict[tuple[object, ...], Path] = {}
    for file in sorted(Path(folder).glob(EVALUATION_FILES)):
        try:
            _, results = model_index_to_eval_results(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); move it away, or restore it.") from error
        for result in results:
            other = origin.setdefault((*result.unique_identifier, result.metric_type), file)
            if other != file:
                raise ValueError(
                    f"{other} and {file} both have the {result.metric_type} of {result.dataset_name}, "
                    f"{result.dataset_split}: of two models or two runs. Keep the file of this checkpoint."
                )
        found += results
    return found
