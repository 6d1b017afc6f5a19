"""What a sweep would cost on a GPU, from the operations of its models."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...images.image_arguments import ImageArguments
from ...images.image_models import build_stock_model
from ...images.image_plan import planned_amounts

# A forward pass, and a backward pass of twice its operations.
PASSES = 3


def training_operations(arguments: ImageArguments) -> float:
    """Return the floating-point operations of a run's training: matrix products and convolutions, of a stock model.

    Corrections, the optimizer, validation and everything that is not a product are left out.

    Raises:
        ImageDataError, ModelError: where a run would raise them.
    """
    images, classes, size, channels = planned_amounts(arguments)
    with torch.random.fork_rng(devices=[]):
        model = build_stock_model(arguments, [str(number) for number in range(classes)], size, channels).eval()
    pixels = torch.zeros(1, channels, size, size)
    counter: Any = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention, but the products that it stands for.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(pixel_values=pixels)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return float(PASSES * counter.get_total_flops() * arguments.steps_of(images, batch) * batch)


def gpu_hours(operations: float, teraflops: float) -> float:
    """Return the hours that this many operations take at a sustained rate, in 10^12 operations per second."""
    return operations / (teraflops * 1e12) / 3600
