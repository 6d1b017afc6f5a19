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

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_specattn.files import CannotWriteError, require_writable, write_bytes, write_json
from recipes.compare.comparison import ComparisonError
from recipes.compare.sweeps.design import Sweep, SweepError
from recipes.compare.sweeps.detection_sweeps import DETECTION_SWEEPS
from recipes.compare.sweeps.execution import run_sweep
from recipes.compare.sweeps.glue_sweep import GLUE_SWEEPS, fine_tune, glue_arms, glue_section
from recipes.compare.sweeps.grid import GridValues, grid_sweep
from recipes.compare.sweeps.lra_sweeps import LRA_SWEEPS, with_data
from recipes.compare.sweeps.regime_sweeps import REGIME_SWEEPS
from recipes.compare.sweeps.runner import Machine
from recipes.compare.sweeps.sweep_figures import monitor_figures
from recipes.compare.sweeps.sweep_plan import check_runs, print_plan
from recipes.compare.sweeps.sweep_presets import IMAGE_SCRIPT, SCALES, SWEEPS
from recipes.compare.sweeps.sweep_report import as_json, picture, report
from recipes.compare.sweeps.text_sweeps import TEXT_SWEEPS
from recipes.glue.glue_files import GlueDataError
from recipes.glue.glue_report import picture as glue_picture
from recipes.glue.summary import Summary
from recipes.images.image_sources import ImageDataError
from recipes.run.command_line import ScriptParser
from recipes.run.usable_model import ModelError

SCRIPTS = Path(__file__).resolve().parent
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
    sweep.refuse_contradictions(behind)
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
            print_plan(sweep, Path(arguments.runs_dir), arguments.gpu_teraflops)
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
