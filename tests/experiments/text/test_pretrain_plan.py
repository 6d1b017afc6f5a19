"""What the plan says before any data is read, against models that are really built, and sums that are really made."""

import dataclasses
from contextlib import nullcontext
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, each_architecture
from transformers import AutoModelForMaskedLM

from hf_specattn import SpectralConfig, condition
from hf_specattn.crammed_bert import CrammedBertConfig, CrammedBertForMaskedLM
from recipes.run.memory import MemoryEstimate, estimate_training_memory
from recipes.text import pretrain_plan as plan
from recipes.text.pretrain_arguments import PretrainArguments, parse_arguments
from recipes.text.pretrain_plan import (
    added_correction_bytes,
    describe_plan,
    expected_memory,
    stock_model,
)
from recipes.text.pretrain_task import MaskingRule

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 70,
}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
SVD = ["--spectral_conditioning", "--spectral_method", "svd"]
IDENTITY = ["--spectral_conditioning", "--lambda_", "1.0"]


def parse(*flags):
    return parse_arguments(["--output_dir", "no_such_folder", "--show_plan", *flags], "description")


def tiny_arguments(**changes):
    return PretrainArguments(**SIZES | {"max_seq_length": 12, "per_device_train_batch_size": 5} | changes)


@pytest.fixture
def lines_of():
    """A function: flags -> the lines of the plan, for some processes."""

    def run(*flags, processes=1, mixed_precision="no"):
        arguments, spectral = parse(*flags)
        return describe_plan(arguments, spectral, processes=processes, mixed_precision=mixed_precision)

    return run


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokens_by_hand(steps, full, ramp, micro_batch_tokens):
    """The batch grows by one micro-batch each time another of the equal parts of the ramp is over; in exact fractions."""
    ramp, total = Fraction(ramp), 0
    for step in range(steps):
        share = Fraction(step, steps)
        micro_steps = full if share >= ramp else min(full, 1 + floor(share / ramp * full))
        total += micro_steps * micro_batch_tokens
    return total


@pytest.mark.parametrize("steps", [1, 2, 64, 128])
@pytest.mark.parametrize("full", [1, 3, 16])
@pytest.mark.parametrize("ramp", [0.0, 0.25, 0.625, 1.0])
def test_tokens_in_all_are_the_sum_over_the_steps(steps, full, ramp):
    arguments = tiny_arguments(max_steps=steps, gradient_accumulation_steps=full, batch_size_ramp=ramp)
    assert arguments.training_tokens(60) == tokens_by_hand(steps, full, ramp, 60)


def test_a_ramp_reads_fewer_tokens_than_none_and_more_than_one_micro_batch_a_step():
    whole = tiny_arguments(max_steps=100, gradient_accumulation_steps=16)
    ramped = dataclasses.replace(whole, batch_size_ramp=0.6)
    assert whole.training_tokens(10) == 100 * 16 * 10
    # Over the ramp the batch is, on average, half of the whole one and half a micro-batch.
    assert ramped.training_tokens(10) == pytest.approx((60 * (16 + 1) / 2 + 40 * 16) * 10, rel=0.01)


def test_the_clock_decides_how_many_tokens_fit_in_hours():
    assert tiny_arguments(max_train_hours=1.0).training_tokens(60) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def trained_batch(model, vocabulary, length, sparse):
    """The forward pass as the script makes it: random tokens, masked by the rule."""
    rule = MaskingRule(4, vocabulary, 0.25)

    def run(sequences):
        tokens = np.random.default_rng(0).integers(5, vocabulary, (sequences, length))
        batch = rule.apply(tokens, np.arange(sequences), seed=0, epoch=0)
        return model(**batch.model_inputs(torch.device("cpu"), sparse)).loss

    return run


@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no", "bf16"])
@pytest.mark.parametrize("length", [12, 30])
def test_memory_is_that_of_the_forward_pass_of_training(autocast, length):
    arguments = tiny_arguments(max_seq_length=length)
    model = stock_model(arguments)
    own = CrammedBertForMaskedLM(arguments.new_model_config(SIZES["vocab_size"]))
    run = trained_batch(own, SIZES["vocab_size"], length, sparse=True)
    assert expected_memory(arguments, model, autocast) == estimate_training_memory(own, run, 5, autocast=autocast)


def test_memory_of_a_model_that_decodes_every_position(stock_checkpoint):
    path = str(stock_checkpoint(ARCHITECTURES["bert"], "AutoModelForMaskedLM"))
    arguments = PretrainArguments(model_name_or_path=path, max_seq_length=16, per_device_train_batch_size=3)
    own = AutoModelForMaskedLM.from_pretrained(path)
    run = trained_batch(own, own.config.vocab_size, 16, sparse=False)
    assert expected_memory(arguments, stock_model(arguments), nullcontext) == estimate_training_memory(own, run, 3)


def test_gradient_checkpointing_shows_in_the_memory():
    arguments = tiny_arguments()
    whole, less = (
        expected_memory(arguments, stock_model(dataclasses.replace(arguments, gradient_checkpointing=on)), nullcontext)
        for on in (False, True)
    )
    assert less.activations_per_sequence < whole.activations_per_sequence / 2
    assert (less.parameters, less.optimizer) == (whole.parameters, whole.optimizer)


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@each_architecture
@pytest.mark.parametrize("targets", [("query", "key", "value"), ("query",), ("value", "key")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_svd_corrections_have_the_bytes_of_the_buffers_of_a_conditioned_model(tiny, targets, dtype):
    for granularity in ("projection", "head"):
        model = tiny.model(dtype=dtype)
        config = SpectralConfig(method="svd", targets=targets, granularity=granularity)
        announced, before = added_correction_bytes(model, config), bytes_of(model.buffers())
        condition(model, config)
        assert announced == bytes_of(model.buffers()) - before > 0
        # They are there now: a checkpoint of it brings them along.
        assert added_correction_bytes(model, config) == 0


def test_dynamic_corrections_are_stored_too():
    model = ARCHITECTURES["crammed_bert"].model()
    config = SpectralConfig(method="svd", refresh_every=5)
    announced, before = added_correction_bytes(model, config), bytes_of(model.buffers())
    condition(model, config)
    assert announced == bytes_of(model.buffers()) - before > 0


def test_identity_and_stock_store_nothing():
    model = ARCHITECTURES["crammed_bert"].model()
    before = bytes_of(model.buffers())
    assert added_correction_bytes(model, None) == added_correction_bytes(model, SpectralConfig(lambda_=1.0)) == 0
    condition(model, SpectralConfig(lambda_=1.0))
    assert bytes_of(model.buffers()) == before


# 1 GB of weights and of gradients, 2 GB of AdamW, no buffers; 0.5 GB + 4 * 0.25 GB of activations.
ESTIMATE = MemoryEstimate(
    parameters=10**9,
    gradients=10**9,
    optimizer=2 * 10**9,
    buffers=0,
    activations_per_sequence=25 * 10**7,
    activations_fixed=5 * 10**8,
    sequences=4,
)


def test_the_memory_line_is_the_estimate(lines_of, monkeypatch):
    asked = []

    def estimate(model, run_batch, batch, *, autocast):
        asked.append((batch, autocast))
        return ESTIMATE

    monkeypatch.setattr(plan, "estimate_training_memory", estimate)
    flags = [*TINY, "--per_device_train_batch_size", "4"]
    *_, line = lines_of(*flags, processes=3, mixed_precision="bf16")
    assert line == (
        "Memory of a process, expected at least (uncompiled, unsharded, mixed precision bf16): 5.50 GB: weights, gradients "
        "and AdamW 4.00 GB, activations 1.50 GB (250.00 MB a sequence); temporary tensors come on top."
    )
    ((batch, autocast),) = asked
    assert batch == 4  # of one process, whatever their number
    with autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(plan, "added_correction_bytes", lambda model, config: 7 * 10**8)
    *_, line = lines_of(*flags, *SVD)
    assert ": 6.20 GB: " in line
    assert "activations 1.50 GB (250.00 MB a sequence), stored corrections 0.70 GB; temporary" in line


# --- the other lines -------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model_that_is_trained(lines_of):
    line, *_ = lines_of(*TINY, "--max_seq_length", "12")
    config = CrammedBertConfig(**SIZES, max_position_embeddings=12)
    parameters = sum(parameter.numel() for parameter in CrammedBertForMaskedLM(config).parameters())
    assert line == (
        f"Model: crammed_bert, new, {parameters:,} parameters, vocabulary of up to 70 tokens; spectral conditioning: none."
    )


@pytest.mark.parametrize("name", ["bert", "crammed_bert"])
def test_a_checkpoint_is_named_with_its_own_parameters(lines_of, stock_checkpoint, name):
    path = str(stock_checkpoint(ARCHITECTURES[name], "AutoModelForMaskedLM"))
    line, *_ = lines_of("--model_name_or_path", path, "--max_seq_length", "16")
    model = AutoModelForMaskedLM.from_pretrained(path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert line == (
        f"Model: {name}, from {path}, {parameters:,} parameters, vocabulary of {model.config.vocab_size} tokens; "
        "spectral conditioning: unchanged, none added."
    )


def test_a_conditioned_checkpoint_is_planned_for_as_it_is(lines_of, tmp_path):
    model = ARCHITECTURES["crammed_bert"].model("AutoModelForMaskedLM", dtype=torch.float32)
    stock = sum(parameter.numel() for parameter in model.parameters())
    condition(model, SpectralConfig(method="svd"))
    model.save_pretrained(tmp_path / "svd")
    checkpoint = ["--model_name_or_path", str(tmp_path / "svd"), "--max_seq_length", "16"]
    for flags, words in (([], "unchanged, none added"), (SVD, f"{SpectralConfig(method='svd').describe()}, init")):
        first, *_, last = lines_of(*checkpoint, *flags)
        assert first.startswith(f"Model: specattn_crammed_bert, from {tmp_path / 'svd'}, {stock:,} parameters")
        assert f"spectral conditioning: {words}" in first
        assert "stored corrections" not in last  # they are among the model's buffers, and so in the sum


@pytest.mark.parametrize(
    ("flags", "config", "init"),
    [
        (SVD, SpectralConfig(method="svd"), "additive"),
        (IDENTITY, SpectralConfig(lambda_=1.0), "additive"),
        ([*IDENTITY, "--spectral_init", "preserve"], SpectralConfig(lambda_=1.0), "preserve"),
        ([*SVD, "--spectral_refresh_every", "7"], SpectralConfig(method="svd", refresh_every=7), "additive"),
    ],
)
def test_the_conditioning_in_words(lines_of, flags, config, init):
    words = f"{config.describe()}, init {init}"
    assert parse(*flags)[1].describe() == words
    assert lines_of(*TINY, *flags)[0].endswith(f"; spectral conditioning: {words}.")
    assert parse()[1].describe() is None


def test_steps_and_schedule_over_steps(lines_of):
    _, steps, schedule, data, *_ = lines_of(*TINY, "--max_steps", "50", processes=2)
    assert steps == "Steps: 50 of 8,192 tokens a step (64 sequences of 128); 409,600 tokens in all."
    assert schedule == (
        "Learning rate: from 0 up to 0.001 at 10% of the run, then down to 0, following the steps; weight decay 0.01."
    )
    assert data == "Data: the embedded corpus; shuffled order."


def test_steps_and_schedule_of_a_ramp_over_steps(lines_of):
    flags = ["--max_steps", "64", "--gradient_accumulation_steps", "4", "--batch_size_ramp", "0.5"]
    flags += ["--lr_scheduler_type", "triangle", "--learning_rate", "2e-3", "--max_seq_length", "32"]
    _, steps, schedule, *_ = lines_of(*TINY, *flags)
    total = tokens_by_hand(64, 4, 0.5, 32 * 32)
    assert steps == (
        "Steps: 64 of 1,024 tokens a step (32 sequences) at first, growing to 4,096 tokens a step (128 sequences of 32) at "
        f"50% of the run; {total:,} tokens in all."
    )
    assert schedule == (
        "Learning rate: from 0.0005 up to 0.002 at 75 % of the run, then down to 0, following the steps; weight decay 0.01."
    )


def test_without_accumulation_there_is_nothing_to_grow(lines_of):
    assert "growing" not in lines_of(*TINY, "--batch_size_ramp", "0.5")[1]


def test_steps_and_schedule_over_time(lines_of):
    flags = ["--max_train_hours", "2.5", "--gradient_accumulation_steps", "2"]
    _, steps, schedule, *_ = lines_of(*TINY, *flags)
    assert steps == (
        "Steps: 8,192 tokens a step (64 sequences of 128), for 2.5 hours; tokens in all: what the machine reads in that "
        "time, estimated after the first steps."
    )
    assert schedule.startswith(
        "Learning rate: from 0.00025 up to 0.001 at 75 % of the run, then down to 0, following the"
    )
    assert "following the clock; weight decay 0.01." in schedule
    _, _, linear, *_ = lines_of(*TINY, *flags, "--lr_scheduler_type", "linear")
    assert "from 0 up to 0.001 at 10% of the run, then down to 0, following the clock" in linear


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--train_file a.txt b.txt", "Data: a.txt, b.txt; shuffled order."),
        (
            "--train_file a.txt --max_documents 1200 --normalize_text --sequence_order published",
            "Data: a.txt, the first 1,200 documents; normalized, published order.",
        ),
        (
            "--dataset_name owner/name --streaming --max_tokens_per_character 0.25",
            "Data: owner/name, streamed; documents below 0.25 tokens per character, shuffled order.",
        ),
        ("--dataset_name owner/name", "Data: owner/name; shuffled order."),
    ],
)
def test_the_data_in_words(lines_of, flags, line):
    assert lines_of(*TINY, *flags.split())[3] == line


# --- presets ---------------------------------------------------------------------------------------------------------


def test_a_preset_of_the_recipe_lists_what_the_run_changes(lines_of):
    _, steps, schedule, data, _, *deviating = lines_of("--preset", "crammed-bert", *TINY, *SVD, processes=2)
    assert steps == (
        "Steps: 131,072 tokens a step (1,024 sequences) at first, growing to 2,097,152 tokens a step (16,384 sequences of "
        "128) at 60% of the run, for 24 hours; tokens in all: what the machine reads in that time, estimated after the "
        "first steps."
    )
    assert schedule == (
        "Learning rate: from 0.00025 up to 0.001 at 75 % of the run, then down to 0, following the clock; weight decay 0.01."
    )
    assert data == (
        "Data: EleutherAI/the_pile_deduplicated, streamed, the first 8,000,000 documents; normalized, documents below 0.25 "
        "tokens per character, published order."
    )
    assert [line.partition(": ")[0] for line in deviating] == [
        "Deviations from the published recipe:",
        "  - vocab_size",
        "  - hidden_size",
        "  - num_hidden_layers",
        "  - num_attention_heads",
        "  - intermediate_size",
        "  - mixed_precision",
        "  - global batch size",
        "  - spectral conditioning",
    ]


@pytest.mark.parametrize("flags", [[], ["--preset", "demo"]])
def test_the_demonstration_is_not_compared_with_the_recipe(lines_of, flags):
    lines = lines_of(*flags, *TINY)
    assert [line.partition(":")[0] for line in lines[:4]] == ["Model", "Steps", "Learning rate", "Data"]
    assert len(lines) == 5


@pytest.mark.slow
def test_the_published_preset_has_the_published_parameters(lines_of):
    first, *_, last = lines_of("--preset", "crammed-bert", "--mixed_precision", "fp16")
    assert first.startswith("Model: crammed_bert, new, 119,589,889 parameters, vocabulary of up to 32,768 tokens")
    assert last == "Deviations from the published recipe: none."


def test_nothing_is_read_or_written(lines_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines_of(*TINY, "--train_file", "gone.txt", "--output_dir", "run")
    assert list(tmp_path.iterdir()) == []
