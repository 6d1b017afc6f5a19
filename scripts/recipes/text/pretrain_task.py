"""Masked language modeling as a task of the loop: which sequences a step reads, what is masked, the loss, the evaluation.

The corruption has an exact count and is a pure function of (seed, epoch, sequence index). Every sequence gets exactly
`round(probability * length)` predicted positions, so that a model may decode just those with static shapes (sparse
prediction). As in cramming, any position may be chosen, [SEP] included, and the random replacement is any token of the
vocabulary: packed sequences carry no padding, and leaving out specials would cost the exact count. 80 % of the chosen
positions show [MASK], 10 % a random token, 10 % the token itself (Devlin et al., 2019).
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from hf_specattn.crammed_bert import CrammedBertConfig

from ..run.batching import Batch, BatchOrder
from ..run.loop import Amounts, Task
from ..run.optimization import build_adamw
from ..run.projection_init import INITIALIZATION_SETTINGS
from ..run.randomness import Purpose, random_words
from ..run.run_metrics import MLM_LOSS_NAME, perplexity
from ..run.runs import show_progress
from ..run.saving import save_pretrained
from ..run.schedules import learning_rate_factor
from ..run.training_state import gather_weights
from .mlm_data import prepare_mlm_data
from .pretrain_arguments import PretrainArguments
from .token_cache import TokenCache

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

IGNORED_LABEL = -100  # the ignore_index of torch's and transformers' cross-entropy

# Validation is corrupted once and for all, so that losses compare between runs of any seed.
EVALUATION_SEED, EVALUATION_EPOCH = 20230713, 0


@dataclass(frozen=True)
class MaskedBatch:
    """A corrupted batch.

    Attributes:
        input_ids: `(batch, length)`, int64, with the chosen positions corrupted.
        labels: `(batch, length)`, int64: the original token at the chosen positions, -100 elsewhere.
        masked_positions: `(batch, predicted)`, int64, the chosen positions in rising order.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    masked_positions: torch.Tensor

    def model_inputs(self, device: torch.device, sparse: bool) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model's forward pass on `device`; `sparse` adds `masked_positions`."""
        inputs = {"input_ids": self.input_ids, "labels": self.labels}
        if sparse:
            inputs["masked_positions"] = self.masked_positions
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


@dataclass(frozen=True)
class MaskingRule:
    """How sequences are corrupted.

    Attributes:
        mask_token_id: The id of [MASK].
        vocab_size: Random replacements are drawn from [0, vocab_size).
        probability: The share of positions to predict, in (0, 1].
    """

    mask_token_id: int
    vocab_size: int
    probability: float = 0.25

    def predictions(self, length: int) -> int:
        """Return how many positions of a sequence of `length` tokens are predicted."""
        return round(self.probability * length)

    def apply(self, tokens: NDArray[np.integer], indices: ArrayLike, *, seed: int, epoch: ArrayLike) -> MaskedBatch:
        """Corrupt a batch.

        Args:
            tokens: `(batch, length)`, the rows at `indices` of the packed corpus.
            indices: `(batch,)`: with seed and epoch it decides the row's corruption, whatever else is in the batch.
            seed: The run's seed.
            epoch: How often the corpus has been passed, one number or `(batch,)`; each pass is corrupted another way.
        """
        length = tokens.shape[1]
        count = self.predictions(length)
        rows = zip(*np.broadcast_arrays(epoch, indices))
        words = np.stack(
            [random_words(seed, int(passed), Purpose.MASKING, int(row), length + 2 * count) for passed, row in rows]
        )
        scores, decisions, replacements = np.split(words, [length, length + count], axis=1)
        # The positions of the smallest scores are a uniform subset; stable, so that even a tie has one outcome.
        positions = np.sort(np.argsort(scores, axis=1, kind="stable")[:, :count], axis=1)
        originals = np.take_along_axis(tokens, positions, axis=1).astype(np.int64)
        shown = np.where(_uniform(decisions) < 0.9, self._random_tokens(replacements), originals)
        shown = np.where(_uniform(decisions) < 0.8, self.mask_token_id, shown)

        input_ids = tokens.astype(np.int64)
        np.put_along_axis(input_ids, positions, shown, axis=1)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        np.put_along_axis(labels, positions, originals, axis=1)
        return MaskedBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions))

    def _random_tokens(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        # The upper 32 bits scaled to the vocabulary: the bias is below vocab_size / 2**32.
        return ((words >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int64)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map words to [0, 1) by their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MlmTask(Task):
    """Predict masked tokens of packed sequences.

    Every process asks for the data: behind a lock the first one on each machine makes them.
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
        self.validation_fingerprint = self.data.validation.fingerprint
        self.rule = MaskingRule(self.data.tokenizer.mask_token_id, len(self.data.tokenizer), arguments.mlm_probability)
        if not arguments.eval_only:
            self.order = BatchOrder(len(self.train), arguments.seed, arguments.sequence_order == "shuffled")

    @property
    def train(self) -> TokenCache:
        """The training sequences."""
        assert self.data.train is not None  # an evaluation alone has none
        return self.data.train

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return len(self.data.tokenizer)

    def samples(self, count: int) -> dict[str, Tensor]:
        rows = self.data.validation[np.arange(min(count, len(self.data.validation)))]
        return {"input_ids": torch.from_numpy(rows.astype("int64"))}

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        data = self.data
        planned = self.arguments.training_tokens(self.amounts.micro_batch * self.units)
        return {
            "corpus": data.origin,
            "vocab_size": self.vocab_size,
            "train_sequences": len(self.train),
            "train_tokens": self.train.size,
            "validation_sequences": len(data.validation),
            "validation_tokens": data.validation.size,
            "validation_fingerprint": data.validation.fingerprint,
            "planned_tokens": planned,
            "epochs": None if planned is None else round(planned / self.train.size, 3),
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
            "train_fingerprint": self.train.fingerprint,
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

    def micro_batches(self, position: int, micro_steps: int, step: int) -> Iterator[MaskedBatch]:
        batch = self.order.batch(position, micro_steps * self.amounts.micro_batch)
        self._announce_new_pass(step, batch)
        for micro_step in range(micro_steps):
            rows = batch.share(micro_step, micro_steps, self.accelerator.process_index, self.accelerator.num_processes)
            sequences = self.train[rows.indices]
            yield self.rule.apply(sequences, rows.indices, seed=self.arguments.seed, epoch=rows.epochs)

    def _announce_new_pass(self, step: int, batch: Batch) -> None:
        """Say that the corpus ends and begins again: the loss is no longer that of unread text."""
        passed = int(batch.epochs[-1])
        if batch.begins_pass and passed > 0:
            order = "in another order" if self.arguments.sequence_order == "shuffled" else "in the same order"
            logger.warning(
                f"step {step}: the training data ({len(self.train):,} sequences) have been read {passed} time(s) and "
                f"are repeated from here on, {order} and with new masks."
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


@dataclass(frozen=True)
class MlmEvaluation:
    """Attributes: `loss` in nats per predicted token, over `predicted_tokens` tokens of `sequences` sequences."""

    loss: float
    predicted_tokens: int
    sequences: int

    @property
    def perplexity(self) -> float | None:
        """Return `exp(loss)`; None where that overflows."""
        return perplexity(self.loss)


def accepts_masked_positions(model: nn.Module) -> bool:
    """Say whether the model can decode chosen positions only (`masked_positions`), as Crammed BERT does."""
    return "masked_positions" in inspect.signature(type(extract_model_from_parallel(model)).forward).parameters


@torch.no_grad()
def evaluate_mlm(
    model: nn.Module,
    sequences: NDArray[np.integer] | TokenCache,
    rule: MaskingRule,
    *,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> MlmEvaluation:
    """Measure the masked-LM loss over packed sequences, `(sequences, length)`, each used exactly once.

    The corruption is that of a fixed seed. Sums are weighted by predicted tokens and kept in float64, so the batch size and
    the number of processes change nothing.

    Args:
        model: Wrapped by `accelerator.prepare` or not; its training mode is left as it was.
        sequences: Token ids; at least one row.
        rule: As in training.
        batch_size: Sequences per process and forward pass.
        accelerator: The processes to share the work among; None evaluates in this one, on the model's device.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    sparse = accepts_masked_positions(model)
    training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, predicted tokens
    for start in range(0, len(sequences), batch_size * processes):
        mine = start + rank * batch_size
        indices = np.arange(mine, min(mine + batch_size, len(sequences)))
        counts = len(indices) > 0
        # A wrapped model may communicate in its forward pass, so a process without data joins in, uncounted.
        indices = indices if counts else np.zeros(1, dtype=int)
        batch = rule.apply(sequences[indices], indices, seed=EVALUATION_SEED, epoch=EVALUATION_EPOCH)
        loss = model(**batch.model_inputs(device, sparse)).loss
        if counts:
            predicted = batch.masked_positions.numel()
            totals += torch.stack([loss.double() * predicted, totals.new_tensor(predicted)])
    model.train(training)
    if accelerator is not None:
        totals = accelerator.reduce(totals, reduction="sum")
    summed_loss, tokens = totals.tolist()
    return MlmEvaluation(summed_loss / tokens, int(tokens), len(sequences))
