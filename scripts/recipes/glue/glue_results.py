"""The record of every fine-tuning run, in one file that is whole at any moment, and which runs may stand in one table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_specattn.files import write_json

from .tasks import TASKS

RESULTS_FILE = "results.json"
FORMAT = 1

FINISHED, FAILED = "finished", "failed"


class ResultsError(ValueError):
    """Results that cannot be read, or that do not belong into one table; the message names the file or value."""


@dataclass
class RunRecord:
    """One model, fine-tuned on one task with one seed.

    Attributes:
        settings: Everything about the model and its training that decides the scores.
        data: Everything about the task's data that decides them; equal for all models.
        scores: Development set -> metric -> value, as fractions of 1; of a finished run.
        failure: Its `kind` and a `message`; of a failed run.
        first_loss: Mean loss of the first step's examples, before any change of the weights.
        epoch_losses: Mean loss of each epoch's examples, while training.
        facts: What else was found: steps, speed, parameters, hardware, ...
        seconds: Wall-clock time of `training`, `evaluation`, and the whole run as `total`.
        outputs: What was written beside the record, below the results' folder: predictions, the model.
    """

    model: str
    task: str
    seed: int
    settings: dict[str, Any]
    data: dict[str, Any]
    status: str = FINISHED
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    failure: dict[str, str] | None = None
    first_loss: float | None = None
    epoch_losses: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from other runs."""
        return self.model, self.task, self.seed


class Results:
    """The records of one folder, `results.json`.

    Several commands may work into one folder at once, each on other runs: a lock keeps their records.

    Args:
        directory: Created with the first record.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / RESULTS_FILE

    def read(self) -> list[RunRecord]:
        """Return all records; none where there is no file yet.

        Raises:
            ResultsError: for a damaged file, or one of something else.
        """
        if not self.path.is_file():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ResultsError(f"{self.path} has the format {content['format']}; this version reads {FORMAT}.")
            records = [RunRecord(**run) for run in content["runs"]]
        except ResultsError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:  # no JSON, or JSON of something else
            raise ResultsError(
                f"{self.path} is damaged or not a record of GLUE runs: {error!r}. Move it away, or name another --output_dir."
            ) from error
        if unknown := sorted({record.task for record in records} - set(TASKS)):
            raise ResultsError(f"{self.path} has runs of unknown tasks: {', '.join(unknown)}. Move it away.")
        return records

    def add(self, record: RunRecord) -> None:
        """Write a record, in place of an earlier one of the same run.

        Raises:
            ResultsError: with the record, where the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                records = {old.key: old for old in self.read()}
                records[record.key] = record
                write_json(self.path, {"format": FORMAT, "runs": [asdict(each) for each in records.values()]})
        except OSError as error:
            raise ResultsError(
                f"{self.path} cannot be written: {error}. Its last whole state is kept. The run that is not in it, for "
                f"you to keep: {json.dumps(asdict(record))}"
            ) from error


def find_conflicts(existing: Iterable[RunRecord], planned: Sequence[RunRecord]) -> list[str]:
    """Return one line for each setting in which a planned run differs from a run that it would share a row or column with.

    A model's row must come from one way of training, and a task's column from one set of data.
    """
    lines: dict[str, None] = {}  # a set that keeps the order
    for old in existing:
        for new in planned:
            if old.model == new.model:
                lines |= dict.fromkeys(_differences(old.model, old.settings, new.settings))
            if old.task == new.task:
                lines |= dict.fromkeys(_differences(TASKS[old.task].title, old.data, new.data))
    return list(lines)


def _differences(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    old, new = (json.loads(json.dumps(settings)) for settings in (old, new))  # JSON has no tuples
    absent = "not recorded"
    return [
        f"{name}: {setting} was {old.get(setting, absent)}, and is {new.get(setting, absent)}"
        for setting in sorted(old.keys() | new.keys())
        if old.get(setting, absent) != new.get(setting, absent)
    ]


def differing_settings(records: Iterable[RunRecord]) -> dict[str, dict[str, Any]]:
    """Return the settings in which models differ: setting -> model -> value."""
    by_model = {record.model: record.settings for record in records}
    names = {name: None for settings in by_model.values() for name in settings}
    found = {name: {model: settings.get(name) for model, settings in by_model.items()} for name in names}
    return {
        name: values for name, values in found.items() if len({json.dumps(value) for value in values.values()}) > 1
    }
