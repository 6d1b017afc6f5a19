"""Which architectures can be conditioned and preconditioned: each built tiny, changed, and compared with an oracle.

    python scripts/survey.py

Every model type in transformers' masked-LM, image-classification and causal-LM mappings, and a list of timm's families,
some ten minutes on two CPU cores. Where the queries, keys and values come from is found by watching the stock model run
(`recipes.survey.tracing`), without the table of the package. One of four things is said of each:

- exact: the weights, outputs and gradients of the conditioned model, and the outputs of the folded one, are those of a
  stock model whose traced weights became W + C with NumPy, for both methods; every attention that ran is among them
  (what does not run, such as the cross-attention of a decoder alone, has no outputs to compare);
- refused: `condition` raised an error, which is quoted;
- not built: no small configuration was found, or the stock model does not run with it;
- wrong: anything else. There must be none.

That is said of query, key and value, and of value and output, where the output projection is the first linear map that
reads what the heads gave; and of the preconditioner (the row axis): its outputs and gradients are those of a stock model in
which what every attention gives, seen as it runs and not by the table, has rows of norm 1.

Each model has a process of its own, so that one that fails, hangs or takes too much memory ends alone.
"""

import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from hf_specattn.figures import markdown_table
from hf_specattn.files import require_writable, write_bytes
from recipes.run.command_line import ScriptParser, flag
from recipes.survey.checks import Result, survey
from recipes.survey.rows import Row, chosen_rows

STATUSES = ("exact", "refused", "not built", "wrong")
OTHERS = ("exact", "refused", "wrong")  # of those that were built and attend
ENCODER_TASKS = ("masked LM", "image classification")


@dataclass
class SurveyArguments:
    """Arguments of the survey."""

    output_file: str = flag("docs/survey.md", "Where the table goes.")
    only: list[str] | None = flag(
        None, "Survey only these rows, as `task/name` or `name`; the table goes to the terminal."
    )
    num_processes: int = flag(2, "How many models at once.")
    timeout_seconds: float = flag(300.0, "When a model's process is ended.")
    max_memory_gb: float = flag(16.0, "Address space of a model's process, in GiB.")
    disable_tqdm: bool = flag(False, "No progress bar.")

    def __post_init__(self) -> None:
        for name in ("num_processes", "timeout_seconds", "max_memory_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be > 0.")


# --- all of them, each in a process ----------------------------------------------------------------------------------


def _work(row: Row, max_memory_gb: float, sender: Connection) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    limit = int(max_memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sender.send(survey(row))


def survey_all(rows: Sequence[Row], arguments: SurveyArguments) -> list[Result]:
    # Forked processes have everything imported already.
    context = multiprocessing.get_context("fork")
    waiting = list(rows)
    running: list[tuple[Row, Any, Connection, float]] = []
    results: dict[Row, Result] = {}
    bar = tqdm(total=len(rows), desc="Survey", disable=True if arguments.disable_tqdm else None)
    while waiting or running:
        while waiting and len(running) < arguments.num_processes:
            row = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(row, arguments.max_memory_gb, sender))
            process.start()
            sender.close()
            running.append((row, process, receiver, time.monotonic() + arguments.timeout_seconds))
        for item in list(running):
            result = _finished(*item)
            if result is not None:
                running.remove(item)
                results[result.row] = result
                bar.update()
        time.sleep(0.02)
    bar.close()
    return [results[row] for row in rows]


def _finished(row: Row, process: Any, receiver: Connection, deadline: float) -> Result | None:
    """The result where there is one; a model that ended without any, or took too long, was not built."""
    result = None
    if receiver.poll():
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            result = Result(row, "not built", f"its process ended with exit code {process.exitcode}")
    elif time.monotonic() > deadline:
        result = Result(row, "not built", "it took too long")
    if result is not None:
        process.kill()
        process.join()
        receiver.close()
    return result


# --- the table -------------------------------------------------------------------------------------------------------


def report(results: Sequence[Result]) -> str:
    """The page: counts, then every row."""
    parts = [
        "# What can be conditioned, and preconditioned\n",
        "Made by `make survey` (`scripts/survey.py`, which says what the words mean); do not edit. "
        f"transformers {transformers.__version__}, timm {version('timm')}, torch {torch.__version__.partition('+')[0]}.\n",
        summary(results),
    ]
    for task in dict.fromkeys(result.row.task for result in results):
        chosen = [result for result in results if result.row.task == task]
        rows = [[f"`{r.row.name}`", r.status, r.output, r.preconditioned, attends(r), reasons(r)] for r in chosen]
        header = ["architecture", "query, key, value", "value, output", "preconditioned", "attention", "reason"]
        parts += [f"\n## {task}\n", markdown_table(header, rows)]
    return "\n".join(parts).rstrip() + "\n"


def attends(result: Result) -> str:
    return {True: "yes", False: "none ran", None: ""}[result.attends]


def reasons(result: Result) -> str:
    """Of conditioning query, key and value; of the others where that is another one."""
    found = {result.reason: result.reason} if result.reason else {}
    for name, reason in (("value, output", result.output_reason), ("preconditioner", result.preconditioned_reason)):
        if reason:
            found.setdefault(reason, f"{name}: {reason}")
    return "; ".join(found.values())


def summary(results: Sequence[Result]) -> str:
    rows = []
    for task in (*dict.fromkeys(result.row.task for result in results), "all"):
        chosen = [result for result in results if task in (result.row.task, "all")]
        counts = [*map([result.status for result in chosen].count, STATUSES), len(chosen)]
        for beside in ([result.output for result in chosen], [result.preconditioned for result in chosen]):
            counts += map(beside.count, OTHERS)
        rows.append([task, *map(str, counts)])
    others = [f"{what}: {status}" for what in ("value, output", "preconditioned") for status in OTHERS]
    table = markdown_table(["", *STATUSES, "rows", *others], rows)
    encoders = [r for r in results if r.row.task in ENCODER_TASKS and r.attends]
    exact = sum(result.status == "exact" for result in encoders)
    if not encoders:
        return table
    return (
        f"{table}\n\nOf the {len(encoders)} encoders (masked LM and image classification) that were built and attend, "
        f"{exact} are exact: {100 * exact / len(encoders):.0f} %.\n"
    )


def main() -> int:
    (arguments,) = ScriptParser(
        SurveyArguments, description=str(__doc__).splitlines()[0]
    ).parse_args_into_dataclasses()
    rows = chosen_rows(arguments.only)
    output = Path(arguments.output_file)
    if arguments.only is None:
        if not output.parent.is_dir():
            raise ValueError(
                f"--output_file={output}: there is no folder {output.parent}; make it, or name another file."
            )
        require_writable(output.parent, "The folder of --output_file,")
    results = survey_all(rows, arguments)
    text = report(results)
    if arguments.only is None:
        write_bytes(output, text.encode())
        print(summary(results))
    else:
        print(text)
    wrong = [result for result in results if "wrong" in (result.status, result.output, result.preconditioned)]
    for result in wrong:
        print(f"wrong: {result.row}: {reasons(result)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
