"""What a run on Long Range Arena is about to do, in sentences, before any data are read."""

import functools
from typing import Any

import torch

from ..run.memory import autocast_on_cpu, estimate_training_memory
from ..run.model_changes import model_changes
from ..run.spectral_arguments import SpectralArguments
from .lra_arguments import PRESETS, LraArguments
from .lra_data import PARTS
from .nystromformer import LraNystromformerForSequenceClassification

# Of the published settings these say how the batch is cut and what is reported, and decide nothing.
CUTTING = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "mixed_precision",
)


def describe_plan(
    arguments: LraArguments, spectral: SpectralArguments, *, processes: int, mixed_precision: str
) -> list[str]:
    """Say what the run will do: a sentence or two for each of model, data, steps, schedule and memory.

    Under the preset `lra` the deviations from the published settings follow, one line each.

    Args:
        arguments, spectral: Of the run.
        processes: How many share the work.
        mixed_precision: As accelerate resolved it.
    """
    with torch.random.fork_rng(devices=[]):
        model = LraNystromformerForSequenceClassification(arguments.new_model_config())
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    changes = model_changes(arguments, spectral)
    origin = f"from {arguments.model_name_or_path}" if arguments.model_name_or_path else "new"
    landmarks = f", {arguments.num_landmarks} landmarks" if arguments.attention_type == "nystrom" else ""
    counts = arguments.data_settings().counts
    samples = ", ".join(f"{'all' if counts[part] is None else f'{counts[part]:,}'} {part}" for part in PARTS)
    lines = [
        f"Task: {arguments.task}, preset {arguments.preset}. Model: {origin}, {model.num_parameters():,} parameters, "
        f"{arguments.attention_type} attention{landmarks}; {'; '.join(changes) or 'not conditioned'}.",
        f"Data: {arguments.data_dir or f'made from seed {arguments.data_seed}'}; {samples} examples, at most "
        f"{arguments.max_length} tokens padded to {arguments.padded_length}; protocol {arguments.protocol}.",
        f"Steps: {arguments.steps:,} of {batch:,} examples, validated every {arguments.eval_steps} steps; the best "
        "validation accuracy picks the weights, which the whole test part measures.",
        f"Learning rate: from {arguments.learning_rate / 25:g} up to {arguments.learning_rate:g} in "
        f"{arguments.warmup_steps:,} steps, then along a line to {arguments.learning_rate / 25e4:g}; beta1 "
        f"{'from 0.95 to 0.85 and back' if arguments.cycle_beta1 else '0.9'}.",
        _memory_line(arguments, model, mixed_precision),
    ]
    if arguments.preset == "lra":
        changed = deviations(arguments, batch, mixed_precision) + changes
        lines.append(f"Deviations from the published settings: {'none.' if not changed else ''}".rstrip())
        lines += [f"  - {line}" for line in changed]
    return lines


def deviations(arguments: LraArguments, batch: int, mixed_precision: str) -> list[str]:
    """One line for each setting in which a run is not the published one."""
    published = PRESETS["lra"][arguments.task]
    size = published["per_device_train_batch_size"]
    lines = [
        f"{name}: {getattr(arguments, name)} (published: {value})"
        for name, value in published.items()
        if name not in CUTTING and getattr(arguments, name) != value
    ]
    quirks = ("padding_in_landmarks", "batch_wide_inverse", "mean_over_padding", "zero_is_padding")
    lines += [f"{name}: False (published: True)" for name in quirks if not getattr(arguments, name)]
    lines += [f"global batch: {batch} (published: {size})"] * (batch != size)
    lines += [f"mixed precision {mixed_precision} (published: fp16)"] * (mixed_precision != "fp16")
    counts = {name: getattr(arguments, name) for name in ("train_samples", "validation_samples", "test_samples")}
    return lines + [f"{name}: {value:,}" for name, value in counts.items() if value is not None]


def _memory_line(
    arguments: LraArguments, model: LraNystromformerForSequenceClassification, mixed_precision: str
) -> str:
    shape = (2, arguments.padded_length) if arguments.task == "retrieval" else (arguments.padded_length,)

    def run_batch(examples: int) -> Any:
        ids = torch.ones(examples, *shape, dtype=torch.int64)
        return model(input_ids=ids, labels=torch.zeros(examples, dtype=torch.int64)).loss

    autocast = functools.partial(autocast_on_cpu, mixed_precision)
    estimate = estimate_training_memory(model, run_batch, arguments.per_device_train_batch_size, autocast=autocast)
    return estimate.describe(mixed_precision, "an example")
