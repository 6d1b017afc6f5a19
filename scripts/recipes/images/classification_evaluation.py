"""Accuracy and loss of an image classifier, the same for any batch size and number of processes."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .image_batches import ValidationImages, load_batches


@dataclass(frozen=True)
class ImageEvaluation:
    """Attributes: top-1 `accuracy` in [0, 1] and `loss` (cross-entropy, nats per image) over `images` images."""

    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate_images(
    model: nn.Module,
    images: ValidationImages,
    *,
    batch_size: int = 64,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> ImageEvaluation:
    """Measure accuracy and loss, each image used exactly once; a last batch of another size changes nothing.

    The model's training mode is left as it was. The processes of `accelerator` share the work; None evaluates in this one, on
    the model's device.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    count = len(images.split)
    mine = [
        np.arange(start, min(start + batch_size, count))
        # A wrapped model may communicate in its forward pass, so a process without images joins in, uncounted.
        for start in range(
            rank * batch_size, -(-count // (batch_size * processes)) * batch_size * processes, batch_size * processes
        )
    ]
    keys = [indices if len(indices) else np.zeros(1, dtype=np.int64) for indices in mine]
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # correct, summed loss, images
    for indices, (pixels, labels) in zip(mine, load_batches(images, keys, workers)):
        labels = labels.to(device)
        logits = model(pixel_values=pixels.to(device)).logits.float()
        if len(indices):
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            totals += torch.stack([(logits.argmax(-1) == labels).sum().double(), loss, loss.new_tensor(len(labels))])
    model.train(training)
    if accelerator is not None:
        totals = accelerator.reduce(totals, reduction="sum")
    correct, summed_loss, seen = totals.tolist()
    return ImageEvaluation(correct / seen, summed_loss / seen, int(seen))
