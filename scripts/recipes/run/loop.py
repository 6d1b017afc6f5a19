"""The one training loop: what every experiment does, in the order of this file.

A task ([`Task`]) says what is learned: the batches of a position, their loss, the evaluation, what is saved. The loop knows
steps, accumulation, precision, schedules, the average of weights, refreshing, the monitor, logging, evaluation, checkpoints,
signals and several processes. A script is: arguments, task, model, `run`.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_specattn import refresh
from hf_specattn.conditioning import refresh_interval

from .batching import BatchOrder
from .checkpointing import Checkpoints, Progress
from .conditioned_model import ConditioningError
from .interruption import stop_on_signals
from .run_arguments import RunArguments
from .run_metrics import RunMetrics, require_finite_gradient, require_finite_loss
from .schedules import Budget, BudgetSchedule, ramped_micro_steps
from .throughput import LossWindow

if TYPE_CHECKING:
    from hf_specattn.diagnostics.monitor import SpectralMonitor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Amounts:
    """How much a run does, in samples: sequences or images.

    Attributes:
        budget: Optimizer steps, or seconds.
        micro_batch: Samples per forward pass, over all processes.
        accumulation: Forward passes per optimizer step.
        eval_steps: Steps between evaluations; 0: only at the end.
        ramp: Share of the budget over which accumulation grows from 1 forward pass to all; 0 begins with all.
    """

    budget: Budget
    micro_batch: int
    accumulation: int
    eval_steps: int
    ramp: float = 0.0

    @property
    def batch(self) -> int:
        """Samples per optimizer step, where no ramp makes them fewer."""
        return self.micro_batch * self.accumulation

    def micro_steps(self, step: int, seconds: float) -> int:
        """Forward passes of the step that follows the given steps and seconds."""
        return ramped_micro_steps(self.budget.share(step, seconds), self.accumulation, self.ramp)

    def describe(self) -> str:
        """The budget in words."""
        if self.budget.seconds is not None:
            return f"{self.budget.seconds / 3600:g} hours"
        return f"{self.budget.steps:,} steps"


class Task(ABC):
    """What is learned. Samples come from one endless stream; a step takes the next ones at its position.

    Attributes:
        name: Of the script, for the trackers.
        unit: What is counted, in the plural: "tokens", "images".
        units: How many of them a sample is.
        loss_name: What the loss is, with its unit.
        processor, processor_name: Saved beside the model: its tokenizer or image processor, and what to call it.
        amounts: How much is done.
        order: The stream of samples.
        hub_task: The task's name on the Hub, for the model card.
        dataset: The data's name, for the model card.
        measured: Value of `evaluate` -> the names of its metric on the Hub, and in words.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    loss_name: ClassVar[str]
    processor_name: ClassVar[str]
    hub_task: ClassVar[str]
    measured: ClassVar[Mapping[str, tuple[str, str]]]
    units: int = 1
    processor: Any
    amounts: Amounts
    order: BatchOrder
    dataset: str
    validation_fingerprint: str

    @abstractmethod
    def samples(self, count: int) -> dict[str, Tensor]:
        """What the model reads of a few samples of the validation data: to look at its attention."""

    @abstractmethod
    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        """What is about to happen, for `metrics.json`."""

    @abstractmethod
    def describe(self, facts: dict[str, Any]) -> Iterable[str]:
        """The same in sentences."""

    def describe_steps(self, facts: dict[str, Any]) -> str:
        """How many steps those are, and on what."""
        return (
            f"{self.amounts.describe()} of {self.amounts.batch:,} {self.unit} are {facts['epochs']} passes over the training "
            f"{self.unit}, on {facts['processes']} {facts['device']} process(es) with {facts['threads']} thread(s), mixed "
            f"precision {facts['mixed_precision']}."
        )

    @abstractmethod
    def must_match(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, in addition to the model, the amounts and the precision."""

    @abstractmethod
    def optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        """The optimizer at its peak learning rates."""

    def averaged(self, model: PreTrainedModel) -> Any:
        """The moving average of the weights of a model on its device, where there is one."""
        return None

    @abstractmethod
    def learning_rate_factor(self) -> Callable[[float], float]:
        """From what is used of the budget to the factor of the peak learning rate."""

    def epochs(self, position: int) -> float:
        """Passes over the training data up to a position."""
        return self.order.epochs(position)

    @abstractmethod
    def micro_batches(self, position: int, micro_steps: int, step: int) -> Iterable[Any]:
        """This process's micro-batches of the step that begins at a position: a function of seed and position."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a micro-batch; each micro-batch counts the same."""

    @abstractmethod
    def evaluate(self, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        """`validation_loss` and what else is measured, on all processes together; None: in this one."""

    @abstractmethod
    def describe_evaluation(self, values: dict[str, float | None]) -> str:
        """The same in words."""

    @abstractmethod
    def save(self, model: PreTrainedModel, accelerator: Accelerator, directory: str) -> bool:
        """Save the trained model; whether `evaluate_saved` can load it. Every process calls it."""

    @abstractmethod
    def evaluate_saved(self, path: str, device: torch.device) -> dict[str, float | None]:
        """Evaluate what is on the disk, in float32 and on this process only, as a user would load it."""


@dataclass(frozen=True)
class Training:
    """What a step of training moves, and what saves it.

    Attributes:
        model: The model itself; sharded in place where the run is.
        wrapped: The model as accelerate wrapped it.
        optimizer: As accelerate wrapped it.
        schedule: Of the learning rate.
        checkpoints: Of all of these.
        averaged: The moving average of the weights, where it is asked for.
        exact_refresh: How dynamic corrections are recomputed, for `refresh`.
        monitor: Of the conditioning of attention; None: not asked for, or another process's.
    """

    model: PreTrainedModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: BudgetSchedule
    checkpoints: Checkpoints
    averaged: Any = None
    exact_refresh: bool | None = None
    monitor: "SpectralMonitor | None" = None

    @property
    def result(self) -> PreTrainedModel:
        """The model that is saved in the end."""
        return self.model if self.averaged is None else self.averaged.model

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated, as the processes share it."""
        return self.wrapped if self.averaged is None else self.averaged.model


def train(
    task: Task,
    training: Training,
    arguments: RunArguments,
    accelerator: Accelerator,
    metrics: RunMetrics,
    begun: Progress,
    with_bar: bool,
) -> Progress:
    """Run the loop from `begun` on; returns how far it came: to the end, unless a signal stopped it."""
    metrics.history, metrics.validation = begun.record.get("history", []), begun.record.get("validation", [])
    window = LossWindow()
    window.restore(begun.record.get("loss_window"))
    amounts, budget = task.amounts, task.amounts.budget
    step, position = begun.step, begun.record.get("position", begun.step * amounts.batch)
    started, seconds = time.perf_counter() - begun.seconds, begun.seconds
    refresh_every = refresh_interval(training.model)
    if training.monitor is not None and (values := first_look(training.monitor, training.model, step)):
        accelerator.log(values, step=step)
    progress = tqdm(total=budget.steps, initial=step, desc="Training", unit="step", disable=not with_bar)
    training.wrapped.train()
    with stop_on_signals(accelerator) as stop:
        while budget.share(step, seconds) < 1:
            learning_rate = training.schedule.set(budget.used(step, seconds))
            micro_steps = amounts.micro_steps(step, seconds)
            step += 1
            batches = task.micro_batches(position, micro_steps, step)
            loss = train_step(task, training, accelerator, batches, micro_steps, step, arguments.max_grad_norm)
            if refresh_every is not None and step % refresh_every == 0:
                refresh(training.model, exact=training.exact_refresh)
            if training.averaged is not None:
                training.averaged.update()
            if training.monitor is not None and training.monitor.is_due(step):
                with window.paused():
                    accelerator.log(training.monitor.measure(training.model, step), step=step)
            samples = micro_steps * amounts.micro_batch
            position += samples
            seconds = common_seconds(accelerator, budget, started)
            last = budget.share(step, seconds) >= 1

            window.add(loss, samples * task.units)
            progress.update()
            if is_due(step, arguments.logging_steps) or last:
                train_loss, speed = window.take()
                values = {
                    "epoch": round(task.epochs(position), 4),
                    "train_loss": train_loss,
                    "learning_rate": learning_rate,
                    "batch_size": samples,
                    f"train_{task.unit}_seen": position * task.units,
                    f"{task.unit}_per_second": speed,
                }
                report_training(task, accelerator, metrics, step, values, with_bar)
                progress.set_postfix_str(f"loss {train_loss:.4f}, {speed:,.0f} {task.unit}/s")
            if is_due(step, amounts.eval_steps) and not last:
                with window.paused():
                    found = task.evaluate(training.evaluated, accelerator)
                    metrics.validation.append(report_evaluation(task, accelerator, found, step))

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


def first_look(monitor: "SpectralMonitor", model: PreTrainedModel, step: int) -> dict[str, float]:
    """Measure before the first step.

    Raises:
        ConditioningError: for a model whose attention cannot be looked at.
    """
    try:
        return monitor.first_values(model, step)
    except ValueError as error:
        raise ConditioningError(f"--spectral_monitor_every: {error} Leave the flag out for this model.") from error


def train_step(
    task: Task,
    training: Training,
    accelerator: Accelerator,
    batches: Iterable[Any],
    micro_steps: int,
    step: int,
    max_grad_norm: float,
) -> float:
    """Take one optimizer step over its micro-batches; returns its loss over all processes."""
    step_loss = torch.zeros((), device=accelerator.device)
    for micro_step, batch in enumerate(batches):
        # Gradients are exchanged once, in the last backward pass.
        accumulating = micro_step < micro_steps - 1
        with accelerator.no_sync(training.wrapped) if accumulating else nullcontext():
            loss = task.loss(training.wrapped, batch) / micro_steps
            accelerator.backward(loss)
        step_loss += loss.detach()
    # Every process and micro-batch counts the same: the mean of their means is the mean.
    step_loss = accelerator.reduce(step_loss, reduction="mean")
    norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), max_grad_norm or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # Both numbers are read at once, and before the optimizer's work is queued: each reading makes the host wait for the GPU.
    loss_value, norm_value = torch.stack([step_loss, norm.to(step_loss)]).tolist()
    require_finite_loss(loss_value, step)
    if accelerator.scaler is None:  # fp16's loss scaling skips a step whose gradient overflowed
        require_finite_gradient(norm_value, step)
    if training.monitor is not None:
        training.monitor.observe_gradients(training.model, step)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return loss_value


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this step; 0 is never."""
    return every > 0 and step % every == 0


def common_seconds(accelerator: Accelerator, budget: Budget, started: float) -> float:
    """Seconds of training; where the schedule follows the clock, that of the main process on every process."""
    seconds = time.perf_counter() - started
    if budget.seconds is None or accelerator.num_processes == 1:
        return seconds
    return broadcast(torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)).item()


def report_training(
    task: Task, accelerator: Accelerator, metrics: RunMetrics, step: int, values: dict[str, Any], with_bar: bool
) -> None:
    """Record the values since the last record, and hand them to the trackers by the same names."""
    first, budget = not metrics.history, task.amounts.budget
    metrics.history.append({"step": step, **values})
    accelerator.log(values, step=step)
    speed = values[f"{task.unit}_per_second"]
    if not with_bar:
        of = "" if budget.steps is None else f"/{budget.steps}"
        logger.info(f"step {step}{of}: loss {values['train_loss']:.4f}, {speed:,.0f} {task.unit}/s")
    if first and budget.steps is None:
        amount = f"{speed * budget.size:,.0f} {task.unit}"
        logger.info(f"At {speed:,.0f} {task.unit}/s the {task.amounts.describe()} are {amount}.")


def report_evaluation(
    task: Task, accelerator: Accelerator, values: dict[str, float | None], step: int
) -> dict[str, Any]:
    """Log one evaluation and return its record."""
    loss = values["validation_loss"]
    assert loss is not None
    require_finite_loss(loss, step, "validation")
    accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
    logger.info(f"step {step}: {task.describe_evaluation(values)}")
    return {"step": step, **values}
