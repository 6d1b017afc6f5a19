"""Masked language modelling as a task of the loop: which sequences a step reads, what is masked, and the loss."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from hf_specattn.crammed_bert import CrammedBertConfig

from ..run.batching import Batch, BatchOrder
from ..run.loop import Amounts, Task
from ..run.optimization import build_adamw
from ..run.projection_init import INITIALIZATION_SETTINGS
from ..run.run_description import sequences_fingerprint
from ..run.run_metrics import MLM_LOSS_NAME
from ..run.runs import show_progress
from ..run.saving import save_pretrained
from ..run.schedules import learning_rate_factor
from ..run.training_state import gather_weights
from .masking import MaskedBatch, MaskingRule
from .mlm_data import prepare_mlm_data
from .mlm_evaluation import accepts_masked_positions, evaluate_mlm
from .pretrain_arguments import PretrainArguments
from .pretrain_plan import training_tokens

logger = logging.getLogger(__name__)

# What decides a run beside its data and model: a resumed run must have the same.
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
# Of AdamW, as cramming has them: a second moment that forgets in 50 steps suits a run of few steps, and an epsilon below any
# gradient's scale gives rarely seen tokens steps of full size.
CRAMMING: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-12}
DROPOUT_SETTINGS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


class MlmTask(Task):
    """Predict masked tokens of packed sequences.

    Every process asks for the data: behind a lock the first one on each machine makes them.

    Args:
        arguments: Of the run.
        accelerator: The processes that share it.
    """

    name = "pretrain_mlm"
    unit = "tokens"
    loss_name = MLM_LOSS_NAME
    processor_name = "tokenizer"
    hub_task = "fill-mask"
    measured: ClassVar = {
        "validation_perplexity": ("perplexity", "Perplexity"),
        "validation_loss": ("loss", "Loss (nats per token)"),
    }

    def __init__(self, arguments: PretrainArguments, accelerator: Accelerator) -> None:
        self.arguments, self.accelerator = arguments, accelerator
        micro_batch = arguments.per_device_train_batch_size * accelerator.num_processes
        accumulation, ramp = arguments.gradient_accumulation_steps, arguments.batch_size_ramp
        self.amounts = Amounts(arguments.budget, micro_batch, accumulation, arguments.eval_steps, ramp)
        self.data = prepare_mlm_data(
            arguments.data_settings(),
            training_sequences=0 if arguments.eval_only else self.amounts.batch,  # 0 leaves the training part out
            show_progress=show_progress(arguments, accelerator),
        )
        logger.info(f"Corpus: {self.data.origin}.")
        self.processor = self.data.tokenizer
        self.dataset = self.data.origin
        self.units = arguments.max_seq_length
        self.validation_fingerprint = self.data.validation_fingerprint
        self.rule = MaskingRule(self.data.tokenizer.mask_token_id, len(self.data.tokenizer), arguments.mlm_probability)
        shuffle = arguments.sequence_order == "shuffled"
        self.order = None if arguments.eval_only else BatchOrder(len(self.data.train), arguments.seed, shuffle=shuffle)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return len(self.data.tokenizer)

    def samples(self, count: int) -> dict[str, Tensor]:
        rows = self.data.validation[np.arange(min(count, len(self.data.validation)))]
        return {"input_ids": torch.from_numpy(rows.astype("int64"))}

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        data = self.data
        planned = training_tokens(self.arguments, self.amounts.micro_batch * self.units)
        return {
            "corpus": data.origin,
            "vocab_size": self.vocab_size,
            "train_sequences": len(data.train),
            "train_tokens": data.train.size,
            "validation_sequences": len(data.validation),
            "validation_tokens": data.validation.size,
            "validation_fingerprint": data.validation_fingerprint,
            "planned_tokens": planned,
            "epochs": None if planned is None else round(planned / data.train.size, 3),
            "lr_scheduler_type": self.arguments.schedule_kind,
        }

    def describe(self, facts: dict[str, Any]) -> Iterator[str]:
        yield (
            f"{facts['model_type']}: {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}. Training: "
            f"{facts['train_tokens']:,} tokens in {facts['train_sequences']:,} sequences of {self.units}; validation: "
            f"{facts['validation_tokens']:,} tokens in {facts['validation_sequences']:,}."
        )
        passes = "" if facts["epochs"] is None else f" are {facts['epochs']} passes over the training data"
        yield (
            f"{self.amounts.describe()} of {self.amounts.batch:,} sequences ({facts['tokens_per_step']:,} tokens){passes}, "
            f"on {facts['processes']} {facts['device']} process(es) with {facts['threads']} thread(s), mixed precision "
            f"{facts['mixed_precision']}."
        )

    def must_match(self) -> dict[str, Any]:
        # Only where it was chosen: runs from before these flags can be resumed.
        as_drawn = self.arguments.initialization().is_default and self.arguments.match_norm_of is None
        start = () if as_drawn else INITIALIZATION_SETTINGS
        return {
            **{name: getattr(self.arguments, name) for name in (*RUN_SETTINGS, *start)},
            "lr_scheduler_type": self.arguments.schedule_kind,
            "warmup_steps": self.arguments.warmup,
            # Under a ramp the batch grows by this.
            "micro_batch_size": self.amounts.micro_batch if self.amounts.ramp else None,
            "train_fingerprint": sequences_fingerprint(self.data.train),
            "tokenizer_size": self.vocab_size,
            "mask_token_id": self.rule.mask_token_id,
        }

    def optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        # Asked of the model itself: a compiled one does not show what its forward pass takes.
        self.sparse = accepts_masked_positions(model)
        arguments = self.arguments
        return build_adamw(model, arguments, arguments.learning_rate, arguments.weight_decay, **CRAMMING)

    def learning_rate_factor(self) -> Callable[[float], float]:
        return learning_rate_factor(self.arguments.schedule_kind, self.arguments.budget, self.arguments.warmup)

    def epochs(self, position: int) -> float:
        assert self.order is not None
        return self.order.epochs(position)

    def micro_batches(self, position: int, micro_steps: int, step: int) -> Iterator[MaskedBatch]:
        assert self.order is not None
        batch = self.order.batch(position, micro_steps * self.amounts.micro_batch)
        self._announce_new_pass(step, batch)
        for micro_step in range(micro_steps):
            rows = batch.share(micro_step, micro_steps, self.accelerator.process_index, self.accelerator.num_processes)
            sequences = self.data.train[rows.indices]
            yield self.rule.apply(sequences, rows.indices, seed=self.arguments.seed, epoch=rows.epochs)

    def _announce_new_pass(self, step: int, batch: Batch) -> None:
        """Say that the corpus ends and begins again: the loss is no longer that of unread text."""
        passed = int(batch.epochs[-1])
        if batch.begins_pass and passed > 0:
            order = "in another order" if self.arguments.sequence_order == "shuffled" else "in the same order"
            logger.warning(
                f"step {step}: the training data ({len(self.data.train):,} sequences) have been read {passed} time(s) and "
                f"are repeated from here on, {order} and masked anew."
            )

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        return model(**batch.model_inputs(self.accelerator.device, self.sparse)).loss

    def evaluate(self, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        batch_size = self.arguments.per_device_eval_batch_size
        found = evaluate_mlm(model, self.data.validation, self.rule, batch_size=batch_size, accelerator=accelerator)
        return {"validation_loss": found.loss, "validation_perplexity": found.perplexity}

    def describe_evaluation(self, values: dict[str, float | None]) -> str:
        perplexity = values["validation_perplexity"]
        text = "beyond floats" if perplexity is None else f"{perplexity:.3f}"
        return f"validation loss {values['validation_loss']:.6f}, perplexity {text}"

    def save(self, model: PreTrainedModel, accelerator: Accelerator, directory: str) -> bool:
        weights = gather_weights(model, accelerator)  # on every process: sharded weights are gathered
        for name, rate in self._fine_tuning_dropout().items():
            setattr(model.config, name, rate)
        if accelerator.is_main_process:
            save_pretrained(model, self.processor, directory, weights)
        return True

    def _fine_tuning_dropout(self) -> dict[str, float]:
        """The dropout rates for the saved config: training runs without, but fine-tuning should find the usual ones."""
        path = self.arguments.model_name_or_path
        config: Any = CrammedBertConfig() if path is None else AutoConfig.from_pretrained(path)
        return {name: getattr(config, name) for name in DROPOUT_SETTINGS if hasattr(config, name)}

    def evaluate_saved(self, path: str, device: torch.device) -> dict[str, float | None]:
        model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).to(device)
        return self.evaluate(model, None)
