"""The svd correction by products and by SVD on a GPU: `bench_polar.py` in parts, for `gpu.py`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench_polar import (
    MATRIX_COLUMNS,
    MATRIX_NOTES,
    MODEL_COLUMNS,
    MODEL_NOTES,
    PolarBenchArguments,
    matrix_row,
    measure_matrices,
    measure_model,
    model_rows,
    model_summary,
)
from gpu_parts import Options, Outcome, Part

# Batches of the two steps from which the time per token follows: sequences of 128 tokens, and images.
SEQUENCES = {"bert": [64, 256], "vit": [32, 128]}
# Rows and columns, and how many at once; an SVD of large matrices takes a GPU seconds.
SIZES = {768: 4, 64: 144, 256: 12, 1024: 2, 2048: 2}
KAPPAS = (None, 1e1, 1e4)
LARGEST_SPECTRUM = 768


def arguments(options: Options, **fields: Any) -> PolarBenchArguments:
    """In the terms of `bench_polar.py`."""
    tiny: dict[str, Any] = {"scale": "tiny", "sequence_length": 8} if options.tiny else {}
    return PolarBenchArguments(device=options.device, **tiny | fields)


def of_model(name: str, options: Options) -> Outcome:
    """A whole model's refresh, and from how many tokens on it costs little."""
    sequences, rounds = ([1, 2], 1) if options.tiny else (SEQUENCES[name], 2)
    settings = arguments(options, models=[name], sequences=sequences, precision="bf16", rounds=rounds)
    numbers = measure_model(name, settings)
    notes = [model_summary(numbers, asdict(settings)), *(note.removeprefix("- ") for note in MODEL_NOTES)]
    rows = [[name, *cells] for cells in model_rows(numbers)]
    return Outcome("A refresh of a whole model", ("model", *MODEL_COLUMNS), rows, numbers, notes=notes)


def of_matrices(size: int, kappa: float | None, options: Options) -> Outcome:
    """Matrices of one size and spectrum: errors and time."""
    settings = arguments(options, batch=2 if options.tiny else SIZES[size], repeats=1 if options.tiny else 3)
    numbers = measure_matrices(size, kappa, "fp32", settings)
    notes = [note.removeprefix("- ") for note in MATRIX_NOTES]
    failures: Sequence[str] = ()
    if numbers.get("kappa_after", 0.0) > 2.02:
        failures = [f"{size} x {size}: kappa(W + C) is {numbers['kappa_after']:.4f}, where 2.02 is allowed"]
    title = (
        f"Matrices ({'2' if options.tiny else '; '.join(f'{n} of {s}' for s, n in SIZES.items())} at once, per matrix)"
    )
    return Outcome(title, MATRIX_COLUMNS, [matrix_row(numbers)], numbers, failures, notes)


def parts(options: Options) -> list[Part]:
    """The parts of the item "polar", in order of worth."""

    def of(name: str) -> Part:
        return Part(f"refresh of {name}", lambda: of_model(name, options))

    def matrices(size: int, kappa: float | None) -> Part:
        spectrum = "random" if kappa is None else f"kappa {kappa:.0e}"
        return Part(f"{size} x {size}, {spectrum}", lambda: of_matrices(size, kappa, options))

    sizes = (8, 20) if options.tiny else SIZES
    listed = [
        matrices(size, kappa) for size in sizes for kappa in (KAPPAS if size <= LARGEST_SPECTRUM else KAPPAS[:1])
    ]
    return [of("bert"), *listed, of("vit")]
