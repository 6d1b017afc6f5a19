"""Finished runs side by side: reading them, grouping them by settings, paired differences over seeds."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from hf_specattn.config import PROJECTIONS

from ..run.run_metrics import METRICS_FILE, RunMetrics
from ..run.spectral_arguments import AUTO, SpectralArguments

STOCK = "stock"

SPECTRAL_SETTINGS = frozenset(setting.name for setting in fields(SpectralArguments))
# Arguments that say what is written where, and change nothing about the trained model.
REPORTING = frozenset(
    {
        "preset",  # its values stand in the other arguments
        "show_plan",
        "cache_dir",
        "streaming",
        "output_dir",
        "overwrite_output_dir",
        "eval_steps",
        "eval_only",
        "logging_steps",
        "per_device_eval_batch_size",
        "report_to",
        "spectral_monitor_every",
        "disable_tqdm",
        "ddp_timeout",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "check_images",
        "dataloader_num_workers",
        "preprocessing_num_workers",
    }
)
# Arguments that change a run's speed, and of what it computes only the rounding: compiled kernels sum in another order.
# Under a time budget speed decides how far a run comes, so there they count.
SPEED = frozenset({"torch_compile", "gradient_checkpointing"})
# How a batch is cut among forward passes: rounding and speed again, and where a ramp begins.
CUTTING = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
# Arguments whose effect depends on how the run was launched or on what a file held: the facts count instead.
RESOLVED = CUTTING | {"mixed_precision"}
FACTS = ("global_batch_size", "mixed_precision", "train_sequences", "train_images", "train_examples")
# Facts on which a run's speed depends.
HARDWARE = ("device", "device_name", "processes", "threads")

# A point of a curve: optimizer step or training tokens (or images), and a value.
Point = tuple[float, float]

ABSENT = "not recorded"


@dataclass(frozen=True)
class Metric:
    """A result of runs that they are compared by.

    Attributes:
        key: its name in the records.
        name: in words.
        unit: of the values shown.
        factor: from the recorded value to the one shown.
        digits: behind the point.
        higher_is_better: else lower.
        final_key: the name of the saved model's result, where its curve over training is of other data.
    """

    key: str
    name: str
    unit: str
    factor: float = 1.0
    digits: int = 4
    higher_is_better: bool = False
    final_key: str | None = None

    @property
    def final_name(self) -> str:
        """The saved model's result, in words."""
        return f"final {'validation' if self.final_key is None else 'test'} {self.name}"


# What a run reads -> the metrics that it records, by the names of `--metric`; the first is the usual one.
METRICS = {
    "tokens": {"loss": Metric("validation_loss", "loss", "nats per predicted token")},
    "images": {
        "accuracy": Metric("validation_accuracy", "accuracy", "%", factor=100.0, digits=2, higher_is_better=True),
        # Of object detection, which has no accuracy.
        "box_ap": Metric("validation_box_ap", "box AP", "%", factor=100.0, digits=1, higher_is_better=True),
        "mask_ap": Metric("validation_mask_ap", "mask AP", "%", factor=100.0, digits=1, higher_is_better=True),
        "loss": Metric("validation_loss", "loss", "nats per image"),
    },
    # Of Long Range Arena: the validation part picks the weights, and all of the test part measures them.
    "examples": {
        "accuracy": Metric(
            *("validation_accuracy", "accuracy", "%", 100.0, 2), higher_is_better=True, final_key="test_accuracy"
        ),
        "loss": Metric("validation_loss", "loss", "nats per example", final_key="test_loss"),
    },
}

LARGEST_SQUARED = 1e100  # what is larger is divided before it is squared


class ComparisonError(ValueError):
    """The runs given cannot be compared; the message names the folder or value and the way out."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: its folder.
        seed: of the run.
        spectral: its spectral settings in words; "stock" where it has none.
        settings: what else decided the trained model, by name.
        record: its `metrics.json`.
    """

    directory: Path
    seed: int
    spectral: str
    settings: Mapping[str, Any] = field(repr=False)
    record: RunMetrics = field(repr=False)

    @property
    def loss(self) -> float:
        """The saved model's validation loss, in nats per predicted token."""
        return self.record.final["validation_loss"]

    def value(self, metric: Metric) -> float:
        """The saved model's result by `metric`, in its unit."""
        return self.record.final[metric.final_key or metric.key] * metric.factor

    @property
    def unit(self) -> str:
        """What the run reads: a key of `METRICS`."""
        return next((unit for unit in METRICS if f"{unit}_per_step" in self.record.facts), "tokens")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.record.final["step"]

    @property
    def tokens(self) -> int:
        """Training tokens (or images) read until the end: as recorded, else those of equal steps."""
        recorded = self.record.final.get(f"train_{self.unit}_seen")
        return self.steps * self.record.facts[f"{self.unit}_per_step"] if recorded is None else recorded

    @property
    def time_budget(self) -> float | None:
        """The hours of training that scheduled the run; None for one scheduled by a number of steps."""
        return self.record.arguments.get("max_train_hours")

    def curve(self, key: str, over_tokens: bool = False) -> list[Point]:
        """Return the training losses, or what validations measured, as points in the order of the record.

        Args:
            key: "train_loss", or the key of a metric; the values are as recorded.
            over_tokens: over the training tokens read until then, not over optimizer steps. Where a record lacks them,
                they lie on the line between its neighbors', the start and the end.
        """
        entries = self.record.history if key == "train_loss" else self.record.validation
        steps = [entry["step"] for entry in entries]
        positions = np.interp(steps, *columns(self._tokens_by_step())).tolist() if over_tokens else steps
        return [(position, entry[key]) for position, entry in zip(positions, entries)]

    def reached(self, metric: Metric, target: float, over_tokens: bool = False) -> float | None:
        """Where the first validation stands that came to a result; None where none did.

        Args:
            metric: Of the result.
            target: The result, in the metric's unit.
            over_tokens: As of `curve`.
        """
        sign = 1 if metric.higher_is_better else -1
        points = self.curve(metric.key, over_tokens)
        return next((place for place, value in points if sign * value * metric.factor >= sign * target), None)

    def _tokens_by_step(self) -> list[Point]:
        entries = [*self.record.history, *self.record.validation]
        known = {
            entry["step"]: entry[f"train_{self.unit}_seen"]
            for entry in entries
            if entry.get(f"train_{self.unit}_seen") is not None
        }
        return sorted(({0: 0} | known | {self.steps: self.tokens}).items())


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone, and what tells them from the other groups."""

    label: str
    spectral: str
    runs: tuple[Run, ...]

    def values(self, metric: Metric) -> dict[int, float]:
        """Seed -> final result by `metric`, in its unit."""
        return {run.seed: run.value(metric) for run in self.runs}

    def mean(self, metric: Metric) -> float:
        """The mean of `values`."""
        return mean_of(self.values(metric).values())

    def deviation(self, metric: Metric) -> float | None:
        """The standard deviation of `values` (divisor n - 1); None for one run."""
        values, scale = scaled(self.values(metric).values())
        return stdev(values) * scale if len(self.runs) > 1 else None

    def steps_until(self, metric: Metric, target: float) -> tuple[float | None, int]:
        """The median of the steps after which its runs came to a result (None without any), and how many did."""
        steps = [step for run in self.runs if (step := run.reached(metric, target)) is not None]
        return (median(steps) if steps else None), len(steps)

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the tokens (or images) per second over all log entries of all runs; None where nothing was logged."""
        speeds = [entry[f"{run.unit}_per_second"] for run in self.runs for entry in run.record.history]
        return median(speeds) if speeds else None


@dataclass(frozen=True)
class PairedDifference:
    """`values - reference` over the seeds that both have.

    Attributes:
        mean: of the differences.
        seeds: the common seeds.
        interval: the ends of the confidence interval of the mean; None for one seed, and for equal differences.
    """

    mean: float
    seeds: tuple[int, ...]
    interval: tuple[float, float] | None

    @property
    def contains_zero(self) -> bool:
        """Whether there is an interval and 0 lies in it."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


def read_runs(directories: Iterable[str | Path]) -> list[Run]:
    """Read several runs with `read_run`.

    Raises:
        ComparisonError: for a folder that is given twice, and as in `read_run`.
    """
    runs: dict[Path, Run] = {}
    for directory in map(Path, directories):
        if directory.resolve() in runs:
            raise ComparisonError(f"{directory} is given twice (through another path, perhaps); name each run once.")
        runs[directory.resolve()] = read_run(directory)
    return list(runs.values())


def read_run(directory: str | Path) -> Run:
    """Read the `metrics.json` of a finished run.

    Raises:
        ComparisonError: where it is missing, unreadable, or of an unfinished run.
    """
    directory = Path(directory)
    file = directory / METRICS_FILE
    if not file.is_file():
        raise ComparisonError(f"{directory} has no {METRICS_FILE}; give the --output_dir of a finished run.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = {item.name: content[item.name] for item in fields(RunMetrics) if item.name in content}
        record = RunMetrics(**known)
    except (ValueError, TypeError, RecursionError) as error:  # no JSON, or JSON of something else
        raise ComparisonError(f"{file} is damaged or no record of a run: {error}.") from error
    if damage := _damage(record):
        raise ComparisonError(f"{file} is damaged or no record of a run: {damage}.")
    if not record.final:
        raise ComparisonError(f"{file} has no final result: the run is unfinished. Let it end, or leave it out.")
    needed = {
        "arguments": ("seed",),
        "facts": ("validation_fingerprint",),
        "final": ("step", "validation_loss"),
    }
    for part, names in needed.items():
        if missing := [name for name in names if name not in getattr(record, part)]:
            raise ComparisonError(f"{file} has no {', '.join(missing)} among its {part}: no record of a training run.")
    results = {metric.final_key or metric.key for metrics in METRICS.values() for metric in metrics.values()}
    for name in ("step", *sorted(results & record.final.keys())):
        if not is_finite(record.final[name]):
            raise ComparisonError(
                f"{file} has the final {name} {record.final[name]!r}: the run diverged, or the file was edited."
            )
    if not {f"{unit}_per_step" for unit in METRICS} & set(record.facts):
        raise ComparisonError(f"{file} has no tokens_per_step among its facts: no record of a training run.")
    try:
        spectral = spectral_label(record)
    except (ValueError, TypeError, AttributeError) as error:
        raise ComparisonError(f"{file} records spectral settings that do not exist: {error}") from error
    return Run(directory, record.arguments["seed"], spectral, deciding_settings(record), record)


def _damage(record: RunMetrics) -> str | None:
    """What in a record is not as a run writes it; None if nothing is."""
    for part in ("arguments", "facts", "final"):
        if not isinstance(getattr(record, part), dict):
            return f"{part} is no object"
    for part in ("history", "validation"):
        entries = getattr(record, part)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "step" in entry for entry in entries):
            return f"{part} is no list of steps"
    speeds = {f"{unit}_per_second" for unit in METRICS}
    if not all("train_loss" in entry and speeds & entry.keys() for entry in record.history):
        return "history has a step without its loss or speed"
    if not isinstance(seed := record.arguments.get("seed", 0), int):
        return f"seed {seed!r} is no integer"
    if not isinstance(fingerprint := record.facts.get("validation_fingerprint", ""), str):
        return f"validation_fingerprint {fingerprint!r} is no text"
    return None


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither nan nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def deciding_settings(record: RunMetrics) -> dict[str, Any]:
    """Return what decided the trained model apart from the seed and the spectral settings, by name."""
    left_out = SPECTRAL_SETTINGS | REPORTING | SPEED | RESOLVED | {"seed"}
    if record.arguments.get("max_train_hours") is not None:
        left_out -= SPEED | CUTTING
    if record.arguments.get("batch_size_ramp"):
        left_out -= CUTTING
    # One file is the same data whether it stands alone or in a list.
    settings = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in record.arguments.items()
        if name not in left_out
    }
    return settings | {name: record.facts[name] for name in FACTS if name in record.facts}


def spectral_label(record: RunMetrics) -> str:
    """Return the spectral settings in words, such as "stock", "identity, lambda 1" or "svd, per head".

    Flags that mean the same (no `--lambda_`, or the default's value) give the same words.
    """
    settable = {setting.name for setting in fields(SpectralArguments) if setting.init}
    arguments = SpectralArguments(**{name: value for name, value in record.arguments.items() if name in settable})
    config = arguments.to_config()
    if config is None:
        # Continued from a conditioned checkpoint, which keeps its settings without any flag.
        inherited = str(record.facts.get("model_type", "")).startswith("specattn_")
        return "conditioned as its checkpoint" if inherited else STOCK
    parts: list[str] = [config.method]
    if arguments.is_automatic:
        parts.append(f"lambda {AUTO}")
    elif isinstance(config.lambda_, Mapping):
        parts.append("lambda " + " ".join(f"{name}={value:.12g}" for name, value in config.lambda_.items()))
    elif config.lambda_ is not None:
        parts.append(f"lambda {config.lambda_:.12g}")
    if config.targets != PROJECTIONS:
        parts.append(f"on {'+'.join(config.targets)}")
    if config.granularity == "head":
        parts.append("per head")
    if config.refresh_every is not None:
        by = {None: "", True: " by SVD", False: " by products"}[arguments.spectral_exact_refresh]
        parts.append(f"refreshed every {config.refresh_every}{by}")
    if arguments.init != "additive":
        parts.append(arguments.init)
    return ", ".join(parts)


def group_runs(runs: Sequence[Run], labels: Sequence[str] | None = None) -> list[RunGroup]:
    """Group runs that differ in their seed alone, in the order of first appearance.

    Args:
        labels: one name per group, in that order; None takes the spectral settings and whatever else differs between
            the groups.

    Raises:
        ComparisonError: for two runs of one seed in a group, and for labels that repeat or are too few or many.
    """
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.spectral, json.dumps(run.settings, sort_keys=True)), []).append(run)
    for members in grouped.values():
        seeds: dict[int, Run] = {}
        for run in members:
            if run.seed in seeds:
                raise ComparisonError(
                    f"{seeds[run.seed].directory} and {run.directory} are runs of one seed ({run.seed}) with the same "
                    "settings; leave one out."
                )
            seeds[run.seed] = run
    derived = derived_labels([members[0] for members in grouped.values()])
    names = derived if labels is None else list(labels)
    if len(names) != len(grouped) or len(set(names)) != len(names):
        raise ComparisonError(
            f"--labels {' '.join(map(repr, names))}: the runs form {len(grouped)} groups, in this order: "
            f"{'; '.join(derived)}. Give each its own name."
        )
    return [RunGroup(name, members[0].spectral, tuple(members)) for name, members in zip(names, grouped.values())]


def derived_labels(representatives: Sequence[Run]) -> list[str]:
    """Return one label per run: its spectral settings, then every other setting in which any two of the runs differ."""
    names = {name: None for run in representatives for name in run.settings}  # a set that keeps the order
    differing = [name for name in names if len({repr(run.settings.get(name, ABSENT)) for run in representatives}) > 1]
    return [
        ", ".join([run.spectral, *(f"{name} {_as_given(run.settings.get(name, ABSENT))}" for name in differing)])
        for run in representatives
    ]


def _as_given(value: Any) -> str:
    """A setting as written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def find_reference(groups: Sequence[RunGroup], label: str | None = None) -> RunGroup:
    """Return the group of that label; for None the first stock group, or the first of all where none is stock.

    Raises:
        ComparisonError: for an unknown label.
    """
    if label is None:
        return next((group for group in groups if group.spectral == STOCK), groups[0])
    for group in groups:
        if group.label == label:
            return group
    raise ComparisonError(
        f"--reference {label!r} is not a group; the groups are: {'; '.join(group.label for group in groups)}."
    )


def shared_time_budget(runs: Iterable[Run]) -> float | None:
    """Return the time budget, in hours, that scheduled all of the runs; None where they have not one in common."""
    budgets = {run.time_budget for run in runs}
    return budgets.pop() if len(budgets) == 1 else None


def find_metric(runs: Sequence[Run], name: str | None = None) -> Metric:
    """Return the metric of that name that all runs record; for None the usual one.

    Raises:
        ComparisonError: for runs of different kinds, and for a metric that they do not record.
    """
    units = {run.unit for run in runs}
    if len(units) > 1:
        raise ComparisonError("Some of these runs read text and some images; compare runs of one kind.")
    available = {
        key: metric
        for key, metric in METRICS[units.pop()].items()
        if all((metric.final_key or metric.key) in run.record.final for run in runs)
    }
    if name is None:
        return next(iter(available.values()))
    if name not in available:
        raise ComparisonError(f"--metric {name}: these runs record {', '.join(available)}; choose one of them.")
    return available[name]


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Return one line for everything that must be equal for losses to compare, and is not; empty where all is well.

    That is the validation data with the share of it that is predicted, and the training: steps and tokens, or for runs
    that share a time budget the hardware, because there the steps are what came out.
    """
    checked: dict[str, Callable[[Run], Any]] = {
        "validation data (fingerprint)": lambda run: run.record.facts["validation_fingerprint"],
        "share of predicted tokens": lambda run: run.record.arguments.get("mlm_probability", ABSENT),
        "time budget (hours)": lambda run: run.time_budget,
    }
    if shared_time_budget(runs) is None:
        checked |= {"steps": lambda run: run.steps, f"training {runs[0].unit}": lambda run: run.tokens}
    else:
        checked[f"hardware under a time budget ({', '.join(HARDWARE)})"] = hardware
    lines = []
    for name, value_of in checked.items():
        folders: dict[Any, list[str]] = {}
        for run in runs:
            folders.setdefault(value_of(run), []).append(str(run.directory))
        if len(folders) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} in {', '.join(at)}" for value, at in folders.items()))
    return lines


def hardware(run: Run) -> str:
    """Return what a run's speed depends on, in words."""
    return " ".join(str(run.record.facts.get(name, ABSENT)) for name in HARDWARE)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """Return the mean of `values - reference` over the common seeds, with its Student-t interval.

    Args:
        values, reference: seed -> value.
        confidence: of the interval, between 0 and 1.

    Returns:
        None where no seed is common; no interval where only one is, or where all differences are equal.

    Raises:
        ImportError: if scipy is missing and an interval is due.
    """
    seeds = tuple(sorted(values.keys() & reference.keys()))
    if not seeds:
        return None
    both, scale = scaled([*(values[seed] for seed in seeds), *(reference[seed] for seed in seeds)])
    ours, others = both[: len(seeds)], both[len(seeds) :]
    differences = [mine - theirs for mine, theirs in zip(ours, others)]
    mean = fmean(differences) * scale
    if len(set(differences)) == 1:
        return PairedDifference(mean, seeds, None)
    try:
        # Imported here: training and its metrics must run where scipy is missing.
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "The intervals need scipy, which is not installed: pip install 'hf_specattn[train]'."
        ) from error
    low, high = stats.ttest_rel(ours, others).confidence_interval(confidence)
    return PairedDifference(mean, seeds, (float(low) * scale, float(high) * scale))


def scaled(values: Iterable[float]) -> tuple[list[float], float]:
    """Return values whose sums and squares stay within floats, and what they were divided by: 1, but for huge ones."""
    found = list(values)
    largest = max(map(abs, found))
    scale = largest if largest > LARGEST_SQUARED else 1.0
    return [value / scale for value in found], scale


def mean_of(values: Iterable[float]) -> float:
    """Return the mean, also of values whose sum is beyond floats."""
    found, scale = scaled(values)
    return fmean(found) * scale


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of curves, at every position of any of them that lies within all; empty where none does.

    Between its points a curve is joined by straight lines, as it is drawn. Where all curves have the same positions, the
    means are those of recorded values alone.

    Args:
        curves: `(position, value)`, positions rising.
    """
    if not curves or not all(curves):
        return []
    begin, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    positions = sorted({position for curve in curves for position, _ in curve if begin <= position <= end})
    values = [np.interp(positions, *columns(curve)) for curve in curves]
    return [(position, mean_of(column)) for position, column in zip(positions, zip(*values))]


def columns(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    """Return the positions and the values of a curve."""
    positions, values = [], []
    for position, value in points:
        positions.append(position)
        values.append(value)
    return positions, values
