"""The flags that every training script has, and how a command line becomes arguments."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from hf_specattn.files import CannotWriteError, holds_files, require_writable

from .checkpointing import list_checkpoints
from .command_line import ScriptParser, flag
from .optimization import OptimizationArguments
from .preset_files import as_defaults, find_preset
from .projection_init import InitializationArguments
from .run_metrics import METRICS_FILE
from .spectral_arguments import (
    PreconditionerArguments,
    SpectralArguments,
    check_bounds,
    explicitly_given,
    refuse_unknown_trackers,
)

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_total_limit",
    "ddp_timeout",
)


@dataclass
class RunArguments(OptimizationArguments, PreconditionerArguments, InitializationArguments):
    """Arguments of a training run. Scripts add theirs, and set other defaults by `default_of`."""

    show_plan: bool = flag(False, "Print what the run would do, and exit.")

    # Optimization.
    max_steps: int | None = flag(None, "Optimizer steps.")
    per_device_train_batch_size: int = flag(32, "Samples per process and forward pass.")
    per_device_eval_batch_size: int = flag(32, "The same, for validation.")
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step.")
    learning_rate: float = flag(1e-3, "Peak learning rate.")
    weight_decay: float = flag(0.01, "Decoupled decay; biases and norms are exempt.")
    max_grad_norm: float = flag(1.0, "Clip the gradient's norm here; 0: never.")
    mixed_precision: str | None = flag(
        None, "no, fp16 (GPU only) or bf16. None: what accelerate is configured for.", ["no", "fp16", "bf16"]
    )
    torch_compile: bool = flag(False, "Compile the model with torch.compile (inductor).")
    seed: int = flag(0, "Decides initialization, order, and what is drawn of the data.")

    # Reporting and saving.
    output_dir: str = flag("runs/run", "Where everything is written.")
    overwrite_output_dir: bool = flag(False, "Allow a non-empty output folder; an earlier run in it is replaced.")
    resume_from_checkpoint: bool = flag(
        False, "Continue the run in --output_dir from its newest good checkpoint, or start it if there is none yet."
    )
    save_steps: int = flag(
        100, "Steps between checkpoints; there is also one after the last step. 0: only when a signal stops the run."
    )
    save_total_limit: int = flag(2, "Checkpoints to keep; older ones are removed.")
    logging_steps: int = flag(10, "Steps between records of the training loss.")
    report_to: list[str] | None = flag(None, "accelerate's trackers: tensorboard, wandb, trackio, ... None: none.")
    spectral_monitor_every: int = flag(
        0, "Steps between measurements of the conditioning of attention, written to spectral_monitor.json; 0: never."
    )
    ddp_timeout: int = flag(
        1800,
        "Seconds without an answer from another process after which training fails. (Preparation has no such limit: "
        "one process may work while the others wait.)",
    )
    disable_tqdm: bool = flag(False, "Print log lines instead of progress bars.")
    eval_only: bool = flag(False, "Measure --model_name_or_path on its run's validation data; write nothing.")

    def check_run(self) -> None:
        """Refuse values that no run can have.

        Raises:
            ValueError: naming the flag, its value and what is allowed.
        """
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        bounds += [("max_steps", 1, 2**31)] if self.max_steps is not None else []
        bounds += [("save_steps", 0, 2**31), ("spectral_monitor_every", 0, 2**31), ("seed", 0, 2**32 - 1)]
        bounds += [("weight_decay", 0, 1e9), ("max_grad_norm", 0, 1e9)]
        check_bounds(self, bounds)
        if not 0 < self.learning_rate < 1e9:
            raise ValueError(f"--learning_rate {self.learning_rate} must be a finite number above 0.")
        start = self.initialization()  # refuses bad values, as the next does
        if isinstance(start.scale, float):
            self.initialization_scale = f"{start.scale:g}"  # so that 2 and 2.0 are one setting
        self.preconditioner()
        self.check_optimization()
        if self.eval_only and getattr(self, "model_name_or_path", None) is None:
            raise ValueError("--eval_only measures a saved model; name it with --model_name_or_path.")
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ValueError(
                "--resume_from_checkpoint continues a run and --overwrite_output_dir replaces it; give one."
            )
        refuse_unknown_trackers(self.report_to)


def default_of(name: str, default: Any, help: str | None = None) -> Any:
    """A field of `RunArguments` with another default, and another help where it is given."""
    (found,) = (each for each in fields(RunArguments) if each.name == name)
    assert found.default is not MISSING
    metadata = dict(found.metadata) if help is None else {**found.metadata, "help": help}
    return field(default=default, metadata=metadata)


Arguments = TypeVar("Arguments", bound=RunArguments)
# Flag -> the arguments whose preset or recorded values it replaces, such as another source of data.
Replaced = Mapping[str, Sequence[str]]


def parse_run_arguments(
    kind: type[Arguments],
    argv: Sequence[str],
    description: str,
    *,
    presets: Mapping[str, Mapping[str, Any]],
    replaced: Replaced,
    data_settings: Iterable[str],
    refuse: Callable[[HfArgumentParser, Arguments, SpectralArguments, list[str]], None],
    replaced_of_preset: Replaced | None = None,
) -> tuple[Arguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts.

    Args:
        kind: The script's dataclass.
        argv: Without the program's name.
        description: Of the program, for its help.
        presets: Values of `--preset`: defaults that flags on the command line replace.
        replaced: See `Replaced`.
        data_settings: What decides the validation data of a run: `--eval_only` takes these from its `metrics.json`.
        refuse: Raises a ValueError for flags that do not go together.
        replaced_of_preset: In place of `replaced`, for a preset's values.
    """
    dataclasses: Any = (kind, SpectralArguments)
    parser = ScriptParser(dataclasses, description=description)
    argv = list(argv)

    def set_defaults(values: Mapping[str, Any], gone_with: Replaced) -> None:
        gone = {name for flag in explicitly_given(parser, gone_with, argv) for name in gone_with[flag]}
        parser.set_defaults(**{name: value for name, value in values.items() if name not in gone})

    try:
        if "preset" in explicitly_given(parser, ["preset"], argv):
            values = find_preset(parser.parse_known_args(argv)[0].preset, presets)
            set_defaults(as_defaults(values, vars(parser.parse_args([]))), replaced_of_preset or replaced)
        named = parser.parse_known_args(argv)[0]
        if named.eval_only and named.model_name_or_path is not None:
            set_defaults(recorded_settings(named.model_name_or_path, data_settings), replaced)
        arguments, spectral = parser.parse_args_into_dataclasses(args=argv)
        if arguments.eval_only and spectral.spectral_conditioning:
            raise ValueError("--eval_only measures a model as it was saved; leave out --spectral_conditioning.")
        refuse(parser, arguments, spectral, argv)
        spectral.find_lambda_by_default()
        if not (arguments.eval_only or arguments.show_plan):
            check_output_dir(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments, spectral


def recorded_settings(model_path: str, names: Iterable[str]) -> dict[str, Any]:
    """Read what a saved model was validated on; empty for a model that no run wrote.

    Raises:
        ValueError: for a damaged record.
    """
    file = Path(model_path) / METRICS_FILE
    if not file.is_file():
        return {}
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8"))["arguments"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the record of a run ({type(error).__name__}: {error}). Mend or remove it; without it, the "
            "validation data follow from the flags."
        ) from error
    return {name: recorded[name] for name in names if name in recorded}


def check_output_dir(arguments: RunArguments) -> None:
    """Refuse a folder that cannot be written, or in which files would be replaced without permission.

    Raises:
        CannotWriteError: saying what to do.
    """
    directory = Path(arguments.output_dir)
    require_writable(directory, "--output_dir")
    if arguments.overwrite_output_dir or not holds_files(directory):
        return
    if not arguments.resume_from_checkpoint:
        raise CannotWriteError(
            f"--output_dir {directory} is not empty. Name another folder, add --resume_from_checkpoint to continue the run "
            "in it, or add --overwrite_output_dir to replace the files of an earlier run."
        )
    # A run that was killed before its first checkpoint leaves neither; what is here would be lost.
    if not list_checkpoints(directory) and any((directory / name).exists() for name in ("config.json", METRICS_FILE)):
        raise CannotWriteError(
            f"--resume_from_checkpoint: {directory} holds a saved model and no checkpoint to continue from. Name "
            "another folder, or pass --overwrite_output_dir instead to start over in this one."
        )
