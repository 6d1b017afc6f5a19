"""What `import hf_specattn` costs beyond `from transformers import PreTrainedModel, AutoModel`: time and resident memory.

    python benchmarks/bench_import.py                                                      # and what commands cost to start
    python benchmarks/bench_import.py --package_roots ../before . --labels before after    # another checkout beside it

Every measurement is a process of its own that imports what the baseline does, and then the package. The control imports
the baseline and then nothing new. All of them take turns, in each round once. Two differences are reported: what the second
import added within the process, and the time of both against the time of the baseline alone in the same round; there the
control is the baseline against itself, and what its spread leaves open this machine cannot tell. Beside that stands the
processors' time of each command until it has shown its help, or its plan, which other work on the machine hardly changes.
Writes `import.json` and `import.md`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench_step import describe_machine, median_interval, time_rounds
from transformers import HfArgumentParser

from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "hf_specattn"
BASELINE, CONTROL = "baseline", "baseline again (control)"
DIFFERENCES = ("seconds_added", "processor_seconds_added", "resident_bytes_added")

# Seconds of the processors in which a command should show its first line.
COMMAND_AIM, SCRIPT_AIM = 1.0, 6.0
PLANNED = ("pretrain_mlm", "train_image_classification", "train_detection", "train_lra")  # scripts with --show_plan

MEASURE = """
import json, sys, time
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
begun = time.perf_counter()
from transformers import PreTrainedModel, AutoModel
between, processor, memory, modules = time.perf_counter(), time.process_time(), resident(), len(sys.modules)
{statement}
ended = time.perf_counter()
print(json.dumps({{
    "seconds": ended - begun,
    "seconds_added": ended - between,
    "processor_seconds_added": time.process_time() - processor,
    "resident_bytes_added": resident() - memory,
    "modules_added": len(sys.modules) - modules,
    "file": getattr(sys.modules.get("hf_specattn"), "__file__", None),
}}))
"""


@dataclass
class ImportBenchArguments:
    """Arguments of the benchmark."""

    package_roots: list[str] = field(
        default_factory=lambda: [str(REPOSITORY)],
        metadata={"help": "Folders with the package, such as other checkouts; each is put first on the path."},
    )
    labels: list[str] = field(
        default_factory=lambda: ["this checkout"], metadata={"help": "What the results call them."}
    )
    rounds: int = field(
        default=15, metadata={"help": "Each measures everything once; one more before them is left out."}
    )
    command_rounds: int = field(default=3, metadata={"help": "Starts of each command; 0: none is started."})
    output_dir: str = field(default=str(REPOSITORY / "benchmarks" / "results"), metadata={"help": "For the results."})


def check(arguments: ImportBenchArguments) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: saying what to do.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError("the memory of a process is read from /proc, which only Linux has.")
    if arguments.rounds < 2:
        raise ValueError(f"--rounds {arguments.rounds} must be at least 2, for quartiles.")
    if arguments.command_rounds < 0:
        raise ValueError(f"--command_rounds {arguments.command_rounds} must be at least 0.")
    names = [BASELINE, CONTROL, *arguments.labels]
    if len(arguments.labels) != len(arguments.package_roots) or len(set(names)) != len(names):
        raise ValueError(
            f"--labels {' '.join(arguments.labels)}: give one to each of the {len(arguments.package_roots)} "
            f"--package_roots, all different, and none {BASELINE!r} or {CONTROL!r}."
        )
    for root in arguments.package_roots:
        if not (Path(root) / PACKAGE / "__init__.py").is_file():
            raise ValueError(f"--package_roots {root} has no {PACKAGE}/__init__.py; give the folder of a checkout.")


def measure(statement: str, root: Path | None) -> dict[str, Any]:
    """Run the measurement in a new process, with `root` first on its path.

    Raises:
        RuntimeError: if the process failed, or imported the package from elsewhere.
    """
    environment = os.environ | ({} if root is None else {"PYTHONPATH": str(root)})
    with tempfile.TemporaryDirectory() as folder:  # Python looks for modules where it is started
        done = subprocess.run(
            [sys.executable, "-c", MEASURE.format(statement=statement)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{statement!r} failed:\n{done.stderr[-3000:]}")
    numbers = json.loads(done.stdout.splitlines()[-1])
    file = numbers.pop("file")
    expected = None if root is None else root / PACKAGE / "__init__.py"
    if (file and Path(file).resolve()) != expected:
        raise RuntimeError(f"{statement!r} imported {file} and not {expected}.")
    return numbers


def commands(folder: str) -> dict[str, tuple[list[str], float]]:
    """Each command by the name that users know, with its arguments and its aim in seconds.

    Args:
        folder: an empty one, for scripts that look whether they could write there.
    """
    scripts = sorted((REPOSITORY / "scripts").glob("*.py"))
    started = {"specattn --help": ([str(Path(sys.executable).with_name("specattn")), "--help"], COMMAND_AIM)}
    started |= {f"{file.name} --help": ([sys.executable, str(file), "--help"], SCRIPT_AIM) for file in scripts}
    plan = ["--show_plan", "--output_dir", folder]
    planned = [file for file in scripts if file.stem in PLANNED]
    return started | {f"{file.name} --show_plan": ([sys.executable, str(file), *plan], SCRIPT_AIM) for file in planned}


def processor_seconds(command: Sequence[str]) -> float:
    """Run a command to its end; the seconds that it took of the processors.

    Raises:
        RuntimeError: if it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_commands(rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of the processors of each command, started so often in turns; once more before that, to be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        started = commands(folder)
        steps = {name: partial(processor_seconds, command) for name, (command, _) in started.items()}
        time_rounds(steps, 1, seed=0)
        seconds = time_rounds(steps, rounds, seed=1)
    return {name: {"aim": aim, "processor_seconds": seconds[name]} for name, (_, aim) in started.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, and the sign test's interval of the median (None for fewer than 6 values)."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "quartiles": [low, high], "interval_95": median_interval(values)}


def summarize(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Each variant's differences, over the rounds; the baseline's own time as it is."""
    results: dict[str, Any] = {BASELINE: {"seconds": spread([each["seconds"] for each in measured[BASELINE]])}}
    for name in [name for name in measured if name != BASELINE]:
        pairs = zip(measured[name], measured[BASELINE])
        results[name] = {
            **{key: spread([each[key] for each in measured[name]]) for key in DIFFERENCES},
            "modules_added": max(each["modules_added"] for each in measured[name]),
            "seconds_over_baseline": spread([own["seconds"] - baseline["seconds"] for own, baseline in pairs]),
        }
    return results


COLUMNS = (
    "",
    "added (s)",
    "middle half",
    "of the processors (s)",
    "resident memory added (MB)",
    "middle half",
    "modules added",
    "against the baseline alone (s)",
    "95 % interval",
)


def report(content: Mapping[str, Any]) -> str:
    """The Markdown page."""
    results, rounds = content["results"], content["rounds"]
    rows = []
    for name in [name for name in results if name != BASELINE]:
        numbers = results[name]
        seconds, processor, memory, over = (numbers[key] for key in (*DIFFERENCES, "seconds_over_baseline"))
        interval = over["interval_95"]
        rows.append(
            [
                name,
                f"{seconds['median']:.3f}",
                "{:.3f} to {:.3f}".format(*seconds["quartiles"]),
                f"{processor['median']:.3f}",
                f"{memory['median'] / 1e6:.1f}",
                "{:.1f} to {:.1f}".format(*(value / 1e6 for value in memory["quartiles"])),
                f"{numbers['modules_added']:,}",
                f"{over['median']:.3f}",
                "too few rounds" if interval is None else "{:.3f} to {:.3f}".format(*interval),
            ]
        )
    baseline = results[BASELINE]["seconds"]
    return (
        "# The import of the package\n\n"
        f"Machine: {', '.join(f'{name} {value}' for name, value in content['machine'].items())}, load "
        f"{content['load_before']} before the start.\n\n"
        f"Beyond `from transformers import PreTrainedModel, AutoModel`, which takes {baseline['median']:.2f} s (middle half "
        "{:.2f} to {:.2f}) here; medians of {} rounds, every number from a process of its own.\n\n".format(
            *baseline["quartiles"], rounds
        )
        + markdown_table(COLUMNS, rows)
        + "\nAdded: by the second import within the process; the processors' time leaves out what it waited for other work. "
        "Against the baseline alone: the time of both imports less that of the baseline's in another process of the same "
        "round.\n" + command_lines(content["commands"])
    )


def command_lines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the commands; nothing where none was started."""
    if not found:
        return ""
    rows = []
    for name, numbers in found.items():
        seconds = numbers["processor_seconds"]
        rows.append(
            [f"`{name}`", f"{median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}", f"{numbers['aim']:g}"]
        )
    columns = ("command", "seconds of the processors, median", "least to most", "aim")
    return "\n## Starting a command\n\n" + markdown_table(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    dataclasses: Any = ImportBenchArguments
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else list(argv))
        check(arguments)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    machine, load = describe_machine("cpu"), round(os.getloadavg()[0], 1)
    variants = {name: partial(measure, "pass", None) for name in (BASELINE, CONTROL)}
    for label, root in zip(arguments.labels, arguments.package_roots):
        variants[label] = partial(measure, f"import {PACKAGE}", Path(root).resolve())
    for variant in variants.values():
        variant()  # compiles the modules and brings them into the page cache
    results = summarize(time_rounds(variants, arguments.rounds, seed=0))
    content = {"machine": machine, "load_before": load, "rounds": arguments.rounds, "results": results}
    content["commands"] = start_commands(arguments.command_rounds) if arguments.command_rounds else {}
    text, output = report(content), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "import.json", content)
    write_bytes(output / "import.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
