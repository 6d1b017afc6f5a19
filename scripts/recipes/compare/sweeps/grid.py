"""A user's own grid: the product of the values given, without the combinations that mean nothing."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_specattn.config import GRANULARITIES, METHODS, PROJECTIONS, TARGETS, check_choice
from hf_specattn.initialization import INITIALIZATIONS

from .design import Flags, Setting, Sweep, SweepError, Variant

STOCK = "stock"
LAYER_NORMS = ("with", "without")


@dataclass(frozen=True)
class GridValues:
    """What varies; each is a list of the values to take.

    Attributes:
        models: Flags of the training script that choose a model, as one text each; "" is the script's own model.
        methods: "stock", "identity", "svd".
        lambdas: Of identity: numbers, or one per projection as `query=1,value=0.5`.
        targets: Of both corrections: names joined by commas.
        granularities: "projection", "head".
        refresh_every: Of svd: steps; 0 is static.
        layer_norm: "with", "without".
        projection_inits: Names of `--projection_init`.
        initialization_scales: Numbers.
    """

    models: tuple[str, ...] = ("",)
    methods: tuple[str, ...] = (STOCK, "identity")
    lambdas: tuple[str, ...] = ("10",)
    targets: tuple[str, ...] = (",".join(PROJECTIONS),)
    granularities: tuple[str, ...] = ("projection",)
    refresh_every: tuple[int, ...] = (0,)
    layer_norm: tuple[str, ...] = ("with",)
    projection_inits: tuple[str, ...] = ("default",)
    initialization_scales: tuple[float, ...] = (1.0,)


def grid_sweep(values: GridValues, script: Path, seeds: Sequence[int], common: Sequence[str]) -> Sweep:
    """Return the sweep over a grid.

    Args:
        values: To take the product of.
        script: The training script.
        seeds: Of every arm.
        common: Further flags of every run.

    Raises:
        SweepError: for an unknown value, and for an empty or repeating list.
    """
    _check(values)
    settings = [Setting(model or "default model", _words(model)) for model in values.models]
    variants = []
    starts = itertools.product(values.layer_norm, values.projection_inits, values.initialization_scales)
    for norm, init, scale in starts:
        label, flags = _start(norm, init, scale)
        for name, correction, strength in _corrections(values):
            variants.append(Variant(", ".join(filter(None, (name, label))), (*correction, *flags), strength, label))
    title = f"A grid over {script.name}"
    return Sweep("grid", title, script, tuple(settings), tuple(variants), tuple(seeds), common=tuple(common))


def _check(values: GridValues) -> None:
    allowed = {
        "methods": (STOCK, *METHODS),
        "granularities": GRANULARITIES,
        "layer_norm": LAYER_NORMS,
        "projection_inits": INITIALIZATIONS,
    }
    for name, given in vars(values).items():
        if not given:
            raise SweepError(f"--{name} has no value; give at least one, or leave it out.")
        if len(set(given)) < len(given):
            raise SweepError(f"--{name} {' '.join(map(str, given))}: a value stands twice; leave one out.")
        for value in given if name in allowed else ():
            try:
                check_choice(name, value, allowed[name])
            except ValueError as error:
                raise SweepError(str(error)) from error
    for targets in values.targets:
        if not set(targets.split(",")) <= set(TARGETS):
            raise SweepError(f"--targets {targets}: names of {', '.join(TARGETS)}, joined by commas.")


def _words(model: str) -> Flags:
    try:
        return tuple(shlex.split(model))
    except ValueError as error:
        raise SweepError(f"--models {model!r}: {error}; write the flags as in a shell.") from error


def _strength(lambda_: str | None) -> float | None:
    """A lambda for the picture; None for what is not one number, which the script's parser judges."""
    try:
        return None if lambda_ is None else float(lambda_)
    except ValueError:
        return None


def _start(norm: str, init: str, scale: float) -> tuple[str, Flags]:
    """What is done to the stock model first: in words, and as flags."""
    words, flags = [], []
    if norm == "without":
        words.append("no layer norm")
        flags += ["--no_layer_norm", "True"]
    if init != "default":
        words.append(init)
        flags += ["--projection_init", init]
    if scale != 1:
        words.append(f"scale {scale:g}")
        flags += ["--initialization_scale", f"{scale:g}"]
    return ", ".join(words), tuple(flags)


def _corrections(values: GridValues) -> Iterator[tuple[str, Flags, float | None]]:
    """Every correction in words, as flags, and its strength where that is one number."""
    for method in values.methods:
        if method == STOCK:
            yield STOCK, (), None
            continue
        strengths = values.lambdas if method == "identity" else (None,)
        refreshes = values.refresh_every if method == "svd" else (0,)
        for strength, refresh, targets, granularity in itertools.product(
            strengths, refreshes, values.targets, values.granularities
        ):
            words, flags = [method], ["--spectral_conditioning", "True", "--spectral_method", method]
            if strength is not None:
                words.append(f"lambda {strength}")
                flags += ["--lambda_", strength]
            if refresh:
                words.append(f"every {refresh} step{'s' * (refresh > 1)}")
                flags += ["--spectral_refresh_every", str(refresh)]
            if targets != ",".join(PROJECTIONS):
                words.append(f"on {targets.replace(',', '+')}")
                flags += ["--spectral_targets", *targets.split(",")]
            if granularity != "projection":
                words.append("per head")
                flags += ["--spectral_granularity", granularity]
            yield ", ".join(words), tuple(flags), _strength(strength)
