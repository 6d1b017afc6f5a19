r"""Fine-tune checkpoints on GLUE, stock or spectrally conditioned, and compare them over several seeds.

    python scripts/eval_glue.py --model_name_or_path runs/stock runs/svd --output_dir runs/glue

Every model is fine-tuned on every task with every seed, and scored on the development sets. A stock checkpoint, and the same
one conditioned without changing its function, on some tasks from the official files:

    python scripts/eval_glue.py --model_name_or_path bert-base-uncased --compare_stock \
        --spectral_conditioning --spectral_method svd --spectral_init preserve \
        --tasks cola,rte,sst2 --data_dir glue --seeds 5 --output_dir runs/glue

On several GPUs, with the same scores but for rounding and dropout:

    accelerate launch --num_processes 4 scripts/eval_glue.py ... --mixed_precision bf16

The output folder gets `results.json` (every run), `glue.md` (the table), `glue.png`, `glue.svg`, and for each model's card
`evaluations_glue-<model>.json`, to be copied beside its checkpoint. The same command again does what is missing: finished
runs are kept, an interrupted one starts again, and further models, tasks or seeds are added to the table. See docs/glue.md.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from hf_specattn import refresh
from hf_specattn.conditioning import refresh_interval
from hf_specattn.files import write_bytes
from recipes.glue.arguments import GlueArguments, folder_name, parse_arguments
from recipes.glue.batches import epoch_batches
from recipes.glue.data import Examples, GlueDataError, read_examples
from recipes.glue.evaluations import GLUE_EVALUATIONS, write_glue_evaluations
from recipes.glue.failures import RunFailedError, SharedFailure
from recipes.glue.features import (
    Collator,
    TokenizedExamples,
    load_tokens,
    prepare_tokens,
    tokenizer_fingerprint,
)
from recipes.glue.metrics import predictions_from_logits
from recipes.glue.models import (
    ModelError,
    ModelVariant,
    load_model,
    plan_variants,
    quiet,
    save_base,
)
from recipes.glue.prediction import accepted_inputs, predict_logits, write_submission
from recipes.glue.protocols import Protocol, build_schedule, total_steps
from recipes.glue.report import NAME, markdown, picture
from recipes.glue.results import (
    FAILED,
    FINISHED,
    RESULTS_FILE,
    Results,
    ResultsError,
    RunRecord,
    find_conflicts,
)
from recipes.glue.scoring import best_constant_score, compute_scores
from recipes.glue.summary import Summary
from recipes.glue.tasks import TASKS, GlueTask
from recipes.run.arguments import SpectralArguments
from recipes.run.distributed import run_on_main_process
from recipes.run.interruption import StopRequest, stop_on_signals
from recipes.run.metrics import NonFiniteLossError, package_versions
from recipes.run.optimization import parameter_groups
from recipes.run.saving import save_pretrained

logger = logging.getLogger("eval_glue")

# Steps between looks at the losses: each one waits for the device.
STEPS_PER_CHECK = 25
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


# ------------------------------------------------------------------------------------------------------------ preparing


def build_accelerator(arguments: GlueArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        # One process prepares the data while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.distributed_type not in PLAIN:
        raise ModelError(
            f"accelerate is configured for {accelerator.distributed_type.value}. Every process here holds the whole model: "
            "use plain multi-GPU or CPU processes, or one process."
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    transformers_logging.disable_progress_bar()  # of loading weights: one per run would be too many
    return accelerator


def show_progress(arguments: GlueArguments, accelerator: Accelerator) -> bool:
    return accelerator.is_main_process and sys.stderr.isatty() and not arguments.disable_tqdm


@dataclass(frozen=True)
class TaskData:
    """The data of a task.

    Attributes:
        task: Which one.
        description: What tells it from other data, and its sizes; equal for all models.
        files: Tokenizer's fingerprint -> split -> file with the token ids.
    """

    task: GlueTask
    description: dict[str, Any]
    files: dict[str, dict[str, Path]]


def prepare_task(arguments: GlueArguments, task: GlueTask, variants: Sequence[ModelVariant], bars: bool) -> TaskData:
    """Read, check and tokenize the sets of a task. On the main process only."""
    protocol = arguments.resolved_protocol
    tokenizers = {tokenizer_fingerprint(variant.tokenizer): variant.tokenizer for variant in variants}
    files: dict[str, dict[str, Path]] = {fingerprint: {} for fingerprint in tokenizers}
    description: dict[str, Any] = {"constant_answer": {}}
    for split in task.splits:
        if split.kind == "test" and not arguments.do_predict:
            continue
        limit = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}.get(split.kind)
        examples = read_examples(task, split, arguments.data_dir, arguments.dataset_name).subset(limit)
        if split.kind != "test":
            describe_split(description, task, split.name, examples)
        for fingerprint, tokenizer in tokenizers.items():
            files[fingerprint][split.name] = prepare_tokens(
                examples,
                tokenizer,
                protocol.max_seq_length,
                arguments.resolved_cache_dir,
                f"{task.name}-{split.name}",
                empty_second=protocol.empty_second,
                show_progress=bars,
            )
    logger.info(f"{task.title}: {description['train_examples']:,} examples to train on.")
    return TaskData(task, description, files)


def describe_split(description: dict[str, Any], task: GlueTask, split: str, examples: Examples) -> None:
    description[f"{split}_fingerprint"] = examples.fingerprint()
    description[f"{split}_examples"] = len(examples)
    if split != "train" and examples.labels is not None:
        description["constant_answer"][split] = best_constant_score(task, examples.labels)


def prepare_data(
    arguments: GlueArguments, accelerator: Accelerator, variants: Sequence[ModelVariant]
) -> dict[str, TaskData]:
    """Prepare all tasks on the main process, and tell the others. Everything that is wrong with the data shows here."""
    bars = show_progress(arguments, accelerator)

    def prepare() -> dict[str, TaskData]:
        tasks = tqdm(arguments.glue_tasks, desc="Preparing", unit="task", disable=not bars)
        data = {task.name: prepare_task(arguments, task, variants, bars) for task in tasks}
        if arguments.runs_all_tasks:  # the smallest first: what is wrong shows early
            data = dict(sorted(data.items(), key=lambda item: item[1].description["train_examples"]))
        return data

    return run_on_main_process(accelerator, prepare)


def plan_runs(
    arguments: GlueArguments, accelerator: Accelerator, variants: Sequence[ModelVariant], data: dict[str, TaskData]
) -> list[RunRecord]:
    """Return a record to fill in for every run: task by task, seed by seed, so that models stay comparable meanwhile."""
    shared = {**arguments.training_settings(), "mixed_precision": accelerator.mixed_precision}
    return [
        RunRecord(variant.label, name, seed, {**variant.settings(), **shared}, task_data.description)
        for name, task_data in data.items()
        for seed in range(arguments.seeds)
        for variant in variants
    ]


def runs_to_do(arguments: GlueArguments, results: Results, planned: Sequence[RunRecord]) -> list[RunRecord]:
    """Leave out what is finished, after a check that all runs belong into one table. On the main process only."""
    if arguments.overwrite_output_dir:
        for path in (results.path, *results.path.parent.glob(GLUE_EVALUATIONS)):
            path.unlink(missing_ok=True)
    existing = results.read()
    if conflicts := find_conflicts(existing, planned):
        raise ResultsError(
            f"{results.path} holds runs that do not belong into one table with these:\n  "
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


# ----------------------------------------------------------------------------------------------------------- fine-tuning


class StoppedError(Exception):
    """A signal has ended the run before its time."""


@dataclass
class Run:
    """One run while it goes on, and what it needs.

    Attributes:
        record: What it fills in.
        variant: The model.
        task: The task.
        tokens: Split -> examples.
        protocol: How it is trained.
        model: Loaded for this run.
        collate: Makes the model's inputs.
        failure: Errors of single processes.
    """

    record: RunRecord
    variant: ModelVariant
    task: GlueTask
    tokens: dict[str, TokenizedExamples]
    protocol: Protocol
    model: nn.Module
    collate: Collator
    failure: SharedFailure


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        arguments, accelerator: Of the command.
        variants: Name -> model.
        data: Task -> its data.
        results: Where the records go.
        stop: Whether a signal asks to stop.
        exact_refresh: How dynamic corrections are recomputed, for `refresh`.
        bases: Model -> the copy that its adapters name as their base.
        loaded: Models that were loaded before, whose warnings were seen.
        tokens: Sets of the task at hand, by file.
    """

    arguments: GlueArguments
    accelerator: Accelerator
    variants: dict[str, ModelVariant]
    data: dict[str, TaskData]
    results: Results
    stop: StopRequest
    exact_refresh: bool | None = None
    bases: dict[str, str] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    tokens: dict[Path, TokenizedExamples] = field(default_factory=dict)

    def tokens_of(self, record: RunRecord) -> dict[str, TokenizedExamples]:
        """Return the sets of a run, kept while runs on the same task follow."""
        files = self.data[record.task].files
        wanted = files[tokenizer_fingerprint(self.variants[record.model].tokenizer)]
        current = {path for by_split in files.values() for path in by_split.values()}
        self.tokens = {path: examples for path, examples in self.tokens.items() if path in current}
        for path in wanted.values():
            if path not in self.tokens:
                self.tokens[path] = load_tokens(path)
        return {split: self.tokens[path] for split, path in wanted.items()}


def execute(bench: Bench, record: RunRecord) -> None:
    """Do one run and fill in its record; a failure is part of the record."""
    accelerator = bench.accelerator
    failure = SharedFailure(accelerator)
    record.versions = package_versions()
    record.facts = {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "model_name_or_path": bench.variants[record.model].path,
    }
    started = time.perf_counter()
    try:
        fine_tune_and_score(bench, record, failure)
        record.status = FINISHED
    except RunFailedError as error:
        logger.error(f"{describe(record)} failed ({error.kind}): {error}", exc_info=error.__cause__)
        record.status, record.scores = FAILED, {}
        record.failure = {"kind": error.kind, "message": str(error)}
    finally:
        accelerator.free_memory()
    record.seconds["total"] = time.perf_counter() - started


def describe(record: RunRecord) -> str:
    return f"{TASKS[record.task].title}, seed {record.seed}, {record.model}"


def fine_tune_and_score(bench: Bench, record: RunRecord, failure: SharedFailure) -> None:
    run = begin(bench, record, failure)
    started = time.perf_counter()
    train(bench, run)
    record.seconds["training"] = time.perf_counter() - started
    examples = len(run.tokens["train"]) * run.protocol.num_train_epochs
    record.facts["train_examples_per_second"] = examples / record.seconds["training"]

    started = time.perf_counter()
    count = 0
    for split in run.task.splits_of("validation"):
        logits = predict(bench, run, split.name)
        with failure.collected():
            labels: Any = run.tokens[split.name].labels
            record.scores[split.name] = compute_scores(run.task, predictions_from_logits(run.task, logits), labels)
        failure.raise_together()
        count += len(logits)
    record.seconds["evaluation"] = time.perf_counter() - started
    record.facts["eval_examples_per_second"] = count / record.seconds["evaluation"]
    write_outputs(bench, run)


def begin(bench: Bench, record: RunRecord, failure: SharedFailure) -> Run:
    """Load the data and the model; every process draws the same new layers."""
    accelerator, variant = bench.accelerator, bench.variants[record.model]
    task, protocol = TASKS[record.task], bench.arguments.resolved_protocol
    with failure.collected():
        tokens = bench.tokens_of(record)
        set_seed(record.seed)
        model = load(bench, variant, task, protocol).to(accelerator.device)
        base = model.get_base_model() if variant.lora is not None else model
        collate = Collator(variant.tokenizer, accepted_inputs(base), accelerator.device)
        parameters = list(model.parameters())
        record.facts |= {
            "model_type": base.config.model_type,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "steps": total_steps(protocol, len(tokens["train"])),
        }
    failure.raise_together()
    return Run(record, variant, task, tokens, protocol, model, collate, failure)


def load(bench: Bench, variant: ModelVariant, task: GlueTask, protocol: Protocol) -> Any:
    if variant.label in bench.loaded:
        with quiet():
            return load_model(variant, task, protocol, bench.bases.get(variant.label))
    bench.loaded.add(variant.label)
    return load_model(variant, task, protocol, bench.bases.get(variant.label))


def train(bench: Bench, run: Run) -> None:
    """Train for all epochs of the protocol.

    The model is not wrapped for several processes: their gradients are summed here, weighted by examples, so that the last,
    smaller batch counts like on one process, and a process that fails leaves none waiting.
    """
    accelerator, protocol, record = bench.accelerator, run.protocol, run.record
    examples = run.tokens["train"]
    optimizer = torch.optim.AdamW(
        parameter_groups(run.model, protocol.weight_decay),
        lr=protocol.learning_rate,
        betas=(protocol.adam_beta1, protocol.adam_beta2),
        eps=protocol.adam_epsilon,
        fused=accelerator.device.type == "cuda",  # at these sizes a step costs mostly launches of kernels
    )
    schedule = build_schedule(protocol, optimizer, record.facts["steps"])
    prepared = accelerator.prepare_optimizer(optimizer)
    refresh_every = refresh_interval(run.model)
    set_seed(record.seed, device_specific=True)  # dropout differs between processes
    run.model.train()
    step = 0
    with tqdm(
        total=record.facts["steps"],
        desc=describe(record),
        unit="step",
        disable=not show_progress(bench.arguments, accelerator),
        leave=False,
    ) as bar:
        for epoch in range(protocol.num_train_epochs):
            batches = epoch_batches(
                examples.lengths,
                protocol.train_batch_size,
                seed=record.seed,
                epoch=epoch,
                group_by_length=bench.arguments.group_by_length,
            )
            losses: list[torch.Tensor] = []
            for batch in batches:
                losses.append(train_step(bench, run, prepared, batch))
                if not accelerator.optimizer_step_was_skipped:  # fp16's loss scaling skips steps that overflowed
                    schedule.step()
                step += 1
                if refresh_every is not None and step % refresh_every == 0:
                    refresh(run.model, exact=bench.exact_refresh)
                bar.update()
                if bench.stop.requested():
                    raise StoppedError
                if step % STEPS_PER_CHECK == 0 or len(losses) == len(batches):
                    require_finite(run, losses, step)
                    bar.set_postfix_str(f"loss {losses[-1].item():.4f}")
            values = torch.stack(losses).double().cpu().numpy()
            if epoch == 0:
                record.first_loss = float(values[0])
            record.epoch_losses.append(float(np.average(values, weights=[len(batch) for batch in batches])))
    run.failure.raise_together()


def train_step(bench: Bench, run: Run, optimizer: Any, batch: NDArray[np.int64]) -> torch.Tensor:
    """Take one optimizer step over a batch that all processes share; returns its mean loss, on the device."""
    accelerator, failure = bench.accelerator, run.failure
    several = accelerator.num_processes > 1
    own = batch[accelerator.process_index :: accelerator.num_processes]
    totals = torch.zeros(2, device=accelerator.device)  # the mean loss, and how many processes have failed
    gradients = torch.empty(0)
    with failure.collected():
        if len(own) and not failure.happened:
            with accelerator.autocast():
                logits = run.model(**run.collate(run.tokens["train"], own)).logits
            loss = summed_loss(run, logits, own) / len(batch)
            accelerator.backward(loss)
            totals[0] = loss.detach()
        if several:
            gradients = flat_gradients(run.model)
    totals[1] = float(failure.happened)
    if several:
        torch.distributed.all_reduce(totals)
    failure.raise_together(any_failed=totals[1].item() > 0 if several else None)
    if several:
        torch.distributed.all_reduce(gradients)
    with failure.collected():
        if several:
            set_gradients(run.model, gradients)
        if run.protocol.max_grad_norm > 0:
            accelerator.clip_grad_norm_(run.model.parameters(), run.protocol.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return totals[0]


def summed_loss(run: Run, logits: torch.Tensor, indices: NDArray[np.int64]) -> torch.Tensor:
    """Sum the losses of some examples: cross-entropy, or the squared error of a regression; in float32."""
    labels = torch.as_tensor(run.tokens["train"].labels[indices], device=logits.device)  # type: ignore[index]
    if run.task.is_regression:
        return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def flat_gradients(model: nn.Module) -> torch.Tensor:
    """Return the gradients of all trainable parameters in a row, then for each of them whether it has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    present = torch.tensor([float(each.grad is not None) for each in parameters], device=rows[0].device)
    return torch.cat([*(row.flatten() for row in rows), present])


def set_gradients(model: nn.Module, gradients: torch.Tensor) -> None:
    """Put summed `flat_gradients` back. What has no gradient on any process keeps none: AdamW leaves it alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    *rows, present = gradients.split([*(each.numel() for each in parameters), len(parameters)])
    for parameter, row, found in zip(parameters, rows, present.tolist()):
        parameter.grad = row.view_as(parameter) if found else None


def require_finite(run: Run, losses: Sequence[torch.Tensor], step: int) -> None:
    """End the run if one of the last losses is nan or infinite; `step` is that of the last one, from 1."""
    recent = torch.stack(list(losses[-STEPS_PER_CHECK:]))
    with run.failure.collected():
        if not bool(recent.isfinite().all()):
            first = int((~recent.isfinite()).nonzero()[0])
            raise NonFiniteLossError(
                f"The training loss is {recent[first].item()} at step {step - len(recent) + 1 + first}. Lower "
                "--learning_rate, lengthen --warmup_ratio, or use --mixed_precision no."
            )
    run.failure.raise_together()


def predict(bench: Bench, run: Run, split: str) -> NDArray[np.float32]:
    return predict_logits(
        run.model,
        run.tokens[split],
        run.collate,
        bench.accelerator,
        run.failure,
        num_outputs=run.task.num_outputs,
        batch_size=bench.arguments.per_device_eval_batch_size,
        show_progress=show_progress(bench.arguments, bench.accelerator),
    )


def write_outputs(bench: Bench, run: Run) -> None:
    """Write what was asked for beside the scores: test-set predictions, the model."""
    record, output = run.record, Path(bench.arguments.output_dir)
    if bench.arguments.do_predict:
        for split in run.task.splits_of("test"):
            logits = predict(bench, run, split.name)
            with run.failure.collected():
                if bench.accelerator.is_main_process:
                    folder = output / predictions_folder(record)
                    write_submission(folder, run.task, split, run.tokens[split.name].indices, logits)
            run.failure.raise_together()
    if bench.arguments.save_models:
        with run.failure.collected():
            if bench.accelerator.is_main_process:
                model: Any = run.model
                save_pretrained(model, run.variant.tokenizer, output / model_folder(record))
        run.failure.raise_together()
    record.outputs = output_paths(record, bench.arguments)


def predictions_folder(record: RunRecord) -> str:
    return f"predictions/{folder_name(record.model)}/seed-{record.seed}"


def model_folder(record: RunRecord) -> str:
    return f"models/{folder_name(record.model)}/{record.task}/seed-{record.seed}"


def output_paths(record: RunRecord, arguments: GlueArguments) -> list[str]:
    """Return what a run writes beside its record, below the output folder."""
    titles = [split.title for split in TASKS[record.task].splits_of("test")] if arguments.do_predict else []
    saved = [model_folder(record)] if arguments.save_models else []
    return [*(f"{predictions_folder(record)}/{title}.tsv" for title in titles), *saved]


# ------------------------------------------------------------------------------------------------------------ reporting


def report(arguments: GlueArguments, results: Results) -> None:
    """Write the table and the picture of all runs in the output folder, and print the table. On the main process only."""
    records = results.read()
    if not records:
        return
    summary = Summary(records, arguments.reference)
    text, output = markdown(summary), Path(arguments.output_dir)
    write_bytes(output / f"{NAME}.md", text.encode())
    write_glue_evaluations(records, output)
    print(text, end="")
    try:
        images = picture(summary)
    except ImportError as error:
        logger.warning(f"{NAME}.png and {NAME}.svg are left out: {error}")
        images = {}
    for ending, image in images.items():
        write_bytes(output / f"{NAME}.{ending}", image)
    logger.info(f"{RESULTS_FILE}, {NAME}.md, {GLUE_EVALUATIONS} and the picture are in {output}.")


def tell(record: RunRecord, place: str) -> None:
    if record.status == FAILED:
        return  # told already
    scores = [f"{100 * metrics[TASKS[record.task].main_metric]:.2f}" for metrics in record.scores.values()]
    logger.info(
        f"{place}: {describe(record)}: {' / '.join(scores)} in {record.seconds['total']:.0f} s, "
        f"{record.facts['train_examples_per_second']:.1f} training examples/s."
    )


# ----------------------------------------------------------------------------------------------------------------- main


def check_reference(arguments: GlueArguments, variants: Sequence[ModelVariant], results: Results) -> None:
    names = dict.fromkeys([*(variant.label for variant in variants), *(record.model for record in results.read())])
    if arguments.reference is not None and arguments.reference not in names:
        raise ResultsError(
            f"--reference {arguments.reference!r} is no model; the models are {', '.join(map(repr, names))}."
        )


def name_bases(arguments: GlueArguments, accelerator: Accelerator, variants: Sequence[ModelVariant]) -> dict[str, str]:
    """Save what saved adapters name as their base model, where that is nowhere yet: checkpoints conditioned by flags."""

    def save() -> dict[str, str]:
        wanted = [each for each in variants if each.lora is not None and each.loading and arguments.save_models]
        return {each.label: save_base(each, Path(arguments.output_dir) / "bases" / each.folder) for each in wanted}

    return run_on_main_process(accelerator, save)


def evaluate(arguments: GlueArguments, spectral: SpectralArguments, accelerator: Accelerator) -> int:
    """Do all runs that are missing and report all that there are; returns how many of those asked for have failed."""
    results = Results(arguments.output_dir)
    variants = plan_variants(arguments, spectral)
    run_on_main_process(accelerator, lambda: check_reference(arguments, variants, results))
    data = prepare_data(arguments, accelerator, variants)
    planned = plan_runs(arguments, accelerator, variants, data)
    to_do = run_on_main_process(accelerator, lambda: runs_to_do(arguments, results, planned))
    bases = name_bases(arguments, accelerator, variants) if to_do else {}
    by_label = {variant.label: variant for variant in variants}
    with stop_on_signals(accelerator) as stop:
        bench = Bench(arguments, accelerator, by_label, data, results, stop, spectral.spectral_exact_refresh, bases)
        stopped = run_all(bench, to_do)
    if accelerator.is_main_process:
        report(arguments, results)
        if stopped:
            again = "" if not arguments.overwrite_output_dir else " without --overwrite_output_dir"
            logger.info(f"Stopped by a signal. The same command{again} does what is missing.")
    keys = {record.key for record in planned}
    failed = run_on_main_process(
        accelerator, lambda: sum(record.status == FAILED and record.key in keys for record in results.read())
    )
    accelerator.wait_for_everyone()
    return failed


def run_all(bench: Bench, to_do: Sequence[RunRecord]) -> bool:
    """Do the runs, and record each; returns whether a signal has ended it before."""
    bars = show_progress(bench.arguments, bench.accelerator)
    for number, record in enumerate(tqdm(to_do, desc="Runs", unit="run", disable=not bars), start=1):
        try:
            execute(bench, record)
        except StoppedError:
            return True
        if bench.accelerator.is_main_process:
            bench.results.add(record)
            tell(record, f"{number}/{len(to_do)}")
        if bench.stop.requested():
            return True
    return False


def main(argv: Sequence[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[0])
    try:
        accelerator = build_accelerator(arguments)
        with logging_redirect_tqdm():
            failed = evaluate(arguments, spectral, accelerator)
    except (GlueDataError, ModelError, ResultsError) as error:
        # One line for what a user can change; a traceback for anything else.
        raise SystemExit(f"error: {error}") from error
    if failed:
        if accelerator.is_main_process:
            logger.warning(f"{failed} runs have failed; the table says how. --retry_failed runs them again.")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
