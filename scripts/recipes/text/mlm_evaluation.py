"""Validation loss of a masked language model, the same for any batch size and number of processes."""

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from numpy.typing import NDArray
from torch import nn

from ..run.run_metrics import perplexity
from .masking import MaskingRule
from .token_cache import TokenCache

# Validation is corrupted once and for all, so that losses compare between runs of any seed.
EVALUATION_SEED = 20230713
EVALUATION_EPOCH = 0


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
    """Measure the masked-LM loss over packed sequences, each used exactly once.

    The corruption is that of a fixed seed. Sums are weighted by predicted tokens and kept in float64, so a last batch
    of another size or on one process only changes nothing.

    Args:
        model: A masked language model, wrapped by `accelerator.prepare` or not; its training mode is left as it was.
        sequences: Token ids, `(sequences, length)`.
        rule: As in training.
        batch_size: Sequences per process and forward pass.
        accelerator: The processes to share the work among; None evaluates in this one, on the model's device.

    Raises:
        ValueError: without any sequence.
    """
    if len(sequences) == 0:
        raise ValueError("There is no validation sequence to evaluate; give a longer validation corpus.")
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
