"""Train a grid of runs and compare them: tables, a picture, and every number.

    python scripts/sweep.py table5                     # small models on scikit-learn's digits, on a CPU
    python scripts/sweep.py table1 --scale paper       # commands and estimated GPU hours; --run runs them
    python scripts/sweep.py table2                     # object detection, on shapes
    python scripts/sweep.py table3 --lra_data text=aclImdb retrieval=lra_release image=cifar-10-batches-py
    python scripts/sweep.py grid --methods stock svd --refresh_every 0 20 --seeds 0 1 2 -- --num_train_epochs 5

`table1`, `table5`, `table6` and `table7` are those of the conditioning paper; `evidence` asks whether a gain is the
conditioning's or the initialization scale's; `precondition` sets preconditioned attention beside both and its controls;
`residual_free`, `strong_decay` and `dynamic` look for the regimes in which conditioning pays; `precondition_text` and
`residual_free_text` ask the same of a masked language model; `table4` pretrains such models and fine-tunes them on GLUE
(`--glue_data` names the folder of its files); `grid` takes the product of the values given. Other flags, and
all that follows `--`, are given to every run.

As many runs at once as the machine has GPUs, or else cores. Sweeps share their runs, which lie in `--runs_dir`; an
interrupted sweep goes on when its command is repeated.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_specattn.figures import markdown_table
from hf_specattn.files import CannotWriteError, require_writable, write_bytes, write_json
from recipes.compare.comparison import ComparisonError
from recipes.compare.sweeps.cost import gpu_hours, training_operations
from recipes.compare.sweeps.design import PlannedRun, Sweep, SweepError
from recipes.compare.sweeps.detection_sweeps import (
    DETECTION_SCRIPT,
    DETECTION_SWEEPS,
    detection_operations,
    parse_detection_arguments,
)
from recipes.compare.sweeps.execution import planned_runs, run_sweep
from recipes.compare.sweeps.glue_sweep import (
    GLUE_SWEEPS,
    check_fine_tunings,
    fine_tune,
    fine_tuning_operations,
    fine_tunings,
    glue_arms,
    glue_section,
)
from recipes.compare.sweeps.grid import GridValues, grid_sweep
from recipes.compare.sweeps.lra_sweeps import LRA_SCRIPT, LRA_SWEEPS, lra_operations, with_data
from recipes.compare.sweeps.regime_sweeps import REGIME_SWEEPS
from recipes.compare.sweeps.runner import Machine
from recipes.compare.sweeps.sweep_figures import monitor_figures
from recipes.compare.sweeps.sweep_presets import IMAGE_SCRIPT, SCALES, SWEEPS
from recipes.compare.sweeps.sweep_report import as_json, picture, report
from recipes.compare.sweeps.text_sweeps import TEXT_SCRIPT, TEXT_SWEEPS, text_operations
from recipes.glue.glue_arguments import parse_arguments as parse_glue_arguments
from recipes.glue.glue_files import GlueDataError
from recipes.glue.glue_report import picture as glue_picture
from recipes.glue.summary import Summary
from recipes.images.image_arguments import parse_arguments as parse_image_arguments
from recipes.images.image_sources import ImageDataError
from recipes.lra.lra_arguments import parse_arguments as parse_lra_arguments
from recipes.run.command_line import ScriptParser
from recipes.run.usable_model import ModelError
from recipes.text.pretrain_arguments import parse_arguments as parse_text_arguments

SCRIPTS = Path(__file__).resolve().parent
PARSERS: dict[str, Callable[..., Any]] = {
    IMAGE_SCRIPT: parse_image_arguments,
    LRA_SCRIPT: parse_lra_arguments,
    DETECTION_SCRIPT: parse_detection_arguments,
    TEXT_SCRIPT: parse_text_arguments,
}
ALL_SWEEPS = SWEEPS | LRA_SWEEPS | DETECTION_SWEEPS | REGIME_SWEEPS | TEXT_SWEEPS | GLUE_SWEEPS
NAMES = (*ALL_SWEEPS, "grid")


@dataclass
class SweepArguments:
    """Arguments of the sweep; its name stands before them, and other flags are given to every run."""

    scale: str = field(
        default="small",
        metadata={
            "help": "small: small models on digits, on any machine; paper: the published recipes on ImageNet-1k."
            " Not of grid.",
            "choices": list(SCALES),
        },
    )
    run: bool = field(
        default=False,
        metadata={"help": "Run the sweep at --scale paper, too, instead of printing commands and costs."},
    )
    plan: bool = field(
        default=False, metadata={"aliases": ["--show_plan"], "help": "Print commands and costs, and run nothing."}
    )
    gpu_teraflops: float = field(
        default=100.0,
        metadata={
            "help": "Sustained rate of one GPU in training, for the estimated hours, in 10^12 operations per second; 100 is "
            "a third of the peak in bf16 that NVIDIA states for an A100 (312)."
        },
    )
    runs_dir: str = field(default="runs/sweeps", metadata={"help": "Folder of the runs of all sweeps."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the report (.md, .png, .svg, .json). None: runs_dir/reports."}
    )
    num_parallel: int | None = field(
        default=None, metadata={"help": "Runs at once. None: one for each GPU, or without any one for each core."}
    )
    num_seeds: int | None = field(
        default=None, metadata={"help": "Use only this many of the sweep's seeds. None: all."}
    )
    lra_data: list[str] | None = field(
        default=None,
        metadata={"help": "Of the sweeps on Long Range Arena: where data lie, each as task=folder (see docs/lra.md)."},
    )
    glue_data: str | None = field(
        default=None,
        metadata={"help": "Of table4: folder of GLUE's official TSV files, plain or .gz. None: the Hub."},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    # Of grid.
    script: str = field(default=str(SCRIPTS / IMAGE_SCRIPT), metadata={"help": "The training script of a grid."})
    models: list[str] | None = field(
        default=None,
        metadata={"help": 'Flags that choose a model, as one text each: "--timm_model deit_tiny_patch16_224".'},
    )
    methods: list[str] | None = field(default=None, metadata={"help": "Of stock, identity, svd (stock identity)."})
    lambdas: list[str] | None = field(
        default=None, metadata={"help": "Of identity: numbers, or one per projection as query=1,value=0.5 (10)."}
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": "Projections to condition, joined by commas (query,key,value)."}
    )
    granularities: list[str] | None = field(default=None, metadata={"help": "Of projection, head (projection)."})
    refresh_every: list[int] | None = field(default=None, metadata={"help": "Of svd, in steps; 0: static (0)."})
    layer_norm: list[str] | None = field(default=None, metadata={"help": "Of with, without (with)."})
    projection_inits: list[str] | None = field(
        default=None, metadata={"help": "Of default, orthogonal, mimetic (default)."}
    )
    initialization_scales: list[float] | None = field(
        default=None, metadata={"help": "Factors of the query, key and value weights at the start (1)."}
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "Of every arm of the grid (0)."})


# What every run has from its sweep, and what makes a stock model another: `--` cannot give it.
OF_EVERY_RUN = {"--seed", "--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}
CONDITIONING = {"--spectral_conditioning", "--attention_preconditioner"}
GRID_FLAGS = (*(item.name for item in fields(GridValues)), "script", "seeds")


def parse_arguments(argv: Sequence[str]) -> tuple[str, SweepArguments, list[str]]:
    dataclasses: Any = SweepArguments
    parser = ScriptParser(dataclasses, description=str(__doc__).splitlines()[0])
    parser.add_argument("sweep", choices=NAMES, help="Which.")
    argv, behind = list(argv), []
    if "--" in argv:
        argv, behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    # What is not a flag of the sweep is one of its runs, whose script rejects it otherwise.
    arguments, positional, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    return positional.sweep, arguments, [*unknown, *behind]


def build_sweep(name: str, arguments: SweepArguments, behind: Sequence[str]) -> Sweep:
    """Return the sweep asked for.

    Raises:
        SweepError: for values that do not go together.
    """
    if name == "grid":
        sweep = build_grid(arguments, behind)
    else:
        given = [flag for flag in GRID_FLAGS if getattr(arguments, flag) != getattr(SweepArguments(), flag)]
        if given:
            names = ", ".join(f"--{flag}" for flag in given)
            raise SweepError(f"{names}: of grid only; {name} has its own values. Leave out, or give the sweep grid.")
        sweep = ALL_SWEEPS[name](arguments.scale, SCRIPTS)
        sweep = replace(sweep, common=(*sweep.common, *behind))
    refuse_contradictions(sweep, behind)
    if name in LRA_SWEEPS:
        sweep = with_data(sweep, arguments.lra_data or [])
    elif arguments.lra_data is not None:
        raise SweepError(f"--lra_data: of {', '.join(LRA_SWEEPS)}; leave it out of {name}.")
    if arguments.glue_data is not None:
        if not sweep.glue_tasks:
            raise SweepError(f"--glue_data: of {', '.join(GLUE_SWEEPS)}; leave it out of {name}.")
        sweep = replace(sweep, glue_flags=(*sweep.glue_flags, "--data_dir", arguments.glue_data))
    if arguments.num_seeds is not None:
        if not 1 <= arguments.num_seeds <= len(sweep.seeds):
            raise SweepError(
                f"--num_seeds {arguments.num_seeds}: {name} has {len(sweep.seeds)} seed(s); choose at most that many."
            )
        sweep = replace(sweep, seeds=sweep.seeds[: arguments.num_seeds])
    return sweep


def refuse_contradictions(sweep: Sweep, behind: Sequence[str]) -> None:
    """Refuse flags for every run that the sweep sets itself: for some runs they would do nothing, or undo what these are.

    Raises:
        SweepError: naming one.
    """
    parts: list[Any] = [*sweep.settings, *sweep.variants, *sweep.tunings]
    own = {word for part in parts for word in part.flags}
    for word in behind:
        name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        named = {name, f"{name}_", name.replace("--seeds", "--seed")}
        if name.startswith("--") and named & (own | OF_EVERY_RUN | CONDITIONING):
            raise SweepError(
                f"{word} is for every run, but {sweep.name} sets it for some or all of them. Leave it out"
                f"{'; a grid takes --seeds, --methods and others before the `--`' if sweep.name == 'grid' else ''}."
            )


def build_grid(arguments: SweepArguments, behind: Sequence[str]) -> Sweep:
    if arguments.scale != "small":
        raise SweepError("--scale is of the sweeps that have a name; a grid trains what follows `--`.")
    script = Path(arguments.script).resolve()
    if not script.is_file():
        raise SweepError(
            f"--script {arguments.script} does not exist; name a training script, such as {IMAGE_SCRIPT}."
        )
    given = {item.name: getattr(arguments, item.name) for item in fields(GridValues)}
    values = GridValues(**{name: tuple(value) for name, value in given.items() if value is not None})
    return grid_sweep(values, script, (0,) if arguments.seeds is None else arguments.seeds, behind)


def check_runs(sweep: Sweep, runs_dir: Path) -> None:
    """Let the script's parser read the flags of every run before the first one starts: a bad one ends the sweep here."""
    if (parse := PARSERS.get(sweep.script.name)) is not None:
        for _, run in planned_runs(sweep, {tuning.name: tuning.values[0] for tuning in sweep.tunings}):
            parse(run.arguments(runs_dir, anew=True), f"a run of {sweep.name}")
    if sweep.glue_tasks:
        check_fine_tunings(sweep, runs_dir)


def show_plan(sweep: Sweep, arguments: SweepArguments) -> None:
    """Print the commands of every run, and what they would cost where that is known."""
    runs_dir = Path(arguments.runs_dir)
    planned = planned_runs(sweep, {tuning.name: tuning.name.upper() for tuning in sweep.tunings})
    for run in [*(run for _, run in planned), *(fine_tunings(sweep) if sweep.glue_tasks else [])]:
        print(shlex.join(["accelerate", "launch", shown_path(run.script), *run.arguments(runs_dir)]))
    if sweep.tunings:
        names = ", ".join(tuning.name.upper() for tuning in sweep.tunings)
        print(
            f"\n{names}: what the runs of the tuning, which come first for each model, find best; --run fills them in."
        )
    if sweep.script.name in PARSERS:
        print(f"\n{costs(sweep, planned, arguments)}")


def costs(sweep: Sweep, planned: Sequence[tuple[Any, PlannedRun]], arguments: SweepArguments) -> str:
    rows, whole = [], 0.0
    for setting in sweep.settings:
        runs = [run for of, run in planned if of is setting]
        parsed: Any = PARSERS[sweep.script.name]([*runs[0].flags, "--show_plan"], f"a run of {sweep.name}")[0]
        counts = {
            LRA_SCRIPT: lra_operations,
            DETECTION_SCRIPT: detection_operations,
            TEXT_SCRIPT: text_operations,
        }
        if (hours := getattr(parsed, "max_train_hours", None)) is None:
            operations = counts.get(sweep.script.name, training_operations)(parsed)
            hours, counted = gpu_hours(operations, arguments.gpu_teraflops), f"{operations:.3g}"
        else:
            counted = "by the clock"
        parts = [(setting.label, hours, counted)]
        if sweep.glue_tasks:
            tasks = ",".join(sweep.glue_tasks)
            flags = ["--model_name_or_path", "model", *sweep.glue_flags, "--tasks", tasks]
            operations = fine_tuning_operations(parsed, parse_glue_arguments(flags, "a fine-tuning")[0])
            hours = gpu_hours(operations, arguments.gpu_teraflops)
            parts.append((f"{setting.label}, GLUE", hours, f"{operations:.3g}"))
        for label, hours, counted in parts:
            whole += hours * len(runs)
            rows.append([label, str(len(runs)), counted, f"{hours:,.2f}", f"{hours * len(runs):,.1f}"])
    header = ["model", "runs", "operations of a run", "GPU hours of a run", "GPU hours"]
    note = (
        f"Estimated at {arguments.gpu_teraflops:g} x 10^12 operations per second (--gpu_teraflops): three times the products "
        "and convolutions of a stock model's forward pass, without reading data, validation, optimizer and corrections."
    )
    if sweep.script.name == LRA_SCRIPT:
        note += " A model of this width keeps no GPU busy: its runs take many times as long."
    return markdown_table(header, [*rows, ["all", str(len(planned)), "", "", f"{whole:,.1f}"]]) + f"\n{note}"


def shown_path(path: Path) -> str:
    """A path as it is shown: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def sweep_and_report(sweep: Sweep, arguments: SweepArguments, command: str) -> bool:
    """Run, and write the report; returns whether every run came to its end."""
    runs_dir = Path(arguments.runs_dir)
    output = Path(arguments.output_dir) if arguments.output_dir else runs_dir / "reports"
    machine = Machine.whole(arguments.num_parallel)
    results = run_sweep(sweep, runs_dir, machine, arguments.disable_tqdm)
    output.mkdir(parents=True, exist_ok=True)
    text = report(results, runs_dir, command)
    figures = {sweep.name: picture(results)}
    figures |= {f"{sweep.name}-{name}": images for name, images in monitor_figures(results).items()}
    content = as_json(results)
    complete = not any(arm.failed for arm in results.arms.values())
    if sweep.glue_tasks:
        records, failed = fine_tune(sweep, runs_dir, machine, arguments.disable_tqdm)
        text += f"\n{glue_section(sweep, records, failed, runs_dir)}"
        content["arms"] += glue_arms(records)
        figures[f"{sweep.name}-glue"] = glue_picture(Summary(records, sweep.reference.label))
        complete = complete and not failed
    write_json(output / f"{sweep.name}.json", content)
    for name, images in figures.items():
        for ending, image in images.items():
            write_bytes(output / f"{name}.{ending}", image)
        text += f"\n![{sweep.title if name == sweep.name else name}]({name}.png)\n"
    write_bytes(output / f"{sweep.name}.md", text.encode())
    print(text)
    print(f"Report: {output / sweep.name}.md, .png, .svg, .json")
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    name, arguments, behind = parse_arguments(argv)
    # As Ctrl-C: the runs are ended, and save checkpoints.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sweep = build_sweep(name, arguments, behind)
        if arguments.plan or (arguments.scale == "paper" and not arguments.run):
            show_plan(sweep, arguments)
            return
        require_writable(arguments.runs_dir, "--runs_dir")
        require_writable(arguments.output_dir or arguments.runs_dir, "--output_dir")
        check_runs(sweep, Path(arguments.runs_dir))
        complete = sweep_and_report(sweep, arguments, shlex.join(["python", "scripts/sweep.py", *argv]))
    except (
        SweepError,
        CannotWriteError,
        ComparisonError,
        GlueDataError,
        ImageDataError,
        ModelError,
        ImportError,
    ) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues where this one stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    if not complete:
        raise SystemExit(
            "error: some runs failed; their folders, named above, have a log.txt. Repeat the command to try them again."
        )


if __name__ == "__main__":
    main()
