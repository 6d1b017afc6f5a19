"""How models are fine-tuned on GLUE: the settings of a protocol, and what may be changed in them."""

from dataclasses import dataclass, fields

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class Protocol:
    """The settings of a fine-tuning.

    The learning rate rises from 0 over `warmup_ratio` of the steps, and falls as a cosine or a line to 0, or not at all.
    Weight decay is decoupled; biases and norms are exempt. The gradient's norm is clipped at `max_grad_norm`; 0 is never.
    `dropout` is that of hidden states and attention probabilities; `empty_second` feeds a single text as a pair with an
    empty second one.

    Raises:
        ValueError: for values that cannot be, with what is allowed.
    """

    learning_rate: float
    num_train_epochs: int
    train_batch_size: int
    lr_scheduler_type: str
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    max_seq_length: int
    dropout: float
    empty_second: bool

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        # Infinities and nan fail each comparison with an upper end.
        bounds = {"weight_decay": 1e9, "max_grad_norm": 1e9, "warmup_ratio": 1.0}
        for name, high in bounds.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0 and at most {high:g}.")
        if not 0 < self.learning_rate < 1e9:
            raise ValueError(f"--learning_rate {self.learning_rate} must be a finite number above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} must be at least 0 and below 1.")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"--lr_scheduler_type {self.lr_scheduler_type!r}: choose one of {', '.join(SCHEDULES)}.")


PROTOCOLS = {
    # JonasGeiping/cramming, eval/GLUE_sane.yaml and eval/optim/adam.yaml.
    "crammed": Protocol(
        learning_rate=4e-5,
        num_train_epochs=5,
        train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        max_seq_length=128,
        dropout=0.1,
        empty_second=True,
    ),
    # Devlin et al. (2019), section 4.1, and google-research/bert: run_classifier.py, optimization.py.
    "bert": Protocol(
        learning_rate=2e-5,
        num_train_epochs=3,
        train_batch_size=32,
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        max_seq_length=128,
        dropout=0.1,
        empty_second=False,
    ),
}

SETTINGS = tuple(setting.name for setting in fields(Protocol))


def total_steps(protocol: Protocol, examples: int) -> int:
    """Return the optimizer steps of a run; the last, smaller batch of an epoch is one, too."""
    return protocol.num_train_epochs * -(-examples // protocol.train_batch_size)


def build_schedule(protocol: Protocol, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule of the learning rate; call its `step()` once after each optimizer step."""
    warmup = int(protocol.warmup_ratio * steps)
    return get_scheduler(protocol.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
