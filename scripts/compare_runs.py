"""Compare finished runs of pretraining or of image classification: one table and one figure.

    python scripts/compare_runs.py runs/stock-0 runs/stock-1 runs/identity-0 runs/identity-1 --output_dir docs/images

Runs that differ only in their seed form a group. The table has for each group the final validation loss (of image
classifiers the accuracy, unless `--metric loss` is given; mean and standard deviation), perplexity, speed, and the
difference to a reference group, paired over the seeds that both have, with its 95 % interval. With `--output_dir` it
is written there as `comparison.md`, with `comparison.png` and `.svg`. Where every run was trained with
`--spectral_monitor_every`, the conditioning of attention over training is drawn there, too: `training.png` and `.svg`.

Runs under one wall-clock budget compare with each other, whatever steps they came to; then the speed is part of the result.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_specattn.diagnostics import write_training_report
from hf_specattn.diagnostics.monitor import MONITOR_FILE
from hf_specattn.figures import markdown_table
from hf_specattn.files import CannotWriteError, cannot_be_written, require_writable, write_bytes
from recipes.compare.comparison import (
    HARDWARE,
    ComparisonError,
    Metric,
    PairedDifference,
    Run,
    RunGroup,
    derived_labels,
    find_differences,
    find_metric,
    find_reference,
    group_runs,
    hardware,
    paired_difference,
    read_runs,
    shared_time_budget,
)
from recipes.compare.curves import HUGE, picture
from recipes.compare.monitor_records import read_records
from recipes.run.command_line import ScriptParser
from recipes.run.run_metrics import perplexity

NAME = "comparison"
NOTHING = "–"


@dataclass
class CompareArguments:
    """Arguments of the comparison; the folders of the runs come first."""

    labels: list[str] | None = field(
        default=None,
        metadata={"help": "One name per group, in the order of their first runs. None: what sets them apart."},
    )
    reference: str | None = field(
        default=None, metadata={"help": "Name of the group to take differences to. None: stock, else the first."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "What to compare by: loss, or accuracy of image classifiers. None: accuracy where there is one.",
            "choices": ["loss", "accuracy"],
        },
    )
    allow_different: bool = field(
        default=False,
        metadata={"help": "Go on although validation data, steps or training tokens differ; the table says so."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": f"Folder for {NAME}.md and the pictures. None: only print the table."}
    )


def parse_arguments(argv: Sequence[str]) -> tuple[CompareArguments, list[str]]:
    dataclasses: Any = CompareArguments
    parser = ScriptParser(dataclasses, description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a finished run.")
    arguments, rest = parser.parse_args_into_dataclasses(args=list(argv))
    return arguments, rest.runs


def table(groups: Sequence[RunGroup], reference: RunGroup, metric: Metric) -> str:
    """A Markdown table, one row per group."""
    unit = groups[0].runs[0].unit
    header = [
        "group",
        "runs",
        f"{metric.final_name.removeprefix('final ')} ({metric.unit}), mean",
        "standard deviation",
        *(["perplexity (exp of the mean)"] if unit == "tokens" else []),
        f"training {unit}/s, median",
        f"steps to the final {metric.name} of {reference.label} (runs)",
        f"{metric.name} minus that of {reference.label}, mean (seeds)",
        "95 % interval",
    ]
    return markdown_table(header, [row(group, reference, metric) for group in groups])


def row(group: RunGroup, reference: RunGroup, metric: Metric) -> list[str]:
    mean, deviation, speed = group.mean(metric), group.deviation(metric), group.tokens_per_second
    difference = None if group is reference else paired_difference(group.values(metric), reference.values(metric))
    steps, reached = group.steps_until(metric, reference.mean(metric))
    return [
        group.label,
        str(len(group.runs)),
        shown(mean, metric.digits),
        NOTHING if deviation is None else shown(deviation, metric.digits),
        *([describe_perplexity(mean)] if group.runs[0].unit == "tokens" else []),
        NOTHING if speed is None else f"{speed:,.0f}",
        NOTHING if steps is None else f"{steps:,.0f} ({reached} of {len(group.runs)})",
        *describe_difference(difference, group is reference, metric.digits),
    ]


def shown(value: float, digits: int, sign: str = "") -> str:
    """A number with that many decimals; a huge one, of a run that diverged, by its leading digits."""
    return f"{value:{sign}.{digits}f}" if abs(value) < HUGE else f"{value:{sign}.4g}"


def describe_perplexity(loss: float) -> str:
    value = perplexity(loss)
    return "beyond floats" if value is None else f"{value:.2f}"


def describe_difference(difference: PairedDifference | None, is_reference: bool, digits: int) -> tuple[str, str]:
    if difference is None:
        return (NOTHING, NOTHING) if is_reference else ("no common seed", NOTHING)
    mean = f"{shown(difference.mean, digits, '+')} ({len(difference.seeds)})"
    if difference.interval is None:
        return mean, NOTHING
    low, high = difference.interval
    return (
        mean,
        f"{shown(low, digits, '+')} to {shown(high, digits, '+')}{', contains 0' if difference.contains_zero else ''}",
    )


def notes(groups: Sequence[RunGroup], reference: RunGroup, metric: Metric, arguments: CompareArguments) -> list[str]:
    """What the reader of the table has to know, one paragraph each."""
    runs = [run for group in groups for run in group.runs]
    budget = shared_time_budget(runs)
    lines = [f"**Caution, these runs differ where they should not.** {line}." for line in find_differences(runs)]
    if not lines:
        unit = runs[0].unit
        tokens = runs[0].record.facts.get(f"validation_{unit}")
        data = "the same validation data" if tokens is None else f"the same {tokens:,} validation {unit}"
        training = f"{runs[0].steps:,} steps, {runs[0].tokens:,} training {unit}"
        lines = [f"Every run: {training if budget is None else f'{budget:g} h of training'}, {data}."]
    if budget is not None:
        lines.append(time_budget_note(budget, groups))
    if arguments.labels is not None:
        settings = derived_labels([group.runs[0] for group in groups])
        lines += [f"{group.label}: {setting}." for group, setting in zip(groups, settings)]
    others = [group for group in groups if group is not reference]
    differences = [paired_difference(group.values(metric), reference.values(metric)) for group in others]
    if any(difference is not None and difference.interval is not None for difference in differences):
        lines.append(
            "The interval is that of the mean difference over seeds (Student's t, paired: a seed fixes the initial weights "
            "and the batches of both). One that contains 0 means that these seeds do not tell which of the two is better, "
            f"not that they are equal. One that does not speaks for this model, {data_noun(runs[0])} and "
            f"{'number of steps' if budget is None else 'time on this machine'} alone."
        )
        if len(others) > 1:
            lines.append("Each interval stands by itself: among many comparisons some leave out 0 by chance.")
    if any(difference is not None and difference.interval is None for difference in differences):
        lines.append(
            "A difference of one seed, or the same for each seed, has no interval and is not evidence for either side."
        )
    if len({hardware(run) for run in runs}) > 1:
        lines.append(f"Speeds do not compare: the runs differ in {', '.join(HARDWARE)}.")
    else:
        lines.append("Speeds compare only if nothing else ran on the machine; for a measured ratio see benchmarks/.")
    return lines


def data_noun(run: Run) -> str:
    return {"tokens": "corpus", "images": "set of images"}.get(run.unit, "data")


def time_budget_note(hours: float, groups: Sequence[RunGroup]) -> str:
    read = [
        f"{group.label}: {span(run.tokens for run in group.runs)} training tokens in {span(run.steps for run in group.runs)} "
        "steps"
        for group in groups
    ]
    return (
        f"These runs share a time budget of {hours:g} h, not a number of steps. {'; '.join(read)}. So the comparison "
        "includes speed: what makes a step slower, another program on the machine included, makes the training shorter, "
        "and elsewhere the losses may stand in another order."
    )


def span(numbers: Iterable[int]) -> str:
    """The least and the greatest number, or the one."""
    least, *_, greatest = sorted(numbers) * 2
    return f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}"


def draw_conditioning(groups: Sequence[RunGroup], metric: Metric, output: Path) -> None:
    """Where every run was trained with `SpectralMonitor`, draw what it measured, and the final values against kappa."""
    runs = [run for group in groups for run in group.runs]
    lacking = [str(run.directory) for run in runs if not is_monitored(run)]
    if not lacking:
        records = {group.label: [read_records(run.directory) for run in group.runs] for group in groups}
        finals = {group.label: [group.values(metric)[run.seed] for run in group.runs] for group in groups}
        measure = f"{metric.final_name} ({metric.unit})"
        picture = write_training_report(records, output, finals, measure)
        print(
            f"Conditioning of attention over training: {picture.with_suffix('')}.png, .svg\n"
            f"Final {metric.name} against it: {picture.with_name('outcome')}.png, .svg"
        )
    elif len(lacking) < len(runs):
        print(
            f"Conditioning of attention over training is not drawn: no {MONITOR_FILE} (--spectral_monitor_every) in "
            f"{', '.join(lacking)}."
        )


def is_monitored(run: Run) -> bool:
    """Whether the run itself was trained with the monitor: an earlier one in the same folder may have left a file, too."""
    return bool(run.record.arguments.get("spectral_monitor_every")) and (run.directory / MONITOR_FILE).is_file()


def check_output_dir(output_dir: str | None) -> Path | None:
    if output_dir is None:
        return None
    require_writable(output_dir, "--output_dir")
    return Path(output_dir)


def read_comparable(directories: Sequence[str], allow_different: bool) -> list[Run]:
    runs = read_runs(directories)
    if (differences := find_differences(runs)) and not allow_different:
        raise ComparisonError(
            "The results of these runs do not compare, for they differ in\n  "
            + "\n  ".join(differences)
            + "\nLeave out the runs that differ, or add --allow_different to compare them anyway; the table will say so."
        )
    return runs


def compare(arguments: CompareArguments, directories: Sequence[str]) -> None:
    output = check_output_dir(arguments.output_dir)
    runs = read_comparable(directories, arguments.allow_different)
    metric = find_metric(runs, arguments.metric)
    groups = group_runs(runs, arguments.labels)
    reference = find_reference(groups, arguments.reference)
    paragraphs = [f"{line}\n" for line in notes(groups, reference, metric, arguments)]
    text = "\n".join([table(groups, reference, metric), *paragraphs])
    if output is not None:  # before anything is printed: the reader of a pipe may be gone
        output.mkdir(parents=True, exist_ok=True)
        write_bytes(output / f"{NAME}.md", text.encode())
        for ending, image in picture(groups, metric).items():
            write_bytes(output / f"{NAME}.{ending}", image)
    print(text, end="")
    if output is not None:
        print(f"\nTable and figure: {output / NAME}.md, .png, .svg")
        draw_conditioning(groups, metric, output)


def main(argv: Sequence[str] | None = None) -> None:
    arguments, directories = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        compare(arguments, directories)
    except (ComparisonError, CannotWriteError, ImportError, OSError) as error:
        # One line for what a user can change; a traceback for anything else.
        if isinstance(error, OSError) and not cannot_be_written(error):
            raise
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
