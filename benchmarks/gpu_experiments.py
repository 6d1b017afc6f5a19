"""Training by this repository's scripts on a GPU, in parts, for `gpu.py`: pretraining's speed, and the published ListOps.

Each run is a process of its own, started as a user starts it, and its numbers come from the files that it writes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import bench_pretrain  # first: it lets the scripts be found
import train_lra
from gpu_parts import NOT_HERE, Options, Outcome, Part

from recipes.text.embedded_corpus import embedded_documents

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS_OF_A_DAY = 24 * 3600
CONDITIONED = {"stock": [], "identity, auto lambda": ["--spectral_conditioning"]}
# On a CPU everything but the numbers is the same.
TINY_BERT = [
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "1",
    "--num_attention_heads",
    "2",
    "--intermediate_size",
    "16",
]
TINY_BERT += ["--vocab_size", "300", "--max_seq_length", "16", "--per_device_train_batch_size", "4"]
TINY_BERT += ["--per_device_eval_batch_size", "64", "--mixed_precision", "no", "--torch_compile", "False"]
TINY_LISTOPS = ["--preset", "small", "--max_steps", "4", "--warmup_steps", "2", "--train_samples", "64"]
TINY_LISTOPS += ["--validation_samples", "20", "--test_samples", "20", "--eval_steps", "2"]


@contextmanager
def corpus(tiny: bool) -> Iterator[str]:
    """A file with the corpus that every Python carries, or a part of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.txt"
        texts = [document.text for document in embedded_documents()]
        file.write_text("\n\n".join(texts[:40] if tiny else texts), encoding="utf-8")
        yield str(file)


def recipe_on(file: str) -> list[str]:
    """The published recipe on a corpus that its cleaning was not made for."""
    return ["--preset", "crammed-bert", "--train_file", file, "--max_tokens_per_character", "1"]


def run_script(script: Path, flags: Sequence[str], folder: str) -> dict[str, Any]:
    """Run a training script to its end, and return its record; what it prints goes to the log."""
    command = [
        sys.executable,
        str(script),
        *flags,
        "--output_dir",
        folder,
        "--disable_tqdm",
        "True",
        "--save_steps",
        "0",
    ]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(command, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": path}, check=False)
    if ended.returncode:
        raise RuntimeError(f"{script.name} {' '.join(flags)} ended with code {ended.returncode}; the log says why")
    content: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    return content


# --- pretraining -----------------------------------------------------------------------------------------------------


def speed_of_pretraining(options: Options, name: str, flags: Sequence[str]) -> Outcome:
    """Tokens per second of `--preset crammed-bert` by its own account, and its memory."""
    with corpus(options.tiny) as file, tempfile.TemporaryDirectory() as folder:
        where = [*recipe_on(file), "--cache_dir", str(Path(folder) / "cache")]
        steps = ["--max_steps", "4" if options.tiny else "14", "--logging_steps", "1", "--eval_steps", "0"]
        tiny = [*TINY_BERT, "--gradient_accumulation_steps", "2"] if options.tiny else []
        script = Path(str(bench_pretrain.script.__file__))
        # Without the ramp, whose first steps have one micro-batch each.
        record = run_script(
            script, [*where, *steps, *tiny, *flags, "--batch_size_ramp", "0"], str(Path(folder) / "run")
        )
    # The first steps compile.
    speeds = [each["tokens_per_second"] for each in record["history"]][2:]
    speed, memory = median(speeds), record["facts"].get("peak_memory_bytes")
    row = [name, f"{speed:,.0f}", f"{speed * SECONDS_OF_A_DAY / 1e9:,.2f}"]
    row += [NOT_HERE if memory is None else f"{memory / 1e9:.1f}"]
    columns = ("model", "tokens/s", "10^9 tokens in 24 hours", "peak memory (GB)")
    notes = ["Medians over the steps after the second; 24 hours of the published batch, without validation."]
    numbers = {"tokens_per_second": speeds, "peak_memory_bytes": memory, "facts": record["facts"]}
    return Outcome("Crammed BERT by the script", columns, [row], numbers, notes=notes)


def against_the_bare_step(options: Options, variant: str) -> Outcome:
    """A step of the script over forward, backward and optimizer alone, in turns."""
    with corpus(options.tiny) as file, tempfile.TemporaryDirectory() as folder:
        flags = ["--variants", variant, "--rounds", "2" if options.tiny else "8", "--results_dir", folder]
        flags += [*recipe_on(file), "--cache_dir", str(Path(folder) / "cache")]
        flags += ["--batch_size_ramp", "0", "--gradient_accumulation_steps", "1", *(TINY_BERT if options.tiny else [])]
        bench_pretrain.main(flags)
        (file_of_results,) = Path(folder).glob("bench_pretrain_*.json")
        numbers = json.loads(file_of_results.read_text(encoding="utf-8"))["results"][variant]
    speeds, share = numbers["tokens_per_second"], numbers["share_of_bare"]
    interval = share["interval_95"]
    row = [variant, *(f"{speeds[name]:,.0f}" for name in (bench_pretrain.SCRIPT, bench_pretrain.BARE))]
    row += [f"{share['median']:.3f}", "too few rounds" if interval is None else bench_pretrain.between(interval)]
    columns = ("model", "tokens/s, script", "tokens/s, bare step", "script / bare", "95 % interval")
    notes = ["One forward pass to a step, where data, clipping and checks weigh most; the aim is 0.90."]
    return Outcome("Pretraining against the bare step", columns, [row], numbers, notes=notes)


def pretrain(options: Options) -> list[Part]:
    """The parts of the item "pretrain"."""

    def bare(variant: str) -> Part:
        return Part(f"{variant} against the bare step", lambda: against_the_bare_step(options, variant))

    def speed(name: str) -> Part:
        return Part(f"crammed-bert, {name}", lambda: speed_of_pretraining(options, name, CONDITIONED[name]))

    return [bare("stock"), *map(speed, CONDITIONED), bare("identity")]


# --- ListOps ---------------------------------------------------------------------------------------------------------


def trained_on_listops(options: Options, name: str, seed: int) -> Outcome:
    """Accuracy on ListOps of one run at the published size."""
    with tempfile.TemporaryDirectory() as folder:
        size = TINY_LISTOPS if options.tiny else ["--preset", "lra"]
        flags = ["--task", "listops", *size, *CONDITIONED[name], "--seed", str(seed)]
        flags += ["--cache_dir", str(Path(tempfile.gettempdir()) / "specattn-listops")]  # made once for all runs
        record = run_script(Path(str(train_lra.__file__)), flags, str(Path(folder) / "run"))
    final, arguments = record["final"], record["arguments"]
    row = [
        name,
        str(seed),
        f"{arguments['max_steps']:,}",
        _lambda(arguments),
        *_accuracies(final),
        f"{final['seconds']:.0f}",
    ]
    columns = ("model", "seed", "steps", "lambda", "validation accuracy (%)", "test accuracy (%)", "seconds")
    numbers = {"final": final, "facts": record["facts"], "validation": record["validation"]}
    return Outcome("ListOps, Nystromformer", columns, [row], numbers, notes=["Sequences of up to 2,000 tokens."])


def _lambda(arguments: Mapping[str, Any]) -> str:
    found = arguments.get("found_lambda")
    return "–" if found is None else f"{found:g}"


def _accuracies(final: Mapping[str, Any]) -> list[str]:
    return [f"{100 * final[name]:.2f}" for name in ("validation_accuracy", "test_accuracy")]


def listops(options: Options) -> list[Part]:
    """The parts of the item "listops": stock and conditioned, two seeds."""

    def part(name: str, seed: int) -> Part:
        return Part(f"{name}, seed {seed}", lambda: trained_on_listops(options, name, seed))

    return [part(name, seed) for seed in (0, 1) for name in CONDITIONED]
