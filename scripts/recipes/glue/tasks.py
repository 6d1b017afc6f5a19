"""The GLUE tasks: where their text, labels and predictions stand, in the official files and on the Hub, and their metrics.

The tasks, metrics and files are those of Wang et al., "GLUE: A multi-task benchmark and analysis platform for natural
language understanding" (ICLR 2019, https://gluebenchmark.com). WNLI is left out, as in BERT and in Crammed BERT: its
development set contradicts its training set, and a constant answer beats models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

DEFAULT_DATASET = "nyu-mll/glue"

METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
# How the table's headings name them.
METRIC_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
}

# The scores that STS-B's annotators could give.
LOWEST_SIMILARITY, HIGHEST_SIMILARITY = 0.0, 5.0

LARGER_GLUE = "GLUE has a ninth task, WNLI, which is left out here as in BERT's and Crammed BERT's tables"


@dataclass(frozen=True)
class GlueSplit:
    """One set of examples of a task.

    Attributes:
        name: As on the Hub, such as "validation_matched".
        stem: Name of the official file without `.tsv`, such as "dev_matched".
        title: Heading of its column in tables, such as "MNLI-mm"; of a test set, the name of its file in a submission.
    """

    name: str
    stem: str
    kind: Literal["train", "validation", "test"]
    title: str


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: As on the Hub and on the command line, such as "sst2".
        title: As in print, and the name of its official folder, such as "SST-2".
        hub_text_columns: Columns of the one or two texts on the Hub.
        tsv_text_columns: The same in the official files.
        tsv_label_column: Column of the label in the official files.
        labels: The labels as they are spelled in the official files and in submissions, in the order of their numbers; empty
            for a regression.
        label_names: The same in words, as on the Hub.
        metrics: The first stands in tables; all are recorded.
        splits: Its sets of examples.
        index_column: What numbers the rows of the official test files.
        headerless_columns: The columns of official training and development files that have no header.
        may_be_incomplete: Whether its official training and development files have rows that lack columns.
    """

    name: str
    title: str
    hub_text_columns: tuple[str, ...]
    tsv_text_columns: tuple[str, ...]
    tsv_label_column: str
    labels: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: tuple[GlueSplit, ...]
    index_column: str = "index"
    headerless_columns: tuple[str, ...] | None = None
    may_be_incomplete: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number, not a class."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """How many numbers a model computes for an example: one per class, or one."""
        return len(self.labels) or 1

    @property
    def main_metric(self) -> str:
        """The metric that stands in tables."""
        return self.metrics[0]

    def splits_of(self, kind: str) -> tuple[GlueSplit, ...]:
        """Return its training, validation or test sets."""
        return tuple(split for split in self.splits if split.kind == kind)


@dataclass(frozen=True)
class Column:
    """One number of the table: a task's main metric on one of its development sets."""

    task: GlueTask
    split: GlueSplit

    @property
    def title(self) -> str:
        """Its heading without the metric."""
        return self.split.title

    @property
    def heading(self) -> str:
        """Its heading, such as "CoLA (Matthews)"."""
        return f"{self.title} ({METRIC_TITLES[self.task.main_metric]})"


def _splits(title: str) -> tuple[GlueSplit, ...]:
    return (
        GlueSplit("train", "train", "train", title),
        GlueSplit("validation", "dev", "validation", title),
        GlueSplit("test", "test", "test", title),
    )


_MNLI_SPLITS = (
    GlueSplit("train", "train", "train", "MNLI"),
    GlueSplit("validation_matched", "dev_matched", "validation", "MNLI-m"),
    GlueSplit("validation_mismatched", "dev_mismatched", "validation", "MNLI-mm"),
    GlueSplit("test_matched", "test_matched", "test", "MNLI-m"),
    GlueSplit("test_mismatched", "test_mismatched", "test", "MNLI-mm"),
)

_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

# In the column order of the conditioning paper's table 4.
TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            _PAIR,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            _MNLI_SPLITS,
        ),
        GlueTask(
            "sst2",
            "SST-2",
            ("sentence",),
            ("sentence",),
            "label",
            ("0", "1"),
            ("negative", "positive"),
            ("accuracy",),
            _splits("SST-2"),
        ),
        GlueTask("stsb", "STS-B", _PAIR, _PAIR, "score", (), (), ("pearson", "spearmanr"), _splits("STS-B")),
        GlueTask("rte", "RTE", _PAIR, _PAIR, "label", _ENTAILMENT, _ENTAILMENT, ("accuracy",), _splits("RTE")),
        GlueTask(
            "qnli",
            "QNLI",
            ("question", "sentence"),
            ("question", "sentence"),
            "label",
            _ENTAILMENT,
            _ENTAILMENT,
            ("accuracy",),
            _splits("QNLI"),
        ),
        GlueTask(
            "qqp",
            "QQP",
            ("question1", "question2"),
            ("question1", "question2"),
            "is_duplicate",
            ("0", "1"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            _splits("QQP"),
            index_column="id",
            may_be_incomplete=True,
        ),
        GlueTask(
            "mrpc",
            "MRPC",
            _PAIR,
            ("#1 String", "#2 String"),
            "Quality",
            ("0", "1"),
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            _splits("MRPC"),
        ),
        GlueTask(
            "cola",
            "CoLA",
            ("sentence",),
            ("sentence",),
            "label",
            ("0", "1"),
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            _splits("CoLA"),
            headerless_columns=("source", "label", "star", "sentence"),
        ),
    )
}

COLUMNS: tuple[Column, ...] = tuple(
    Column(task, split) for task in TASKS.values() for split in task.splits_of("validation")
)


def parse_tasks(names: str | Iterable[str]) -> list[GlueTask]:
    """Return the tasks that `--tasks` names: "all", or names separated by commas or spaces, in the order given.

    Raises:
        ValueError: for an unknown task, one that is named twice, and none at all.
    """
    parts = [names] if isinstance(names, str) else list(names)
    wanted = [name.strip().lower() for part in parts for name in part.split(",") if name.strip()]
    if wanted == ["all"]:
        return list(TASKS.values())
    if unknown := [name for name in wanted if name not in TASKS]:
        reason = f" ({LARGER_GLUE}.)" if "wnli" in unknown else ""
        raise ValueError(
            f"--tasks {', '.join(unknown)}: unknown; choose all, or some of {', '.join(TASKS)}, separated by commas.{reason}"
        )
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"--tasks {','.join(wanted)}: a task is named twice; name each once.")
    if not wanted:
        raise ValueError(f"--tasks names no task; choose all, or some of {', '.join(TASKS)}.")
    return [TASKS[name] for name in wanted]
