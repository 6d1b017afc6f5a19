"""One item of `gpu.py`, in a process of its own: its parts run in turn, and each reports as soon as it ends.

`gpu.py` starts this file as `gpu_parts.py MODULE FUNCTION`, gives it the [`Options`] as JSON on its standard input, and reads
one JSON object a line from its standard output; whatever is printed otherwise goes to standard error, which is the log. The
function takes the options and returns the [`Part`]s.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What stands in a cell that needs another device.
NOT_HERE = "not on this device"


@dataclass(frozen=True)
class Options:
    """What every item is told.

    Args:
        device: "cuda" or "cpu".
        tiny: models and matrices so small that a CPU runs everything, to test that it runs.
        cifar10: a folder that [`cifar10_files`] takes, for the items that read images; None where there is none.
        measured: the numbers of each part that is done, for those that follow from others.
    """

    device: str
    tiny: bool
    cifar10: str | None = None
    measured: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Outcome:
    """What a part measured.

    Args:
        section: heading on the page; parts that follow each other with the same section and columns share a table.
        columns: of the table.
        rows: of the table, as text.
        numbers: everything measured, as JSON takes it.
        failures: the checks that did not hold, each in a line.
        notes: lines below the table; the same line is printed once.
    """

    section: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Any
    failures: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Part:
    """A piece of an item that is measured, reported and remembered by itself."""

    name: str
    run: Callable[[], Outcome]


def cifar10_files(folder: str | Path) -> list[Path]:
    """The Parquet files of CIFAR-10, `train*` first: rows of an encoded image (`image` or `img`) and its `label`.

    Raises:
        ValueError: where one of the two kinds is missing.
    """
    found = [sorted(Path(folder).glob(f"{part}*.parquet")) for part in ("train", "test")]
    if not all(found):
        raise ValueError(f"{folder} has no train*.parquet or no test*.parquet of CIFAR-10.")
    return [file for files in found for file in files]


def as_json(value: Any) -> Any:
    """`value` with tuples as lists and, because JSON has none, nan and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def record_of(part: Part) -> dict[str, Any]:
    """Run a part; an error is a result, too, because the parts after it are worth having."""
    started = time.perf_counter()
    record: dict[str, Any] = {"part": part.name, "state": "done", "why": None}
    try:
        outcome = part.run()
    except Exception as error:
        traceback.print_exc()
        record |= {"state": "failed", "why": one_line(error)}
    else:
        table = {"section": outcome.section, "columns": outcome.columns, "rows": outcome.rows}
        record |= {"table": table, "notes": outcome.notes, "failures": outcome.failures, "numbers": outcome.numbers}
        if outcome.failures:
            record |= {"state": "failed", "why": f"{len(outcome.failures)} of its checks"}
    free_memory()
    return as_json(record | {"seconds": round(time.perf_counter() - started, 1)})


def free_memory() -> None:
    """Give the device what nothing refers to any more."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():
        # A failed kernel has broken the device for this process: let the next part say so.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """Type and first line of an error's message, cut where it becomes long."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:300]}"


def load_module(path: str | Path) -> Any:
    """Import a file as the module of its name."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str]) -> int:
    module, function = argv
    options = Options(**json.load(sys.stdin))
    finished = set(options.measured)
    with os.fdopen(os.dup(1), "w", buffering=1) as stream:
        os.dup2(2, 1)

        def report(record: Mapping[str, Any]) -> None:
            stream.write(json.dumps(record, allow_nan=False) + "\n")

        try:
            parts = getattr(load_module(module), function)(options)
        except Exception as error:
            traceback.print_exc()
            report({"failed": one_line(error)})
            return 1
        report({"planned": [part.name for part in parts]})
        for part in parts:
            if part.name not in finished:
                report({"begins": part.name})
                record = record_of(part)
                if record["state"] == "done":
                    options.measured[part.name] = record["numbers"]
                report(record)
    return 0


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(ended)  # at once: torch.compile's workers would take seconds to end
