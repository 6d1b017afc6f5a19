r"""How much memory and time the conversions of a checkpoint take.

    python benchmarks/bench_convert.py --gigabytes 1

The checkpoint is a BERT with random weights in float32, in files of a quarter of its size. Each conversion runs in a process
of its own. Its memory is sampled: what the process allocated (anonymous), and all that is resident, to which the pages of the
source's files belong that it maps; the system takes those back when others need memory.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging

from hf_specattn import SpectralConfig
from hf_specattn.checkpoints.conversion import Result, balance_checkpoint, convert, fold_checkpoint
from hf_specattn.checkpoints.destinations import folder_bytes
from hf_specattn.files import write_bytes, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
WIDTH, VOCABULARY, INTERMEDIATE = 1024, 30522, 4096
SAMPLES_PER_SECOND = 50

# Name -> the folder it reads, the folder it writes, and how.
COMMANDS: dict[str, tuple[str, str, Callable[[str, Path], Result]]] = {
    "convert --method identity": ("source", "identity", lambda src, dst: convert(src, dst, SpectralConfig())),
    "convert --init preserve": (
        "source",
        "preserve",
        lambda src, dst: convert(src, dst, SpectralConfig(), "preserve"),
    ),
    "convert --method svd": ("source", "svd", lambda src, dst: convert(src, dst, SpectralConfig("svd"))),
    "fold (of svd)": ("svd", "folded", fold_checkpoint),
    "balance": ("source", "balanced", balance_checkpoint),
}


def write_source(folder: Path, gigabytes: float) -> int:
    """Write a BERT of about this many GB; return the number of its parameters."""
    layer = 4 * WIDTH**2 + 2 * WIDTH * INTERMEDIATE
    layers = max(1, round((gigabytes * 1e9 / 4 - VOCABULARY * WIDTH) / layer))
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    model.save_pretrained(folder, max_shard_size=f"{gigabytes * 1000 / 4:.0f}MB")
    return model.num_parameters()


def memory() -> dict[str, int]:
    """This process's memory in bytes: `anonymous`, and all that is `resident`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        name: int(fields[field].split()[0]) * 1024 for name, field in (("anonymous", "RssAnon"), ("resident", "VmRSS"))
    }


class Peak(threading.Thread):
    """Samples the memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = memory()
        self.highest = dict(self.before)
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(1 / SAMPLES_PER_SECOND):
            now = memory()
            self.highest = {name: max(value, now[name]) for name, value in self.highest.items()}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(name: str, folder: Path, connection: Any) -> None:
    """In a process of its own: do it and send the figures."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    peak = Peak()
    peak.start()
    begun = time.perf_counter()
    source, destination, command = COMMANDS[name]
    result = command(str(folder / source), folder / destination)
    seconds = time.perf_counter() - begun
    peak.over.set()
    peak.join()
    connection.send(
        {
            "seconds": seconds,
            "bytes_before": peak.before,
            "bytes_peak": peak.highest,
            "bytes_written": folder_bytes(result.folder),
            "weight_bytes_read": weight_bytes(folder / source),
            "weight_bytes_written": weight_bytes(result.folder),
        }
    )


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    spawning = multiprocessing.get_context("spawn")  # a forked process would count this one's memory
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=measure, args=(name, folder, sender))
    process.start()
    sender.close()  # so that a failing child ends the waiting
    figures = receiver.recv()
    process.join()
    return figures


def machine() -> dict[str, Any]:
    """Describe the machine without names."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "memory_gib": round(total / 2**30),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    where, size = results["machine"], results["source_bytes"]
    lines = []
    for name, figures in results["conversions"].items():
        # With its corrections, where it has some.
        model = max(figures["weight_bytes_read"], figures["weight_bytes_written"])
        anonymous = figures["bytes_peak"]["anonymous"] - figures["bytes_before"]["anonymous"]
        resident = figures["bytes_peak"]["resident"] - figures["bytes_before"]["resident"]
        cells = (
            f"`{name}`",
            f"{model / MIB:,.0f}",
            f"{anonymous / MIB:,.0f}",
            f"{resident / MIB:,.0f}",
            f"{(resident - model) / MIB:,.0f}",
            f"{figures['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return (
        f"# Converting a checkpoint\n\n`{results['command']}`: a BERT of {results['parameters']:,} random parameters in "
        f"float32, {size / 1e9:.2f} GB in {results['source_files']} files; one thread.\n\n"
        f"{where['cores']} cores ({where['architecture']}), {where['memory_gib']} GiB of memory, {where['system']}, load "
        f"{where['load_before']} before the start; Python {where['python']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, safetensors {where['safetensors']}.\n\n"
        "Memory in MiB beyond the imported libraries. The model is the weights in their stored dtype, corrections included; "
        "allocated is what the process asked for; resident counts the mapped pages of files too, which the system takes back "
        "when it needs them. The embedding, the largest module, is "
        f"{results['largest_module_float64_bytes'] / MIB:,.0f} MiB in float64.\n\n"
        "| | model | peak allocated | peak resident | resident less model | seconds |\n|---|---:|---:|---:|---:|---:|\n"
        f"{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="Size of the checkpoint (1).")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("error: the memory of a process is read from /proc, which only Linux has.")
    described = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = write_source(folder / "source", arguments.gigabytes)
        files = list((folder / "source").glob("*.safetensors"))
        results = {
            "command": f"python benchmarks/bench_convert.py --gigabytes {arguments.gigabytes:g}",
            "parameters": parameters,
            "source_bytes": weight_bytes(folder / "source"),
            "source_files": len(files),
            "largest_module_float64_bytes": VOCABULARY * WIDTH * 8,
            "conversions": {name: in_a_process(name, folder) for name in COMMANDS},
            "machine": described,
        }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output_dir / "convert.json", results)
    write_bytes(arguments.output_dir / "convert.md", report(results).encode())
    print(report(results))
    print(json.dumps(results["conversions"], indent=2))


if __name__ == "__main__":
    main()
