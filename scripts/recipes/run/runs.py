"""What every training script does around its own loop: processes and logging, beginning and resuming, small questions."""

import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.utils import logging as transformers_logging

from hf_specattn.checkpoints.evaluations import EVALUATIONS

from .checkpointing import Checkpoints, Progress, list_checkpoints
from .distributed import run_on_main_process
from .metrics import METRICS_FILE

logger = logging.getLogger(__name__)


class RunArguments(Protocol):
    """The arguments that every training script has."""

    output_dir: str
    resume_from_checkpoint: bool
    eval_only: bool
    disable_tqdm: bool
    mixed_precision: str | None
    torch_compile: bool
    report_to: list[str] | None


def build_accelerator(arguments: RunArguments, loggers: Sequence[str]) -> Accelerator:
    """Make the accelerator of a run, and let `loggers` speak on its main process.

    Raises:
        ValueError: for what this machine cannot do.
    """
    report_to: Any = arguments.report_to
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=report_to,
        project_dir=arguments.output_dir,
        dynamo_backend="inductor" if arguments.torch_compile else None,
        # One process may prepare something while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU take bf16 or no.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not show_progress(arguments, accelerator):
        transformers_logging.disable_progress_bar()
    return accelerator


def show_progress(arguments: RunArguments, accelerator: Accelerator) -> bool:
    """Whether progress bars are drawn: on the main process, on a terminal, unless the user does not want any."""
    return accelerator.is_main_process and sys.stderr.isatty() and not arguments.disable_tqdm


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this step that happens every so many; 0 is never."""
    return every > 0 and step % every == 0


def is_finished(arguments: RunArguments, accelerator: Accelerator) -> bool:
    """Whether the run to be resumed came to its end: `metrics.json` is written then, after the model."""
    metrics_file = Path(arguments.output_dir) / METRICS_FILE
    return arguments.resume_from_checkpoint and run_on_main_process(accelerator, metrics_file.is_file)


def begin(arguments: RunArguments, accelerator: Accelerator, checkpoints: Checkpoints) -> Progress:
    """Start at step 0, or restore the newest good checkpoint and start where it ends."""
    if not arguments.resume_from_checkpoint:
        if accelerator.is_main_process:  # it would say that the new run is finished
            for name in (METRICS_FILE, EVALUATIONS):
                (Path(arguments.output_dir) / name).unlink(missing_ok=True)
        checkpoints.start_over()
        return Progress()
    begun = checkpoints.resume()
    if begun is None:
        logger.info(f"There is no checkpoint in {arguments.output_dir} yet: starting from the beginning.")
        return Progress()
    logger.info(f"Continuing after step {begun.step}, from the newest good checkpoint in {arguments.output_dir}.")
    return begun


def tracker_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as the scalars and texts that every tracker takes."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}


def last_checkpoint(arguments: RunArguments, advice: str = "") -> str:
    """Say where the newest checkpoint of a run that failed is, and what can be done with it; an evaluation has none."""
    saved = list_checkpoints(arguments.output_dir)
    if not saved or arguments.eval_only:
        return "There is no checkpoint of it."
    return f"The last checkpoint before is {saved[-1]}{advice}."
