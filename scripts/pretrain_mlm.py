r"""Pretrain a Crammed BERT as a masked language model, stock or spectrally conditioned.

Without arguments: a small model on the documentation that every Python carries, three to four minutes on two CPU cores.

    python scripts/pretrain_mlm.py
    python scripts/pretrain_mlm.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/identity

On text of your own, through accelerate's launcher, and on two processes of one machine:

    accelerate launch --num_cpu_threads_per_process 2 scripts/pretrain_mlm.py --output_dir runs/books \
        --train_file train.txt.gz --validation_file val.txt.gz --max_steps 200 \
        --spectral_conditioning --spectral_method svd
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/pretrain_mlm.py --per_device_train_batch_size 16

What the published recipe would do here, and what a command changes of it; then a day of one GPU:

    python scripts/pretrain_mlm.py --preset crammed-bert --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/pretrain_mlm.py --preset crammed-bert \
        --output_dir runs/crammed-bert

A run that was stopped (SIGTERM, Ctrl-C) or killed goes on from its newest good checkpoint, to the same weights:

    python scripts/pretrain_mlm.py --output_dir runs/books ... --resume_from_checkpoint

The validation loss of a saved model, on the data it was validated on:

    python scripts/pretrain_mlm.py --eval_only --model_name_or_path runs/books

The output folder holds the model and its tokenizer (for the Auto classes), `metrics.json`, `loss_curve.png`,
`evaluations.json` (for the model card), and the last checkpoints, each a folder `checkpoint-<step>`.
"""

import json
import logging
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from hf_specattn import condition, refresh
from hf_specattn.checkpoints.evaluations import write_evaluations
from hf_specattn.conditioning import refresh_interval
from hf_specattn.crammed_bert import CrammedBertConfig, CrammedBertForMaskedLM
from hf_specattn.diagnostics.monitor import MONITOR_FILE, SpectralMonitor
from recipes.run.arguments import SpectralArguments
from recipes.run.batching import Batch, BatchOrder
from recipes.run.checkpointing import (
    CheckpointError,
    Checkpoints,
    Progress,
    TrainingParts,
)
from recipes.run.interruption import stop_on_signals
from recipes.run.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    NonFiniteLossError,
    RunMetrics,
    require_finite_gradient,
    require_finite_loss,
)
from recipes.run.optimization import build_adamw
from recipes.run.run_description import model_description, sequences_fingerprint
from recipes.run.runs import (
    begin,
    build_accelerator,
    is_due,
    is_finished,
    last_checkpoint,
    show_progress,
    tracker_config,
)
from recipes.run.saving import save_pretrained
from recipes.run.schedules import BudgetSchedule, learning_rate_factor, ramped_micro_steps
from recipes.run.sharding import configure_sharding, will_shard
from recipes.run.throughput import LossWindow
from recipes.run.training_state import gather_weights
from recipes.text.documents import CorpusError
from recipes.text.evaluation import MlmEvaluation, accepts_masked_positions, evaluate_mlm
from recipes.text.masking import MaskingRule
from recipes.text.mlm_data import MlmData, prepare_mlm_data
from recipes.text.plan import describe_plan, training_tokens
from recipes.text.pretrain_arguments import PretrainArguments, parse_arguments

logger = logging.getLogger("pretrain_mlm")
LOGGERS = ("pretrain_mlm", "recipes", "hf_specattn")  # the others say what is prepared, and skipped

# What decides a run beside its data and model: a resumed run must have the same. How the global batch is cut among processes
# and forward passes may change (unless it grows by them), and so may everything about reporting and saving.
RUN_SETTINGS = (
    "seed",
    "max_train_hours",
    "batch_size_ramp",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_seq_length",
    "mlm_probability",
    "model_name_or_path",
)
# What the model card says of the saved model: the names of its metrics on the Hub, and in words.
MEASURED = {
    "validation_perplexity": ("perplexity", "Perplexity"),
    "validation_loss": ("loss", "Loss (nats per token)"),
}
DROPOUT_SETTINGS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def check_monitor(arguments: PretrainArguments, accelerator: Accelerator) -> None:
    """Refuse a monitor of weights that FSDP shards.

    Raises:
        ValueError: for both together.
    """
    if arguments.spectral_monitor_every and will_shard(accelerator):
        raise ValueError(
            "--spectral_monitor_every needs whole weights, and FSDP shards them; leave it out, or use DDP."
        )


def show_plan(arguments: PretrainArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """Log what the run will do, before any of it is done."""
    if not accelerator.is_main_process:
        return
    half_precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    plan = describe_plan(
        arguments,
        spectral,
        processes=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
        autocast=lambda: torch.autocast("cpu", half_precision) if half_precision else nullcontext(),
    )
    for line in plan:
        logger.info(line)


@dataclass(frozen=True)
class MlmTask:
    """What is learned: the sequences, their order, and what is masked."""

    data: MlmData
    order: BatchOrder
    rule: MaskingRule


def load_data(arguments: PretrainArguments, accelerator: Accelerator, global_batch_size: int) -> MlmData:
    """Prepare the data, or find them prepared; a global batch of 0 leaves out the training part.

    Every process asks for them: behind a lock the first one on each machine makes them.
    """
    data = prepare_mlm_data(
        arguments.data_settings(),
        training_sequences=global_batch_size,
        show_progress=show_progress(arguments, accelerator),
    )
    logger.info(f"Corpus: {data.origin}.")
    return data


def build_model(arguments: PretrainArguments, spectral: SpectralArguments, vocab_size: int) -> PreTrainedModel:
    """Build or load the model, without dropout, and condition it if asked to.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    if arguments.model_name_or_path is not None:
        return load_model(arguments.model_name_or_path, spectral, vocab_size)
    model = CrammedBertForMaskedLM(arguments.new_model_config(vocab_size))
    if (settings := spectral.to_config()) is not None:
        reports = condition(model, settings, init=spectral.init)
        before, after = (
            max(getattr(report, kappa) for report in reports) for kappa in ("kappa_before", "kappa_after")
        )
        logger.info(
            f"Conditioned {len(reports)} projections by {settings.describe()}, init {spectral.init}: the largest "
            f"condition number was {before:.4g} of W and is {after:.4g} of W + C."
        )
    return model


def load_model(path: str, spectral: SpectralArguments, vocab_size: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    no_dropout = {name: 0.0 for name in DROPOUT_SETTINGS if hasattr(config, name)}
    model = AutoModelForMaskedLM.from_pretrained(path, **no_dropout, **spectral.to_loading_kwargs())
    if model.config.vocab_size < vocab_size:
        raise CorpusError(
            f"The tokenizer has {vocab_size} tokens and the model of {path} only {model.config.vocab_size}; name the "
            "tokenizer it was trained with by --tokenizer_name."
        )
    return model


def fine_tuning_dropout(arguments: PretrainArguments) -> dict[str, float]:
    """Return the dropout rates for the saved config: training runs without, but fine-tuning should find the usual ones."""
    if arguments.model_name_or_path is None:
        config: Any = CrammedBertConfig()
    else:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    return {name: getattr(config, name) for name in DROPOUT_SETTINGS if hasattr(config, name)}


def describe_run(
    arguments: PretrainArguments, accelerator: Accelerator, model: PreTrainedModel, task: MlmTask
) -> dict[str, Any]:
    """Log what is about to happen, and return it for `metrics.json`."""
    data, length = task.data, arguments.max_seq_length
    batch = global_batch(arguments, accelerator)
    planned = training_tokens(arguments, micro_batch(arguments, accelerator) * length)
    facts = {
        "corpus": data.origin,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "vocab_size": len(data.tokenizer),
        "train_sequences": len(data.train),
        "train_tokens": data.train.size,
        "validation_sequences": len(data.validation),
        "validation_tokens": data.validation.size,
        "validation_fingerprint": data.validation_fingerprint,
        "global_batch_size": batch,
        "tokens_per_step": batch * length,
        "planned_tokens": planned,
        "epochs": None if planned is None else round(planned / data.train.size, 3),
        "lr_scheduler_type": arguments.schedule_kind,
        "device": accelerator.device.type,
        "device_name": torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else None,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }
    logger.info(
        f"{facts['model_type']}: {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}. Training: "
        f"{facts['train_tokens']:,} tokens in {facts['train_sequences']:,} sequences of {length}; validation: "
        f"{facts['validation_tokens']:,} tokens in {facts['validation_sequences']:,}."
    )
    amount = f"{arguments.max_train_hours:g} hours" if planned is None else f"{arguments.budget.steps:,} steps"
    passes = "" if planned is None else f" are {facts['epochs']} passes over the training data"
    logger.info(
        f"{amount} of {batch:,} sequences ({batch * length:,} tokens){passes}, on {facts['processes']} {facts['device']} "
        f"process(es) with {facts['threads']} thread(s), mixed precision {facts['mixed_precision']}."
    )
    return facts


def settings_to_keep(
    arguments: PretrainArguments,
    spectral: SpectralArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    task: MlmTask,
) -> dict[str, Any]:
    """Return what must be the same when the run is resumed, by the names of flags and of the model's configuration.

    A resumed run prepares its data anew, tokenizer included, which gives the same: the fingerprints tell if not.
    """
    exact = spectral.spectral_exact_refresh
    return {
        **model_description(model.config),
        **{name: getattr(arguments, name) for name in RUN_SETTINGS},
        "max_steps": arguments.budget.steps,
        "lr_scheduler_type": arguments.schedule_kind,
        "warmup_steps": arguments.warmup,
        "global_batch_size": global_batch(arguments, accelerator),
        # Under a ramp the batch grows by this.
        "micro_batch_size": micro_batch(arguments, accelerator) if arguments.batch_size_ramp else None,
        "mixed_precision": accelerator.mixed_precision,
        "spectral_init": spectral.init,
        # Only where it was chosen: runs from before this flag can be resumed.
        **({} if exact is None else {"spectral_exact_refresh": exact}),
        "train_fingerprint": sequences_fingerprint(task.data.train),
        "validation_fingerprint": task.data.validation_fingerprint,
        "tokenizer_size": len(task.data.tokenizer),
        "mask_token_id": task.rule.mask_token_id,
    }


def micro_batch(arguments: PretrainArguments, accelerator: Accelerator) -> int:
    """Sequences per forward pass, over all processes."""
    return arguments.per_device_train_batch_size * accelerator.num_processes


def global_batch(arguments: PretrainArguments, accelerator: Accelerator) -> int:
    """Sequences per optimizer step, over all processes, where no ramp makes them fewer."""
    return micro_batch(arguments, accelerator) * arguments.gradient_accumulation_steps


@dataclass(frozen=True)
class Training:
    """What a step of training moves, and what saves it.

    Attributes:
        model: The model itself; sharded in place where the run is.
        wrapped: The model as accelerate wrapped it.
        optimizer: As accelerate wrapped it.
        schedule: Of the learning rate.
        sparse: Whether the model computes logits at the masked positions only.
        exact_refresh: How dynamic corrections are recomputed, for `refresh`.
        checkpoints: Of the model and optimizer.
        monitor: Of the conditioning of attention; None: not asked for, or another process's.
    """

    model: PreTrainedModel
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: BudgetSchedule
    sparse: bool
    exact_refresh: bool | None
    checkpoints: Checkpoints
    monitor: SpectralMonitor | None


def prepare_training(
    arguments: PretrainArguments,
    spectral: SpectralArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    data: MlmData,
    description: dict[str, Any],
) -> Training:
    sparse = accepts_masked_positions(model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_adamw(model, arguments.learning_rate, weight_decay=arguments.weight_decay)
    factor = learning_rate_factor(arguments.schedule_kind, arguments.budget, arguments.warmup)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    schedule = BudgetSchedule(prepared, factor)
    parts = TrainingParts(model, prepared, scaler=accelerator.scaler, processor=data.tokenizer)
    limit = arguments.save_total_limit
    checkpoints = Checkpoints(arguments.output_dir, accelerator, parts, description, keep_last=limit)
    monitor = None
    if arguments.spectral_monitor_every and accelerator.is_main_process:
        batch = {"input_ids": torch.from_numpy(data.validation[np.arange(2)].astype("int64"))}
        file = Path(arguments.output_dir) / MONITOR_FILE
        monitor = SpectralMonitor(arguments.spectral_monitor_every, batch=batch, file=file)
    return Training(model, wrapped, prepared, schedule, sparse, spectral.spectral_exact_refresh, checkpoints, monitor)


def train(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    task: MlmTask,
    training: Training,
    metrics: RunMetrics,
    begun: Progress,
) -> Progress:
    """Run the loop from `begun` on; returns how far it came: to the end, unless a signal stopped it."""
    metrics.history, metrics.validation = begun.record.get("history", []), begun.record.get("validation", [])
    window = LossWindow()
    window.restore(begun.record.get("loss_window"))
    budget, length = arguments.budget, arguments.max_seq_length
    step, position, started = begun.step, begun.record.get("position", 0), time.perf_counter() - begun.seconds
    seconds = begun.seconds
    refresh_every = refresh_interval(training.model)
    with_bar = show_progress(arguments, accelerator)
    if training.monitor is not None and (values := training.monitor.begin(training.model, step)):
        accelerator.log(values, step=step)
    progress = tqdm(total=budget.steps, initial=step, desc="Training", unit="step", disable=not with_bar)
    training.wrapped.train()
    with stop_on_signals(accelerator) as stop:
        while budget.share(step, seconds) < 1:
            learning_rate = training.schedule.set(budget.used(step, seconds))
            share, ramp = budget.share(step, seconds), arguments.batch_size_ramp
            micro_steps = ramped_micro_steps(share, arguments.gradient_accumulation_steps, ramp)
            batch = task.order.batch(position, micro_steps * micro_batch(arguments, accelerator))
            step += 1
            announce_new_pass(task, step, batch)
            loss = train_step(arguments, accelerator, task, training, batch, micro_steps, step)
            if refresh_every is not None and step % refresh_every == 0:
                refresh(training.model, exact=training.exact_refresh)
            if training.monitor is not None and training.monitor.is_due(step):
                with window.paused():
                    accelerator.log(training.monitor.measure(training.model, step), step=step)
            position += len(batch.indices)
            seconds = common_seconds(arguments, accelerator, started)
            last = budget.share(step, seconds) >= 1

            window.add(loss, tokens=len(batch.indices) * length)
            progress.update()
            if is_due(step, arguments.logging_steps) or last:
                train_loss, speed = window.take()
                values = {
                    "epoch": round(task.order.epochs(position), 4),
                    "train_loss": train_loss,
                    "learning_rate": learning_rate,
                    "batch_size": len(batch.indices),
                    "train_tokens_seen": position * length,
                    "tokens_per_second": speed,
                }
                report_training(arguments, accelerator, metrics, step, values, with_bar)
                progress.set_postfix_str(f"loss {train_loss:.4f}, {speed:,.0f} tokens/s")
            if is_due(step, arguments.eval_steps) and not last:
                with window.paused():
                    metrics.validation.append(validate(arguments, accelerator, training.wrapped, task, step))

            stopping = stop.requested()
            if stopping or is_due(step, arguments.save_steps) or (last and arguments.save_steps > 0):
                record = {
                    "history": metrics.history,
                    "validation": metrics.validation,
                    "loss_window": window.state(),
                    "position": position,
                }
                with window.paused():
                    training.checkpoints.save(Progress(step, seconds, record))
            if stopping:
                break
    progress.close()
    if training.monitor is not None:
        training.monitor.end()
    return Progress(step, seconds, {"position": position})


def common_seconds(arguments: PretrainArguments, accelerator: Accelerator, started: float) -> float:
    """Seconds of training; where the schedule follows the clock, that of the main process on every process."""
    seconds = time.perf_counter() - started
    if arguments.max_train_hours is None or accelerator.num_processes == 1:
        return seconds
    return broadcast(torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)).item()


def announce_new_pass(task: MlmTask, step: int, batch: Batch) -> None:
    """Say that training reaches the end of the corpus and begins it again: its loss is no longer that of unread text."""
    passed = int(batch.epochs[-1])
    if batch.begins_pass and passed > 0:
        order = "in another order" if task.order.shuffle else "in the same order"
        logger.warning(
            f"step {step}: the training data ({len(task.data.train):,} sequences) have been read {passed} time(s) and are "
            f"repeated from here on, {order} and masked anew."
        )


def report_training(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    metrics: RunMetrics,
    step: int,
    values: dict[str, Any],
    with_bar: bool,
) -> None:
    """Record the values since the last record, and hand them to the trackers by the same names."""
    first = not metrics.history
    metrics.history.append({"step": step, **values})
    accelerator.log(values, step=step)
    speed, steps = values["tokens_per_second"], arguments.budget.steps
    if not with_bar:
        of = "" if steps is None else f"/{steps}"
        logger.info(f"step {step}{of}: loss {values['train_loss']:.4f}, {speed:,.0f} tokens/s")
    if first and steps is None:
        tokens = speed * arguments.budget.size
        logger.info(f"At {speed:,.0f} tokens/s the {arguments.max_train_hours:g} hours are {tokens:,.0f} tokens.")


def train_step(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    task: MlmTask,
    training: Training,
    batch: Batch,
    micro_steps: int,
    step: int,
) -> float:
    """Take one optimizer step, its batch cut into micro-batches; returns its loss over all processes."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    step_loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(micro_steps):
        rows = batch.share(micro_step, micro_steps, rank, processes)
        masked = task.rule.apply(task.data.train[rows.indices], rows.indices, seed=arguments.seed, epoch=rows.epochs)
        # Gradients are exchanged once, in the last backward pass.
        accumulating = micro_step < micro_steps - 1
        with accelerator.no_sync(training.wrapped) if accumulating else nullcontext():
            loss = training.wrapped(**masked.model_inputs(accelerator.device, training.sparse)).loss / micro_steps
            accelerator.backward(loss)
        step_loss += loss.detach()
    # Every process and micro-batch predicts equally many tokens: the mean of their means is the mean.
    step_loss = accelerator.reduce(step_loss, reduction="mean")
    require_finite_loss(step_loss.item(), step)
    norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), arguments.max_grad_norm or math.inf)
    if accelerator.scaler is None:  # fp16's loss scaling skips a step whose gradient overflowed
        require_finite_gradient(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm), step)
    if training.monitor is not None:
        training.monitor.observe_gradients(training.model, step)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return step_loss.item()


def validate(
    arguments: PretrainArguments, accelerator: Accelerator, wrapped: torch.nn.Module, task: MlmTask, step: int
) -> dict[str, Any]:
    """Measure the validation loss on all processes together, log it and return its record."""
    batch_size = arguments.per_device_eval_batch_size
    result = evaluate_mlm(wrapped, task.data.validation, task.rule, batch_size=batch_size, accelerator=accelerator)
    return report_validation(accelerator, result, step)


def report_validation(accelerator: Accelerator, result: MlmEvaluation, step: int) -> dict[str, Any]:
    """Log one evaluation and return its record."""
    require_finite_loss(result.loss, step, "validation")
    values = {"validation_loss": result.loss, "validation_perplexity": result.perplexity}
    accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
    perplexity = "beyond floats" if result.perplexity is None else f"{result.perplexity:.3f}"
    logger.info(f"step {step}: validation loss {result.loss:.6f}, perplexity {perplexity}")
    return {"step": step, **values}


def save(arguments: PretrainArguments, accelerator: Accelerator, training: Training, data: MlmData) -> None:
    """Save model and tokenizer, the config with the dropout that fine-tuning expects."""
    weights = gather_weights(training.model, accelerator)  # on every process: sharded weights are gathered
    for name, rate in fine_tuning_dropout(arguments).items():
        setattr(training.model.config, name, rate)
    if accelerator.is_main_process:
        save_pretrained(training.model, data.tokenizer, arguments.output_dir, weights)


def evaluate_saved(
    path: str, accelerator: Accelerator, data: MlmData, rule: MaskingRule, batch_size: int
) -> MlmEvaluation:
    """Evaluate what is on the disk, in float32 and on this process alone: the number that whoever loads it will find."""
    model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).to(accelerator.device)
    return evaluate_mlm(model, data.validation, rule, batch_size=batch_size)


def pretrain(arguments: PretrainArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """The whole run: data, model, loop, saving, and the saved model's validation loss."""
    show_plan(arguments, spectral, accelerator)
    if arguments.show_plan:
        return
    data = load_data(arguments, accelerator, global_batch(arguments, accelerator))
    rule = MaskingRule(data.tokenizer.mask_token_id, len(data.tokenizer), arguments.mlm_probability)
    order = BatchOrder(len(data.train), arguments.seed, shuffle=arguments.sequence_order == "shuffled")
    task = MlmTask(data, order, rule)
    model = build_model(arguments, spectral, len(data.tokenizer))
    configure_sharding(accelerator, model)
    metrics = RunMetrics(arguments=asdict(arguments) | asdict(spectral))
    metrics.facts = describe_run(arguments, accelerator, model, task)

    finished = is_finished(arguments, accelerator)
    if not finished:
        accelerator.init_trackers("pretrain_mlm", config=tracker_config(metrics.arguments))
    description = settings_to_keep(arguments, spectral, accelerator, model, task)
    training = prepare_training(arguments, spectral, accelerator, model, data, description)
    # Last before the loop: it restores the random number generators.
    begun = begin(arguments, accelerator, training.checkpoints)
    if finished:
        logger.info(f"The run in {arguments.output_dir} is finished; there is nothing to continue.")
    else:
        done = train(arguments, accelerator, task, training, metrics, begun)
        if arguments.budget.share(done.step, done.seconds) < 1:
            report_stop(arguments, done)
        else:
            finish(arguments, accelerator, training, task, metrics, done)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report_stop(arguments: PretrainArguments, done: Progress) -> None:
    instead = " in place of --overwrite_output_dir" if arguments.overwrite_output_dir else ""
    of = arguments.budget.steps or f"those that {arguments.max_train_hours:g} hours give"
    logger.info(
        f"Stopped after step {done.step} of {of}, with a checkpoint in {arguments.output_dir}. The same command with "
        f"--resume_from_checkpoint{instead} continues."
    )


def finish(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    training: Training,
    task: MlmTask,
    metrics: RunMetrics,
    done: Progress,
) -> None:
    """Save the model, measure what was saved, and write the record."""
    save(arguments, accelerator, training, task.data)
    if accelerator.is_main_process:
        path, batch_size = arguments.output_dir, arguments.per_device_eval_batch_size
        result = evaluate_saved(path, accelerator, task.data, task.rule, batch_size)
        metrics.validation.append(report_validation(accelerator, result, done.step))
        tokens = done.record["position"] * arguments.max_seq_length
        metrics.final = {**metrics.validation[-1], "train_tokens_seen": tokens, "seconds": done.seconds}
        if accelerator.device.type == "cuda":
            metrics.facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(accelerator.device)
        results = metrics.evaluations("fill-mask", metrics.facts["corpus"], MEASURED)
        write_evaluations(path, Path(path).resolve().name, results)
        metrics.write(path)
        logger.info(
            f"Trained for {done.seconds:.1f} s on {tokens:,} tokens. Model, tokenizer, {METRICS_FILE} and "
            f"{LOSS_CURVE_FILE} are in {path}."
        )


def evaluate_only(arguments: PretrainArguments, accelerator: Accelerator) -> None:
    """Measure a saved model on the validation data of its run, or on that of the flags given."""
    path = str(arguments.model_name_or_path)
    data = load_data(arguments, accelerator, global_batch_size=0)
    rule = MaskingRule(data.tokenizer.mask_token_id, len(data.tokenizer), arguments.mlm_probability)
    if accelerator.is_main_process:
        recorded = Path(path) / METRICS_FILE
        if recorded.is_file():
            facts = json.loads(recorded.read_text(encoding="utf-8")).get("facts", {})
            if facts.get("validation_fingerprint") != data.validation_fingerprint:
                logger.warning(
                    f"This is not the validation data that {path} was trained with: the losses do not compare."
                )
        result = evaluate_saved(path, accelerator, data, rule, arguments.per_device_eval_batch_size)
        print(json.dumps({"validation_loss": result.loss, "validation_perplexity": result.perplexity}))
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    try:
        accelerator = build_accelerator(arguments, LOGGERS)
        check_monitor(arguments, accelerator)
    except ValueError as error:  # what accelerate refuses on this machine
        raise SystemExit(f"error: {error}") from error
    try:
        with logging_redirect_tqdm():
            if arguments.eval_only:
                evaluate_only(arguments, accelerator)
            else:
                pretrain(arguments, spectral, accelerator)
    # A message for what a user can change; a traceback for anything else.
    except NonFiniteLossError as error:
        advice = "; another run can start from it by --model_name_or_path"
        raise SystemExit(f"error: {error} {last_checkpoint(arguments, advice)}") from error
    except (CorpusError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
