"""The sweeps on Long Range Arena: tables 3, 11 and 12 of the conditioning paper, and the controls of its claim there.

At scale "small" they train the small presets of `train_lra.py`, on a CPU; at scale "paper" the published settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...lra.lra_arguments import LraArguments
from ...lra.nystromformer import LraNystromformerForSequenceClassification
from .cost import PASSES
from .design import Setting, Sweep, SweepError, Variant
from .sweep_presets import (
    CONDITIONED_START,
    PAPER_LAMBDAS,
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

LRA_SCRIPT = "train_lra.py"
TASKS = {"ListOps": "listops", "Text": "text", "Retrieval": "retrieval", "Image": "image", "Pathfinder": "pathfinder"}
MADE = ("ListOps", "Pathfinder")
# Both papers draw the conditioning of these two over training.
DRAWN = ("ListOps", "Text")
MONITOR_EVERY = {"small": "100", "paper": "500"}
# The strength is the largest up to 10 that saturates no layer: 10 saturates this model from its own start.
IDENTITY = Variant("identity, auto lambda", ("--spectral_conditioning", "True"))

TABLE_3 = (
    "Table 3 of the paper: accuracy on Long Range Arena, five seeds",
    (
        ("model", *TASKS),
        ("original", "37.1 ± 0.21", "63.8 ± 0.24", "79.8 ± 0.26", "39.9 ± 0.20", "72.9 ± 0.25"),
        ("conditioned", "37.8 ± 0.23", "64.8 ± 0.20", "80.6 ± 0.27", "40.2 ± 0.22", "73.7 ± 0.23"),
    ),
)
TABLE_11 = (
    "Table 11 of the paper: Text, accuracy by lambda",
    (
        ("lambda", *(f"{value:g}" for value in PAPER_LAMBDAS)),
        ("Text", "63.7", "64.1", "64.3", "64.6", "64.8", "64.8", "64.7", "64.7"),
    ),
)
TABLE_12 = (
    "Table 12 of the paper: Text",
    (
        ("model", "accuracy"),
        ("original, with layer norm", "63.8 ± 0.24"),
        ("conditioned, with layer norm", "64.8 ± 0.20"),
        ("conditioned, no layer norm", "62.3 ± 0.23"),
    ),
)


def table3(scale: str, scripts: Path) -> Sweep:
    """The five tasks, stock and conditioned."""
    variants = (STOCK, IDENTITY) if scale == "small" else (STOCK, identity(10.0))
    return _sweep("table3", "Long Range Arena, stock and conditioned", scale, scripts, tuple(TASKS), variants, TABLE_3)


def table11(scale: str, scripts: Path) -> Sweep:
    """The strength of the identity correction, on Text."""
    strengths = (0.5, 1.0, 2.0, 4.0, 10.0, 16.0) if scale == "small" else PAPER_LAMBDAS
    variants = (STOCK, *map(identity, strengths))
    sweep = _sweep("table11", "Text, accuracy by lambda", scale, scripts, ("Text",), variants, TABLE_11)
    return replace(sweep, layout="variants")


def table12(scale: str, scripts: Path) -> Sweep:
    """With and without layer norm, on Text; the paper leaves out the stock model without."""
    norms = ("--no_layer_norm", "True")
    treated = Variant(f"{IDENTITY.label}, no layer norm", (*IDENTITY.flags, *norms))
    small = (STOCK, IDENTITY, Variant("stock, no layer norm", norms), treated)
    paper = (STOCK, identity(10.0), small[2], identity(10.0, *norms, label=", no layer norm"))
    variants = small if scale == "small" else paper
    return _sweep("table12", "Text, with and without layer norm", scale, scripts, ("Text",), variants, TABLE_12)


def lra_controls(scale: str, scripts: Path) -> Sweep:
    """ListOps and Text: the correction beside a stock model of tuned scale, the second source, and a conditioned start.

    The preconditioner has a control of stock norm: it sets the scale of the outputs, too.
    """
    row = Variant("row preconditioner", ROW, control=ROW_AT_STOCK_NORM.label)
    variants = (STOCK, TUNED_STOCK, IDENTITY, svd(), row, ROW_AT_STOCK_NORM, CONDITIONED_START)
    title = "ListOps and Text, with controls"
    sweep = _sweep("lra_controls", title, scale, scripts, ("ListOps", "Text"), variants, TABLE_3)
    tuning = replace(SCALE, values=SCALE.values[:4])
    seeds = TUNING_SEEDS[:1] if scale == "small" else TUNING_SEEDS
    # As published, Text is validated on its test part, which must choose nothing.
    clean = ("--protocol", "clean")
    references = (TUNED_STOCK.label,)
    return replace(sweep, tunings=(tuning,), tuning_seeds=seeds, tuning_flags=clean, second_references=references)


def _sweep(
    name: str,
    title: str,
    scale: str,
    scripts: Path,
    tasks: Sequence[str],
    variants: Sequence[Variant],
    published: tuple[str, tuple[tuple[str, ...], ...]],
) -> Sweep:
    preset = ("--preset", "small" if scale == "small" else "lra")
    monitor = ("--spectral_monitor_every", MONITOR_EVERY[scale])
    settings = tuple(
        Setting(task, ("--task", TASKS[task], *preset, *(monitor if task in DRAWN else ()))) for task in tasks
    )
    seeds = SEEDS[:2] if scale == "small" else SEEDS
    script = scripts / LRA_SCRIPT
    return Sweep(name, title, script, settings, tuple(variants), seeds, published=published, draws_monitor=True)


LRA_SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {
    "table3": table3,
    "table11": table11,
    "table12": table12,
    "lra_controls": lra_controls,
}


def with_data(sweep: Sweep, folders: Sequence[str]) -> Sweep:
    """Tell the runs of each task where its data lie.

    Args:
        folders: `--lra_data`, each `task=folder`.

    Raises:
        SweepError: for another form, and where a task's data are missing.
    """
    found = {item.partition("=")[0]: item.partition("=")[2] for item in folders}
    if bad := sorted(task for task, folder in found.items() if task not in TASKS.values() or not folder):
        raise SweepError(f"--lra_data {' '.join(bad)}: give each as task=folder, of {', '.join(TASKS.values())}.")
    settings = []
    for setting in sweep.settings:
        folder = found.get(TASKS[setting.label])
        if folder is None and setting.label not in MADE:
            raise SweepError(
                f"{sweep.name} needs the data of {setting.label}: give --lra_data {TASKS[setting.label]}=<folder>, in a form "
                "of docs/lra.md."
            )
        settings.append(setting if folder is None else replace(setting, flags=(*setting.flags, "--data_dir", folder)))
    return replace(sweep, settings=tuple(settings))


def lra_operations(arguments: LraArguments) -> float:
    """Floating-point operations of a run's training, as `training_operations` counts those of images."""
    model = LraNystromformerForSequenceClassification(arguments.new_model_config()).eval()
    shape = (1, 2, arguments.padded_length) if arguments.task == "retrieval" else (1, arguments.padded_length)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=torch.ones(shape, dtype=torch.int64))
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return float(PASSES * counter.get_total_flops() * arguments.steps * batch)
