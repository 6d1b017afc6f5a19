"""Table 4 of the conditioning paper: masked language models are pretrained, and each is fine-tuned on GLUE.

A seed is that of a pretraining and of the fine-tunings that follow it, as in the paper, so that scores pair by seed.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_specattn.crammed_bert import CrammedBertForSequenceClassification
from hf_specattn.figures import markdown_table

from ...glue.glue_arguments import GlueArguments, parse_arguments
from ...glue.glue_files import read_examples
from ...glue.glue_report import difference_rows, markdown, table_header
from ...glue.glue_results import FINISHED, RunRecord
from ...glue.glue_results import Results as GlueResults
from ...glue.summary import Summary
from ...glue.tasks import TASKS
from ...text.pretrain_arguments import PretrainArguments
from .design import Flags, PlannedRun, Setting, Sweep, SweepError, Variant
from .runner import Machine, failure, run_all
from .sweep_presets import MIMETIC, SEEDS, STOCK, identity
from .text_sweeps import TEXT_SCRIPT, sequence_operations

GLUE_SCRIPT = "eval_glue.py"
# Of the official files.
TRAINING_EXAMPLES = {
    "mnli": 392_702,
    "sst2": 67_349,
    "stsb": 5_749,
    "rte": 2_490,
    "qnli": 104_743,
    "qqp": 363_846,
    "mrpc": 3_668,
    "cola": 8_551,
}

# Pieces of words, and loud positions: a model of this size then learns within two minutes of one core to look at neighbors.
SMALL_PRETRAINING: Flags = (
    *("--normalize_text", "True", "--vocab_size", "1024", "--max_seq_length", "64"),
    *("--hidden_size", "64", "--num_hidden_layers", "4", "--num_attention_heads", "4", "--intermediate_size", "128"),
    *("--position_scale", "1", "--learning_rate", "2e-3", "--max_steps", "1500"),
    *("--per_device_train_batch_size", "32", "--eval_steps", "200", "--logging_steps", "200", "--save_steps", "0"),
)
# The protocol's learning rate is made for a width of 768.
SMALL_FINE_TUNING: Flags = (
    *("--max_seq_length", "64", "--max_train_samples", "16000"),
    *("--learning_rate", "1e-3", "--num_train_epochs", "3", "--train_batch_size", "32"),
)
PAPER_PRETRAINING: Flags = ("--preset", "crammed-bert", "--num_hidden_layers", "12")
TABLE_4 = (
    "Table 4 of the paper: GLUE, five seeds",
    (
        ("model", "MNLI", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA", "average"),
        (
            *("original", "83.8 ± 0.21", "92.3 ± 0.18", "86.3 ± 0.21", "55.1 ± 0.20", "90.1 ± 0.23", "87.3 ± 0.15"),
            *("85.0 ± 0.25", "48.9 ± 0.26", "78.6"),
        ),
        (
            *("conditioned", "84.3 ± 0.20", "92.7 ± 0.19", "86.6 ± 0.22", "55.5 ± 0.24", "91.0 ± 0.22", "87.5 ± 0.23"),
            *("86.1 ± 0.23", "51.7 ± 0.24", "79.4"),
        ),
    ),
)


def table4(scale: str, scripts: Path) -> Sweep:
    """Crammed BERT stock, stock with the norms of the conditioned one (small: and with the mimetic start), conditioned."""
    strength, pretraining, flags, tasks, starts = {
        "small": (1.0, SMALL_PRETRAINING, SMALL_FINE_TUNING, ("cola", "rte", "sst2"), (MIMETIC,)),
        "paper": (10.0, PAPER_PRETRAINING, (), tuple(TASKS), ()),
    }[scale]
    treated = identity(strength)
    control = Variant(f"stock, norm of {treated.label}", ("--match_norm_of", f"identity={strength:g}"))
    return Sweep(
        "table4",
        "Pretraining, then GLUE",
        scripts / TEXT_SCRIPT,
        (Setting("Crammed BERT"),),
        (STOCK, control, *starts, replace(treated, control=control.label)),
        SEEDS if scale == "paper" else SEEDS[:3],
        common=pretraining,
        published=TABLE_4,
        glue_tasks=tasks,
        glue_flags=flags,
    )


@dataclass(frozen=True)
class FineTuning(PlannedRun):
    """One task for one pretrained model, in a folder below the model's.

    Attributes:
        label: Of the model, in the tables.
        pretrained: The run that trains the model.
    """

    label: str
    pretrained: PlannedRun

    def directory(self, runs_dir: Path) -> Path:
        return super().directory(self.pretrained.directory(runs_dir))

    def arguments(self, runs_dir: Path, *, anew: bool = False) -> list[str]:
        return [
            *("--model_name_or_path", str(self.pretrained.directory(runs_dir)), "--labels", self.label),
            *("--tasks", self.name, *self.flags, "--seeds", str(self.seed)),
            *("--output_dir", str(self.directory(runs_dir)), "--cache_dir", str(runs_dir / "glue-cache")),
            *("--retry_failed", "True", "--disable_tqdm", "True"),
        ]

    def finished(self, runs_dir: Path) -> RunRecord | None:
        records = GlueResults(self.directory(runs_dir)).read()
        return next((record for record in records if record.status == FINISHED), None)


def fine_tunings(sweep: Sweep) -> list[FineTuning]:
    """Return every fine-tuning of a sweep that tunes nothing, seeds outermost."""
    script = sweep.script.with_name(GLUE_SCRIPT)
    runs = [
        FineTuning(script, task, sweep.glue_flags, run.seed, variant.label, run)
        for setting in sweep.settings
        for variant in sweep.variants
        for run in sweep.runs(setting, variant, {})
        for task in sweep.glue_tasks
    ]
    return sorted(runs, key=lambda run: sweep.seeds.index(run.seed))


def check_fine_tunings(sweep: Sweep, runs_dir: Path) -> None:
    """Let `eval_glue.py` read the flags, and read the data, before the first model is pretrained.

    Raises:
        GlueDataError: for data that are missing or damaged.
    """
    for run in {run.name: run for run in fine_tunings(sweep)}.values():
        arguments, _ = parse_arguments(run.arguments(runs_dir), f"a run of {run.name}")
        task = TASKS[run.name]
        for split in (*task.splits_of("train"), *task.splits_of("validation")):
            read_examples(task, split, arguments.data_dir, arguments.dataset_name)


def fine_tune(
    sweep: Sweep, runs_dir: Path, machine: Machine, disable_tqdm: bool = False
) -> tuple[list[RunRecord], list[PlannedRun]]:
    """Fine-tune every model that was pretrained to its end, as far as that is missing.

    Returns:
        The records, and the runs that failed.

    Raises:
        SweepError: if none came to its end.
    """
    runs = [run for run in fine_tunings(sweep) if run.pretrained.finished(runs_dir) is not None]
    failed = run_all(runs, runs_dir, machine, description="GLUE", disable_tqdm=disable_tqdm)
    records = [record for run in runs if (record := run.finished(runs_dir)) is not None]
    if not records:
        raise SweepError(f"No fine-tuning of {sweep.name} came to its end; the first: {failure(runs[0], runs_dir)}")
    return records, failed


def glue_section(sweep: Sweep, records: Sequence[RunRecord], failed: Sequence[PlannedRun], runs_dir: Path) -> str:
    """The tables of the scores as Markdown: every model, and those with a control beside it."""
    parts = ["## GLUE", markdown(Summary(records, sweep.reference.label))]
    for variant in sweep.variants:
        if variant.control is not None:
            beside = Summary(records, variant.control)
            parts += [
                "Beside its control:",
                markdown_table(table_header(beside), difference_rows(beside, variant.label)),
            ]
    if failed:
        folders = "; ".join(os.path.relpath(run.directory(runs_dir), runs_dir) for run in failed)
        parts.append(f"Fine-tunings that did not come to their end, and are in no mean: {folders}.")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def glue_arms(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return every score as `as_json` has results: an arm for each development set and model, and one for the average."""
    summary = Summary(records)
    arms = []
    for model in summary.models:
        for column in (*summary.columns, None):
            is_first = column is not None and column.split is column.task.splits_of("validation")[0]
            runs = summary.runs_of(model, column.task.name) if column is not None and is_first else []
            scores = summary.average(model) if column is None else summary.scores(model, column)
            arms.append(
                {
                    "setting": "GLUE, average" if column is None else column.heading,
                    "variant": model,
                    "values": {str(seed): value for seed, value in scores.by_seed.items()},
                    # MNLI's two development sets are of one run.
                    "seconds": {str(run.seed): run.seconds["total"] for run in runs},
                }
            )
    return arms


def fine_tuning_operations(pretraining: PretrainArguments, glue: GlueArguments) -> float:
    """Operations of training one model on its tasks, every text as long as texts may be."""
    protocol = glue.resolved_protocol
    counts = [TRAINING_EXAMPLES[task.name] for task in glue.glue_tasks]
    examples = sum(min(count, glue.max_train_samples or count) for count in counts) * protocol.num_train_epochs
    return examples * sequence_operations(CrammedBertForSequenceClassification, pretraining, protocol.max_seq_length)


GLUE_SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {"table4": table4}
