"""What a sweep will run: its commands, read by the scripts' own parsers, and what they would cost on a GPU."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_specattn.figures import markdown_table

from ...glue.glue_arguments import parse_arguments as parse_glue_arguments
from ...images.image_arguments import parse_arguments as parse_image_arguments
from ...lra.lra_arguments import parse_arguments as parse_lra_arguments
from ...text.pretrain_arguments import parse_arguments as parse_text_arguments
from .cost import gpu_hours, training_operations
from .design import PlannedRun, Sweep
from .detection_sweeps import DETECTION_SCRIPT, detection_operations, parse_detection_arguments
from .execution import planned_runs
from .glue_sweep import check_fine_tunings, fine_tuning_operations, fine_tunings
from .lra_sweeps import LRA_SCRIPT, lra_operations
from .sweep_presets import IMAGE_SCRIPT
from .text_sweeps import TEXT_SCRIPT, text_operations

PARSERS: dict[str, Callable[..., Any]] = {
    IMAGE_SCRIPT: parse_image_arguments,
    LRA_SCRIPT: parse_lra_arguments,
    DETECTION_SCRIPT: parse_detection_arguments,
    TEXT_SCRIPT: parse_text_arguments,
}
OPERATIONS: dict[str, Callable[[Any], float]] = {
    IMAGE_SCRIPT: training_operations,
    LRA_SCRIPT: lra_operations,
    DETECTION_SCRIPT: detection_operations,
    TEXT_SCRIPT: text_operations,
}


def check_runs(sweep: Sweep, runs_dir: Path) -> None:
    """Let the script's parser read the flags of every run before the first one starts: a bad one ends the sweep here."""
    if (parse := PARSERS.get(sweep.script.name)) is not None:
        for _, run in planned_runs(sweep, {tuning.name: tuning.values[0] for tuning in sweep.tunings}):
            parse(run.arguments(runs_dir, anew=True), f"a run of {sweep.name}")
    if sweep.glue_tasks:
        check_fine_tunings(sweep, runs_dir)


def print_plan(sweep: Sweep, runs_dir: Path, teraflops: float) -> None:
    """Print the commands of every run, and what they would cost where that is known.

    Args:
        runs_dir: the folder of the runs.
        teraflops: the sustained rate of a GPU, in 10^12 operations per second.
    """
    planned = planned_runs(sweep, {tuning.name: tuning.name.upper() for tuning in sweep.tunings})
    for run in [*(run for _, run in planned), *(fine_tunings(sweep) if sweep.glue_tasks else [])]:
        print(shlex.join(["accelerate", "launch", _shown_path(run.script), *run.arguments(runs_dir)]))
    if sweep.tunings:
        names = ", ".join(tuning.name.upper() for tuning in sweep.tunings)
        print(
            f"\n{names}: what the runs of the tuning, which come first for each model, find best; --run fills them in."
        )
    if sweep.script.name in PARSERS:
        print(f"\n{_costs(sweep, planned, teraflops)}")


def _costs(sweep: Sweep, planned: Sequence[tuple[Any, PlannedRun]], teraflops: float) -> str:
    rows, whole = [], 0.0
    for setting in sweep.settings:
        runs = [run for of, run in planned if of is setting]
        parsed: Any = PARSERS[sweep.script.name]([*runs[0].flags, "--show_plan"], f"a run of {sweep.name}")[0]
        if (hours := getattr(parsed, "max_train_hours", None)) is None:
            operations = OPERATIONS[sweep.script.name](parsed)
            hours, counted = gpu_hours(operations, teraflops), f"{operations:.3g}"
        else:
            counted = "by the clock"
        parts = [(setting.label, hours, counted)]
        if sweep.glue_tasks:
            tasks = ",".join(sweep.glue_tasks)
            flags = ["--model_name_or_path", "model", *sweep.glue_flags, "--tasks", tasks]
            operations = fine_tuning_operations(parsed, parse_glue_arguments(flags, "a fine-tuning")[0])
            hours = gpu_hours(operations, teraflops)
            parts.append((f"{setting.label}, GLUE", hours, f"{operations:.3g}"))
        for label, hours, counted in parts:
            whole += hours * len(runs)
            rows.append([label, str(len(runs)), counted, f"{hours:,.2f}", f"{hours * len(runs):,.1f}"])
    header = ["model", "runs", "operations of a run", "GPU hours of a run", "GPU hours"]
    note = (
        f"Estimated at {teraflops:g} x 10^12 operations per second (--gpu_teraflops): three times the products "
        "and convolutions of a stock model's forward pass, without reading data, validation, optimizer and corrections."
    )
    if sweep.script.name == LRA_SCRIPT:
        note += " A model of this width keeps no GPU busy: its runs take many times as long."
    return markdown_table(header, [*rows, ["all", str(len(planned)), "", "", f"{whole:,.1f}"]]) + f"\n{note}"


def _shown_path(path: Path) -> str:
    """A path as it is shown: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
