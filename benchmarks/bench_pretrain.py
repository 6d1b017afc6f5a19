"""Where the time of scripts/pretrain_mlm.py goes: data, forward, backward, clipping, optimizer, correction; and its speed
against the bare step.

    python benchmarks/bench_pretrain.py                                       # the script's defaults, a minute on a CPU
    python benchmarks/bench_pretrain.py --rounds 50 --preset crammed-bert --train_file books.txt.gz --batch_size_ramp 0

Flags that are not its own go to the script, whose own functions take the steps. The bare step is forward, backward and
optimizer on one batch that is on the device already, with the same model and optimizer: no data, no clipping, no check
of the loss. Both are stepped in turns. The parts come from other steps, in which the device is waited for after each part.
Writes `bench_pretrain_<device>.json` and `.md`.
"""

import copy
import dataclasses
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from bench_step import between, describe_machine, median_interval, time_rounds
from transformers import HfArgumentParser

from hf_specattn import refresh
from hf_specattn.conditioning import refresh_interval
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json
from hf_specattn.layers import STEPS_SINCE_REFRESH

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import pretrain_mlm as script

from recipes.run import runs
from recipes.run.loop import train_step
from recipes.text.pretrain_task import MlmTask

SCRIPT, BARE = "script", "bare step"
SVD = ["--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "1"]
VARIANTS = {
    "stock": [],
    "identity": ["--spectral_conditioning", "--lambda_", "1.0"],
    "svd_products": [*SVD, "--spectral_exact_refresh", "False"],
    "svd_exact": [*SVD, "--spectral_exact_refresh", "True"],
}
# In the order of a step; the rest is what the others leave of the whole.
PARTS = ("data", "to the device", "forward", "backward", "clipping", "optimizer", "correction")
REST = "the rest"


@dataclass
class PretrainBenchArguments:
    """Arguments of the benchmark; all others are those of pretrain_mlm.py."""

    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS),
        metadata={"help": "svd is refreshed after every step.", "choices": list(VARIANTS)},
    )
    rounds: int = field(default=10, metadata={"help": "Timed steps of each kind; an interval needs at least 6."})
    results_dir: str = field(default="benchmarks/results", metadata={"help": "Folder for the two files."})

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds} must be at least 1.")


class Timed:
    """Something whose calls are timed, or those of one method of it; in all else it is as it was."""

    def __init__(self, wrapped: Any, clock: "Clock", part: str, method: str | None = None) -> None:
        self._wrapped, self._clock, self._part, self._method = wrapped, clock, part, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part(self._part):
            return self._wrapped(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        with self._clock.part(self._part):
            return self._wrapped[key]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return Timed(found, self._clock, self._part) if name == self._method else found


class Clock:
    """Seconds of each part, until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside to one part."""
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_forward(model: torch.nn.Module, clock: Clock) -> list[Any]:
    """Count the forward passes of a model; returns the hooks, to be removed."""
    running: list[Any] = []

    def before(module: torch.nn.Module, args: Any) -> None:
        running.append(clock.part("forward"))
        running[-1].__enter__()

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [model.register_forward_pre_hook(before), model.register_forward_hook(after)]


class PretrainRun:
    """What the script would train, made by its own functions, and its steps one by one.

    Args:
        flags: of the script.
        accelerator: of all runs.
    """

    def __init__(self, flags: Sequence[str], accelerator: Accelerator) -> None:
        self.arguments, spectral = script.parse_arguments(list(flags), str(script.__doc__).splitlines()[0])
        self.accelerator = accelerator
        self.task = MlmTask(self.arguments, accelerator)
        self.rows = self.task.amounts.batch
        model = script.build_model(self.arguments, self.task.vocab_size)
        samples = self.task.samples(script.SAMPLES)
        script.condition_model(model, self.arguments, spectral, samples, accelerator)
        self.training = runs.prepare(self.task, model, self.arguments, spectral, accelerator)
        self.training.wrapped.train()
        self.every = refresh_interval(model)
        # A rate so small that the model stays what it is over any number of steps.
        for group in self.training.optimizer.param_groups:
            group["lr"] = 1e-9
        self.step, self.position = 0, 0
        self.fixed = self._fixed_batch()

    def take(self, clock: Clock | None = None) -> None:
        """One step of the script: its batch, `train_step`, refresh; with a clock the parts are timed."""
        accelerator, task, training, correct = self.accelerator, self.task, self.training, refresh
        hooks: list[Any] = []
        if clock is not None:
            task = copy.copy(task)
            task.data = dataclasses.replace(task.data, train=Timed(task.data.train, clock, "data"))  # type: ignore[arg-type]
            task.rule = _WithTimedInputs(task.rule, clock)  # type: ignore[assignment]
            task.order = Timed(task.order, clock, "data", "batch")  # type: ignore[assignment]
            optimizer: Any = _TimedOptimizer(training.optimizer, clock)
            training = dataclasses.replace(training, optimizer=optimizer)
            hooks = time_forward(training.wrapped, clock)
            accelerator = _TimedAccelerator(accelerator, clock)  # type: ignore[assignment]
            correct = Timed(refresh, clock, "correction")  # type: ignore[assignment]
        self.step += 1
        micro_steps, norm = self.task.amounts.accumulation, self.arguments.max_grad_norm
        batches = task.micro_batches(self.position, micro_steps, self.step)
        train_step(task, training, accelerator, batches, micro_steps, self.step, norm)
        for hook in hooks:
            hook.remove()
        if self.every is not None and self.step % self.every == 0:
            correct(training.model, exact=training.exact_refresh)
        self.position += self.rows

    def take_bare(self) -> None:
        """Forward, backward and optimizer, as often as the script, on one batch that is on the device."""
        micro_steps = self.arguments.gradient_accumulation_steps
        for _ in range(micro_steps):
            self.accelerator.backward(self.training.wrapped(**self.fixed).loss / micro_steps)
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()
        for layer in STEPS_SINCE_REFRESH:  # a forgotten refresh is an error, and the bare step has none
            STEPS_SINCE_REFRESH[layer] = 0

    def timed(self, work: Callable[[], None]) -> Callable[[], float]:
        """A function that does the work and returns its seconds."""

        def run() -> float:
            synchronize(self.accelerator.device)
            started = time.perf_counter()
            work()
            synchronize(self.accelerator.device)
            return time.perf_counter() - started

        return run

    def _fixed_batch(self) -> dict[str, torch.Tensor]:
        rows = self.task.order.batch(0, self.rows).share(
            0, self.arguments.gradient_accumulation_steps, 0, self.accelerator.num_processes
        )
        sequences = self.task.data.train[rows.indices]
        masked = self.task.rule.apply(sequences, rows.indices, seed=self.arguments.seed, epoch=rows.epochs)
        return masked.model_inputs(self.accelerator.device, self.task.sparse)


class _WithTimedInputs(Timed):
    """A masking rule whose batches are timed on their way to the device, too."""

    def __init__(self, rule: Any, clock: Clock) -> None:
        super().__init__(rule, clock, "data")

    def apply(self, *args: Any, **kwargs: Any) -> Timed:
        with self._clock.part("data"):
            masked = self._wrapped.apply(*args, **kwargs)
        return Timed(masked, self._clock, "to the device", "model_inputs")


class _TimedOptimizer(Timed):
    def __init__(self, optimizer: Any, clock: Clock) -> None:
        super().__init__(optimizer, clock, "optimizer")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return Timed(found, self._clock, "optimizer") if name in ("step", "zero_grad") else found


class _TimedAccelerator(Timed):
    PARTS = {"backward": "backward", "clip_grad_norm_": "clipping"}  # noqa: RUF012

    def __init__(self, accelerator: Any, clock: Clock) -> None:
        super().__init__(accelerator, clock, "")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return Timed(found, self._clock, self.PARTS[name]) if name in self.PARTS else found


def measure(run: PretrainRun, rounds: int) -> dict[str, Any]:
    """Seconds of the script's step and of the bare one in turns; then the parts."""
    steps = {SCRIPT: run.timed(run.take), BARE: run.timed(run.take_bare)}
    time_rounds(steps, 2, seed=0)
    seconds = time_rounds(steps, rounds, seed=0)
    parts, wholes = defaultdict(list), []
    for _ in range(rounds):
        clock = Clock(run.accelerator.device)
        wholes.append(run.timed(lambda clock=clock: run.take(clock))())
        for name in PARTS:
            parts[name].append(clock.seconds[name])
        parts[REST].append(wholes[-1] - sum(clock.seconds.values()))
    shares = [bare / own for own, bare in zip(seconds[SCRIPT], seconds[BARE])]
    tokens = run.rows * run.arguments.max_seq_length
    return {
        "tokens_per_step": tokens,
        "tokens_per_second": {name: tokens / median(values) for name, values in seconds.items()},
        "share_of_bare": {"median": median(shares), "interval_95": median_interval(shares)},
        "parts_seconds": {name: median(values) for name, values in parts.items()},
        "parts_whole_seconds": median(wholes),
        "seconds": {name: [round(value, 6) for value in values] for name, values in seconds.items()},
    }


def report(content: dict[str, Any]) -> str:
    """The Markdown page."""
    machine, results = content["machine"], content["results"]
    lines = ["# Where the time of pretraining goes", ""]
    lines += ["Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    flags = " ".join(content["script_flags"]) or "none, so the script's defaults"
    lines += [f"Flags of `pretrain_mlm.py`: {flags}. {content['rounds']} steps of each kind.", ""]
    rows = []
    for name, numbers in results.items():
        interval = numbers["share_of_bare"]["interval_95"]
        speed = numbers["tokens_per_second"]
        rows.append(
            [
                name,
                f"{numbers['tokens_per_step']:,}",
                f"{speed[SCRIPT]:,.0f}",
                f"{speed[BARE]:,.0f}",
                f"{numbers['share_of_bare']['median']:.3f}",
                "too few rounds" if interval is None else between(interval),
            ]
        )
    header = (
        "variant",
        "tokens per step",
        "tokens/s, script",
        "tokens/s, bare step",
        "script / bare",
        "95 % interval",
    )
    lines += [markdown_table(header, rows), "Milliseconds of each part in a step (median), the device waited for:", ""]
    names = [*PARTS, REST]
    rows = []
    for variant, numbers in results.items():
        cells = [f"{1000 * numbers['parts_seconds'][name]:,.1f}" for name in names]
        rows.append([variant, *cells, f"{1000 * numbers['parts_whole_seconds']:,.1f}"])
    lines += [markdown_table(("variant", *names, "whole"), rows)]
    return "\n".join([*lines, NOTE, ""])


NOTE = (
    "Script / bare compares two steps of the same round of the same model, so for svd the bare step has W + C in it and the "
    "script's step the refresh besides. The rest is the mean of the loss over processes and the check that it is finite."
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(
        PretrainBenchArguments,  # type: ignore[arg-type]
        description=" ".join(__doc__.split("\n\n")[0].split()),
        allow_abbrev=False,
    )
    try:
        arguments, flags = parser.parse_args_into_dataclasses(
            args=sys.argv[1:] if argv is None else list(argv), return_remaining_strings=True
        )
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        where = ["--output_dir", folder, "--disable_tqdm"]
        first, _ = script.parse_arguments([*flags, *where], "")
        accelerator = runs.build_accelerator(first)
        # Of the package: that bare steps refresh nothing, which is as it should be.
        for logger in runs.LOGGERS:
            logging.getLogger(logger).setLevel(logging.ERROR)
        for name in arguments.variants:
            torch.compiler.reset()
            run = PretrainRun([*flags, *where, *VARIANTS[name]], accelerator)
            results[name] = measure(run, arguments.rounds)
            accelerator.free_memory()
            print(f"{name}: done", file=sys.stderr)
    device = accelerator.device.type
    content = {"machine": describe_machine(device), "script_flags": list(flags), "rounds": arguments.rounds}
    content |= {"settings": asdict(first) | {"output_dir": None}, "results": results}
    text, output = report(content), Path(arguments.results_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"bench_pretrain_{device}.json", content)
    write_bytes(output / f"bench_pretrain_{device}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
