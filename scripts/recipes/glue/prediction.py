"""What a model says about each example of a set, and files for GLUE's server."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from hf_specattn.files import write_bytes

from ..run.run_metrics import NonFiniteLossError
from ..run.usable_model import unusable_inputs
from .features import Collator, TokenizedExamples
from .glue_scores import predictions_from_logits
from .tasks import GlueSplit, GlueTask


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Return the names of the inputs that a model's forward pass takes, and its weights have something for."""
    taken = frozenset(inspect.signature(type(model).forward).parameters)
    return taken - unusable_inputs(getattr(model, "config", None))


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    examples: TokenizedExamples,
    collate: Collator,
    accelerator: Accelerator,
    *,
    num_outputs: int,
    batch_size: int,
    show_progress: bool = False,
) -> NDArray[np.float32]:
    """Return the logits of every example, `(examples, num_outputs)`, on the accelerator's device and in its precision.

    The model is not wrapped; its training mode is left as it was.

    Raises:
        NonFiniteLossError: for logits that are nan or infinite.
    """
    training = model.training
    model.eval()
    logits = torch.zeros(len(examples), num_outputs, device=accelerator.device)
    order = np.argsort(-examples.lengths, kind="stable")  # by length, to pad little
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for indices in tqdm(batches, desc="Evaluating", unit="batch", disable=not show_progress, leave=False):
        with accelerator.autocast():
            output = model(**collate(examples, indices)).logits
        logits[torch.as_tensor(indices, device=accelerator.device)] = output.float()
    model.train(training)
    if not bool(logits.isfinite().all()):
        raise NonFiniteLossError(
            f"The logits of {int((~logits.isfinite()).any(dim=1).sum())} of {len(examples)} examples are nan or infinite."
        )
    return logits.cpu().numpy()


def write_submission(
    folder: str | Path, task: GlueTask, split: GlueSplit, indices: Sequence[str], logits: NDArray[np.floating]
) -> Path:
    """Write the predictions for a test set in the format of GLUE's server, such as `SST-2.tsv`; returns the file.

    Classes are written as they are spelled in the official files, scores of STS-B with three decimals, within their range.
    `indices` number the rows of the logits, `(examples, outputs)`.
    """
    predictions = predictions_from_logits(task, logits)
    spelled = [f"{value:.3f}" if task.is_regression else task.labels[value] for value in predictions]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in zip(indices, spelled, strict=True))]
    path = Path(folder) / f"{split.title}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path
