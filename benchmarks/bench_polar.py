"""The svd correction by matrix products against the SVD: its error, its time, and what a refresh of a whole model costs.

    python benchmarks/bench_polar.py                                              # some ten minutes on a CPU
    python benchmarks/bench_polar.py --device cuda --batch 12 --sequences 64 512  # on a GPU

Products and SVD are timed in turns, in one process. The error is that of `C` in the Frobenius norm, relative, against an
SVD in float64. A model's refresh is compared with its stock training step, whose time is taken at two batch sizes, so that
the tokens per step follow at which refreshing costs 5 % and 1 %. Writes `bench_polar_<device>.json` and `.md`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import (
    STOCK,
    BenchArguments,
    TrainingStep,
    between,
    build_model,
    condition_model,
    describe_machine,
    median_interval,
    time_rounds,
)
from torch import Tensor
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_specattn import SpectralConfig, refresh
from hf_specattn.corrections import svd_correction
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json
from hf_specattn.layers import spectral_layers
from hf_specattn.polar import CHECKED_RANGE, polar_correction

PRODUCTS, SVD = "products", "svd"
AGAIN = "products_again"  # the control
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
GAUSSIAN = "random"
NOTHING = "–"
SHARES = (0.05, 0.01)
INTERVALS = (1, 10, 100)


@dataclass
class PolarBenchArguments:
    """Arguments of the benchmark."""

    sizes: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512, 768, 1024, 2048, 4096], metadata={"help": "Square matrices."}
    )
    kappas: list[float] = field(
        default_factory=lambda: [1e1, 1e3, 1e4, 1e6],
        metadata={
            "help": "Condition numbers of matrices with geometric singular values; random ones always come first."
        },
    )
    dtypes: list[str] = field(default_factory=lambda: ["fp32"], metadata={"choices": list(DTYPES)})
    batch: int = field(default=1, metadata={"help": "Matrices at once."})
    repeats: int = field(default=3, metadata={"help": "Timed rounds for each row."})
    largest_reference: int = field(
        default=1024, metadata={"help": "Up to this size errors are measured; an SVD in float64 takes minutes beyond."}
    )
    largest_spectrum: int = field(
        default=1024, metadata={"help": "Beyond this size random matrices alone: the time does not depend on kappa."}
    )
    models: list[str] = field(
        default_factory=lambda: ["bert", "vit"], metadata={"help": "As of bench_step.py.", "choices": ["bert", "vit"]}
    )
    scale: str = field(default="base", metadata={"help": "As of bench_step.py.", "choices": ["base", "tiny"]})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers. None: those of the scale."})
    sequences: list[int] = field(
        default_factory=lambda: [2, 8], metadata={"help": "The two batch sizes of the step: sequences or images."}
    )
    sequence_length: int = field(default=128, metadata={"help": "Tokens per sequence (bert), at most 512."})
    precision: str = field(
        default="fp32", metadata={"help": "Of the step; bf16: by autocast.", "choices": ["fp32", "bf16"]}
    )
    mode: str = field(default="eager", metadata={"help": "Of the step.", "choices": ["eager", "compile"]})
    rounds: int = field(
        default=6, metadata={"help": "Timed rounds of step and refresh; an interval needs at least 6."}
    )
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"choices": ["cpu", "cuda"]})
    seed: int = field(default=0, metadata={"help": "Decides matrices, weights, inputs and the order within a round."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder for the two files."})

    def __post_init__(self) -> None:
        for name in ("batch", "repeats", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        if min(self.sizes, default=1) < 1:
            raise ValueError(f"--sizes {min(self.sizes)} must be at least 1.")
        if any(not 1 <= kappa < float("inf") for kappa in self.kappas):
            raise ValueError(f"--kappas {self.kappas} must be finite numbers of at least 1.")
        if len(self.sequences) != 2 or not 1 <= self.sequences[0] < self.sequences[1]:
            raise ValueError(f"--sequences {self.sequences} must be two numbers, the first the smaller, from 1 on.")
        self.of_step(1)  # refuses its own
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu.")

    def of_step(self, sequences: int) -> BenchArguments:
        """The same in the terms of bench_step.py."""
        names = ("scale", "num_hidden_layers", "sequence_length", "device", "seed")
        return BenchArguments(batch_size=sequences, **{name: getattr(self, name) for name in names})


def timed(work: Callable[[], Any], device: str) -> Callable[[], float]:
    """A function that does the work and returns its seconds, until the device is done."""

    def run() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


# --- matrices --------------------------------------------------------------------------------------------------------


def build_matrices(size: int, kappa: float | None, arguments: PolarBenchArguments) -> Tensor:
    """`(batch, size, size)` in float64 on the device: Gaussian, or with geometric singular values from 1 to `1 / kappa`."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch, size, size)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64).to(arguments.device)
    if kappa is None:
        return 0.02 * matrices
    other = torch.randn(shape, generator=generator, dtype=torch.float64).to(arguments.device)
    sigma = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), size, dtype=torch.float64)
    left, right = (torch.linalg.qr(each).Q for each in (matrices, other))
    return left * sigma.to(arguments.device) @ right


def relative_error(correction: Tensor, expected: Tensor) -> float:
    """The largest of the batch."""
    difference = torch.linalg.matrix_norm(correction.double() - expected) / torch.linalg.matrix_norm(expected)
    return float(difference.max())


def rounding_of_the_check(effective: Tensor, sigma_max: Tensor) -> float:
    """How far rounding moves the matrix that `within_limit` factorizes, in the spectral norm and units of sigma_max^4."""

    def factorized(matrix: Tensor, sigma: Tensor) -> Tensor:
        low, high = ((bound * sigma[:, None, None]).square() for bound in CHECKED_RANGE)
        gram = matrix @ matrix.mT
        return (low + high) * gram - gram @ gram

    change = factorized(effective, sigma_max).double() - factorized(effective.double(), sigma_max.double())
    return float((torch.linalg.matrix_norm(change, 2) / sigma_max.double() ** 4).max())


def measure_matrices(size: int, kappa: float | None, dtype: str, arguments: PolarBenchArguments) -> dict[str, Any]:
    """One row: errors, the condition number reached, and seconds per matrix."""
    weight = build_matrices(size, kappa, arguments).to(DTYPES[dtype])
    result = polar_correction(weight)
    row: dict[str, Any] = {"size": size, "kappa": kappa, "dtype": dtype, "batch": arguments.batch}
    row |= {"continued": int(result.continued.sum()), "exact": int(result.exact.sum())}
    if size <= arguments.largest_reference:
        left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = sigma[:, :1, None] * (left @ right)
        effective = weight + result.correction
        values = torch.linalg.svdvals(effective.double())
        row |= {
            "kappa_measured": float((sigma[:, 0] / sigma[:, -1]).max()),
            "error_products": relative_error(result.correction, expected),
            "error_svd": relative_error(svd_correction(weight), expected),
            "kappa_after": float((values[:, 0] / values[:, -1]).max()),
            "check_rounding": rounding_of_the_check(effective, sigma[:, 0].to(weight.dtype)),
        }
    products = timed(lambda: polar_correction(weight), arguments.device)
    steps = {PRODUCTS: products, AGAIN: products, SVD: timed(lambda: svd_correction(weight), arguments.device)}
    seconds = time_rounds(steps, arguments.repeats, arguments.seed)
    return row | {f"seconds_{name}": median(values) / arguments.batch for name, values in seconds.items()}


# --- whole models ----------------------------------------------------------------------------------------------------


def measure_model(name: str, arguments: PolarBenchArguments) -> dict[str, Any]:
    """Seconds of a refresh by products and by SVD, of a stock step at two sizes, and what follows."""
    small, large = (
        TrainingStep(name, STOCK, arguments.precision, arguments.mode, arguments.of_step(sequences))
        for sequences in arguments.sequences
    )
    dynamic = build_model(name, arguments.of_step(1)).to(arguments.device)
    condition_model(dynamic, SpectralConfig("svd", refresh_every=1))
    steps = {
        "small step": small,
        "large step": large,
        PRODUCTS: timed(lambda: refresh(dynamic, exact=False), arguments.device),
        SVD: timed(lambda: refresh(dynamic, exact=True), arguments.device),
    }
    time_rounds(steps, 1, arguments.seed)  # warm
    seconds = time_rounds(steps, arguments.rounds, arguments.seed)
    tokens = [step_tokens(step) for step in (small, large)]
    middle = {key: median(values) for key, values in seconds.items()}
    per_token, fixed = line_through(tokens, [middle["small step"], middle["large step"]])
    weights = [tuple(layer.weight.shape) for _, layer in spectral_layers(dynamic)]
    return {
        "model": name,
        "layers": dynamic.config.num_hidden_layers,
        "weights": len(weights),
        "shapes": sorted({f"{rows} x {columns}" for rows, columns in weights}),
        "tokens": tokens,
        "median_seconds": middle,
        "intervals_95": {key: median_interval(values) for key, values in seconds.items()},
        "seconds_per_token": per_token,
        "seconds_fixed": fixed,
        "break_even_tokens": {
            f"{method}, every {every}": {
                str(share): break_even(middle[method] / every, share, per_token, fixed) for share in SHARES
            }
            for method in (PRODUCTS, SVD)
            for every in INTERVALS
        },
        "seconds": {key: [round(value, 6) for value in values] for key, values in seconds.items()},
    }


def step_tokens(step: TrainingStep) -> int:
    """Tokens of text, or patches with the class token, in one step's batch."""
    if "input_ids" in step.batch:
        return step.batch["input_ids"].numel()
    config = step.model.config
    return len(step.batch["labels"]) * ((config.image_size // config.patch_size) ** 2 + 1)


def line_through(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds per token and per step of a step that takes `fixed + per_token * tokens`; noise makes neither negative."""
    per_token = (seconds[1] - seconds[0]) / (tokens[1] - tokens[0])
    fixed = seconds[0] - per_token * tokens[0]
    if per_token <= 0 or fixed < 0:  # so far the whole time is proportional
        return seconds[1] / tokens[1], 0.0
    return per_token, fixed


def break_even(seconds: float, share: float, per_token: float, fixed: float) -> int:
    """Tokens per step from which `seconds` of refreshing per step are at most `share` of the step."""
    return max(0, round((seconds / share - fixed) / per_token))


# --- the page --------------------------------------------------------------------------------------------------------

MATRIX_COLUMNS = (
    "size",
    "dtype",
    "kappa(W)",
    "error of C, products",
    "error of C, SVD",
    "kappa(W + C)",
    "products (ms)",
    "SVD (ms)",
    "SVD / products",
    "products again / products",
    "took more products / an SVD",
    "rounding of the check",
)
MODEL_COLUMNS = ("refresh", "seconds", "95 % interval", *(f"tokens per step for {share:.0%}" for share in SHARES))


def report(rows: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    """The Markdown page."""
    machine, settings = content["machine"], content["settings"]
    lines = ["# The svd correction: matrix products against the SVD", ""]
    lines += ["Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    lines += [f"## Matrices ({settings['batch']} at once, median of {settings['repeats']} rounds, per matrix)", ""]
    lines.append(markdown_table(MATRIX_COLUMNS, [matrix_row(row) for row in rows]))
    lines += [*MATRIX_NOTES, ""]
    for model in models:
        lines += [f"## A refresh of {model['model']} ({settings['scale']})", ""]
        lines += [model_summary(model, settings), "", markdown_table(MODEL_COLUMNS, model_rows(model))]
    return "\n".join([*lines, *MODEL_NOTES, ""])


def model_summary(model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What the model is, and its stock step."""
    step = ", ".join(
        f"{1000 * model['median_seconds'][name]:,.0f} ms at {tokens:,}"
        for name, tokens in zip(("small step", "large step"), model["tokens"])
    )
    per_token, fixed = 1e6 * model["seconds_per_token"], 1000 * model["seconds_fixed"]
    return (
        f"{model['layers']} layers, {model['weights']} weights of {' and '.join(model['shapes'])}. A stock step "
        f"({settings['precision']}, {settings['mode']}, AdamW) takes {step} tokens, so {per_token:,.1f} microseconds "
        f"per token and {fixed:,.0f} ms besides. Median of {settings['rounds']} rounds."
    )


MATRIX_NOTES = (
    "- Errors: in the Frobenius norm, relative, against an SVD in float64 of the same matrix; the largest of the batch. The "
    "SVD beside it is that of the dtype. kappa(W + C) is that of the products, measured in float64; above 2.02 is wrong.",
    "- random: Gaussian, with the condition number that was found. The others have geometric singular values.",
    "- Rounding of the check: `r` of `hf_specattn.polar.within_limit`, which needs it to be below 0.011.",
)
MODEL_NOTES = (
    "- Tokens per step: from here on refreshing every so many steps adds at most that share to the stock step, computed from "
    "its time per token. What W + C costs within the step itself is in `bench_step`.",
)


def matrix_row(row: Mapping[str, Any]) -> list[str]:
    seconds, again = (row["seconds_products"], row["seconds_svd"]), row["seconds_products_again"]
    if "error_svd" in row:
        kappa = f"{GAUSSIAN}, {row['kappa_measured']:.2g}" if row["kappa"] is None else f"{row['kappa']:.0e}"
        measured = [f"{row['error_products']:.1e}", f"{row['error_svd']:.1e}", f"{row['kappa_after']:.4f}"]
        rounding = f"{row['check_rounding']:.1e}"
    else:
        kappa = GAUSSIAN if row["kappa"] is None else f"{row['kappa']:.0e}"
        measured, rounding = [NOTHING] * 3, NOTHING
    times = [
        *(f"{1000 * value:,.2f}" for value in seconds),
        f"{seconds[1] / seconds[0]:.2f}",
        f"{again / seconds[0]:.2f}",
    ]
    return [str(row["size"]), row["dtype"], kappa, *measured, *times, f"{row['continued']} / {row['exact']}", rounding]


def model_rows(model: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for label, tokens in model["break_even_tokens"].items():
        method, every = label.split(", every ")
        interval = model["intervals_95"][method]
        first = every == str(INTERVALS[0])
        seconds = f"{model['median_seconds'][method]:.3f}" if first else ""
        spread = ("too few rounds" if interval is None else between(interval)) if first else ""
        rows.append([label, seconds, spread, *(f"{tokens[str(share)]:,}" for share in SHARES)])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    dataclasses: Any = PolarBenchArguments
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else list(argv))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    logging.disable_progress_bar()
    rows = []
    for dtype in arguments.dtypes:
        for size in arguments.sizes:
            spectra = arguments.kappas if size <= arguments.largest_spectrum else []
            for kappa in (None, *spectra):
                rows.append(measure_matrices(size, kappa, dtype, arguments))
            print(f"{dtype}, {size}: done", file=sys.stderr)
    models = [measure_model(name, arguments) for name in arguments.models]
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    content = {"machine": describe_machine(arguments.device), "settings": settings}
    content |= {"matrices": rows, "models": models}
    text, output = report(rows, models, content), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"bench_polar_{arguments.device}.json", content)
    write_bytes(output / f"bench_polar_{arguments.device}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
