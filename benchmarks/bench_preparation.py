r"""How long preparing a corpus takes, and how much memory: text to packed sequences, the tokenizer's training included.

    python benchmarks/bench_preparation.py --megabytes 1000

The text is a given file repeated with varied lines until it is as long as asked for. The work runs in a process of its
own, whose peak resident memory counts everything, the imported libraries as well.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_specattn.files import write_bytes, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where `recipes` is
from recipes.text.cleaning import NO_CLEANING, PUBLISHED_CLEANING
from recipes.text.streams import file_stream, split_stream
from recipes.text.text_files import file_documents
from recipes.text.token_cache import prepare_tokens
from recipes.text.tokenization import prepare_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20


def write_varied_text(path: Path, source: Path, megabytes: int) -> None:
    """Write the source's documents again and again; each time, some words of every line change places or get numbers."""
    documents = [document.text for document in file_documents(source)]
    generator = random.Random(0)
    size, repetition = 0, 0
    with path.open("wb") as stream:
        while size < megabytes * 1_000_000:
            for text in documents:
                lines = [varied(line, repetition, generator) for line in text.strip().split("\n")]
                size += stream.write(("\n".join(lines) + "\n\n\n").encode())
                if size >= megabytes * 1_000_000:
                    break
            repetition += 1


def varied(line: str, repetition: int, generator: random.Random) -> str:
    words = line.split(" ")
    if repetition and len(words) > 2:
        first, second = generator.randrange(len(words)), generator.randrange(len(words))
        words[first], words[second] = words[second], words[first]
        if generator.random() < 0.1:
            words[first] += str(generator.randrange(100_000))
    return " ".join(words)


def prepare(path: Path, cache_dir: Path, vocab_size: int, length: int, cleaning: Any, connection: Any) -> None:
    """In a process of its own: prepare both parts and send the figures."""
    begun = time.perf_counter()
    imported = peak_memory()
    train, validation = split_stream(file_stream([path]), 0.001)
    options = {"cache_dir": cache_dir, "cleaning": cleaning, "show_progress": sys.stderr.isatty()}
    tokenizer = prepare_tokenizer(train, vocab_size, **options)
    trained = time.perf_counter()
    trained_memory = peak_memory()
    cache = prepare_tokens(train, tokenizer, length, **options)
    packed = time.perf_counter()
    held_out = prepare_tokens(validation, tokenizer, length, **options)
    done = time.perf_counter()
    prepare_tokens(train, tokenizer, length, **options)
    connection.send(
        {
            "seconds_tokenizer": trained - begun,
            "seconds_training_part": packed - trained,
            "seconds_validation_part": done - packed,
            "seconds_hit": time.perf_counter() - done,
            "seconds": done - begun,
            "documents": cache.manifest["documents"] + held_out.manifest["documents"],
            "documents_kept": cache.manifest["documents_kept"] + held_out.manifest["documents_kept"],
            "tokens": cache.size + held_out.size,
            "vocab_size": len(tokenizer),
            "peak_memory_mib_after_imports": imported,
            "peak_memory_mib_after_tokenizer": trained_memory,
            "peak_memory_mib": peak_memory(),
        }
    )


def peak_memory() -> int:
    """Return this process's largest resident memory so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) // MIB


def machine() -> dict[str, Any]:
    """Describe the machine without names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "memory_gib": round(memory / 2**30),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    where, megabytes = results["machine"], results["megabytes"]
    rows = {
        "Text": f"{megabytes:,.0f} MB in {results['documents']:,} documents, {results['documents_kept']:,} kept",
        "Training the tokenizer": f"{results['seconds_tokenizer']:.0f} s ({results['vocab_size']:,} tokens)",
        "Packing the training part": f"{results['seconds_training_part']:.0f} s",
        "Packing the validation part": f"{results['seconds_validation_part']:.0f} s",
        "In all": f"{results['seconds']:.0f} s, {results['megabytes_per_second']:.2f} MB/s",
        "Tokens": f"{results['tokens']:,} in sequences of {results['max_seq_length']}",
        "The same again, from the cache": f"{results['seconds_hit']:.2f} s",
        "Peak resident memory": f"{results['peak_memory_mib']:,} MiB",
        "of which the imported libraries": f"{results['peak_memory_mib_after_imports']:,} MiB",
        "Peak until the tokenizer was trained": f"{results['peak_memory_mib_after_tokenizer']:,} MiB",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# Preparing a corpus\n\n`{results['command']}`: one text file, {results['cleaning']}, WordPiece trained on it.\n\n"
        f"{where['cores']} cores ({where['architecture']}), {where['memory_gib']} GiB of memory, {where['system']}, load "
        f"{where['load_before']} before the start; Python {where['python']}, tokenizers {where['tokenizers']}, "
        f"transformers {where['transformers']}.\n\n| | |\n|---|---|\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="Size of the text (1000).")
    parser.add_argument(
        "--source", type=Path, default=REPOSITORY.parent / "shared" / "data" / "books-pd" / "train.txt.gz"
    )
    parser.add_argument("--vocab_size", type=int, default=32_768, help="Tokens of the tokenizer (32768).")
    parser.add_argument("--max_seq_length", type=int, default=128, help="Tokens per sequence (128).")
    parser.add_argument("--no_cleaning", action="store_true", help="Without the published normalization and filter.")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    cleaning = NO_CLEANING if arguments.no_cleaning else PUBLISHED_CLEANING

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_varied_text(text, arguments.source, arguments.megabytes)
        megabytes = text.stat().st_size / 1e6
        described = machine()
        spawning = multiprocessing.get_context("spawn")  # a forked process would count this one's memory
        receiver, sender = spawning.Pipe(duplex=False)
        options = (text, Path(folder) / "cache", arguments.vocab_size, arguments.max_seq_length, cleaning, sender)
        process = spawning.Process(target=prepare, args=options)
        process.start()
        sender.close()  # so that a failing child ends the waiting
        figures = receiver.recv()
        process.join()
    results = {
        "command": f"python benchmarks/bench_preparation.py --megabytes {arguments.megabytes}"
        + (" --no_cleaning" if arguments.no_cleaning else ""),
        "cleaning": "as it is" if arguments.no_cleaning else "with the published normalization and filter",
        "megabytes": megabytes,
        "megabytes_per_second": megabytes / figures["seconds"],
        "max_seq_length": arguments.max_seq_length,
        **figures,
        "machine": described,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output_dir / "preparation.json", results)
    write_bytes(arguments.output_dir / "preparation.md", report(results).encode())
    print(report(results))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
