r"""Pretrain a Crammed BERT as a masked language model, stock or spectrally conditioned.

Without arguments: a small model on the documentation that every Python carries, three to four minutes on two CPU cores.

    python scripts/pretrain_mlm.py
    python scripts/pretrain_mlm.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/identity

On text of your own, through accelerate's launcher, and on two processes of one machine:

    accelerate launch --num_cpu_threads_per_process 2 scripts/pretrain_mlm.py --output_dir runs/books \
        --train_file train.txt.gz --validation_file val.txt.gz --max_steps 200 \
        --spectral_conditioning --spectral_method svd
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/pretrain_mlm.py --per_device_train_batch_size 16

A run that was stopped (SIGTERM, Ctrl-C) or killed goes on from its newest good checkpoint, to the same weights:

    python scripts/pretrain_mlm.py --output_dir runs/books ... --resume_from_checkpoint

The validation loss of a saved model, on the data it was validated on:

    python scripts/pretrain_mlm.py --eval_only --model_name_or_path runs/books

The output folder holds the model and its tokenizer (for the Auto classes), `metrics.json`, `loss_curve.png`, and the last
checkpoints, each a folder `checkpoint-<step>`.
"""

import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoModelForMaskedLM, HfArgumentParser, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_specattn import condition, refresh
from hf_specattn.conditioning import refresh_interval
from hf_specattn.crammed_bert import CrammedBertConfig, CrammedBertForMaskedLM
from hf_specattn.training.arguments import SpectralArguments, explicitly_given
from hf_specattn.training.batching import BatchOrder
from hf_specattn.training.checkpointing import (
    CheckpointError,
    Checkpoints,
    Progress,
    TrainingParts,
    list_checkpoints,
)
from hf_specattn.training.distributed import run_on_main_process
from hf_specattn.training.documents import CorpusError
from hf_specattn.training.evaluation import MlmEvaluation, accepts_masked_positions, evaluate_mlm
from hf_specattn.training.interruption import stop_on_signals
from hf_specattn.training.masking import MaskingRule
from hf_specattn.training.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    NonFiniteLossError,
    RunMetrics,
    require_finite_gradient,
    require_finite_loss,
)
from hf_specattn.training.mlm_data import MlmData, MlmDataSettings, prepare_mlm_data
from hf_specattn.training.optimization import build_adamw
from hf_specattn.training.run_description import model_description, sequences_fingerprint
from hf_specattn.training.saving import save_pretrained
from hf_specattn.training.schedules import linear_schedule
from hf_specattn.training.throughput import LossWindow

logger = logging.getLogger("pretrain_mlm")

# What decides the validation data of a run: --eval_only takes these from the run's metrics.json.
DATA_SETTINGS = (
    "train_file",
    "validation_file",
    "text_column",
    "validation_fraction",
    "max_seq_length",
    "mlm_probability",
)
# Flags that shape a new model or tokenizer, and say nothing about a checkpoint.
NEW_MODEL_SETTINGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
AT_LEAST_ONE = (
    *NEW_MODEL_SETTINGS,
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_seq_length",
    "save_total_limit",
)
# What decides a run beside its data and model: a resumed run must have the same. How the global batch is cut among processes
# and forward passes may change, and so may everything about reporting and saving.
RUN_SETTINGS = (
    "seed",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_seq_length",
    "mlm_probability",
    "model_name_or_path",
)
DROPOUT_SETTINGS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass
class PretrainArguments:
    """Arguments of the run; the defaults are the demonstration."""

    # Data.
    train_file: str | None = field(
        default=None,
        metadata={"help": "Corpus: .txt, .jsonl, .json (each also .gz) or .parquet. None: embedded text."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation corpus. None: documents held out from the training corpus."}
    )
    text_column: str = field(default="text", metadata={"help": "Key or column with the text (JSON, Parquet)."})
    # A tenth of the embedded corpus is some 440 sequences, 14,000 predictions; of a large corpus take less.
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of documents held out for validation."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer to load. None: train WordPiece."})
    vocab_size: int = field(default=4096, metadata={"help": "Largest vocabulary of a trained tokenizer."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per packed sequence."})  # as in cramming
    mlm_probability: float = field(default=0.25, metadata={"help": "Share of positions to predict."})  # cramming

    # Model: 3.7 million parameters, so that 300 steps take three to four minutes on two cores.
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to continue from."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a new model."})
    # Four times the width, halved by the gate: cramming's proportions.
    intermediate_size: int = field(
        default=1024, metadata={"help": "Feed-forward width of a new model, gate included."}
    )

    # Optimization: cramming's values (see hf_specattn.training.optimization) at a batch that a CPU can do.
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per process and forward pass."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same, for validation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Steps of linear warmup. None: a tenth."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled decay; biases and norms are exempt."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Clip the gradient's norm here; 0: never."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no or bf16. None: what accelerate is configured for.", "choices": ["no", "bf16"]},
    )
    seed: int = field(default=0, metadata={"help": "Decides initialization, batch order and masking."})

    # Reporting and saving.
    output_dir: str = field(default="runs/pretrain_mlm", metadata={"help": "Where everything is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow an output folder that has files; an earlier run in it is replaced."}
    )
    resume_from_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Continue the run in --output_dir from its newest good checkpoint, or begin it where there is none yet."
        },
    )
    # A checkpoint of the demonstration has 46 MB: weights, and twice as much of the optimizer's.
    save_steps: int = field(
        default=100,
        metadata={
            "help": "Steps between checkpoints; the last step has one, too. 0: only when a signal stops the run."
        },
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep; older ones are removed."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between validations; 0: only at the end."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between records of the training loss."})
    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers of accelerate: tensorboard, wandb, trackio, ... None: none."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Log lines instead of progress bars."})
    eval_only: bool = field(
        default=False, metadata={"help": "Measure --model_name_or_path on its run's validation data; write nothing."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.eval_only and self.model_name_or_path is None:
            raise ValueError("--eval_only measures a saved model; name it with --model_name_or_path.")
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ValueError(
                "--resume_from_checkpoint continues a run and --overwrite_output_dir replaces it; give one."
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} must lie between 0 and --max_steps {self.max_steps}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden_size {self.hidden_size} must be a multiple of --num_attention_heads {self.num_attention_heads}."
            )
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 2:
                raise ValueError(f"--{name} {getattr(self, name)} must be even (position table, gated feed-forward).")
        if round(self.mlm_probability * self.max_seq_length) < 1:
            raise ValueError(
                f"--mlm_probability {self.mlm_probability} of --max_seq_length {self.max_seq_length} predicts no token."
            )
        available = [str(tracker) for tracker in get_available_trackers()]
        if missing := sorted(set(self.report_to or ()) - {*available, "all"}):
            raise ValueError(
                f"--report_to {' '.join(missing)}: unknown or not installed; available here: "
                f"{', '.join(available) or 'none'}."
            )

    def _check_numbers(self) -> None:
        # Infinities and nan fail each comparison with an upper end.
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        bounds += [
            ("eval_steps", 0, 2**31),
            ("save_steps", 0, 2**31),
            ("seed", 0, 2**32 - 1),
            ("weight_decay", 0, 1e9),
            ("max_grad_norm", 0, 1e9),
        ]
        for name, low, high in bounds:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {low} and at most {high:g}.")
        if not 0 < self.learning_rate < 1e9:
            raise ValueError(f"--learning_rate {self.learning_rate} must be a finite number above 0.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} must be above 0 and at most 1.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction} must lie between 0 and 1.")


def parse_arguments(argv: list[str]) -> tuple[PretrainArguments, SpectralArguments]:
    """Parse and check the command line; anything wrong ends the program before work starts."""
    dataclasses: Any = (PretrainArguments, SpectralArguments)
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    try:
        arguments, spectral = parser.parse_args_into_dataclasses(args=argv)
        if arguments.eval_only:
            parser.set_defaults(**recorded_data_settings(arguments.model_name_or_path))
            arguments, spectral = parser.parse_args_into_dataclasses(args=argv)
        else:
            check_output_dir(arguments)
        if arguments.model_name_or_path is not None:
            if given := explicitly_given(parser, NEW_MODEL_SETTINGS, argv):
                flags = ", ".join(f"--{name}" for name in sorted(given))
                raise ValueError(f"{flags}: for a new model only; leave out beside --model_name_or_path.")
            check_checkpoint(arguments, spectral)
        elif arguments.tokenizer_name is not None and explicitly_given(parser, ["vocab_size"], argv):
            raise ValueError("--vocab_size: for a trained tokenizer only; leave it out beside --tokenizer_name.")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments, spectral


def check_checkpoint(arguments: PretrainArguments, spectral: SpectralArguments) -> None:
    """Refuse a checkpoint that does not exist, is conditioned otherwise, or is too short, by its config alone."""
    if arguments.eval_only and spectral.spectral_conditioning:
        raise ValueError("--eval_only measures a model as it was saved; leave out --spectral_conditioning.")
    path = str(arguments.model_name_or_path)
    config = AutoConfig.from_pretrained(path, **spectral.to_loading_kwargs())
    positions = getattr(config, "max_position_embeddings", arguments.max_seq_length)
    if arguments.max_seq_length > positions:
        raise ValueError(f"--max_seq_length {arguments.max_seq_length} exceeds the {positions} positions of {path}.")


def check_output_dir(arguments: PretrainArguments) -> None:
    """Refuse a folder in which files would be replaced that nobody said could be."""
    directory = Path(arguments.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output_dir {directory} is a file; name a folder.")
    if arguments.overwrite_output_dir or not directory.is_dir() or not any(directory.iterdir()):
        return
    if not arguments.resume_from_checkpoint:
        raise ValueError(
            f"--output_dir {directory} is not empty. Name another folder, add --resume_from_checkpoint to continue the run "
            "in it, or add --overwrite_output_dir to replace the files of an earlier run."
        )
    # A run that was killed before its first checkpoint leaves neither; what is here would be lost.
    if not list_checkpoints(directory) and any((directory / name).exists() for name in ("config.json", METRICS_FILE)):
        raise ValueError(
            f"--resume_from_checkpoint: {directory} holds a saved model and no checkpoint to continue from. Name another "
            "folder, or give --overwrite_output_dir instead to train anew in this one."
        )


def recorded_data_settings(model_path: str) -> dict[str, Any]:
    """Read which data a saved model was validated on; empty for a model that no run of this script wrote."""
    file = Path(model_path) / METRICS_FILE
    if not file.is_file():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8")).get("arguments", {})
    return {name: recorded[name] for name in DATA_SETTINGS if name in recorded}


def build_accelerator(arguments: PretrainArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.report_to,
        project_dir=arguments.output_dir,
        # One process prepares the data while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not show_progress(arguments, accelerator):
        transformers_logging.disable_progress_bar()
    return accelerator


def show_progress(arguments: PretrainArguments, accelerator: Accelerator) -> bool:
    return accelerator.is_main_process and sys.stderr.isatty() and not arguments.disable_tqdm


@dataclass(frozen=True)
class MlmTask:
    """What is learned: the sequences, their order, and what is masked."""

    data: MlmData
    order: BatchOrder
    rule: MaskingRule


def load_data(arguments: PretrainArguments, accelerator: Accelerator, global_batch_size: int) -> MlmData:
    """Prepare the data on the main process and hand it to all; a global batch of 0 leaves out the training part."""
    settings = MlmDataSettings(
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        text_column=arguments.text_column,
        validation_fraction=arguments.validation_fraction,
        tokenizer_name=arguments.tokenizer_name or arguments.model_name_or_path,
        vocab_size=arguments.vocab_size,
        max_seq_length=arguments.max_seq_length,
    )
    progress = show_progress(arguments, accelerator)
    data = run_on_main_process(
        accelerator,
        lambda: prepare_mlm_data(settings, training_sequences=global_batch_size, show_progress=progress),
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
    config = CrammedBertConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=arguments.intermediate_size,
        max_position_embeddings=arguments.max_seq_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = CrammedBertForMaskedLM(config)
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
    data, order, length = task.data, task.order, arguments.max_seq_length
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
        "global_batch_size": global_batch(arguments, accelerator),
        "tokens_per_step": global_batch(arguments, accelerator) * length,
        "epochs": round(order.epochs(arguments.max_steps * global_batch(arguments, accelerator)), 3),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }
    logger.info(
        f"{facts['model_type']}: {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}. Training: "
        f"{facts['train_tokens']:,} tokens in {facts['train_sequences']:,} sequences of {length}; validation: "
        f"{facts['validation_tokens']:,} tokens in {facts['validation_sequences']:,}."
    )
    logger.info(
        f"{arguments.max_steps} steps of {global_batch(arguments, accelerator)} sequences ({facts['tokens_per_step']:,} tokens) are "
        f"{facts['epochs']} epochs, on {facts['processes']} {facts['device']} process(es) with {facts['threads']} "
        f"thread(s), mixed precision {facts['mixed_precision']}."
    )
    return facts


def resolved_warmup(arguments: PretrainArguments) -> int:
    return arguments.max_steps // 10 if arguments.warmup_steps is None else arguments.warmup_steps


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
    return {
        **model_description(model.config),
        **{name: getattr(arguments, name) for name in RUN_SETTINGS},
        "warmup_steps": resolved_warmup(arguments),
        "global_batch_size": global_batch(arguments, accelerator),
        "mixed_precision": accelerator.mixed_precision,
        "spectral_init": spectral.init,
        "train_fingerprint": sequences_fingerprint(task.data.train),
        "validation_fingerprint": task.data.validation_fingerprint,
        "tokenizer_size": len(task.data.tokenizer),
        "mask_token_id": task.rule.mask_token_id,
    }


@dataclass(frozen=True)
class Training:
    """What a step of training moves, and what saves it.

    Attributes:
        wrapped: The model as accelerate wrapped it.
        optimizer: As accelerate wrapped it.
        schedule: On the bare optimizer.
        sparse: Whether the model computes logits at the masked positions only.
        checkpoints: Of the model, optimizer and schedule.
    """

    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    sparse: bool
    checkpoints: Checkpoints


def prepare_training(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    data: MlmData,
    description: dict[str, Any],
) -> Training:
    sparse = accepts_masked_positions(model)
    optimizer = build_adamw(model, arguments.learning_rate, weight_decay=arguments.weight_decay)
    # On the bare optimizer and not through prepare(), which would step the schedule once per process.
    schedule = linear_schedule(optimizer, resolved_warmup(arguments), arguments.max_steps)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    parts = TrainingParts(model, prepared, schedule, accelerator.scaler, data.tokenizer)
    limit = arguments.save_total_limit
    checkpoints = Checkpoints(arguments.output_dir, accelerator, parts, description, keep_last=limit)
    return Training(wrapped, prepared, schedule, sparse, checkpoints)


def global_batch(arguments: PretrainArguments, accelerator: Accelerator) -> int:
    """Sequences per optimizer step, over all processes."""
    per_process = arguments.per_device_train_batch_size * accelerator.gradient_accumulation_steps
    return per_process * accelerator.num_processes


def is_finished(arguments: PretrainArguments, accelerator: Accelerator) -> bool:
    """Whether the run to be resumed came to its end: `metrics.json` is written then, after the model."""
    metrics_file = Path(arguments.output_dir) / METRICS_FILE
    return arguments.resume_from_checkpoint and run_on_main_process(accelerator, metrics_file.is_file)


def begin(arguments: PretrainArguments, accelerator: Accelerator, checkpoints: Checkpoints) -> Progress:
    """Start at step 0, or restore the newest good checkpoint and start where it ends."""
    if not arguments.resume_from_checkpoint:
        if accelerator.is_main_process:  # it would say that the new run is finished
            (Path(arguments.output_dir) / METRICS_FILE).unlink(missing_ok=True)
        checkpoints.start_over()
        return Progress()
    begun = checkpoints.resume()
    if begun is None:
        logger.info(f"There is no checkpoint in {arguments.output_dir} yet: starting from the beginning.")
        return Progress()
    logger.info(f"Continuing after step {begun.step}, from the newest good checkpoint in {arguments.output_dir}.")
    return begun


def train(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    task: MlmTask,
    training: Training,
    metrics: RunMetrics,
    begun: Progress,
) -> Progress:
    """Run the loop from `begun` on; returns how far it came: to the end, unless a signal stopped it."""
    metrics.history, metrics.validation = begun.record.get("history", []), begun.record.get("validation", [])
    window = LossWindow(global_batch(arguments, accelerator) * arguments.max_seq_length)
    window.restore(begun.record.get("loss_window"))
    step, started = begun.step, time.perf_counter() - begun.seconds
    refresh_every = refresh_interval(model)
    with_bar = show_progress(arguments, accelerator)
    progress = tqdm(total=arguments.max_steps, initial=step, desc="Training", unit="step", disable=not with_bar)
    training.wrapped.train()
    with stop_on_signals(accelerator) as stop:
        for step in range(begun.step + 1, arguments.max_steps + 1):
            loss, epoch = train_step(arguments, accelerator, task, training, step)
            learning_rate = training.schedule.get_last_lr()[0]
            if not accelerator.optimizer_step_was_skipped:  # fp16's loss scaling skips steps whose gradient overflowed
                training.schedule.step()
            if refresh_every is not None and step % refresh_every == 0:
                refresh(model)

            window.add(loss)
            progress.update()
            if is_due(step, arguments.logging_steps) or step == arguments.max_steps:
                train_loss, speed = window.take()
                values = {"train_loss": train_loss, "learning_rate": learning_rate, "tokens_per_second": speed}
                metrics.history.append({"step": step, "epoch": epoch, **values})
                accelerator.log(values, step=step)
                progress.set_postfix_str(f"loss {train_loss:.4f}, {speed:,.0f} tokens/s")
                if not with_bar:
                    logger.info(f"step {step}/{arguments.max_steps}: loss {train_loss:.4f}, {speed:,.0f} tokens/s")
            if is_due(step, arguments.eval_steps) and step < arguments.max_steps:
                with window.paused():
                    metrics.validation.append(validate(arguments, accelerator, training.wrapped, task, step))

            stopping = stop.requested()
            last = step == arguments.max_steps and arguments.save_steps > 0
            if stopping or last or is_due(step, arguments.save_steps):
                record = {"history": metrics.history, "validation": metrics.validation, "loss_window": window.state()}
                with window.paused():
                    training.checkpoints.save(Progress(step, time.perf_counter() - started, record))
            if stopping:
                break
    progress.close()
    return Progress(step, time.perf_counter() - started)


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this step that happens every so many; 0 is never."""
    return every > 0 and step % every == 0


def train_step(
    arguments: PretrainArguments, accelerator: Accelerator, task: MlmTask, training: Training, step: int
) -> tuple[float, int]:
    """Take one optimizer step; returns its loss over all processes, and the epoch."""
    micro_steps = accelerator.gradient_accumulation_steps
    rank, processes = accelerator.process_index, accelerator.num_processes
    size = arguments.per_device_train_batch_size * processes * micro_steps
    step_loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(micro_steps):
        rows = task.order.batch((step - 1) * size, size).share(micro_step, micro_steps, rank, processes)
        batch = task.rule.apply(task.data.train[rows.indices], rows.indices, seed=arguments.seed, epoch=rows.epochs)
        with accelerator.accumulate(training.wrapped):
            loss = training.wrapped(**batch.model_inputs(accelerator.device, training.sparse)).loss
            accelerator.backward(loss)
            step_loss += loss.detach() / micro_steps
            if accelerator.sync_gradients:
                # Every process and micro-batch predicts equally many tokens: the mean of their means is the mean.
                step_loss = accelerator.reduce(step_loss, reduction="mean")
                require_finite_loss(step_loss.item(), step)
                norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), arguments.max_grad_norm or math.inf)
                if accelerator.scaler is None:  # fp16's loss scaling skips a step whose gradient overflowed
                    require_finite_gradient(float(norm), step)
            training.optimizer.step()
            training.optimizer.zero_grad()
    return step_loss.item(), int(task.order.epochs(step * size))


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


def save(
    arguments: PretrainArguments, accelerator: Accelerator, wrapped: torch.nn.Module, data: MlmData
) -> PreTrainedModel:
    """Save model and tokenizer, the config with the dropout that fine-tuning expects; returns the unwrapped model."""
    state_dict = accelerator.get_state_dict(wrapped)  # on every process: sharded weights are gathered
    model = accelerator.unwrap_model(wrapped)
    for name, rate in fine_tuning_dropout(arguments).items():
        setattr(model.config, name, rate)
    if accelerator.is_main_process:
        save_pretrained(model, data.tokenizer, arguments.output_dir, state_dict)
    return model


def evaluate_saved(
    path: str, accelerator: Accelerator, data: MlmData, rule: MaskingRule, batch_size: int
) -> MlmEvaluation:
    """Evaluate what is on the disk, in float32 and on this process alone: the number that whoever loads it will find."""
    model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).to(accelerator.device)
    return evaluate_mlm(model, data.validation, rule, batch_size=batch_size)


def pretrain(arguments: PretrainArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """The whole run: data, model, loop, saving, and the saved model's validation loss."""
    data = load_data(arguments, accelerator, global_batch(arguments, accelerator))
    rule = MaskingRule(data.tokenizer.mask_token_id, len(data.tokenizer), arguments.mlm_probability)
    task = MlmTask(data, BatchOrder(len(data.train), arguments.seed), rule)
    model = build_model(arguments, spectral, len(data.tokenizer))
    metrics = RunMetrics(arguments=asdict(arguments) | asdict(spectral))
    metrics.facts = describe_run(arguments, accelerator, model, task)

    finished = is_finished(arguments, accelerator)
    if not finished:
        accelerator.init_trackers("pretrain_mlm", config=tracker_config(metrics.arguments))
    description = settings_to_keep(arguments, spectral, accelerator, model, task)
    training = prepare_training(arguments, accelerator, model, data, description)
    # Last before the loop: it restores the random number generators.
    begun = begin(arguments, accelerator, training.checkpoints)
    if finished:
        logger.info(f"The run in {arguments.output_dir} is finished; there is nothing to continue.")
    else:
        done = train(arguments, accelerator, model, task, training, metrics, begun)
        if done.step < arguments.max_steps:
            report_stop(arguments, done.step)
        else:
            finish(arguments, accelerator, training.wrapped, task, metrics, done.seconds)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report_stop(arguments: PretrainArguments, step: int) -> None:
    instead = " in place of --overwrite_output_dir" if arguments.overwrite_output_dir else ""
    logger.info(
        f"Stopped after step {step} of {arguments.max_steps}, with a checkpoint in {arguments.output_dir}. The same "
        f"command with --resume_from_checkpoint{instead} continues."
    )


def finish(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    task: MlmTask,
    metrics: RunMetrics,
    seconds: float,
) -> None:
    """Save the model, measure what was saved, and write the record."""
    save(arguments, accelerator, wrapped, task.data)
    if accelerator.is_main_process:
        path, batch_size = arguments.output_dir, arguments.per_device_eval_batch_size
        result = evaluate_saved(path, accelerator, task.data, task.rule, batch_size)
        metrics.validation.append(report_validation(accelerator, result, arguments.max_steps))
        metrics.final = {**metrics.validation[-1], "seconds": seconds}
        metrics.write(path)
        logger.info(
            f"Trained for {seconds:.1f} s. Model, tokenizer, {METRICS_FILE} and {LOSS_CURVE_FILE} are in {path}."
        )


def tracker_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as the scalars and texts that every tracker takes."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}


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
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv)
    accelerator = build_accelerator(arguments)
    try:
        with logging_redirect_tqdm():
            if arguments.eval_only:
                evaluate_only(arguments, accelerator)
            else:
                pretrain(arguments, spectral, accelerator)
    # A message for what a user can change; a traceback for anything else.
    except NonFiniteLossError as error:
        raise SystemExit(f"error: {error} {last_checkpoint(arguments)}") from error
    except (CorpusError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


def last_checkpoint(arguments: PretrainArguments) -> str:
    saved = list_checkpoints(arguments.output_dir)
    if not saved or arguments.eval_only:
        return "There is no checkpoint of it."
    return f"The last checkpoint before is {saved[-1]}; another run can start from it by --model_name_or_path."


if __name__ == "__main__":
    main()
