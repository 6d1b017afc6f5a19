"""The data of the tasks: read, checked and tokenized once for all models and runs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .features import prepare_tokens, tokenizer_fingerprint
from .glue_arguments import GlueArguments
from .glue_files import Examples, read_examples
from .glue_models import ModelVariant
from .glue_scores import best_constant_score
from .tasks import GlueTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The data of a task.

    Attributes:
        task: Which one.
        description: What tells it from other data, and its sizes; equal for all models.
        files: Tokenizer's fingerprint -> split -> file with the token ids.
    """

    task: GlueTask
    description: dict[str, Any]
    files: dict[str, dict[str, Path]]


def prepare_data(arguments: GlueArguments, variants: Sequence[ModelVariant], bars: bool) -> dict[str, TaskData]:
    """Prepare all tasks. Everything that is wrong with the data shows here.

    Args:
        bars: Whether to draw progress bars.
    """
    tasks = tqdm(arguments.glue_tasks, desc="Preparing", unit="task", disable=not bars)
    data = {task.name: _prepare_task(arguments, task, variants, bars) for task in tasks}
    if arguments.runs_all_tasks:  # the smallest first: what is wrong shows early
        data = dict(sorted(data.items(), key=lambda item: item[1].description["train_examples"]))
    return data


def _prepare_task(arguments: GlueArguments, task: GlueTask, variants: Sequence[ModelVariant], bars: bool) -> TaskData:
    protocol = arguments.resolved_protocol
    tokenizers = {tokenizer_fingerprint(variant.tokenizer): variant.tokenizer for variant in variants}
    files: dict[str, dict[str, Path]] = {fingerprint: {} for fingerprint in tokenizers}
    description: dict[str, Any] = {"constant_answer": {}}
    for split in task.splits:
        if split.kind == "test" and not arguments.do_predict:
            continue
        limit = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}.get(split.kind)
        examples = read_examples(task, split, arguments.data_dir, arguments.dataset_name).subset(limit)
        if split.kind != "test":
            _describe_split(description, task, split.name, examples)
        for fingerprint, tokenizer in tokenizers.items():
            files[fingerprint][split.name] = prepare_tokens(
                examples,
                tokenizer,
                protocol.max_seq_length,
                arguments.resolved_cache_dir,
                f"{task.name}-{split.name}",
                empty_second=protocol.empty_second,
                show_progress=bars,
            )
    logger.info(f"{task.title}: {description['train_examples']:,} examples to train on.")
    return TaskData(task, description, files)


def _describe_split(description: dict[str, Any], task: GlueTask, split: str, examples: Examples) -> None:
    description[f"{split}_fingerprint"] = examples.fingerprint()
    description[f"{split}_examples"] = len(examples)
    if split != "train" and examples.labels is not None:
        description["constant_answer"][split] = best_constant_score(task, examples.labels)
