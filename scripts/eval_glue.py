r"""Fine-tune checkpoints on GLUE, stock or spectrally conditioned, and compare them over several seeds.

    python scripts/eval_glue.py --model_name_or_path runs/stock runs/svd --output_dir runs/glue

Every model is fine-tuned on every task with every seed, and scored on the development sets. A stock checkpoint, and the same
one conditioned without changing its function, on some tasks from the official files:

    python scripts/eval_glue.py --model_name_or_path bert-base-uncased --compare_stock \
        --spectral_conditioning --spectral_method svd --spectral_init preserve \
        --tasks cola,rte,sst2 --data_dir glue --seeds 0 1 2 3 4 --output_dir runs/glue

On several GPUs, each of which takes whole runs (model x task x seed), so that every run is what it is on one:

    accelerate launch --num_processes 4 scripts/eval_glue.py ... --mixed_precision bf16

The output folder gets `results.json` (every run), `glue.md` (the table), `glue.png`, `glue.svg`, and for each model's
card `evaluations_glue-<model>.json`, to be copied next to its checkpoint. The same command, run again, does what is
missing: finished runs are kept, an interrupted one starts over, and further models, tasks or seeds are added to the
table. See docs/glue.md.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from hf_specattn.files import CannotWriteError, FolderLock, cannot_be_written, require_writable, write_bytes
from recipes.glue.fine_tuning import FineTuner, StoppedError, describe, output_paths
from recipes.glue.glue_arguments import GlueArguments, folder_name, parse_arguments
from recipes.glue.glue_evaluations import GLUE_EVALUATIONS, write_glue_evaluations
from recipes.glue.glue_files import GlueDataError
from recipes.glue.glue_models import ModelVariant, check_models, plan_variants, save_base, weight_bytes
from recipes.glue.glue_report import NAME, markdown, picture
from recipes.glue.glue_results import FAILED, RESULTS_FILE, Results, ResultsError, RunRecord, find_conflicts
from recipes.glue.glue_scores import require_packages
from recipes.glue.summary import Summary
from recipes.glue.task_data import TaskData, prepare_data
from recipes.glue.tasks import TASKS
from recipes.run.distributed import PREPARATION_TIMEOUT, run_on_main_process
from recipes.run.interruption import stop_on_signals
from recipes.run.runs import show_progress
from recipes.run.spectral_arguments import SpectralArguments
from recipes.run.usable_model import ModelError

logger = logging.getLogger("eval_glue")

RUNNING = ".running"  # a folder for each run that a command is at

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def build_accelerator(arguments: GlueArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        # The others wait while one prepares the data, and at the end for the process with the longest run.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PREPARATION_TIMEOUT)],
    )
    if accelerator.distributed_type not in PLAIN:
        raise ModelError(
            f"accelerate is configured for {accelerator.distributed_type.value}. Every process here holds the whole model: "
            "use plain multi-GPU or CPU processes, or one process."
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for name in ("eval_glue", "recipes"):
        logging.getLogger(name).setLevel(logging.INFO)  # each process tells of its own runs
    transformers_logging.disable_progress_bar()  # of loading weights: one per run would be too many
    return accelerator


def plan_runs(
    arguments: GlueArguments, accelerator: Accelerator, variants: Sequence[ModelVariant], data: dict[str, TaskData]
) -> list[RunRecord]:
    """Return a record to fill in for every run: task by task, seed by seed, so that models stay comparable meanwhile."""
    shared = {**arguments.training_settings(), "mixed_precision": accelerator.mixed_precision}
    return [
        RunRecord(variant.label, name, seed, {**variant.settings(), **shared}, task_data.description)
        for name, task_data in data.items()
        for seed in arguments.seeds
        for variant in variants
    ]


def runs_to_do(arguments: GlueArguments, results: Results, planned: Sequence[RunRecord]) -> list[RunRecord]:
    """Leave out what is finished, after a check that all runs belong into one table."""
    if arguments.overwrite_output_dir:
        for path in (results.path, *results.path.parent.glob(GLUE_EVALUATIONS)):
            path.unlink(missing_ok=True)
    existing = results.read()
    if conflicts := find_conflicts(existing, planned):
        raise ResultsError(
            f"{results.path} holds runs that do not belong in one table with these:\n  "
            + "\n  ".join(conflicts)
            + "\nName another --output_dir, give these models other --labels, or forget the earlier runs with "
            "--overwrite_output_dir."
        )
    kept = {record.key: record for record in existing}
    to_do = [record for record in planned if not is_done(arguments, kept.get(record.key))]
    if kept:
        logger.info(f"{len(planned) - len(to_do)} of {len(planned)} runs are in {results.path} already.")
    return to_do


def is_done(arguments: GlueArguments, record: RunRecord | None) -> bool:
    """Whether a run is in the results, with everything that is asked for."""
    if record is None:
        return False
    if record.status == FAILED:
        return not arguments.retry_failed
    return all((Path(arguments.output_dir) / path).exists() for path in output_paths(record, arguments))


def save_bases(arguments: GlueArguments, variants: Sequence[ModelVariant]) -> dict[str, str]:
    """Save what saved adapters name as their base model, where that is nowhere yet: checkpoints conditioned by flags."""
    wanted = [each for each in variants if each.lora is not None and each.loading and arguments.save_models]
    return {each.label: save_base(each, Path(arguments.output_dir) / "bases" / each.folder) for each in wanted}


def check_reference(arguments: GlueArguments, variants: Sequence[ModelVariant], results: Results) -> None:
    names = dict.fromkeys([*(variant.label for variant in variants), *(record.model for record in results.read())])
    if arguments.reference is not None and arguments.reference not in names:
        raise ResultsError(
            f"--reference {arguments.reference!r} is not a model; the models are {', '.join(map(repr, names))}."
        )


def run_all(tuner: FineTuner, to_do: Sequence[RunRecord], results: Results) -> bool:
    """Do the runs, and record each; returns whether a signal ended it early."""
    for number, record in enumerate(tqdm(to_do, desc="Runs", unit="run", disable=not tuner.bars), start=1):
        lock = FolderLock(results.path.parent / RUNNING / record_folder(record), "--output_dir")
        try:
            lock.acquire()
            if not is_done(tuner.arguments, {old.key: old for old in results.read()}.get(record.key)):
                tuner.execute(record)
                results.add(record)
                tell(record, f"{number}/{len(to_do)}")
        except CannotWriteError:
            # Several commands may work into one folder, each on other runs; what both ask for, one does.
            logger.warning(f"{number}/{len(to_do)}: {describe(record)} is skipped: another command is running it.")
        except StoppedError:
            return True
        finally:
            lock.release()
        if tuner.stop.requested():
            return True
    with suppress(OSError):  # another command is at a run
        (results.path.parent / RUNNING).rmdir()
    return False


def record_folder(record: RunRecord) -> str:
    return f"{folder_name(record.model)}-{record.task}-{record.seed}"


def check_space(arguments: GlueArguments, variants: Sequence[ModelVariant]) -> None:
    """Refuse, before the data are read, a disk without space for the models that are to be saved."""
    if arguments.save_models:
        runs = len(arguments.glue_tasks) * len(arguments.seeds)
        require_writable(arguments.output_dir, "--output_dir", runs * sum(map(weight_bytes, variants)))


def tell(record: RunRecord, place: str) -> None:
    if record.status == FAILED:
        return  # told already
    scores = [f"{100 * metrics[TASKS[record.task].main_metric]:.2f}" for metrics in record.scores.values()]
    logger.info(
        f"{place}: {describe(record)}: {' / '.join(scores)} in {record.seconds['total']:.0f} s, "
        f"{record.facts['train_examples_per_second']:.1f} training examples/s."
    )


def report(arguments: GlueArguments, results: Results) -> None:
    """Write the table and the figure of all runs in the output folder, and print the table."""
    records = results.read()
    if not records:
        return
    summary = Summary(records, arguments.reference)
    text, output = markdown(summary), Path(arguments.output_dir)
    write_bytes(output / f"{NAME}.md", text.encode())
    write_glue_evaluations(records, output)
    try:
        images = picture(summary)
    except ImportError as error:
        logger.warning(f"{NAME}.png and {NAME}.svg are left out: {error}")
        images = {}
    for ending, image in images.items():
        write_bytes(output / f"{NAME}.{ending}", image)
    print(text, end="")  # last: the reader of a pipe may be gone
    logger.info(f"{RESULTS_FILE}, {NAME}.md, {GLUE_EVALUATIONS} and the figure are in {output}.")


def evaluate(arguments: GlueArguments, spectral: SpectralArguments, accelerator: Accelerator) -> int:
    """Do all runs that are missing and report all that there are; returns how many of those asked for have failed."""
    results, bars = Results(arguments.output_dir), show_progress(arguments, accelerator)
    if len(arguments.seeds) == 1 and arguments.seeds[0] > 1 and accelerator.is_main_process:  # it was a count once
        logger.warning(
            f"--seeds {arguments.seeds[0]} is one run per model and task, with that seed; five are --seeds 0 1 2 3 4."
        )
    require_packages()
    variants = plan_variants(arguments, spectral)
    by_label = {variant.label: variant for variant in variants}
    # What all processes need, one makes; what is wrong shows before the first run.
    run_on_main_process(accelerator, lambda: check_space(arguments, variants))
    run_on_main_process(accelerator, lambda: check_reference(arguments, variants, results))
    run_on_main_process(accelerator, lambda: check_models(variants, arguments.glue_tasks, arguments.resolved_protocol))
    data = run_on_main_process(accelerator, lambda: prepare_data(arguments, variants, bars))
    planned = plan_runs(arguments, accelerator, variants, data)
    to_do = run_on_main_process(accelerator, lambda: runs_to_do(arguments, results, planned))
    bases = run_on_main_process(accelerator, lambda: save_bases(arguments, variants) if to_do else {})
    # From here on each process is for itself, with its share of the runs: neighbors in the list take equally long.
    mine = to_do[accelerator.process_index :: accelerator.num_processes]
    with stop_on_signals() as stop:
        tuner = FineTuner(arguments, accelerator, by_label, data, stop, spectral.spectral_exact_refresh, bases, bars)
        stopped = run_all(tuner, mine, results)
    if stopped:
        again = "" if not arguments.overwrite_output_dir else " without --overwrite_output_dir"
        logger.info(f"Stopped by a signal. The same command{again} continues it.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(arguments, results)
    keys = {record.key for record in planned}
    return run_on_main_process(
        accelerator, lambda: sum(record.failure is not None and record.key in keys for record in results.read())
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[0])
    try:
        accelerator = build_accelerator(arguments)
        with logging_redirect_tqdm():
            failed = evaluate(arguments, spectral, accelerator)
        accelerator.end_training()  # Gloo's threads can abort an interpreter that is finalized beside them
    except (GlueDataError, ModelError, ResultsError, CannotWriteError, ImportError, OSError) as error:
        # One line for what a user can change; a traceback for anything else.
        if isinstance(error, OSError) and not cannot_be_written(error):
            raise
        raise SystemExit(f"error: {error}") from error
    if failed:
        if accelerator.is_main_process:
            logger.warning(f"{failed} runs have failed; the table says how. --retry_failed runs them again.")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
