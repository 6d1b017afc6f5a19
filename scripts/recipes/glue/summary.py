"""What the runs say together: scores over seeds, averages over tasks, paired differences between models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from ..compare.comparison import PairedDifference, paired_difference
from .glue_results import FAILED, FINISHED, RunRecord
from .tasks import COLUMNS, Column


@dataclass(frozen=True)
class Scores:
    """A model's scores in one column, in points of 100, or their average over columns.

    Attributes:
        by_seed: Seed -> score; of an average, for the seeds that have all of its columns.
        mean, median: Over seeds; of an average, the averages of the columns' own. None without a score.
        failed: Runs that came to no score.
        columns: Over how many columns; None for one column itself.
    """

    by_seed: Mapping[int, float]
    mean: float | None
    median: float | None
    failed: int = 0
    columns: int | None = None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (divisor n - 1); None for fewer than two."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


class Summary:
    """The scores of all models in all columns that any run has.

    Args:
        records: From `Results.read`.
        reference: The model that differences are taken to; where it has no run the first that is not conditioned, else the
            first.

    Raises:
        ValueError: without any record.
    """

    def __init__(self, records: Sequence[RunRecord], reference: str | None = None) -> None:
        if not records:
            raise ValueError("There is no run to report.")
        self.records = list(records)
        self.models = list(dict.fromkeys(record.model for record in records))
        tasks = {record.task for record in records}
        self.columns = [column for column in COLUMNS if column.task.name in tasks]
        self.reference = self._find_reference(reference)

    def _find_reference(self, reference: str | None) -> str:
        if reference in self.models:  # of a command that was stopped it may have no run yet
            return str(reference)
        stock = [record.model for record in self.records if not record.settings.get("conditioning")]
        return (stock or self.models)[0]

    def runs_of(self, model: str, task: str) -> list[RunRecord]:
        """Return a model's runs on a task."""
        return [record for record in self.records if (record.model, record.task) == (model, task)]

    def scores(self, model: str, column: Column) -> Scores:
        """Return a model's scores in one column."""
        runs = self.runs_of(model, column.task.name)
        found = {
            run.seed: 100 * run.scores[column.split.name][column.task.main_metric]
            for run in runs
            if run.status == FINISHED
        }
        failed = sum(run.status == FAILED for run in runs)
        if not found:
            return Scores({}, None, None, failed)
        return Scores(dict(sorted(found.items())), fmean(found.values()), median(found.values()), failed)

    def average(self, model: str, columns: Sequence[Column] | None = None) -> Scores:
        """Return a model's average over those columns (None: all) in which it has a score."""
        found = [self.scores(model, column) for column in (self.columns if columns is None else columns)]
        found = [scores for scores in found if scores.by_seed]
        if not found:
            return Scores({}, None, None, columns=0)
        complete = set.intersection(*(set(scores.by_seed) for scores in found))
        by_seed = {seed: fmean(scores.by_seed[seed] for scores in found) for seed in sorted(complete)}
        means, medians = (fmean(getattr(scores, statistic) for scores in found) for statistic in ("mean", "median"))
        return Scores(by_seed, means, medians, columns=len(found))

    def difference(self, model: str, column: Column | None) -> PairedDifference | None:
        """Return a model's scores minus the reference's over common seeds, in a column or (None) on average.

        None without a common seed, and for averages over different columns. Without scipy there are no intervals.
        """
        if column is not None:
            return _difference(self.scores(model, column).by_seed, self.scores(self.reference, column).by_seed)
        own, other = self.average(model), self.average(self.reference)
        if self.scored_columns(model) != self.scored_columns(self.reference):
            return None
        return _difference(own.by_seed, other.by_seed)

    def constant_score(self, column: Column) -> float | None:
        """Return the best score of a constant answer on the development set, in points of 100; None where undefined."""
        for record in self.records:
            if record.task == column.task.name:
                value = record.data.get("constant_answer", {}).get(column.split.name)
                return None if value is None else 100 * value
        return None

    @property
    def failures(self) -> list[RunRecord]:
        """The runs that came to no score."""
        return [record for record in self.records if record.status == FAILED]

    @property
    def seeds(self) -> list[int]:
        """All seeds of all runs."""
        return sorted({record.seed for record in self.records})

    def scored_columns(self, model: str) -> list[str]:
        """Return the titles of the columns in which a model has a score."""
        return [column.title for column in self.columns if self.scores(model, column).by_seed]

    @property
    def one_mnli(self) -> list[Column] | None:
        """The columns without MNLI's mismatched set, as the conditioning paper averages them; None if they are all."""
        kept = [column for column in self.columns if column.title != "MNLI-mm"]
        return kept if len(kept) < len(self.columns) else None


def _difference(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference | None:
    try:
        return paired_difference(values, reference)
    except ImportError:  # scipy, for the interval
        seeds = tuple(sorted(values.keys() & reference.keys()))
        return PairedDifference(fmean(values[seed] - reference[seed] for seed in seeds), seeds, None)
