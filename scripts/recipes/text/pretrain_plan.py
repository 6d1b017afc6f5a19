"""What a pretraining run is about to do, in sentences, before any data is read."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from hf_specattn.config import SpectralConfig
from hf_specattn.crammed_bert import CrammedBertForMaskedLM
from hf_specattn.layers import spectral_layers
from hf_specattn.projections import find_projections

from ..run.memory import MemoryEstimate, autocast_on_cpu, estimate_training_memory
from ..run.model_changes import model_changes
from ..run.spectral_arguments import SpectralArguments
from .crammed_recipe import PRESETS, deviations
from .pretrain_arguments import PretrainArguments
from .pretrain_task import accepts_masked_positions


def describe_plan(
    arguments: PretrainArguments,
    spectral: SpectralArguments,
    *,
    processes: int,
    mixed_precision: str,
) -> list[str]:
    """Say what the run will do: one sentence or two for each of model, steps, schedule, data and memory.

    For the presets of the published recipe the deviations from it follow, one line each. `processes` share the work, and the
    precision is as accelerate resolved it.
    """
    model = stock_model(arguments)
    micro_batch = arguments.per_device_train_batch_size * processes
    lines = [
        _model_line(arguments, spectral, model),
        _steps_line(arguments, micro_batch),
        _schedule_line(arguments),
        _data_line(arguments),
        _memory_line(arguments, spectral, model, mixed_precision),
    ]
    if PRESETS.get(arguments.preset or "demo"):
        changed = deviations(vars(arguments), micro_batch * arguments.gradient_accumulation_steps)
        changed += model_changes(arguments, spectral)
        lines.append(f"Deviations from the published recipe: {'none.' if not changed else ''}".rstrip())
        lines += [f"  - {line}" for line in changed]
    return lines


def stock_model(arguments: PretrainArguments) -> PreTrainedModel:
    """Build the run's model before anything is loaded: random weights, no conditioning, the largest vocabulary."""
    if arguments.model_name_or_path is None:
        model: PreTrainedModel = CrammedBertForMaskedLM(arguments.new_model_config(arguments.vocab_size))
    else:
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(arguments.model_name_or_path))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _model_line(arguments: PretrainArguments, spectral: SpectralArguments, model: PreTrainedModel) -> str:
    origin = f"from {arguments.model_name_or_path}" if arguments.model_name_or_path else "new"
    vocabulary = f"{'' if arguments.model_name_or_path else 'up to '}{model.config.vocab_size:,} tokens"
    unchanged = "unchanged, none added" if arguments.model_name_or_path else "none"
    changes = model_changes(arguments, spectral)
    if not spectral.spectral_conditioning:
        changes.append(f"spectral conditioning: {unchanged}")
    return (
        f"Model: {model.config.model_type}, {origin}, {model.num_parameters():,} parameters, vocabulary of {vocabulary}; "
        f"{'; '.join(changes)}."
    )


def _steps_line(arguments: PretrainArguments, micro_batch: int) -> str:
    full, length = micro_batch * arguments.gradient_accumulation_steps, arguments.max_seq_length
    step = f"{full * length:,} tokens a step ({full:,} sequences of {length})"
    if arguments.batch_size_ramp and arguments.gradient_accumulation_steps > 1:
        step = f"{micro_batch * length:,} tokens a step ({micro_batch:,} sequences) at first, growing to {step} " + (
            f"at {arguments.batch_size_ramp:.0%} of the run"
        )
    tokens = arguments.training_tokens(micro_batch * length)
    if tokens is None:
        return (
            f"Steps: {step}, for {arguments.max_train_hours:g} hours; tokens in all: what the machine reads in that time, "
            "estimated after the first steps."
        )
    return f"Steps: {arguments.budget.steps:,} of {step}; {tokens:,} tokens in all."


def _schedule_line(arguments: PretrainArguments) -> str:
    peak, warmup, budget = arguments.learning_rate, arguments.warmup, arguments.budget
    if arguments.schedule_kind == "triangle":
        shape = f"from {peak / 4:g} up to {peak:g} at 75 % of the run, then down to 0"
    else:
        shape = f"from 0 up to {peak:g} at {warmup / budget.size:.0%} of the run, then down to 0"
    follows = "the clock" if budget.steps is None else "the steps"
    return f"Learning rate: {shape}, following {follows}; weight decay {arguments.weight_decay:g}."


def _data_line(arguments: PretrainArguments) -> str:
    if arguments.dataset_name is not None:
        source = f"{arguments.dataset_name}{', streamed' if arguments.streaming else ''}"
    else:
        source = ", ".join(arguments.train_file or ["the embedded corpus"])
    if arguments.max_documents is not None:
        source += f", the first {arguments.max_documents:,} documents"
    cleaned = ["normalized"] * arguments.normalize_text
    if arguments.max_tokens_per_character is not None:
        cleaned.append(f"documents below {arguments.max_tokens_per_character:g} tokens per character")
    return f"Data: {source}; {', '.join([*cleaned, f'{arguments.sequence_order} order'])}."


def _memory_line(
    arguments: PretrainArguments,
    spectral: SpectralArguments,
    model: PreTrainedModel,
    mixed_precision: str,
) -> str:
    estimate = expected_memory(arguments, model, functools.partial(autocast_on_cpu, mixed_precision))
    return estimate.describe(mixed_precision, "a sequence", added_correction_bytes(model, spectral.to_config()))


def added_correction_bytes(model: PreTrainedModel, config: SpectralConfig | None) -> int:
    """Return the bytes of the svd corrections that conditioning adds; those of a conditioned model are there already."""
    if config is None or config.method != "svd" or next(spectral_layers(model), None) is not None:
        return 0
    return sum(
        projection.module.weight.nbytes
        for projection in find_projections(model)
        if set(config.targets) & set(projection.layout.projections)
    )


def expected_memory(
    arguments: PretrainArguments, model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[Any]]
) -> MemoryEstimate:
    """Estimate what one process needs for a micro-batch, from forward passes of one and two sequences."""
    length = arguments.max_seq_length
    predictions = round(arguments.mlm_probability * length)
    sparse = accepts_masked_positions(model)

    def run_batch(sequences: int) -> Any:
        tokens = torch.zeros(sequences, length, dtype=torch.int64)
        inputs = {"input_ids": tokens, "labels": tokens.clone()}  # two tensors, as in training
        if sparse:
            inputs["masked_positions"] = torch.arange(predictions).repeat(sequences, 1)
        return model(**inputs).loss

    return estimate_training_memory(model, run_batch, arguments.per_device_train_batch_size, autocast=autocast)
