"""Everything that has to be measured on a GPU, in one command that goes on where it was stopped.

    make gpu                                                         # eight minutes; what is left is said
    PYTHONPATH=. python3 benchmarks/gpu.py --items steps --minutes 4
    python benchmarks/gpu.py --device cpu --tiny --results runs/gpu  # every item on tiny models, to test that it runs

The items come in order of worth. Each runs in a process of its own with a time limit of its own, so that one that hangs,
crashes or runs out of memory ends alone. Every part of an item enters `gpu.json` and the page `gpu.md` as soon as it ends;
`gpu.log` has what was printed. A part that is done is known by the card and by a hash of the source files that it measures:
the next call measures the others only. What was measured on another card or from older sources stays, and says so.
Results are read from `--results`, or where that folder has none from `--earlier`: copy what came back from a lent machine
there.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench_step import describe_machine
from gpu_parts import Options, cifar10_files
from transformers import HfArgumentParser

import hf_specattn
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
COMMAND = REPOSITORY / "specattn.py"
SEARCHED = (BENCHMARKS, REPOSITORY, REPOSITORY / "scripts")  # for the sources of what a benchmark imports
PACKAGES = ("triton", "accelerate", "peft", "timm")
# An item that is given less would be stopped while it loads; and so much is kept for the last writing.
LEAST_SECONDS, RESERVED_SECONDS = 20, 5


@dataclass(frozen=True)
class Item:
    """What is measured in a process of its own.

    Args:
        name: what `--items` calls it.
        asks: the question it answers, for the page.
        module: the file with its parts.
        limit_s: seconds after which it is stopped.
        function: of the module, from `Options` to the parts.
        reads_images: whether other images are another measurement.
    """

    name: str
    asks: str
    module: Path
    limit_s: float
    function: str = "parts"
    reads_images: bool = False


# In order of worth.
ITEMS = (
    Item("correctness", "Is what is computed right on this device?", BENCHMARKS / "gpu_correctness.py", 170),
    Item("steps", "What does a training step cost, against stock?", BENCHMARKS / "gpu_steps.py", 300),
    Item("polar", "What does a refresh of svd cost?", BENCHMARKS / "gpu_polar.py", 110),
    Item("families", "The same for the paper's other models", BENCHMARKS / "gpu_steps.py", 180, "families"),
    Item("pretrain", "How fast does the script pretrain?", BENCHMARKS / "gpu_experiments.py", 300, "pretrain"),
    Item("listops", "ListOps, stock and conditioned", BENCHMARKS / "gpu_experiments.py", 500, "listops"),
    Item("detection", "What does a step of the paper's detectors cost?", BENCHMARKS / "gpu_detection.py", 200),
    Item("experiments", "Attention without its residual", BENCHMARKS / "gpu_residual_free.py", 560, reads_images=True),
)


@dataclass
class GpuArguments:
    """Arguments of the command."""

    items: list[str] = field(
        default_factory=lambda: [item.name for item in ITEMS],
        metadata={"help": "What to measure.", "choices": [item.name for item in ITEMS]},
    )
    minutes: float = field(default=8.0, metadata={"help": "Stop after this many minutes, with everything written."})
    results: str = field(default="benchmarks/results/gpu", metadata={"help": "Folder for the three files."})
    earlier: str = field(
        default="benchmarks/results/gpu", metadata={"help": "Folder with earlier results, where --results has none."}
    )
    device: str = field(default="cuda", metadata={"choices": ["cpu", "cuda"]})
    tiny: bool = field(default=False, metadata={"help": "Tiny models: to test that everything runs."})
    cifar10: str | None = field(
        default=None,
        metadata={
            "help": "Folder with CIFAR-10 as Parquet, train*.parquet and test*.parquet with columns image and label, for the "
            "experiments; as JPEG it takes 18 MB. None: scikit-learn's digits."
        },
    )

    def __post_init__(self) -> None:
        if self.cifar10 is not None:
            try:
                cifar10_files(self.cifar10)
            except ValueError as error:
                raise ValueError(f"--cifar10 {error}") from error
        if not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes} must be above 0.")
        if self.device == "cpu" and not self.tiny:
            raise ValueError("--device cpu would take days at full size; give --tiny, too.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu --tiny.")


# --- what a result is known by ---------------------------------------------------------------------------------------


def source_files(start: Path) -> set[Path]:
    """`start` and every file of this repository that it imports, directly or not.

    A name of `hf_specattn` itself stands for the module that has it: the package's own file imports every module.
    """
    found: set[Path] = set()
    waiting = [start.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            # The command imports the whole package, but only where it runs, which nothing here does.
            waiting += [] if path == COMMAND else _imported(path)
    return found


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _file_of(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(REPOSITORY).parts[: -node.level]) if node.level else []
            module = package + (node.module.split(".") if node.module else [])
            if module != ["hf_specattn"]:
                yield from _file_of(module)
            for alias in node.names:
                public = getattr(hf_specattn, alias.name, None) if module == ["hf_specattn"] else None
                home = getattr(public, "__module__", None)
                yield from _file_of([*module, alias.name] if home is None else home.split("."))


def _file_of(module: Sequence[str]) -> Iterator[Path]:
    files = (folder.joinpath(*module).with_suffix(".py") for folder in SEARCHED)
    yield from (file for file in files if file.is_file())


def sources_hash(item: Item, cifar10: str | None = None) -> str:
    """A hash of the names and contents of the files that an item measures, of its function, and of the images it reads."""
    digest = hashlib.sha256(item.function.encode())
    if item.reads_images and cifar10 is not None:
        digest.update(repr([(file.name, file.stat().st_size) for file in cifar10_files(cifar10)]).encode())
    for path in sorted(source_files(item.module)):
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(device: str) -> dict[str, Any]:
    """The machine as `bench_step.py` has it, and what else decides a GPU's numbers."""
    facts = describe_machine(device)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu_memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        facts |= {"cudnn": torch.backends.cudnn.version(), "driver": driver_version()}
    return facts


def driver_version() -> str:
    """As nvidia-smi says it, or that it does not."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return answer[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown: nvidia-smi does not answer"


# --- running ---------------------------------------------------------------------------------------------------------


def run_child(item: Item, options: Options, log: Any, limit_s: float) -> Iterator[dict[str, Any]]:
    """Run an item in a process of its own; yields what it reports, and at last how it ended, under "ended".

    Args:
        options: with what was measured before; these parts are left out.
        log: an open file for everything the process prints.
        limit_s: seconds after which the process and its children are killed.
    """
    command = [sys.executable, str(BENCHMARKS / "gpu_parts.py"), str(item.module), item.function]
    # Nothing is loaded from the Hub: without a network, asking it takes its time.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ends = time.monotonic() + limit_s
    # A group of its own, to be killed with all its children; no session of its own, or it might outlive this command.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    process = subprocess.Popen(command, **pipes, text=True, env=environment, process_group=0)
    lines: queue.Queue[str] = queue.Queue()

    def talk() -> None:
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:  # a process that died before it listened
            json.dump(asdict(options), stream)
        for line in process.stdout or ():
            if line.endswith("\n"):  # whole: the process was not killed while it wrote
                lines.put(line)
        lines.put("")

    threading.Thread(target=talk, daemon=True).start()
    try:
        while line := lines.get(timeout=max(0.0, ends - time.monotonic())):
            yield json.loads(line)
        code = 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            # All was reported, and a process that does not end by itself is ended below.
            code = process.wait(timeout=10)
        yield {"ended": f"its process ended with code {code}; the log may say why" if code else None}
    except queue.Empty:
        yield {"ended": f"stopped after {limit_s:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Results:
    """The entries of all items, and the three files that have them.

    An entry is the state of one item for one card, size and hash of sources.
    """

    def __init__(self, arguments: GpuArguments, items: Sequence[Item], started: float) -> None:
        self.started = started
        self.machine = describe(arguments.device)
        self.options = Options(arguments.device, arguments.tiny, arguments.cifar10)
        self.folder = Path(arguments.results)
        self.folder.mkdir(parents=True, exist_ok=True)
        source = next((path for path in (self.folder, Path(arguments.earlier)) if (path / "gpu.json").is_file()), None)
        self.entries: list[dict[str, Any]] = []
        if source is not None:
            self.entries = read_entries(source / "gpu.json")
            if source != self.folder and (source / "gpu.log").is_file():
                shutil.copyfile(source / "gpu.log", self.folder / "gpu.log")
        self.current = {item.name: self._find_or_add(item) for item in items}
        self.log = open(self.folder / "gpu.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  until the end

    @property
    def card(self) -> str:
        """What the results belong to."""
        return self.machine.get("gpu") or self.machine["cpu"]

    def _find_or_add(self, item: Item) -> dict[str, Any]:
        sources = sources_hash(item, self.options.cifar10)
        key = {"item": item.name, "card": self.card, "tiny": self.options.tiny, "sources": sources}
        for entry in self.entries:
            if all(entry[name] == value for name, value in key.items()):
                entry["current"] = True
                return entry
        entry = key | {"asks": item.asks, "state": "not started", "why": None, "planned": [], "parts": {}}
        self.entries.append(entry | {"machine": self.machine, "current": True})
        return self.entries[-1]

    def say(self, text: str) -> None:
        """To the terminal and the log."""
        line = f"[{time.monotonic() - self.started:4.0f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")

    def write(self) -> None:
        """JSON and page, each whole or not at all."""
        finished = [e for e in self.entries if e["current"] and e["state"] == "done"]
        superseded = [(e["item"], e["card"], e["tiny"]) for e in finished]
        self.entries = [
            e
            for e in self.entries
            if e["current"] or (e["parts"] and (e["item"], e["card"], e["tiny"]) not in superseded)
        ]
        write_json(self.folder / "gpu.json", {"entries": self.entries})
        write_bytes(self.folder / "gpu.md", page(self.entries, self.card, self.machine).encode())


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a `gpu.json`; whether they are current is for the caller to find out."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return [entry | {"current": False} for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this command ({error}); move it away.") from error


def measure(item: Item, results: Results, limit_s: float, whose: str) -> None:
    """Run what is left of one item, and enter it part by part."""
    entry = results.current[item.name]
    entry |= {"state": "running", "why": None, "machine": results.machine}
    done = {name: part["numbers"] for name, part in entry["parts"].items() if part["state"] == "done"}
    began = ""
    for record in run_child(item, replace(results.options, measured=done), results.log, limit_s):
        if "planned" in record:
            entry["planned"] = record["planned"]
        elif "begins" in record:
            began = record["begins"]
        elif "part" in record:
            entry["parts"][record["part"]] = record
            results.say(f"{item.name}: {record['part']}: {record['state']}, {record['seconds']} s{because(record)}")
        elif "failed" in record:
            entry["why"] = record["failed"]
        elif record["ended"] is not None and entry["why"] is None:
            during = f" (in the part {began!r})" if began and began not in entry["parts"] else ""
            limited = record["ended"].startswith("stopped")
            entry["why"] = f"{record['ended']}{during}{whose if limited else ''}"
        results.write()
    entry["state"] = state_of(entry)
    results.say(f"{item.name}: {entry['state']}{because(entry)}")
    results.write()


def state_of(entry: Mapping[str, Any]) -> str:
    """ "done" where every planned part is, "failed" where something went wrong, else "stopped"."""
    states = [entry["parts"].get(name, {}).get("state") for name in entry["planned"]]
    if entry["why"] is None and states and all(state == "done" for state in states):
        return "done"
    stopped = entry["why"] is not None and entry["why"].startswith("stopped")
    return "stopped" if stopped and "failed" not in states else "failed"


def because(state: Mapping[str, Any]) -> str:
    return f" ({state['why']})" if state["why"] else ""


def run(items: Sequence[Item], arguments: GpuArguments, results: Results) -> bool:
    """Measure the chosen items as far as they are not done; returns whether none failed."""
    deadline = results.started + 60 * arguments.minutes - RESERVED_SECONDS
    results.say("; ".join(f"{name} {value}" for name, value in results.machine.items()))
    results.write()
    chosen = [item for item in items if item.name in arguments.items]
    for item in chosen:
        entry, remaining = results.current[item.name], deadline - time.monotonic()
        if entry["state"] == "done":
            results.say(f"{item.name}: done before, with the same sources on the same card")
        elif remaining < min(LEAST_SECONDS, item.limit_s):
            if not entry["parts"]:
                entry["state"] = "not started"
            entry["why"] = f"the {arguments.minutes:g} minutes were over"
            results.say(f"{item.name}: not started{because(entry)}")
            results.write()
        else:
            shortened = remaining < item.limit_s
            whose = f", because the {arguments.minutes:g} minutes were over" if shortened else ", its limit"
            measure(item, results, min(item.limit_s, remaining), whose)
    print("\n" + markdown_table(SUMMARY_COLUMNS, map(summary_row, results.current.values())))
    results.log.close()
    return all(results.current[item.name]["state"] != "failed" for item in chosen)


# --- the page --------------------------------------------------------------------------------------------------------

SUMMARY_COLUMNS = ("item", "question", "state", "parts done", "seconds", "left")


def summary_row(entry: Mapping[str, Any]) -> list[str]:
    parts = entry["parts"].values()
    done = sum(part["state"] == "done" for part in parts)
    planned = str(len(entry["planned"])) if entry["planned"] else "?"
    left = ", ".join(name for name in entry["planned"] if entry["parts"].get(name, {}).get("state") != "done")
    if not entry["planned"]:
        left = "everything"
    state = entry["state"] + because(entry)
    return [entry["item"], entry["asks"], state, f"{done} of {planned}", f"{seconds_of(entry):.0f}", left or "nothing"]


def seconds_of(entry: Mapping[str, Any]) -> float:
    return sum(part["seconds"] for part in entry["parts"].values())


def page(entries: Sequence[Mapping[str, Any]], card: str, machine: Mapping[str, Any]) -> str:
    """The Markdown page: what was asked, what was found, and beside every ratio what chance does."""
    current = [entry for entry in entries if entry["current"]]
    others = [entry for entry in entries if not entry["current"]]
    lines = [f"# Measured on {card}", ""]
    if any(entry["tiny"] for entry in current):
        lines += ["Tiny models, to test the command: these figures say nothing about a model's speed.", ""]
    lines += [machine_line(machine), "", markdown_table(SUMMARY_COLUMNS, map(summary_row, current))]
    for entry in current:
        lines += [f"## {entry['item']}: {entry['asks']}", "", *entry_lines(entry)]
    if others:
        lines += [
            "# Other cards, other sources",
            "",
            markdown_table(("card", *SUMMARY_COLUMNS), map(other_row, others)),
        ]
    for entry in others:
        what = "other sources than today's" if entry["card"] == card else "another card"
        lines += [f"## {entry['item']} on {entry['card']} ({what})", "", machine_line(entry["machine"]), ""]
        lines += entry_lines(entry)
    return "\n".join(lines).rstrip() + "\n"


def other_row(entry: Mapping[str, Any]) -> list[str]:
    return [entry["card"] + (", tiny models" if entry["tiny"] else ""), *summary_row(entry)]


def machine_line(machine: Mapping[str, Any]) -> str:
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."


def entry_lines(entry: Mapping[str, Any]) -> list[str]:
    """What failed, then the tables, then the notes below them."""
    names = [*entry["planned"], *(name for name in entry["parts"] if name not in entry["planned"])]
    parts = [entry["parts"][name] for name in names if name in entry["parts"]]
    lines = []
    for part in parts:
        if part["state"] == "failed":
            lines.append(f"- **{part['part']}** failed: {part['why']}.")
            lines += [f"  - {failure}" for failure in part.get("failures", ())]
    lines += [""] if lines else []
    measured = [part for part in parts if "table" in part]
    tables: dict[str, dict[tuple[str, ...], list[list[str]]]] = {}  # section -> columns -> rows
    for part in measured:
        table = part["table"]
        tables.setdefault(table["section"], {}).setdefault(tuple(table["columns"]), []).extend(table["rows"])
    for section, with_columns in tables.items():
        lines += [f"### {section}", "", *(markdown_table(columns, rows) for columns, rows in with_columns.items())]
    notes = dict.fromkeys(note for part in measured for note in part["notes"])
    return [*lines, *(f"- {note}" for note in notes), ""]


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    dataclasses: Any = GpuArguments
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else list(argv))
        results = Results(arguments, ITEMS, started)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the item is ended, too
    return 0 if run(ITEMS, arguments, results) else 1


if __name__ == "__main__":
    sys.exit(main())
