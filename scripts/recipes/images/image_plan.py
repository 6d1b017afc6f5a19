"""What a training run is about to do, in sentences, before any image is read."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..run.memory import autocast_on_cpu, estimate_training_memory
from ..run.model_changes import model_changes
from ..run.spectral_arguments import SpectralArguments
from .image_arguments import ImageArguments
from .image_datasets import find_images
from .image_models import DEFAULT_IMAGE_SIZE, build_stock_model, model_input, tokens_per_image
from .imagenet_recipes import RECIPES, deviations

# Training images and classes of datasets that nobody downloads for a plan.
KNOWN_SIZES = {"ILSVRC/imagenet-1k": (1_281_167, 1000)}

MANY_TOKENS = 1000


def describe_plan(
    arguments: ImageArguments, spectral: SpectralArguments, *, processes: int, mixed_precision: str
) -> list[str]:
    """Say what the run will do: a sentence or two for each of model, data, steps, schedule and memory.

    For the presets of published recipes the deviations from them follow, one line each. `processes` share the work, and the
    precision is as accelerate resolved it.

    Raises:
        ImageDataError, ModelError: where a run would raise them.
    """
    images, classes, size, channels = planned_amounts(arguments)
    names = [str(number) for number in range(classes)]
    with torch.random.fork_rng(devices=[]):
        model = build_stock_model(arguments, names, size, channels)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    changes = model_changes(arguments, spectral)
    tokens = tokens_per_image(model.config, size)
    cut = "" if tokens is None else f", {tokens:,} tokens each"
    lines = [
        f"Model: {arguments.named} ({model.config.model_type}), {model.num_parameters():,} parameters, {classes} classes, "
        f"images of {size} x {size} with {channels} channel(s){cut}; {'; '.join(changes) or 'not conditioned'}.",
        _data_line(arguments),
        _steps_line(arguments, images, batch),
        f"Learning rate: from {arguments.warmup_learning_rate:g} up to {arguments.learning_rate:g} in "
        f"{arguments.warmup_epochs:g} passes, then along a cosine to {arguments.min_learning_rate:g}; weight decay "
        f"{arguments.weight_decay:g}, gradient clipped at {arguments.max_grad_norm or 'no norm'}.",
        _memory_line(model, arguments.per_device_train_batch_size, channels, size, classes, mixed_precision),
    ]
    if tokens is not None and tokens > MANY_TOKENS:
        lines.append(
            f"CAUTION: {tokens:,} tokens are many: time and memory of attention grow with their square. Larger patches "
            "(--patch_size) or smaller images (--image_size) make fewer."
        )
    if arguments.preset in RECIPES:
        changed = deviations(arguments.preset, vars(arguments), batch, changes)
        lines.append(f"Deviations from the published recipe: {'none.' if not changed else ''}".rstrip())
        lines += [f"  - {line}" for line in changed]
    return lines


def planned_amounts(arguments: ImageArguments) -> tuple[int, int, int, int]:
    """Return a run's training images, classes, image size in pixels, and channels."""
    own_size, own_channels = model_input(arguments)
    if arguments.dataset_name in KNOWN_SIZES:
        images, classes = KNOWN_SIZES[arguments.dataset_name]
        data_size, data_channels = None, 3
        if arguments.max_train_samples is not None:
            images = min(images, arguments.max_train_samples)
    else:
        data = find_images(arguments)
        images, classes, data_channels = len(data.train), len(data.class_names), data.channels
        data_size = data.size
    size = arguments.image_size or own_size or (max(data_size) if data_size else DEFAULT_IMAGE_SIZE)
    channels = own_channels if arguments.timm_model is None and own_channels else data_channels
    return images, classes, size, channels


def _data_line(arguments: ImageArguments) -> str:
    source = arguments.dataset_name or arguments.idx_dir or arguments.train_dir or "the digits of scikit-learn"
    parts = []
    if arguments.random_resized_crop is not None:
        parts.append(f"random crops of at least {arguments.random_resized_crop:.0%} of the area")
    if arguments.random_shift:
        parts.append(f"shifts by up to {arguments.random_shift} pixel(s)")
    if arguments.horizontal_flip:
        parts.append(f"mirrored with probability {arguments.horizontal_flip:g}")
    if arguments.rand_augment:
        parts.append(f"RandAugment {arguments.rand_augment}")
    if arguments.random_erasing:
        parts.append(f"erasing with probability {arguments.random_erasing:g}")
    if arguments.repeated_augmentation > 1:
        parts.append(f"each image {arguments.repeated_augmentation} times in a pass")
    mixed = {"mixup": arguments.mixup, "CutMix": arguments.cutmix, "label smoothing": arguments.label_smoothing}
    parts += [f"{name} {value:g}" for name, value in mixed.items() if value > 0]
    return f"Images: {source}; {', '.join(parts) or 'not augmented'}."


def _steps_line(arguments: ImageArguments, images: int, batch: int) -> str:
    steps = arguments.steps_of(images, batch)
    return f"Steps: {steps:,} of {batch:,} images, {steps * batch / images:.4g} passes over {images:,} images."


def _memory_line(
    model: PreTrainedModel, batch_size: int, channels: int, size: int, classes: int, mixed_precision: str
) -> str:
    def run_batch(images: int) -> Any:
        # Two images are the least that a batch norm takes.
        logits = model(pixel_values=torch.zeros(2 * images, channels, size, size)).logits
        return F.cross_entropy(logits.float(), torch.full((2 * images, classes), 1 / classes))

    autocast = functools.partial(autocast_on_cpu, mixed_precision)
    estimate = estimate_training_memory(model, run_batch, max(1, batch_size // 2), autocast=autocast)
    return estimate.describe(mixed_precision, "a pair of images")
