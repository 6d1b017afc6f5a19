r"""Singular values of the Jacobian of one attention head: the closed-form Gram matrix against dense autograd and SVD.

    python benchmarks/bench_jacobian.py                     # the comparison, then one head of ViT-B
    python benchmarks/bench_jacobian.py --skip_large

The comparison runs both ways, and the closed form a second time as the control, in turns on one head of a size where both
are possible; ratios are taken within a round, so that what else the machine does falls on both sides. The head of ViT-B (197
tokens, width 768, head width 64: a Gram matrix of 12,608 rows) runs in a process of its own, whose peak resident memory
counts everything. Writes `jacobian.json` and `jacobian.md`.
"""

import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_specattn.diagnostics import AttentionHead, jacobian_spectrum
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where `recipes` is
from recipes.run.run_metrics import package_versions

GIB = 2**30


@dataclass
class BenchArguments:
    """Arguments of the benchmark."""

    tokens: int = field(default=48, metadata={"help": "Tokens of the head on which both ways are compared."})
    width: int = field(default=192, metadata={"help": "Width of its layer."})
    head_width: int = field(default=16, metadata={"help": "Its own width."})
    rounds: int = field(default=5, metadata={"help": "Rounds of the comparison."})
    skip_large: bool = field(default=False, metadata={"help": "Leave out the head of ViT-B."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Folder for jacobian.json and .md."}
    )


def random_head(tokens: int, width: int, head_width: int) -> AttentionHead:
    """Layer-normed inputs and Gaussian weights whose logits have a standard deviation of about 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.layer_norm(x, (width,))
    weights = [
        torch.randn(head_width, width, generator=generator, dtype=torch.float64) * width**-0.5 for _ in range(3)
    ]
    return AttentionHead(x, *weights, scale=head_width**-0.5)


def dense_extremes(head: AttentionHead) -> tuple[float, float]:
    """Build J by reverse-mode autograd, row by row, and take its SVD."""
    weights = (head.query, head.key, head.value)
    parts = torch.autograd.functional.jacobian(head.output, weights)
    matrix = torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=1)
    sigma = torch.linalg.svdvals(matrix)
    return sigma[0].item(), sigma[-1].item()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(arguments: BenchArguments) -> dict[str, Any]:
    head = random_head(arguments.tokens, arguments.width, arguments.head_width)
    jacobian_spectrum(head)  # warm
    rows = []
    for _ in range(arguments.rounds):
        closed, spectrum = timed(lambda: jacobian_spectrum(head))
        dense, extremes = timed(lambda: dense_extremes(head))
        again, _ = timed(lambda: jacobian_spectrum(head))
        rows.append({"closed_form": closed, "dense": dense, "closed_form_again": again})
    kappa = extremes[0] / extremes[1]
    ratios = [row["dense"] / row["closed_form"] for row in rows]
    return {
        "tokens": arguments.tokens,
        "width": arguments.width,
        "head_width": arguments.head_width,
        "shape": spectrum.shape,
        "seconds": rows,
        "ratio": spread(ratios),
        "control_ratio": spread([row["closed_form_again"] / row["closed_form"] for row in rows]),
        "kappa": kappa,
        "relative_difference_of_kappa": abs(spectrum.kappa / kappa - 1),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def measure_large(threads: int, connection: Any) -> None:
    """In a process of its own: one head of ViT-B."""
    torch.set_num_threads(threads)
    head = random_head(197, 768, 64)
    imported = peak_memory()
    cpu = time.process_time()
    seconds, spectrum = timed(lambda: jacobian_spectrum(head))
    connection.send(
        {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "peak_memory_gib": peak_memory(),
            "peak_memory_gib_before": imported,
            "shape": spectrum.shape,
            "kappa": spectrum.kappa,
            "rank": spectrum.rank,
            "is_lower_bound": spectrum.is_lower_bound,
        }
    )


def peak_memory() -> float:
    """This process's largest resident memory so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def machine() -> dict[str, Any]:
    """Describe the machine without names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "memory_gib": round(memory / GIB),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": package_versions(),
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, small, large = results["machine"], results["comparison"], results["large"]
    seconds = {name: median(row[name] for row in small["seconds"]) for name in small["seconds"][0]}
    ratio, control = (
        f"{small[name]['median']:.4g} ({small[name]['low']:.4g} to {small[name]['high']:.4g})"
        for name in ("ratio", "control_ratio")
    )
    rows = [
        ["J", "{:,} x {:,}".format(*small["shape"])],
        ["dense autograd and SVD, median", f"{seconds['dense']:.4g} s"],
        ["closed form, median", f"{seconds['closed_form']:.4g} s"],
        ["ratio, median (quartiles)", ratio],
        ["closed form against itself (control)", control],
        ["kappa", f"{small['kappa']:.6g}"],
        ["relative difference of the closed form's kappa", f"{small['relative_difference_of_kappa']:.1e}"],
    ]
    title = f"A head with {small['tokens']} tokens, width {small['width']}, head width {small['head_width']}"
    text = (
        f"# Singular values of the Jacobian of one attention head\n\n`{results['command']}`, float64.\n\n"
        f"{where['cores']} cores ({where['architecture']}), {where['threads']} thread(s), {where['memory_gib']} GiB, "
        f"{where['system']}, load {where['load_before']} before the start (other work was running); torch "
        f"{where['versions']['torch']}.\n\n{markdown_table([title, ''], rows)}"
    )
    if large is not None:
        bound = "at least " if large["is_lower_bound"] else ""
        rows = [
            ["J", "{:,} x {:,}".format(*large["shape"])],
            ["time", f"{large['seconds']:.1f} s (of the processors: {large['cpu_seconds']:.1f} s)"],
            [
                "peak resident memory",
                f"{large['peak_memory_gib']:.2f} GiB, of which {large['peak_memory_gib_before']:.2f} before",
            ],
            ["kappa", f"{bound}{large['kappa']:.6g}"],
        ]
        text += "\n" + markdown_table(["A head of ViT-B: 197 tokens, width 768, head width 64", ""], rows)
    return text


def run_large() -> dict[str, Any]:
    spawning = multiprocessing.get_context("spawn")
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=measure_large, args=(torch.get_num_threads(), sender))
    process.start()
    sender.close()  # so that a failing child ends the waiting
    figures = receiver.recv()
    process.join()
    return figures


def main() -> None:
    (arguments,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if arguments.rounds < 2:
        raise SystemExit(f"error: --rounds {arguments.rounds} must be at least 2, for quartiles.")
    described = machine()
    results = {
        "command": " ".join(["python benchmarks/bench_jacobian.py", *sys.argv[1:]]),
        "machine": described,
        "comparison": compare(arguments),
        "large": None if arguments.skip_large else run_large(),
    }
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "jacobian.json", results)
    write_bytes(folder / "jacobian.md", report(results).encode())
    print(report(results))


if __name__ == "__main__":
    main()
