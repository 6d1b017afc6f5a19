"""One run: a model is fine-tuned on a task with a seed, scored, and its record filled in."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_specattn import refresh
from hf_specattn.conditioning import refresh_interval

from ..run.interruption import StopRequest
from ..run.optimization import parameter_groups
from ..run.run_metrics import NonFiniteLossError, package_versions
from ..run.saving import SavedElsewhereError, save_pretrained
from .failures import NOT_WRITTEN, describe_error, kind_of
from .features import Collator, TokenizedExamples, load_tokens, tokenizer_fingerprint
from .glue_arguments import GlueArguments, folder_name
from .glue_batches import epoch_batches
from .glue_models import ModelVariant, load_model, quiet
from .glue_results import FAILED, FINISHED, RunRecord
from .glue_scores import predictions_from_logits, score
from .prediction import accepted_inputs, predict_logits, write_submission
from .protocols import Protocol, build_schedule, total_steps
from .task_data import TaskData
from .tasks import TASKS, GlueTask

logger = logging.getLogger(__name__)

# Steps between looks at the losses: each one waits for the device.
STEPS_PER_CHECK = 25


class StoppedError(Exception):
    """A signal has ended the run before its time."""


@dataclass
class Run:
    """One run while it goes on: the record that it fills in, and what it needs."""

    record: RunRecord
    variant: ModelVariant
    task: GlueTask
    tokens: dict[str, TokenizedExamples]
    protocol: Protocol
    model: nn.Module
    collate: Collator


@dataclass
class FineTuner:
    """Does runs on one device, one after another.

    Attributes:
        variants: Name -> model.
        data: Task -> its data.
        stop: Whether a signal asks to stop.
        exact_refresh: How dynamic corrections are recomputed, for `refresh`.
        bases: Model -> the copy that its adapters name as their base.
        loaded: Models that were loaded before, whose warnings were seen.
        tokens: Sets of the current task, by file.
    """

    arguments: GlueArguments
    accelerator: Accelerator
    variants: dict[str, ModelVariant]
    data: dict[str, TaskData]
    stop: StopRequest
    exact_refresh: bool | None = None
    bases: dict[str, str] = field(default_factory=dict)
    bars: bool = False
    loaded: set[str] = field(default_factory=set)
    tokens: dict[Path, TokenizedExamples] = field(default_factory=dict)

    def execute(self, record: RunRecord) -> None:
        """Do one run and fill in its record; a failure is part of the record.

        Raises:
            StoppedError: if a signal asks to stop.
        """
        record.versions = package_versions()
        record.facts = {
            "device": self.accelerator.device.type,
            "threads": torch.get_num_threads(),
            "model_name_or_path": self.variants[record.model].path,
        }
        started = time.perf_counter()
        try:
            self._fine_tune_and_score(record)
            record.status = FINISHED
        except StoppedError:
            raise
        except Exception as error:  # of any kind: the other runs go on, and the table says which one failed
            kind, message = kind_of(error), describe_error(error)
            logger.error(f"{describe(record)} failed ({kind}): {message}", exc_info=error)
            record.status, record.scores = FAILED, {}
            record.failure = {"kind": kind, "message": message}
        finally:
            self.accelerator.free_memory()
        record.seconds["total"] = time.perf_counter() - started

    def _fine_tune_and_score(self, record: RunRecord) -> None:
        run = self._begin(record)
        started = time.perf_counter()
        self._train(run)
        record.seconds["training"] = time.perf_counter() - started
        examples = len(run.tokens["train"]) * run.protocol.num_train_epochs
        record.facts["train_examples_per_second"] = examples / record.seconds["training"]

        started = time.perf_counter()
        count = 0
        for split in run.task.splits_of("validation"):
            logits = self._predict(run, split.name)
            labels: Any = run.tokens[split.name].labels
            record.scores[split.name] = score(run.task, predictions_from_logits(run.task, logits), labels)
            count += len(logits)
        record.seconds["evaluation"] = time.perf_counter() - started
        record.facts["eval_examples_per_second"] = count / record.seconds["evaluation"]
        try:
            self._write_outputs(run)
        except (OSError, SavedElsewhereError) as error:  # the scores stand; the same command does the run again
            logger.error(f"{describe(record)}: {describe_error(error)}")
            record.failure = {"kind": NOT_WRITTEN, "message": describe_error(error)}

    def _begin(self, record: RunRecord) -> Run:
        """Load the data and the model; its new layers are those of the seed."""
        variant, task = self.variants[record.model], TASKS[record.task]
        protocol, device = self.arguments.resolved_protocol, self.accelerator.device
        tokens = self._tokens_of(record)
        set_seed(record.seed)
        model = self._load(variant, task, protocol).to(device)
        base = model.get_base_model() if variant.lora is not None else model
        collate = Collator(variant.tokenizer, accepted_inputs(base), device)
        parameters = list(model.parameters())
        record.facts |= {
            "model_type": base.config.model_type,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "steps": total_steps(protocol, len(tokens["train"])),
        }
        return Run(record, variant, task, tokens, protocol, model, collate)

    def _tokens_of(self, record: RunRecord) -> dict[str, TokenizedExamples]:
        """Return the sets of a run, kept while runs on the same task follow."""
        files = self.data[record.task].files
        wanted = files[tokenizer_fingerprint(self.variants[record.model].tokenizer)]
        current = {path for by_split in files.values() for path in by_split.values()}
        self.tokens = {path: examples for path, examples in self.tokens.items() if path in current}
        for path in wanted.values():
            if path not in self.tokens:
                self.tokens[path] = load_tokens(path)
        return {split: self.tokens[path] for split, path in wanted.items()}

    def _load(self, variant: ModelVariant, task: GlueTask, protocol: Protocol) -> Any:
        base = self.bases.get(variant.label)
        if variant.label in self.loaded:
            with quiet():
                return load_model(variant, task, protocol, base)
        self.loaded.add(variant.label)
        return load_model(variant, task, protocol, base)

    def _train(self, run: Run) -> None:
        """Train for all epochs of the protocol."""
        accelerator, protocol, record = self.accelerator, run.protocol, run.record
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
        set_seed(record.seed)
        run.model.train()
        step, total = 0, record.facts["steps"]
        with tqdm(total=total, desc=describe(record), unit="step", disable=not self.bars, leave=False) as bar:
            for epoch in range(protocol.num_train_epochs):
                batches = epoch_batches(
                    run.tokens["train"].lengths,
                    protocol.train_batch_size,
                    seed=record.seed,
                    epoch=epoch,
                    group_by_length=self.arguments.group_by_length,
                )
                losses: list[torch.Tensor] = []
                for batch in batches:
                    losses.append(train_step(accelerator, run, prepared, batch))
                    if not accelerator.optimizer_step_was_skipped:  # fp16's loss scaling skips steps that overflowed
                        schedule.step()
                    step += 1
                    if refresh_every is not None and step % refresh_every == 0:
                        refresh(run.model, exact=self.exact_refresh)
                    bar.update()
                    if self.stop.requested():
                        raise StoppedError
                    if step % STEPS_PER_CHECK == 0 or len(losses) == len(batches):
                        require_finite(losses, step)
                        bar.set_postfix_str(f"loss {losses[-1].item():.4f}")
                values = torch.stack(losses).double().cpu().numpy()
                if epoch == 0:
                    record.first_loss = float(values[0])
                record.epoch_losses.append(float(np.average(values, weights=[len(batch) for batch in batches])))

    def _predict(self, run: Run, split: str) -> NDArray[np.float32]:
        return predict_logits(
            run.model,
            run.tokens[split],
            run.collate,
            self.accelerator,
            num_outputs=run.task.num_outputs,
            batch_size=self.arguments.per_device_eval_batch_size,
            show_progress=self.bars,
        )

    def _write_outputs(self, run: Run) -> None:
        """Write what was asked for beside the scores: test-set predictions, the model."""
        record, output = run.record, Path(self.arguments.output_dir)
        if self.arguments.do_predict:
            for split in run.task.splits_of("test"):
                logits = self._predict(run, split.name)
                folder = output / predictions_folder(record)
                write_submission(folder, run.task, split, run.tokens[split.name].indices, logits)
        if self.arguments.save_models:
            model: Any = run.model
            save_pretrained(model, run.variant.tokenizer, output / model_folder(record))
        record.outputs = output_paths(record, self.arguments)


def train_step(accelerator: Accelerator, run: Run, optimizer: Any, batch: NDArray[np.int64]) -> torch.Tensor:
    """Take one optimizer step over a batch; returns its mean loss, on the device."""
    with accelerator.autocast():
        logits = run.model(**run.collate(run.tokens["train"], batch)).logits
    loss = summed_loss(run, logits, batch) / len(batch)
    accelerator.backward(loss)
    if run.protocol.max_grad_norm > 0:
        accelerator.clip_grad_norm_(run.model.parameters(), run.protocol.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def summed_loss(run: Run, logits: torch.Tensor, indices: NDArray[np.int64]) -> torch.Tensor:
    """Sum the losses of some examples: cross-entropy, or the squared error of a regression; in float32."""
    labels = torch.as_tensor(run.tokens["train"].labels[indices], device=logits.device)  # type: ignore[index]
    if run.task.is_regression:
        return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def require_finite(losses: Sequence[torch.Tensor], step: int) -> None:
    """End the run if one of the last losses is nan or infinite; `step` is that of the last one, from 1.

    Raises:
        NonFiniteLossError: naming the first such step.
    """
    recent = torch.stack(list(losses[-STEPS_PER_CHECK:]))
    if not bool(recent.isfinite().all()):
        first = int((~recent.isfinite()).nonzero()[0])
        raise NonFiniteLossError(
            f"The training loss is {recent[first].item()} at step {step - len(recent) + 1 + first}. Lower "
            "--learning_rate, lengthen --warmup_ratio, or use --mixed_precision no."
        )


def describe(record: RunRecord) -> str:
    """A run in words."""
    return f"{TASKS[record.task].title}, seed {record.seed}, {record.model}"


def predictions_folder(record: RunRecord) -> str:
    """Where a run's predictions are, below the output folder."""
    return f"predictions/{folder_name(record.model)}/seed-{record.seed}"


def model_folder(record: RunRecord) -> str:
    """Where a run's model is, below the output folder."""
    return f"models/{folder_name(record.model)}/{record.task}/seed-{record.seed}"


def output_paths(record: RunRecord, arguments: GlueArguments) -> list[str]:
    """Return what a run writes beside its record, below the output folder."""
    titles = [split.title for split in TASKS[record.task].splits_of("test")] if arguments.do_predict else []
    saved = [model_folder(record)] if arguments.save_models else []
    return [*(f"{predictions_folder(record)}/{title}.tsv" for title in titles), *saved]
