"""Compare finished pretraining runs: one table and one picture.

    python scripts/compare_runs.py runs/stock-0 runs/stock-1 runs/identity-0 runs/identity-1 --output_dir docs/images

Runs that differ in their seed alone form a group. The table has for each group the final validation loss (mean and
standard deviation), perplexity, speed, and the difference to a reference group, paired over the seeds that both have,
with its 95 % interval. With `--output_dir` it is written there as `comparison.md`, with `comparison.png` and `.svg`.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_specattn.training import atomic_files
from hf_specattn.training.comparison import (
    COLORS,
    MARKERS,
    ComparisonError,
    PairedDifference,
    Run,
    RunGroup,
    derived_labels,
    find_differences,
    find_reference,
    group_runs,
    mean_curve,
    paired_difference,
    read_runs,
)
from hf_specattn.training.metrics import perplexity

NAME = "comparison"
NOTHING = "–"
HARDWARE = ("device", "processes", "threads")


@dataclass
class CompareArguments:
    """Arguments of the comparison; the folders of the runs stand before them."""

    labels: list[str] | None = field(
        default=None,
        metadata={"help": "One name per group, in the order of their first runs. None: what sets them apart."},
    )
    reference: str | None = field(
        default=None, metadata={"help": "Name of the group to take differences to. None: stock, else the first."}
    )
    allow_different: bool = field(
        default=False,
        metadata={"help": "Go on although validation data, steps or training tokens differ; the table says so."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": f"Folder for {NAME}.md, .png and .svg. None: only print the table."}
    )


def parse_arguments(argv: Sequence[str]) -> tuple[CompareArguments, list[str]]:
    dataclasses: Any = CompareArguments
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a finished run.")
    arguments, rest = parser.parse_args_into_dataclasses(args=list(argv))
    return arguments, rest.runs


def table(groups: Sequence[RunGroup], reference: RunGroup) -> str:
    """A Markdown table, one row per group."""
    header = [
        "group",
        "runs",
        "validation loss (nats per predicted token), mean",
        "standard deviation",
        "perplexity (exp of the mean)",
        "training tokens/s, median",
        f"loss minus that of {reference.label}, mean (seeds)",
        "95 % interval",
    ]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(row(group, reference))} |" for group in groups]
    return "\n".join(lines) + "\n"


def row(group: RunGroup, reference: RunGroup) -> list[str]:
    value, speed = perplexity(group.mean_loss), group.tokens_per_second
    difference = None if group is reference else paired_difference(group.losses, reference.losses)
    return [
        group.label.replace("|", "\\|"),
        str(len(group.runs)),
        f"{group.mean_loss:.4f}",
        NOTHING if group.loss_deviation is None else f"{group.loss_deviation:.4f}",
        "beyond floats" if value is None else f"{value:.2f}",
        NOTHING if speed is None else f"{speed:,.0f}",
        *describe_difference(difference, is_reference=group is reference),
    ]


def describe_difference(difference: PairedDifference | None, is_reference: bool) -> tuple[str, str]:
    if difference is None:
        return (NOTHING, NOTHING) if is_reference else ("no common seed", NOTHING)
    mean = f"{difference.mean:+.4f} ({len(difference.seeds)})"
    if difference.interval is None:
        return mean, "one seed: no interval"
    low, high = difference.interval
    return mean, f"{low:+.4f} to {high:+.4f}{', contains 0' if difference.contains_zero else ''}"


def notes(groups: Sequence[RunGroup], reference: RunGroup, arguments: CompareArguments) -> list[str]:
    """What the reader of the table has to know, one paragraph each."""
    runs = [run for group in groups for run in group.runs]
    lines = [f"**Caution, these runs differ where they should not.** {line}." for line in find_differences(runs)]
    if not lines:
        tokens = runs[0].record.facts.get("validation_tokens")
        data = "the same validation data" if tokens is None else f"the same {tokens:,} validation tokens"
        lines = [f"Every run: {runs[0].steps:,} steps, {runs[0].tokens:,} training tokens, {data}."]
    if arguments.labels is not None:
        settings = derived_labels([group.runs[0] for group in groups])
        lines += [f"{group.label}: {setting}." for group, setting in zip(groups, settings)]
    others = [group for group in groups if group is not reference]
    differences = [paired_difference(group.losses, reference.losses) for group in others]
    if any(difference is not None and difference.interval is not None for difference in differences):
        lines.append(
            "The interval is that of the mean difference over seeds (Student's t, paired: a seed fixes the initial weights "
            "and the batches of both). One that contains 0 means that these seeds do not tell which of the two is better, "
            "not that they are equal. One that does not speaks for this model, corpus and number of steps alone."
        )
        if len(others) > 1:
            lines.append("Each interval stands by itself: among many comparisons some leave out 0 by chance.")
    if any(difference is not None and difference.interval is None for difference in differences):
        lines.append("A difference of one seed has no interval and is no evidence for either side.")
    hardware = {tuple(run.record.facts.get(name) for name in HARDWARE) for run in runs}
    if len(hardware) > 1:
        lines.append(f"Speeds do not compare: the runs differ in {', '.join(HARDWARE)}.")
    else:
        lines.append("Speeds compare only if nothing else ran on the machine; for a measured ratio see benchmarks/.")
    return lines


def picture(groups: Sequence[RunGroup]) -> dict[str, bytes]:
    """Training loss, validation loss over steps, and the final validation losses; file ending -> image."""
    try:
        # Without pyplot: no display is needed.
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib, which is not installed: pip install matplotlib.") from error

    figure = Figure(figsize=(14, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    training, validation, final = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for index, group in enumerate(groups):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        draw_curves(training, group, "train_loss", color, None)
        draw_curves(validation, group, "validation_loss", color, marker)
        draw_final(final, index, group, color, marker)
    training.set(xlabel="optimizer step", ylabel="training loss (nats per predicted token)", title="Training")
    validation.set(xlabel="optimizer step", ylabel="validation loss (nats per predicted token)", title="Validation")
    final.set(ylabel="final validation loss (nats per predicted token)", title="Final: runs, mean, deviation")
    final.set_xticks(range(len(groups)), [group.label.replace(", ", "\n") for group in groups], fontsize=7)
    final.set_xlabel("group")
    final.margins(x=0.2)
    for axes in (training, validation, final):
        axes.grid(alpha=0.3)
    validation.legend(fontsize=8)
    images = {}
    # Without a date and with fixed identifiers, the same runs give the same files.
    with rc_context({"svg.hashsalt": NAME}):
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=metadata)
            images[ending] = buffer.getvalue()
    return images


def draw_curves(axes: Any, group: RunGroup, key: str, color: str, marker: str | None) -> None:
    """Every run of a group thin, their mean thick."""
    curves = [curve(run, key) for run in group.runs]
    for points in curves:
        if points:  # no step was logged otherwise
            axes.plot(*zip(*points), color=color, linewidth=0.6, alpha=0.5)
    if mean := mean_curve(curves):
        axes.plot(*zip(*mean), color=color, linewidth=2, marker=marker, markersize=5, label=group.label)


def curve(run: Run, key: str) -> list[tuple[int, float]]:
    records = run.record.history if key == "train_loss" else run.record.validation
    return [(record["step"], record[key]) for record in records]


def draw_final(axes: Any, position: int, group: RunGroup, color: str, marker: str) -> None:
    """Each run's loss as an open marker, and beside them the mean with one standard deviation either way."""
    losses = list(group.losses.values())
    style = {"color": color, "marker": marker, "linestyle": "none"}
    axes.plot([position - 0.12] * len(losses), losses, fillstyle="none", **style)
    axes.errorbar(position + 0.12, group.mean_loss, yerr=group.loss_deviation, capsize=4, **style)


def check_output_dir(output_dir: str | None) -> Path | None:
    if output_dir is not None and Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ComparisonError(f"--output_dir {output_dir} is a file; name a folder.")
    return None if output_dir is None else Path(output_dir)


def read_comparable(directories: Sequence[str], allow_different: bool) -> list[Run]:
    runs = read_runs(directories)
    if (differences := find_differences(runs)) and not allow_different:
        raise ComparisonError(
            "The losses of these runs do not compare, for they differ in\n  "
            + "\n  ".join(differences)
            + "\nLeave the odd ones out, or add --allow_different to go on; the table will say so."
        )
    return runs


def compare(arguments: CompareArguments, directories: Sequence[str]) -> None:
    output = check_output_dir(arguments.output_dir)
    groups = group_runs(read_comparable(directories, arguments.allow_different), arguments.labels)
    reference = find_reference(groups, arguments.reference)
    text = "\n".join([table(groups, reference), *(f"{line}\n" for line in notes(groups, reference, arguments))])
    print(text, end="")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        atomic_files.write_bytes(output / f"{NAME}.md", text.encode())
        for ending, image in picture(groups).items():
            atomic_files.write_bytes(output / f"{NAME}.{ending}", image)
        print(f"\nTable and picture: {output / NAME}.md, .png, .svg")


def main(argv: Sequence[str] | None = None) -> None:
    arguments, directories = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        compare(arguments, directories)
    except (ComparisonError, ImportError) as error:
        # One line for what a user can change; a traceback for anything else.
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
