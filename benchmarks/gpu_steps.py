"""A training step of stock models against conditioned ones on a GPU: time, peak memory and kernels, for `gpu.py`.

Steps, variants and statistics are those of `bench_step.py`. A part measures a group of variants in one model and mode; in
each of its rounds stock, stock again and each of them step once, so that every ratio has its own control beside it.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
from bench_step import (
    CONTROL,
    MEMORY,
    STOCK,
    TIMM,
    BenchArguments,
    TrainingStep,
    between,
    peak_memory,
    ratios,
    time_rounds,
    variants_of,
)
from gpu_parts import NOT_HERE, Options, Outcome, Part, free_memory, one_line
from torch.profiler import ProfilerActivity, profile

# What is measured in the same rounds: names of `bench_step.VARIANTS`. Another row here is another variant to measure.
GROUPS: dict[str, tuple[str, ...]] = {
    "identity": ("identity",),
    "svd, products": ("svd", "svd_products"),
    "preconditioned": ("preconditioned",),
    "svd, exact": ("svd", "svd_exact"),
}
# An SVD of each weight takes a GPU seconds: fewer rounds tell enough.
FEW_ROUNDS = {"svd, exact": 2}
# It also runs so many kernels that counting them would take longer than all else.
UNCOUNTED = ("svd_exact",)
# The cost of a refresh every n steps is computed from the rounds of a step with one and of one without.
REFRESHED = {"svd_products": "svd by products", "svd_exact": "svd by SVD"}
SHARED_BY = 10
# Sequences of 128 tokens, and images.
BATCHES = {"bert": 512, "vit": 128} | dict.fromkeys(TIMM, 64)
ROUNDS = 20
DTYPE = "bf16"

COLUMNS = (
    "model, batch",
    "variant",
    "step (ms)",
    "ratio to stock, median (quartiles)",
    "stock again in the same rounds",
    "peak memory (MB)",
    "kernels per step",
)
AIMS = (
    "Aims: identity at most 1.01 of stock's time and 1.002 of its memory; svd refreshed in every step at most 1.05, every 10 "
    "steps 1.01.",
    "Ratios are to stock's time in the same round. One within the spread of its control shows no difference.",
    f"Refreshed every {SHARED_BY} steps: computed, from the step without a refresh and a tenth of what one adds.",
    "Kernels: what torch's profiler saw run on the device in one step; copies and fills are counted apart.",
)


@dataclass(frozen=True)
class Case:
    """A model in a mode."""

    model: str
    mode: str

    @property
    def name(self) -> str:
        """For the names of parts."""
        return f"{self.model}, {'compiled' if self.mode == 'compile' else self.mode}"


# --- one part --------------------------------------------------------------------------------------------------------


class StepTimings:
    """Measures groups of variants; keeps the stock steps of the last case, because compiling them takes long."""

    step_of: type[TrainingStep] = TrainingStep
    batch_sizes: Mapping[str, int] = BATCHES
    rounds = ROUNDS

    def __init__(self, options: Options) -> None:
        # Every variant compiles the same functions again; beyond the limit they would run in eager mode.
        torch._dynamo.config.recompile_limit = 64
        self.options = options
        self.case: Case | None = None
        self.steps: dict[str, TrainingStep] = {}
        self.counted: dict[str, dict[str, Any]] = {}
        self.batches = {model: 2 if options.tiny else batch for model, batch in self.batch_sizes.items()}

    def arguments(self, model: str) -> BenchArguments:
        """In the terms of `bench_step.py`."""
        tiny = self.options.tiny
        sizes: dict[str, Any] = {"scale": "tiny", "sequence_length": 8} if tiny else {}
        if tiny and model == "vit":
            sizes["image_size"] = 32
        return BenchArguments(models=[model], batch_size=self.batches[model], device=self.options.device, **sizes)

    def run(self, case: Case, group: str) -> Outcome:
        """Measure a group; with half the batch, and so on, where the device's memory does not hold it."""
        while True:
            try:
                return self._measure(case, group)
            except torch.OutOfMemoryError as error:
                if self.batches[case.model] < 16:
                    raise
                message = str(error).splitlines()[0]
            self._drop()
            self.batches[case.model] //= 2
            print(f"{case.name}: on to a batch of {self.batches[case.model]}: {message}", file=sys.stderr)

    def _drop(self) -> None:
        self.case, self.steps, self.counted = None, {}, {}
        torch.compiler.reset()
        free_memory()

    def _measure(self, case: Case, group: str) -> Outcome:
        if case != self.case:
            self._drop()
            for name in (STOCK, CONTROL):
                self.steps[name], self.counted[name] = self._built(case, name)
            self.case = case
        variants = GROUPS[group]
        built = {name: self._built(case, name) for name in variants}
        steps = self.steps | {name: step for name, (step, _) in built.items()}
        counted = self.counted | {name: numbers for name, (_, numbers) in built.items()}
        rounds = 2 if self.options.tiny else FEW_ROUNDS.get(group, self.rounds)
        if group not in FEW_ROUNDS and not self.options.tiny:
            time_rounds(steps, 2, seed=0)
        seconds = time_rounds(steps, rounds, seed=1)
        return self._outcome(case, seconds, counted)

    def _built(self, case: Case, name: str) -> tuple[TrainingStep, dict[str, Any]]:
        """A step, and what one of it takes beside time."""
        base = torch.cuda.memory_allocated() if self.options.device == "cuda" else 0
        step = self.step_of(case.model, name, DTYPE, case.mode, self.arguments(case.model))
        numbers: dict[str, Any] = {"memory_bytes": peak_memory(step, base)}
        if self.options.device == "cuda" and name not in UNCOUNTED:
            try:
                numbers["events"] = dict(device_events(step, ProfilerActivity.CUDA))
            except (RuntimeError, AssertionError) as error:  # a profiler that does not work must not cost us the times
                numbers["uncounted"] = one_line(error)
        print(f"{case.name}: {name} is ready", file=sys.stderr, flush=True)
        return step, numbers

    def _outcome(
        self, case: Case, seconds: Mapping[str, Sequence[float]], counted: Mapping[str, Mapping[str, Any]]
    ) -> Outcome:
        seconds = dict(seconds) | shared(seconds)
        found, stock = ratios(seconds), counted[STOCK]
        model = f"{case.model}, {self.batches[case.model]}"
        rows = [row(model, STOCK, median(seconds[STOCK]), None, None, stock, stock)]
        for name in seconds:
            if name not in (STOCK, CONTROL):
                numbers = counted.get(name, {})
                rows.append(row(model, name, median(seconds[name]), found[name], found[CONTROL], numbers, stock))
        mode = {"eager": "eager", "compile": "compiled (torch.compile)"}[case.mode]
        everything = {
            "model": case.model,
            "mode": case.mode,
            "dtype": DTYPE,
            "batch": self.batches[case.model],
            "seconds": {name: [round(value, 6) for value in values] for name, values in seconds.items()},
            "ratios": found,
            "counted": counted,
        }
        length = self.arguments(case.model).sequence_length
        unit = f"sequences of {length} tokens" if case.model == "bert" else "images"
        notes = [f"{model} {unit} per step, {DTYPE} by autocast, fused AdamW, dropout 0.", *AIMS]
        if self.options.device == "cpu":
            notes += [
                f"Memory on a CPU: {MEMORY['cpu']}. Kernels: {NOT_HERE}, there is no profiler of kernels for a CPU."
            ]
        return Outcome(f"A step in {DTYPE}, {mode}", COLUMNS, rows, everything, notes=notes)


def shared(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Seconds of a step that is refreshed only every so often, round by round, for each step that is always refreshed."""
    return {
        f"{title}, every {SHARED_BY} steps": [
            plain + (refreshed - plain) / SHARED_BY for plain, refreshed in zip(seconds["svd"], seconds[name])
        ]
        for name, title in REFRESHED.items()
        if name in seconds
    }


def device_events(step: Callable[[], Any], activity: ProfilerActivity) -> Counter[str]:
    """How many events of each category a call of `step` has in the profiler's trace.

    On a GPU the categories are "kernel", "gpu_memcpy", "gpu_memset" and others that do not run there.
    """
    with profile(activities=[activity]) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return Counter(event["cat"] for event in events if "cat" in event)


# --- its row ---------------------------------------------------------------------------------------------------------


def row(
    model: str,
    name: str,
    seconds: float,
    ratio: Mapping[str, Any] | None,
    control: Mapping[str, Any] | None,
    numbers: Mapping[str, Any],
    stock: Mapping[str, Any],
) -> list[str]:
    """The cells of a variant; of stock without `ratio` and `control`.

    Args:
        model: with its batch.
        seconds: of a step.
        numbers: what was counted in one.
    """
    title = f"{REFRESHED[name]}, every step" if name in REFRESHED else name
    cells = [model, title, f"{1000 * seconds:,.2f}"]
    cells += [
        "" if each is None else f"{each['median']:.3f} ({between(each['quartiles'])})" for each in (ratio, control)
    ]
    if "memory_bytes" not in numbers:
        return [*cells, "", ""]
    share = "" if numbers is stock else f" ({numbers['memory_bytes'] / stock['memory_bytes']:.4f}x)"
    kernels = "not counted" if name in UNCOUNTED else kernels_cell(numbers, stock)
    return [*cells, f"{numbers['memory_bytes'] / 1e6:,.0f}{share}", kernels]


def kernels_cell(numbers: Mapping[str, Any], stock: Mapping[str, Any]) -> str:
    """Kernels, beside them copies and fills, and the difference from stock's."""
    if "events" not in numbers:
        return numbers.get("uncounted", NOT_HERE)
    kernels, others = (total(numbers["events"], names) for names in (KERNELS, COPIES))
    if not kernels:
        return "the profiler saw none"
    more = "" if numbers is stock or "events" not in stock else f" ({kernels - total(stock['events'], KERNELS):+,})"
    return f"{kernels:,}{more}, {others} copies"


KERNELS, COPIES = ("kernel",), ("gpu_memcpy", "gpu_memset")


def total(events: Mapping[str, int], categories: Sequence[str]) -> int:
    return sum(events.get(category, 0) for category in categories)


# --- the parts -------------------------------------------------------------------------------------------------------


def listed(timings: StepTimings, cases: Sequence[tuple[Case, str]]) -> list[Part]:
    """A part for each case and group, which share their timings."""

    def part(case: Case, group: str) -> Part:
        return Part(f"{case.name}: {group}", lambda: timings.run(case, group))

    return [part(case, group) for case, group in cases]


def parts(options: Options) -> list[Part]:
    """The parts of the item "steps", in order of worth: BERT-base and ViT-B."""
    eager, compiled = (tuple(Case(model, mode) for model in ("bert", "vit")) for mode in ("eager", "compile"))
    if options.tiny:  # generating code takes a CPU long, and one variant runs all that is ours
        cases = [*((eager[0], group) for group in GROUPS), (compiled[0], "identity"), (eager[1], "identity")]
        return listed(StepTimings(options), cases)
    quick = [group for group in GROUPS if group not in FEW_ROUNDS]
    cases = [(case, group) for case in (eager[0], compiled[0], eager[1], compiled[1]) for group in quick]
    return listed(StepTimings(options), [*cases, *((case, group) for group in FEW_ROUNDS for case in eager)])


def families(options: Options) -> list[Part]:
    """The parts of the item "families": the paper's other models."""
    try:
        import timm  # noqa: F401  an extra
    except ImportError as error:
        why = f"timm is not installed ({error})"
        return [Part("families", lambda: Outcome("The paper's other models", COLUMNS, [], None, notes=[why]))]
    if options.tiny:
        return listed(
            StepTimings(options), [(Case("deit", "eager"), "identity"), (Case("xcit", "eager"), "svd, products")]
        )
    cases = [(Case(model, mode), group) for mode in ("eager", "compile") for model in TIMM for group in GROUPS]
    exist = [
        (case, group) for case, group in cases if variants_of(case.model, GROUPS[group]) and group not in FEW_ROUNDS
    ]
    return listed(StepTimings(options), exist)
