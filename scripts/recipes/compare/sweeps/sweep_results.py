"""What the runs of a sweep came to: arms with their values, what the tuning chose, and how fast a result was reached."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev

from ..comparison import Metric, PairedDifference, Run, find_differences, find_metric, paired_difference
from .design import PlannedRun, Setting, Sweep, Variant


@dataclass(frozen=True)
class ArmResult:
    """The runs of one variant of one setting.

    Attributes:
        runs: Those that came to their end, by seed.
        failed: Those that did not, such as runs whose loss became infinite.
    """

    runs: Mapping[int, Run]
    failed: tuple[PlannedRun, ...] = ()

    def values(self, metric: Metric) -> dict[int, float]:
        """Seed -> final result."""
        return {seed: run.value(metric) for seed, run in self.runs.items()}

    def mean(self, metric: Metric) -> float | None:
        """Mean over the seeds; None without a run."""
        return fmean(self.values(metric).values()) if self.runs else None

    def deviation(self, metric: Metric) -> float | None:
        """Standard deviation over the seeds (divisor n - 1); None for fewer than two runs."""
        return stdev(self.values(metric).values()) if len(self.runs) > 1 else None

    def difference(self, other: "ArmResult", metric: Metric) -> PairedDifference | None:
        """This arm's result minus the other's over common seeds; None without any."""
        return paired_difference(self.values(metric), other.values(metric))

    def at_chance(self) -> int:
        """How many classifiers came to less than twice the accuracy of guessing.

        Where guessing was measured on the test part, two classes may be all there are: to less than three standard errors
        above the most frequent one.
        """
        return sum(_is_at_chance(run) for run in self.runs.values() if "classes" in run.record.facts)

    def seconds(self) -> float | None:
        """Median seconds of training; None without a run."""
        return median(run.record.final["seconds"] for run in self.runs.values()) if self.runs else None

    def passes_until(self, metric: Metric, target: float) -> tuple[float | None, int]:
        """Return how many passes over the training data it took to reach a result, and how many runs did.

        Args:
            metric: Of the result.
            target: The result, in the metric's unit.

        Returns:
            The median over the runs that reached it, at the first validation that did (None if none did); their number.
        """
        reached = [passes for run in self.runs.values() if (passes := _passes_until(run, metric, target)) is not None]
        return (median(reached) if reached else None), len(reached)


def _is_at_chance(run: Run) -> bool:
    facts, final = run.record.facts, run.record.final
    if "baselines" not in facts:
        return final["validation_accuracy"] < 2 / facts["classes"]
    guess = facts["baselines"]["majority"]
    return final["test_accuracy"] < guess + 3 * math.sqrt(guess * (1 - guess) / facts["test_examples"])


def _passes_until(run: Run, metric: Metric, target: float) -> float | None:
    read = run.reached(metric, target, over_tokens=True)
    return None if read is None else read / run.record.facts[f"train_{run.unit}"]


@dataclass(frozen=True)
class Results:
    """Everything that a sweep came to.

    Attributes:
        sweep: What was run.
        metric: What it is judged by.
        chosen: Setting's label -> name of the tuning -> value.
        tried: The same, down to value -> mean result.
        arms: (setting's label, variant's label) -> runs.
    """

    sweep: Sweep
    metric: Metric
    chosen: Mapping[str, Mapping[str, float]]
    tried: Mapping[str, Mapping[str, Mapping[float, float | None]]] = field(repr=False)
    arms: Mapping[tuple[str, str], ArmResult] = field(repr=False)

    def arm(self, setting: Setting, variant: Variant) -> ArmResult:
        """The runs of an arm."""
        return self.arms[setting.label, variant.label]

    def reference(self, setting: Setting) -> ArmResult:
        """The arm that differences are taken to."""
        return self.arm(setting, self.sweep.reference)

    def second_reference(self, setting: Setting) -> tuple[str, ArmResult] | None:
        """The best by its mean of the other ones, with its label; None where the sweep has none, or none was trained."""
        arms = {label: self.arms[setting.label, label] for label in self.sweep.second_references}
        means = {label: mean for label, arm in arms.items() if (mean := arm.mean(self.metric)) is not None}
        if not means:
            return None
        best = (max if self.metric.higher_is_better else min)(means, key=lambda label: means[label])
        return best, arms[best]

    def differences(self) -> list[str]:
        """One line for whatever runs of one setting differ in that should not, such as the number of steps."""
        lines = []
        for setting in self.sweep.settings:
            runs = [run for variant in self.sweep.variants for run in self.arm(setting, variant).runs.values()]
            lines += [f"{setting.label}: {line}" for line in (find_differences(runs) if runs else [])]
        return lines


def choose(tried: Mapping[float, float | None], metric: Metric) -> float | None:
    """Return the value with the best mean result, the smaller of equals; None where no run came to its end."""
    sign = 1 if metric.higher_is_better else -1
    known = {value: mean for value, mean in tried.items() if mean is not None}
    return max(known, key=lambda value: (sign * known[value], -value)) if known else None


def read_arm(runs: Iterable[PlannedRun], runs_dir: Path) -> ArmResult:
    """Read the runs of an arm."""
    records = {run: run.finished(runs_dir) for run in runs}
    return ArmResult(
        {run.seed: record for run, record in records.items() if record is not None},
        tuple(run for run, record in records.items() if record is None),
    )


def metric_of(arms: Iterable[ArmResult]) -> Metric | None:
    """Return what the runs are judged by; None without any run."""
    runs = [run for arm in arms for run in arm.runs.values()]
    return find_metric(runs) if runs else None
