"""A run from its beginning to its end, around the loop: processes and logging, resuming, saving, the record."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from hf_specattn.checkpoints.evaluations_file import EVALUATIONS, write_evaluations
from hf_specattn.files import CannotWriteError, cannot_be_written

from .checkpointing import CheckpointError, Checkpoints, Progress, list_checkpoints
from .conditioned_model import ConditioningError
from .distributed import PREPARATION_TIMEOUT, answers_within, run_on_main_process
from .loop import Task, Training, report_evaluation, train
from .messages import one_line
from .output_folder import sole_use
from .run_arguments import RunArguments, check_output_dir
from .run_description import model_description
from .run_metrics import LOSS_CURVE_FILE, METRICS_FILE, NonFiniteLossError, RunMetrics
from .schedules import BudgetSchedule
from .sharding import configure_sharding
from .spectral_arguments import SpectralArguments
from .training_state import TrainingParts
from .usable_model import ModelError

logger = logging.getLogger(__name__)

# Those that speak on the main process.
LOGGERS = ("recipes", "hf_specattn")


def run(
    task: Task,
    model: PreTrainedModel,
    arguments: Any,
    spectral: SpectralArguments,
    accelerator: Accelerator,
) -> None:
    """Train `model` on `task`, from the newest checkpoint where the run is resumed; save it, and measure what was saved.

    Args:
        arguments: A dataclass with those of `RunArguments` among its fields.
    """
    configure_sharding(accelerator, model)
    metrics = RunMetrics(arguments=asdict(arguments) | asdict(spectral))
    metrics.facts = task.facts(model) | common_facts(task, model, accelerator)
    for line in task.describe(metrics.facts):
        logger.info(line)
    finished = is_finished(arguments, accelerator)
    if not finished:
        accelerator.init_trackers(task.name, config=tracker_config(metrics.arguments))
    training = prepare(task, model, arguments, spectral, accelerator)
    if not finished:
        training.checkpoints.require_space(with_checkpoints=arguments.save_steps > 0)
    # Last before the loop: it restores the random number generators.
    resumed = start_or_resume(arguments, accelerator, training.checkpoints)
    if finished:
        logger.info(f"The run in {arguments.output_dir} is finished; there is nothing to continue.")
    else:
        with answers_within(accelerator, arguments.ddp_timeout):
            with_bar = show_progress(arguments, accelerator)
            done = train(task, training, arguments, accelerator, metrics, resumed, with_bar)
        if task.amounts.budget.share(done.step, done.seconds) < 1:
            report_stop(task, arguments, done)
        else:
            finish(task, training, arguments, accelerator, metrics, done)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextlib.contextmanager
def started(arguments: RunArguments, *errors: type[Exception]) -> Iterator[Accelerator]:
    """The accelerator of a run; what a user can change ends the program with a message, anything else with a traceback.

    Args:
        errors: The experiment's own errors whose message says what to do.
    """
    known: tuple[type[Exception], ...] = (CheckpointError, ConditioningError, CannotWriteError, ModelError, *errors)
    try:
        accelerator = build_accelerator(arguments)
        with contextlib.ExitStack() as stack:
            stack.enter_context(logging_redirect_tqdm())
            if not (arguments.eval_only or arguments.show_plan):
                stack.enter_context(sole_use(arguments.output_dir, accelerator))
                # Again: another run may have written there since the command line was read.
                run_on_main_process(accelerator, lambda: check_output_dir(arguments))
            yield accelerator
        accelerator.state.destroy_process_group()  # Gloo's threads can abort an interpreter that is finalized beside them
    except NonFiniteLossError as error:
        raise SystemExit(f"error: {error} {last_checkpoint(arguments)}") from error
    except known as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        if not cannot_be_written(error):
            raise
        raise SystemExit(f"error: {one_line(error)}. {last_checkpoint(arguments)}") from error


def build_accelerator(arguments: RunArguments) -> Accelerator:
    """Make the accelerator of a run, and let `LOGGERS` speak on its main process.

    Raises:
        SystemExit: for what this machine cannot do.
    """
    report_to: Any = arguments.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=report_to,
            project_dir=arguments.output_dir,
            dynamo_backend="inductor" if arguments.torch_compile else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PREPARATION_TIMEOUT)],
        )
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU take bf16 or no.")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not show_progress(arguments, accelerator):
        transformers_logging.disable_progress_bar()
    return accelerator


def show_progress(arguments: Any, accelerator: Accelerator) -> bool:
    """Whether progress bars are drawn: on the main process, on a terminal, unless the user does not want any."""
    return accelerator.is_main_process and sys.stderr.isatty() and not arguments.disable_tqdm


def show_plan(
    describe_plan: Callable[..., Iterable[str]], arguments: Any, spectral: SpectralArguments, accelerator: Accelerator
) -> None:
    """Log what the run will do, before any of it is done."""
    if accelerator.is_main_process:
        precision = accelerator.mixed_precision
        for line in describe_plan(arguments, spectral, processes=accelerator.num_processes, mixed_precision=precision):
            logger.info(line)


def common_facts(task: Task, model: PreTrainedModel, accelerator: Accelerator) -> dict[str, Any]:
    """What every run records of its model and machine."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "global_batch_size": task.amounts.batch,
        f"{task.unit}_per_step": task.amounts.batch * task.units,
        "device": accelerator.device.type,
        "device_name": torch.cuda.get_device_name(accelerator.device) if on_gpu else None,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def prepare(
    task: Task,
    model: PreTrainedModel,
    arguments: Any,
    spectral: SpectralArguments,
    accelerator: Accelerator,
) -> Training:
    """Optimizer, schedule, processes and checkpoints; the arguments are those of `run`."""
    optimizer = task.optimizer(model)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    schedule = BudgetSchedule(prepared, task.learning_rate_factor())
    averaged = task.averaged(model)
    parts = TrainingParts(model, prepared, scaler=accelerator.scaler, processor=task.processor, averaged=averaged)
    description = settings_to_keep(task, model, arguments, spectral, accelerator)
    limit = arguments.save_total_limit
    checkpoints = Checkpoints(arguments.output_dir, accelerator, parts, description, keep_last=limit)
    monitor = None
    if arguments.spectral_monitor_every and accelerator.is_main_process:
        # Here, because the Trainer's callbacks come with it, which take seconds.
        from hf_specattn.diagnostics.monitor import MONITOR_FILE, SpectralMonitor

        file = Path(arguments.output_dir) / MONITOR_FILE
        monitor = SpectralMonitor(arguments.spectral_monitor_every, batch=task.samples(2), file=file)
    # Dropout and stochastic depth differ between processes.
    set_seed(arguments.seed, device_specific=True)
    exact = spectral.spectral_exact_refresh
    return Training(model, wrapped, prepared, schedule, checkpoints, averaged, exact, monitor)


def settings_to_keep(
    task: Task, model: PreTrainedModel, arguments: RunArguments, spectral: SpectralArguments, accelerator: Accelerator
) -> dict[str, Any]:
    """What must be the same when the run is resumed, by the names of flags and of the model's configuration.

    The split of the global batch among processes and forward passes may change, and so may everything about reading,
    reporting and saving. A resumed run prepares its data again, with the same result: the fingerprints show if not.
    """
    exact = spectral.spectral_exact_refresh
    return {
        **model_description(model.config),
        "max_steps": task.amounts.budget.steps,
        "global_batch_size": task.amounts.batch,
        "mixed_precision": accelerator.mixed_precision,
        "spectral_init": spectral.init,
        # Only where it was chosen: runs from before this flag can be resumed.
        **({} if exact is None else {"spectral_exact_refresh": exact}),
        **arguments.optimization_settings(),
        "validation_fingerprint": task.validation_fingerprint,
        **task.must_match(),
    }


def is_finished(arguments: RunArguments, accelerator: Accelerator) -> bool:
    """Whether the run to be resumed was finished: `metrics.json` is written at the end, after the model."""
    metrics_file = Path(arguments.output_dir) / METRICS_FILE
    return arguments.resume_from_checkpoint and run_on_main_process(accelerator, metrics_file.is_file)


def start_or_resume(arguments: RunArguments, accelerator: Accelerator, checkpoints: Checkpoints) -> Progress:
    """Start at step 0, or restore the newest good checkpoint and start where it ends."""
    if not arguments.resume_from_checkpoint:
        if accelerator.is_main_process:  # it would say that the new run is finished
            for name in (METRICS_FILE, EVALUATIONS):
                (Path(arguments.output_dir) / name).unlink(missing_ok=True)
        checkpoints.start_over()
        return Progress()
    resumed = checkpoints.resume()
    if resumed is None:
        logger.info(f"There is no checkpoint in {arguments.output_dir} yet: starting from the beginning.")
        return Progress()
    logger.info(f"Continuing after step {resumed.step}, from the newest good checkpoint in {arguments.output_dir}.")
    return resumed


def tracker_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as the scalars and texts that every tracker takes."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}


def report_stop(task: Task, arguments: RunArguments, done: Progress) -> None:
    """Say how to continue a run that a signal stopped."""
    instead = " in place of --overwrite_output_dir" if arguments.overwrite_output_dir else ""
    of = task.amounts.budget.steps or f"those that {task.amounts.describe()} give"
    logger.info(
        f"Stopped after step {done.step} of {of}, with a checkpoint in {arguments.output_dir}. The same command with "
        f"--resume_from_checkpoint{instead} continues."
    )


def finish(
    task: Task,
    training: Training,
    arguments: RunArguments,
    accelerator: Accelerator,
    metrics: RunMetrics,
    done: Progress,
) -> None:
    """Save the model, measure what was saved, and write the record."""
    path = arguments.output_dir
    loadable = task.save(training.result, accelerator, path)
    if not accelerator.is_main_process:
        return
    found = task.evaluate_saved(path, accelerator.device) if loadable else task.evaluate(training.result, None)
    metrics.validation.append(report_evaluation(task, accelerator, found, done.step))
    seen = done.record["position"] * task.units
    metrics.final = {**metrics.validation[-1], f"train_{task.unit}_seen": seen, "seconds": done.seconds}
    if accelerator.device.type == "cuda":
        metrics.facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(accelerator.device)
    results = metrics.evaluations(task.hub_task, task.dataset, task.measured)
    write_evaluations(path, Path(path).resolve().name, results)
    metrics.write(path, task.loss_name)
    logger.info(
        f"Trained for {done.seconds:.1f} s on {seen:,} {task.unit}. Model, {task.processor_name}, {METRICS_FILE} and "
        f"{LOSS_CURVE_FILE} are in {path}."
    )


def evaluate_only(task: Task, path: str | None, accelerator: Accelerator) -> None:
    """Measure a saved model on the validation data of its run, or on that of the flags given, and print it as JSON."""
    assert path is not None  # the arguments were checked
    if accelerator.is_main_process:
        recorded = Path(path) / METRICS_FILE
        if recorded.is_file():
            facts = json.loads(recorded.read_text(encoding="utf-8")).get("facts", {})
            if facts.get("validation_fingerprint") != task.validation_fingerprint:
                logger.warning(
                    f"This is not the validation data that {path} was trained with: the values do not compare."
                )
        print(json.dumps(task.evaluate_saved(path, accelerator.device)))
    accelerator.wait_for_everyone()


def last_checkpoint(arguments: RunArguments) -> str:
    """Say where the newest checkpoint of a run that failed is, and what can be done with it; an evaluation has none."""
    saved = list_checkpoints(arguments.output_dir)
    if not saved or arguments.eval_only:
        return "There is no checkpoint of it."
    # Of a conditioned model of timm it holds the weights alone.
    loads = (saved[-1] / CONFIG_NAME).is_file()
    advice = "; another run can start from it by --model_name_or_path" if loads else ""
    return f"The last checkpoint before is {saved[-1]}{advice}."
