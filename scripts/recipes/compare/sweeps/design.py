"""What a sweep consists of: settings (columns), variants (rows), seeds, and values that are tuned first."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..comparison import ComparisonError, read_run

Flags = tuple[str, ...]

# What every run has from its sweep, and what makes a stock model another: `--` cannot give it.
OF_EVERY_RUN = {"--seed", "--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}
CONDITIONING = {"--spectral_conditioning", "--attention_preconditioner"}


class SweepError(ValueError):
    """A sweep cannot be planned or run; the message says what to change."""


@dataclass(frozen=True)
class Setting:
    """What a column of a table has in common: a model, with the flags that build and train it."""

    label: str
    flags: Flags = ()


@dataclass(frozen=True)
class Variant:
    """What is done to the model of every setting.

    Attributes:
        label: For the tables.
        flags: For the training script; `{name}` stands for the value that the tuning of that name chose for the setting.
        strength: The lambda, for a picture over it; None where there is none.
        start: Which start the variant belongs to: variants of one start are drawn together.
        control: Label of the variant that shares everything with this one but what is asked about, such as a stock model of
            the same norm; differences are taken to it, too.
    """

    label: str
    flags: Flags = ()
    strength: float | None = None
    start: str = ""
    control: str | None = None


@dataclass(frozen=True)
class Tuning:
    """A value that is chosen for each setting before the sweep, by the mean result over seeds that the sweep does not use.

    Attributes:
        name: By which variants name the value.
        values: To choose from, rising.
        flags: Of a candidate, with `{value}` in them, and the names of tunings that stand before this one.
    """

    name: str
    values: tuple[float, ...]
    flags: Flags

    def candidate(self, value: float, chosen: Mapping[str, float | str]) -> Variant:
        """The variant that tries a value, with what the tunings before chose."""
        texts = _texts(chosen) | {"value": f"{value:g}"}
        return Variant(f"{self.name} {value:g}", tuple(_filled(flag, texts) for flag in self.flags))


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Attributes:
        name: Of the report's files.
        title: Of the report.
        script: The training script.
        settings, variants: The grid; the first variant is the one that differences are taken to.
        seeds: Of every arm.
        layout: How the short table is laid out: "settings" or "variants" as its columns, "time", or "results".
        common: Flags of every run.
        tunings: What is chosen first.
        tuning_seeds: For that; none of `seeds`.
        tuning_flags: Of the runs of every tuning besides, such as other data to choose by.
        second_references: Labels of other variants; differences are taken to the best of them, too.
        published: The paper's table, as header and rows, with a caption; None where it has none.
        results: Of layout "results", the columns: names in the record of a saved model, with their headers; in percent.
        draws_monitor: Whether its report has the papers' figures of what the monitor saw.
        glue_tasks: What every model is fine-tuned on then, by the names of `eval_glue.py`; none where empty.
        glue_flags: Of that script, for all of them.
    """

    name: str
    title: str
    script: Path
    settings: tuple[Setting, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    layout: str = "settings"
    common: Flags = ()
    tunings: tuple[Tuning, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    tuning_flags: Flags = ()
    second_references: tuple[str, ...] = ()
    published: tuple[str, tuple[tuple[str, ...], ...]] | None = field(default=None, repr=False)
    results: tuple[tuple[str, str], ...] = ()
    draws_monitor: bool = False
    glue_tasks: tuple[str, ...] = ()
    glue_flags: Flags = ()

    def __post_init__(self) -> None:
        for kind, items in (("settings", self.settings), ("variants", self.variants)):
            labels = [item.label for item in items]
            if repeated := sorted({label for label in labels if labels.count(label) > 1}):
                raise SweepError(f"The {kind} {', '.join(repeated)} of {self.name} stand twice; leave one out.")
        known = {variant.label for variant in self.variants}
        named = {variant.control for variant in self.variants} | set(self.second_references)
        if missing := sorted(label for label in named if label is not None and label not in known):
            raise SweepError(f"{self.name} compares with {', '.join(missing)}, which is none of its variants.")
        if not (self.settings and self.variants and self.seeds):
            raise SweepError(f"{self.name} has no run: give at least one setting, variant and seed.")
        if repeated_seeds := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise SweepError(
                f"The seeds {', '.join(map(str, repeated_seeds))} of {self.name} stand twice; leave one out."
            )
        if common := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise SweepError(
                f"The seeds {', '.join(map(str, common))} tune and report: a choice would be judged by what it was made from."
            )

    @property
    def reference(self) -> Variant:
        """The variant that differences are taken to."""
        return self.variants[0]

    def tuning_runs(
        self, setting: Setting, tuning: Tuning, chosen: Mapping[str, float | str]
    ) -> dict[float, list["PlannedRun"]]:
        """Return the runs that choose a setting's value of one tuning: value -> runs.

        Args:
            setting, tuning: Which.
            chosen: What the tunings before it chose for the setting, or a name in its place.
        """
        runs = {}
        for value in tuning.values:
            flags = (*self.tuning_flags, *tuning.candidate(value, chosen).flags)
            runs[value] = [self._run(setting, flags, seed) for seed in self.tuning_seeds]
        return runs

    def runs(self, setting: Setting, variant: Variant, chosen: Mapping[str, float | str]) -> list["PlannedRun"]:
        """Return the runs of an arm, one for each seed.

        Args:
            setting, variant: The arm.
            chosen: What the tunings chose for the setting, or a name in its place.

        Raises:
            SweepError: for a variant that names a value which nothing chose.
        """
        texts = _texts(chosen)
        try:
            flags = tuple(_filled(flag, texts) for flag in variant.flags)
        except KeyError as error:
            raise SweepError(
                f"The variant {variant.label!r} needs the value {error}, and nothing tunes it."
            ) from error
        return [self._run(setting, flags, seed) for seed in self.seeds]

    def refuse_contradictions(self, behind: Sequence[str]) -> None:
        """Refuse flags for every run that it sets itself: for some runs they would do nothing, or undo what these are.

        Raises:
            SweepError: naming one.
        """
        parts: list[Any] = [*self.settings, *self.variants, *self.tunings]
        own = {word for part in parts for word in part.flags}
        for word in behind:
            name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
            named = {name, f"{name}_", name.replace("--seeds", "--seed")}
            if name.startswith("--") and named & (own | OF_EVERY_RUN | CONDITIONING):
                raise SweepError(
                    f"{word} is for every run, but {self.name} sets it for some or all of them. Leave it out"
                    f"{'; a grid takes --seeds, --methods and others before the `--`' if self.name == 'grid' else ''}."
                )

    def _run(self, setting: Setting, flags: Sequence[str], seed: int) -> "PlannedRun":
        return PlannedRun(self.script, setting.label, (*self.common, *setting.flags, *flags), seed)


def _texts(chosen: Mapping[str, float | str]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else f"{value:g}" for name, value in chosen.items()}


def _filled(flag: str, texts: Mapping[str, str]) -> str:
    """A flag with values in the place of names in braces; other braces, as JSON has them, stay."""
    return re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], flag)


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        script: That trains.
        name: For the folder, beside what follows from the flags.
        flags: But for seed and folder.
        seed: Of the run.
    """

    script: Path
    name: str
    flags: Flags
    seed: int

    def directory(self, runs_dir: Path) -> Path:
        """Where it is written: the same for the same run, in whichever sweep, so that sweeps share their runs."""
        digest = hashlib.sha256(json.dumps([self.script.name, *self.flags]).encode()).hexdigest()[:10]
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return runs_dir / f"{name}-{digest}" / f"seed-{self.seed}"

    def finished(self, runs_dir: Path) -> Any:
        """Return the record of the run if it came to its end; None for any other."""
        try:
            return read_run(self.directory(runs_dir))
        except ComparisonError:
            return None

    def arguments(self, runs_dir: Path, *, anew: bool = False) -> list[str]:
        """Its command line, behind the script.

        Args:
            runs_dir: The folder of all runs.
            anew: Replace what the run's folder has, where there is no checkpoint to go on from.
        """
        begin = "--overwrite_output_dir" if anew else "--resume_from_checkpoint"
        return [
            *self.flags,
            *("--seed", str(self.seed)),
            *("--output_dir", str(self.directory(runs_dir))),
            *(begin, "True", "--disable_tqdm", "True"),
        ]
