"""The sweeps on text: masked language models, with the controls of both sources, and without attention's residual connection.

They train a small Crammed BERT on the documentation that Python carries; other text by flags behind `--`, such as
`-- --train_file books.txt.gz`. Scales and strengths are tuned on other seeds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_specattn.crammed_bert import CrammedBertForMaskedLM

from ...text.pretrain_arguments import PretrainArguments
from .cost import PASSES
from .design import Flags, Setting, Sweep, SweepError, Tuning, Variant
from .regime_sweeps import NO_RESIDUAL, VALUE_OUTPUT, orthogonal, scaled
from .sweep_presets import (
    CONDITIONED_START,
    LAMBDA,
    MIMETIC,
    NORM_OF_TUNED,
    ROW,
    ROW_AT_STOCK_NORM,
    SCALE,
    SEEDS,
    STOCK,
    TUNED_STOCK,
    TUNING_SEEDS,
    identity,
    svd,
)

TEXT_SCRIPT = "pretrain_mlm.py"
# Long enough to leave the plateau of word frequencies, on which attention does nothing: near letters and with loud positions
# that takes a model of this size some 800 steps.
SMALL_TEXT: Flags = (
    *("--normalize_text", "True", "--vocab_size", "96", "--max_seq_length", "32"),
    *("--hidden_size", "64", "--num_hidden_layers", "4", "--num_attention_heads", "4", "--intermediate_size", "128"),
    *(
        "--position_scale",
        "1",
        "--per_device_train_batch_size",
        "64",
        "--max_steps",
        "1500",
        "--learning_rate",
        "2e-3",
    ),
    *("--eval_steps", "100", "--logging_steps", "100", "--save_steps", "0"),
)
SETTING = Setting("Crammed BERT, letters")


def precondition_text(scale: str, scripts: Path) -> Sweep:
    """The second source beside the first on text, and both against controls."""
    row = Variant("row preconditioner", ROW, control=ROW_AT_STOCK_NORM.label)
    controls = (STOCK, ROW_AT_STOCK_NORM, CONDITIONED_START, TUNED_STOCK, NORM_OF_TUNED, MIMETIC)
    treated = replace(identity("{lambda}"), control=NORM_OF_TUNED.label)
    variants = (*controls, row, svd(*ROW, label=" + row preconditioner"), svd(), treated)
    tunings = (replace(SCALE, values=(1.0, 2.0, 4.0, 8.0)), replace(LAMBDA, values=(0.3, 1.0, 3.0)))
    title = "Text: preconditioned attention, and its controls"
    sweep = _sweep("precondition_text", title, scale, scripts, variants, tunings)
    return replace(sweep, second_references=tuple(control.label for control in controls))


def residual_free_text(scale: str, scripts: Path) -> Sweep:
    """With and without attention's residual connection: value and output conditioned, beside a tuned scale of Q, K, V."""
    tuned = (*NO_RESIDUAL, *scaled("{qk}", "{vo}"))
    at_norm = ("--spectral_targets", *VALUE_OUTPUT, "--match_norm_of", "stock")
    conditioned = svd(*at_norm, label=" on V and O, no residual")
    variants = (
        STOCK,
        TUNED_STOCK,
        svd(),
        Variant("orthogonal V and O", orthogonal(*VALUE_OUTPUT)),
        Variant("stock, no residual", NO_RESIDUAL),
        Variant("stock, tuned, no residual", tuned),
        Variant(
            "orthogonal V and O, no residual",
            (*tuned, *orthogonal(*VALUE_OUTPUT)),
            control="stock, tuned, no residual",
        ),
        replace(conditioned, flags=(*tuned, *conditioned.flags), control="stock, tuned, no residual"),
    )
    tunings = (
        replace(SCALE, values=(1.0, 2.0, 4.0, 8.0)),
        Tuning("vo", (4.0, 8.0, 16.0), (*NO_RESIDUAL, *scaled("4", "{value}"))),
        Tuning("qk", (1.0, 4.0, 8.0), (*NO_RESIDUAL, *scaled("{value}", "{vo}"))),
    )
    title = "Text: attention with and without its residual connection"
    sweep = _sweep("residual_free_text", title, scale, scripts, variants, tunings)
    return replace(sweep, seeds=SEEDS[:3], second_references=(TUNED_STOCK.label,))


def _sweep(
    name: str, title: str, scale: str, scripts: Path, variants: tuple[Variant, ...], tunings: tuple[Tuning, ...]
) -> Sweep:
    if scale == "paper":
        raise SweepError(
            f"--scale paper: {name} is of no paper's table; leave it out, and give other text behind `--`."
        )
    sweep = Sweep(name, title, scripts / TEXT_SCRIPT, (SETTING,), variants, SEEDS, "settings", SMALL_TEXT, tunings)
    return replace(sweep, tuning_seeds=TUNING_SEEDS[:1])


TEXT_SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {
    "precondition_text": precondition_text,
    "residual_free_text": residual_free_text,
}


def text_operations(arguments: PretrainArguments) -> float:
    """Floating-point operations of a run's training, as `training_operations` counts those of images.

    Every token counts as decoded; training decodes the masked ones alone.

    Raises:
        SweepError: for a run by the clock.
    """
    tokens = arguments.training_tokens(arguments.per_device_train_batch_size * arguments.max_seq_length)
    if tokens is None:
        raise SweepError("--max_train_hours: a run by the clock has no count of operations; give --max_steps.")
    operations = sequence_operations(CrammedBertForMaskedLM, arguments, arguments.max_seq_length)
    return operations * tokens / arguments.max_seq_length


def sequence_operations(model_class: Callable[[Any], Any], arguments: PretrainArguments, length: int) -> float:
    """Operations of training on one sequence, with the head of a class of models."""
    with torch.random.fork_rng(devices=[]):
        model = model_class(arguments.new_model_config(arguments.vocab_size)).eval()
    counter: Any = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=torch.ones(1, length, dtype=torch.int64))
    return float(PASSES * counter.get_total_flops())
