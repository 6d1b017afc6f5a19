"""A task of Long Range Arena as a task of the loop: which examples a step reads, their loss, and the accuracy on all."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..run.batching import BatchOrder
from ..run.distributed import run_on_main_process
from ..run.loop import Amounts, Task
from ..run.optimization import build_adamw
from ..run.projection_init import INITIALIZATION_SETTINGS
from ..run.saving import save_pretrained
from ..run.schedules import Budget
from ..run.spectral_arguments import SpectralArguments
from ..run.usable_model import ModelError
from .lra_arguments import LraArguments
from .lra_data import LraData, Split, load_lra_data
from .one_cycle import beta1, learning_rate_factor

logger = logging.getLogger(__name__)

# Attention weights that the diagnostics may hold: this many samples of 1024 tokens, fewer of longer ones.
SAMPLED_TOKENS = 8 * 1024

# What decides a run beside its data and model: a resumed run must have the same.
RUN_SETTINGS = (
    *("task", "seed", "learning_rate", "warmup_steps", "cycle_beta1", "weight_decay", "max_grad_norm", "eval_steps"),
    *("model_name_or_path", *INITIALIZATION_SETTINGS),
)


def check_model(model: PreTrainedModel, arguments: LraArguments) -> None:
    """Refuse a checkpoint of another task, or of shorter sequences.

    Raises:
        ModelError: saying what differs.
    """
    wanted = arguments.new_model_config()
    for name in ("vocab_size", "max_position_embeddings", "pairs", "num_labels"):
        found, needed = getattr(model.config, name, None), getattr(wanted, name)
        if found != needed:
            raise ModelError(
                f"--model_name_or_path {arguments.model_name_or_path} has {name}={found}, and --task {arguments.task} with "
                f"--max_length {arguments.max_length} needs {needed}; name a model of this task."
            )


class BestWeights:
    """The weights with the best validation accuracy so far: what is saved in the end, as published.

    In the loop it stands where a moving average of the weights would, and goes through the checkpoints as that does.

    Args:
        model: In training, not wrapped.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.best: dict[str, Tensor] = {}

    def update(self) -> None:
        """Nothing happens at a step."""

    def offer(self, accuracy: float, step: int) -> None:
        """Keep the weights as they are now, if they are better than all before."""
        if not self.best or accuracy > self.best["accuracy"].item():
            weights = {f"weights.{name}": value.cpu().clone() for name, value in self.model.state_dict().items()}
            found = {"accuracy": torch.tensor(accuracy, dtype=torch.float64), "step": torch.tensor(step)}
            self.best = {**weights, **found}

    @property
    def step(self) -> int:
        """After which step they were kept."""
        return int(self.best["step"].item())

    def restore(self) -> None:
        """Give the model the best weights."""
        named = {name.removeprefix("weights."): value for name, value in self.best.items()}
        self.model.load_state_dict({name: named[name] for name in self.model.state_dict()})

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return dict(self.best)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.best = dict(state)


@torch.no_grad()
def evaluate_split(
    model: nn.Module, split: Split, length: int, batch_size: int, accelerator: Accelerator | None
) -> tuple[float, float]:
    """Accuracy and loss over all examples of a split, each counted once.

    Batches are the same for any number of processes: with the published pseudo-inverse an output depends on its batch.

    Args:
        model: Not wrapped; its training mode is left as it was.
        length: What sequences are padded to.
        batch_size: Examples per forward pass.
        accelerator: The processes to share the work among; None: this one alone.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for start in range(rank * batch_size, len(split), batch_size * processes):
        ids, labels = split.batch(np.arange(start, min(start + batch_size, len(split))), length)
        targets = torch.from_numpy(labels).to(device)
        logits = model(input_ids=torch.from_numpy(ids).to(device)).logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum").double()
        totals += torch.stack([(logits.argmax(-1) == targets).sum().double(), loss, loss.new_tensor(len(labels))])
    model.train(training)
    if accelerator is not None:
        totals = accelerator.reduce(totals, reduction="sum")
    correct, summed, seen = totals.tolist()
    return correct / seen, summed / seen


class LraTask(Task):
    """Say which class a sequence, or a pair of them, is of.

    Args:
        arguments: Of the run.
        spectral: Of the run, for what must be the same when it is resumed.
        accelerator: The processes that share it.
    """

    name = "train_lra"
    unit = "examples"
    loss_name = "cross-entropy (nats per example)"
    processor_name = "configuration"
    processor = None
    hub_task = "text-classification"
    measured: ClassVar = {
        "test_accuracy": ("accuracy", "Accuracy on the test part"),
        "test_loss": ("loss", "Loss on the test part (nats per example)"),
    }

    def __init__(self, arguments: LraArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
        self.arguments, self.spectral, self.accelerator = arguments, spectral, accelerator
        settings = arguments.data_settings()
        # The main process prepares them; then every one finds them prepared.
        run_on_main_process(accelerator, lambda: bool(load_lra_data(settings)))
        self.data: LraData = load_lra_data(settings)
        self.dataset, self.length = self.data.origin, arguments.padded_length
        self.validation_fingerprint = f"{self.data.validation.fingerprint}-{self.data.test.fingerprint}"
        micro_batch = arguments.per_device_train_batch_size * accelerator.num_processes
        budget = Budget(steps=arguments.steps)
        self.amounts = Amounts(budget, micro_batch, arguments.gradient_accumulation_steps, arguments.eval_steps)
        self.order = BatchOrder(len(self.data.train), arguments.seed)
        self.step = 0
        self.best: BestWeights | None = None

    def samples(self, count: int) -> dict[str, Tensor]:
        rows = min(count, max(1, SAMPLED_TOKENS * 1024 // self.length**2), len(self.data.validation))
        # From all of it: files may be sorted by label.
        places = np.linspace(0, len(self.data.validation) - 1, rows).astype(np.int64)
        ids = torch.from_numpy(self.data.validation.batch(places, self.length)[0])
        # The model finds padding by itself; who looks at its attention has to be told, or counts it as tokens.
        return {"input_ids": ids} | ({"attention_mask": (ids != 0).long()} if self.arguments.zero_is_padding else {})

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        data, planned = self.data, self.amounts.batch * self.arguments.steps
        return {
            "data": data.origin,
            "classes": data.classes,
            "padded_length": self.length,
            **{f"{name}_examples": len(split) for name, split in self._splits().items()},
            "train_fingerprint": data.train.fingerprint,
            "validation_fingerprint": self.validation_fingerprint,
            "planned_examples": planned,
            "epochs": round(self.epochs(planned), 3),
            "baselines": data.baselines(),
        }

    def _splits(self) -> dict[str, Split]:
        return {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}

    def describe(self, facts: dict[str, Any]) -> Iterator[str]:
        splits = ", ".join(f"{facts[f'{name}_examples']:,} {name}" for name in self._splits())
        yield (
            f"{facts['model_type']}: {facts['parameters']:,} parameters, {facts['classes']} classes, sequences padded to "
            f"{self.length}. {facts['data']}: {splits}."
        )
        guessed = ", ".join(f"{name.replace('_', ' ')} {value:.2%}" for name, value in facts["baselines"].items())
        yield f"Test accuracy without a model: {guessed}."
        yield self.describe_steps(facts)

    def must_match(self) -> dict[str, Any]:
        config, preconditioner = self.spectral.to_config(), self.arguments.preconditioner()
        return {
            **{name: getattr(self.arguments, name) for name in RUN_SETTINGS},
            "spectral_settings": None if config is None else config.describe(),
            "preconditioner": None if preconditioner is None else preconditioner.describe(),
            "train_fingerprint": self.data.train.fingerprint,
        }

    def optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        arguments = self.arguments
        optimizer = build_adamw(model, arguments, arguments.learning_rate, arguments.weight_decay, eps=1e-6)
        if arguments.cycle_beta1:
            optimizer.register_step_pre_hook(self._cycle_beta1)
        return optimizer

    def _cycle_beta1(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        value = beta1(self.step - 1, self.arguments.warmup_steps, self.arguments.steps)
        for group in optimizer.param_groups:
            group["betas"] = (value, group["betas"][1])

    def averaged(self, model: PreTrainedModel) -> BestWeights:
        self.best = BestWeights(model)
        return self.best

    def learning_rate_factor(self) -> Callable[[float], float]:
        warmup, steps = self.arguments.warmup_steps, self.arguments.steps
        return lambda used: learning_rate_factor(used, warmup, steps)

    def micro_batches(self, position: int, micro_steps: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.step = step
        batch = self.order.batch(position, micro_steps * self.amounts.micro_batch)
        for micro_step in range(micro_steps):
            rows = batch.share(micro_step, micro_steps, self.accelerator.process_index, self.accelerator.num_processes)
            ids, labels = self.data.train.batch(rows.indices, self.length)
            yield torch.from_numpy(ids), torch.from_numpy(labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, labels = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        return model(input_ids=ids, labels=labels).loss

    def evaluate(self, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        """Accuracy and loss on the validation part; the best weights are kept."""
        values = self._evaluate("validation", model, accelerator)
        if self.best is not None and accelerator is not None:
            accuracy = values["validation_accuracy"]
            assert accuracy is not None
            self.best.offer(accuracy, self.step)
        return values

    def _evaluate(self, name: str, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        batch_size = self.arguments.per_device_eval_batch_size
        accuracy, loss = evaluate_split(model, self._splits()[name], self.length, batch_size, accelerator)
        return {f"{name}_accuracy": accuracy, f"{name}_loss": loss}

    def describe_evaluation(self, values: dict[str, float | None]) -> str:
        parts = [name for name in self._splits() if f"{name}_accuracy" in values]
        found = [
            f"{name} accuracy {values[f'{name}_accuracy']:.2%}, loss {values[f'{name}_loss']:.4f}" for name in parts
        ]
        return "; ".join(found)

    def save(self, model: PreTrainedModel, accelerator: Accelerator, directory: str) -> bool:
        """Save the best weights: those of the last step are offered, too."""
        assert self.best is not None
        self.step = self.arguments.steps
        self.evaluate(model, accelerator)
        self.best.restore()
        if accelerator.is_main_process:
            logger.info(f"The best validation accuracy was that after step {self.best.step}; its weights are saved.")
            save_pretrained(model, None, directory)
        return True

    def evaluate_saved(self, path: str, device: torch.device) -> dict[str, float | None]:
        """Accuracy and loss on the validation and the test part; of a run also the step that its weights are of."""
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).to(device)
        values = self._evaluate("validation", model, None)
        if self.best is not None:
            values["best_step"] = self.best.step
        if self.data.test.fingerprint == self.data.validation.fingerprint:  # Text as published
            return values | {f"test_{kind}": values[f"validation_{kind}"] for kind in ("accuracy", "loss")}
        return values | self._evaluate("test", model, None)
