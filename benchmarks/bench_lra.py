"""Long Range Arena: a training step of `train_lra.py` against a plain PyTorch loop, and Nystrom against softmax attention.

    python benchmarks/bench_lra.py                                    # ListOps, some ten minutes on a CPU
    python benchmarks/bench_lra.py --batch_size 32 --attention_batch_size 32 --mixed_precision bf16 --rounds 50   # on a GPU

The plain loop has a `DataLoader`, `AdamW` and the same model written in plain PyTorch, from the same weights; before it is
timed its outputs are compared with those of ours. Both loops, each a second time or with a correction, step in turns: a
ratio is taken within a round, so that whatever else the machine does falls on both sides. What the controls' ratios leave
open, this machine cannot tell. Then the model with either attention at each length. Writes `bench_lra_<device>.json`
and `.md`.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from bench_step import WrittenElements, between, describe_machine, median_interval, time_rounds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser

from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import train_lra as script

from recipes.lra.lra_task import LraTask
from recipes.lra.nystromformer import LraNystromformerConfig, LraNystromformerForSequenceClassification, register
from recipes.run import runs
from recipes.run.loop import train_step
from recipes.run.memory import saved_for_backward, storages_of, total_bytes

PLAIN, PLAIN_AGAIN = "plain loop", "plain loop again (A/A control)"
OURS, OURS_AGAIN = "train_lra.py", "train_lra.py again (A/A control)"
CONDITIONED = {
    "train_lra.py, identity": ["--spectral_conditioning", "--lambda_", "1.0"],
    "train_lra.py, svd": ["--spectral_conditioning", "--spectral_method", "svd"],
}
# Against which each is timed.
AGAINST = {PLAIN_AGAIN: PLAIN, OURS: PLAIN, OURS_AGAIN: OURS, **dict.fromkeys(CONDITIONED, OURS)}
FEW = ["--train_samples", "2000", "--validation_samples", "10", "--test_samples", "10"]
CASES = {"small": ["--preset", "small", *FEW], "published": ["--preset", "lra", *FEW]}
# Softmax attention by torch's fused kernel, and by the products of its definition.
ATTENTIONS = {
    "nystrom": ("nystrom", "sdpa"),
    "softmax, sdpa": ("softmax", "sdpa"),
    "softmax, eager": ("softmax", "eager"),
}
WARMUP_ROUNDS = 3
# Flags of a tiny run, for tests.
TINY = ["--max_length", "16", "--listops_min_length", "5", "--hidden_size", "8", "--intermediate_size", "8"]
TINY += ["--num_landmarks", "4", "--train_samples", "40"]


@dataclass
class BenchLraArguments:
    """Arguments of the benchmark."""

    cases: list[str] = field(
        default_factory=lambda: list(CASES),
        metadata={"help": "ListOps of at most 64 tokens, or of the published length.", "choices": list(CASES)},
    )
    batch_size: int = field(
        default=4, metadata={"help": "Examples of a step in the published case; 32 are published."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096], metadata={"help": "Tokens at which the attentions are compared."}
    )
    attention_batch_size: int = field(default=2, metadata={"help": "Examples there."})
    num_landmarks: int = field(default=64, metadata={"help": "Landmarks there."})
    mixed_precision: str = field(default="no", metadata={"help": "Of both loops.", "choices": ["no", "bf16"]})
    rounds: int = field(default=30, metadata={"help": "Timed rounds; an interval needs at least 6."})
    tiny: bool = field(default=False, metadata={"help": "Tiny models and sequences, for tests."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder for the two files."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "attention_batch_size", "num_landmarks", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if bad := [length for length in self.lengths if length < 1 or length % self.num_landmarks]:
            raise ValueError(f"--lengths {bad[0]} must be a multiple of the {self.num_landmarks} landmarks.")


# --- the plain loop --------------------------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """Nystrom attention as published, whose formulas it follows one by one."""

    def __init__(self, config: LraNystromformerConfig) -> None:
        super().__init__()
        width, self.heads, self.landmarks = config.hidden_size, config.num_attention_heads, config.num_landmarks
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        kernel = config.conv_kernel_size
        self.conv = nn.Conv2d(
            self.heads, self.heads, (kernel, 1), padding=(kernel // 2, 0), bias=False, groups=self.heads
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend: x (batch, n, width), mask (batch, n)."""
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        with torch.autocast(x.device.type, enabled=False):
            rows, factor = mask[:, None, :, None], (width // self.heads) ** -0.25
            q, k, v = q.float() * rows * factor, k.float() * rows * factor, v.float() * rows
            few = (batch, self.heads, self.landmarks, length // self.landmarks, -1)
            q_few, k_few = q.reshape(few).mean(-2), k.reshape(few).mean(-2)
            first = torch.softmax(q @ k_few.transpose(-1, -2), -1)
            second = torch.softmax(q_few @ k_few.transpose(-1, -2), -1)
            third = torch.softmax(q_few @ k.transpose(-1, -2) - 1e9 * (1 - mask[:, None, None]), -1)
            attended = (first @ self.inverse(second)) @ (third @ v) + self.conv(v)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width).to(x.dtype))

    def inverse(self, matrix: Tensor) -> Tensor:
        """The iterated pseudo-inverse, six steps."""
        eye = torch.eye(matrix.shape[-1], device=matrix.device)
        inverse = matrix.transpose(-1, -2) / matrix.sum(-2).max()
        for _ in range(6):
            product = matrix @ inverse
            inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        return inverse


class PlainLayer(nn.Module):
    """Pre-norm layer."""

    def __init__(self, config: LraNystromformerConfig) -> None:
        super().__init__()
        width, hidden, dropout = config.hidden_size, config.intermediate_size, config.hidden_dropout_prob
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.dropout = PlainAttention(config), nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout))
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """As the attention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.feed_forward(self.feed_forward_norm(x))


class PlainNystromformer(nn.Module):
    """The published classifier of one sequence, in plain PyTorch; its parameters are named as ours."""

    def __init__(self, config: LraNystromformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.encoder = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, width),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
                "dropout": nn.Dropout(config.hidden_dropout_prob),
                "layers": nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers)),
                "final_norm": nn.LayerNorm(width),
            }
        )
        hidden = config.intermediate_size
        self.classifier = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, int(config.num_labels)))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, classes) of ids (batch, n)."""
        parts, mask = self.encoder, (ids != 0).float()
        places = torch.arange(ids.shape[1], device=ids.device)
        x = parts["dropout"](parts["word_embeddings"](ids) + parts["position_embeddings"](places))
        for layer in parts["layers"]:  # type: ignore[attr-defined]
            x = layer(x, mask)
        return self.classifier((parts["final_norm"](x) * mask[..., None]).mean(1))


class PlainLoop:
    """A training loop as anybody would write it, on the data, from the weights and with the settings of ours."""

    def __init__(self, ours: "OurLoop") -> None:
        arguments, self.accelerator = ours.arguments, ours.accelerator
        device = self.accelerator.device
        torch.manual_seed(arguments.seed)
        self.model = PlainNystromformer(ours.model.config).to(device)
        self.model.load_state_dict(ours.model.state_dict())
        train = ours.task.data.train
        ids, labels = (torch.from_numpy(part) for part in train.batch(np.arange(len(train)), arguments.padded_length))
        self.check_outputs(ours.model, ids[: arguments.per_device_train_batch_size].to(device))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=arguments.learning_rate, eps=1e-6, weight_decay=arguments.weight_decay
        )
        rows = arguments.per_device_train_batch_size
        self.loader = DataLoader(TensorDataset(ids, labels), rows, shuffle=True, drop_last=True)
        self.batches = self.endless()
        self.model.train()

    def endless(self) -> Iterator[Any]:
        """Pass after pass."""
        while True:
            yield from self.loader

    @torch.no_grad()
    def check_outputs(self, model: nn.Module, ids: Tensor) -> None:
        """Raise a RuntimeError unless the plain model gives what ours gives."""
        training = model.training
        difference = (self.model.eval()(ids) - model.eval()(input_ids=ids).logits).abs().max().item()
        model.train(training)
        if difference > 1e-4:
            raise RuntimeError(f"The plain model's logits differ from ours by {difference:.2g}: it is another model.")

    def step(self) -> None:
        """One batch: forward, backward, optimizer."""
        device = self.accelerator.device
        ids, labels = (part.to(device, non_blocking=True) for part in next(self.batches))
        with (
            torch.autocast(device.type, torch.bfloat16)
            if self.accelerator.mixed_precision == "bf16"
            else nullcontext()
        ):
            logits = self.model(ids)
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- ours ------------------------------------------------------------------------------------------------------------


class OurLoop:
    """What the script would train, made by its own functions, and the loop's steps one by one.

    Args:
        flags: Of the script.
        accelerator: Of all of them.
    """

    def __init__(self, flags: Sequence[str], accelerator: Accelerator) -> None:
        self.arguments, spectral = script.parse_arguments(list(flags), str(script.__doc__).splitlines()[0])
        self.accelerator, self.task = accelerator, LraTask(self.arguments, spectral, accelerator)
        self.model = script.build_model(self.arguments)
        samples = self.task.samples(script.SAMPLES)
        script.condition_model(self.model, self.arguments, spectral, samples, accelerator)
        self.training = runs.prepare(self.task, self.model, self.arguments, spectral, accelerator)
        self.training.wrapped.train()
        self.taken = 0

    @property
    def tokens(self) -> int:
        """Of a step, padding among them."""
        return self.task.amounts.batch * self.task.length

    def step(self) -> None:
        """What the loop does in every step, without logging, validation and checkpoints."""
        task, training, amounts = self.task, self.training, self.task.amounts
        training.schedule.set(amounts.budget.used(self.taken, 0.0))
        batches = task.micro_batches(self.taken * amounts.batch, amounts.accumulation, self.taken + 1)
        self.taken += 1
        norm = self.arguments.max_grad_norm
        train_step(task, training, self.accelerator, batches, amounts.accumulation, self.taken, norm)
        training.averaged.update()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """A function that does the work and returns its seconds, until the device is done."""

    def run() -> float:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started

    return run


def compared(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The ratio of times to others of the same rounds."""
    values = [own / other for own, other in zip(times, others)]
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": quartiles[::2], "interval_95": median_interval(values)}


def rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in values] for name, values in seconds.items()}


def measure_loops(flags: Sequence[str], rounds: int, accelerator: Accelerator) -> dict[str, Any]:
    """Seconds of the loops' steps in turns, their ratios, and tokens per second."""
    ours = {
        name: OurLoop([*flags, *extra], accelerator)
        for name, extra in {OURS: [], OURS_AGAIN: [], **CONDITIONED}.items()
    }
    plain = {name: PlainLoop(ours[OURS]) for name in (PLAIN, PLAIN_AGAIN)}
    steps = {name: timed(loop.step, accelerator.device) for name, loop in {**plain, **ours}.items()}
    time_rounds(steps, WARMUP_ROUNDS, seed=0)
    seconds = time_rounds(steps, rounds, seed=0)
    stock = ours[OURS]
    return {
        "parameters": stock.model.num_parameters(),
        "examples_per_step": stock.task.amounts.batch,
        "padded_length": stock.task.length,
        "tokens_per_second": {name: stock.tokens / median(values) for name, values in seconds.items()},
        # The speed of one over that of the other is the other's time over that of the one.
        "speed_ratios": {name: compared(seconds[other], seconds[name]) for name, other in AGAINST.items()},
        "seconds": rounded(seconds),
    }


# --- attention -------------------------------------------------------------------------------------------------------


class AttentionPasses:
    """Forward and backward pass of the published encoder with one kind of attention, at one length, dropout 0."""

    def __init__(self, name: str, length: int, arguments: BenchLraArguments, device: torch.device) -> None:
        kind, implementation = ATTENTIONS[name]
        sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8} if arguments.tiny else {}
        config = LraNystromformerConfig(
            attention_type=kind, num_landmarks=arguments.num_landmarks, max_position_embeddings=length, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LraNystromformerForSequenceClassification(config).to(device).train()
        self.model.set_attn_implementation(implementation)
        shape = (arguments.attention_batch_size, length)
        self.batch = {
            "input_ids": torch.randint(1, config.vocab_size, shape).to(device),
            "labels": torch.randint(10, shape[:1]).to(device),
        }

    def loss(self) -> Tensor:
        """The forward pass."""
        return self.model(**self.batch).loss

    def passes(self) -> None:
        """Both passes."""
        self.loss().backward()
        self.model.zero_grad()


def measure_attention(arguments: BenchLraArguments, device: torch.device) -> list[dict[str, Any]]:
    """At each length: seconds in turns, their ratio to Nystrom's, and memory."""
    results = []
    for length in arguments.lengths:
        memory = {name: attention_memory(name, length, arguments, device) for name in ATTENTIONS}
        passes = {name: AttentionPasses(name, length, arguments, device) for name in ATTENTIONS}
        steps = {name: timed(each.passes, device) for name, each in passes.items()}
        again = f"{next(iter(ATTENTIONS))} again (A/A control)"
        steps[again] = timed(AttentionPasses("nystrom", length, arguments, device).passes, device)
        time_rounds(steps, WARMUP_ROUNDS, seed=0)
        seconds = time_rounds(steps, arguments.rounds, seed=0)
        ratios = {name: compared(own, seconds["nystrom"]) for name, own in seconds.items() if name != "nystrom"}
        results.append({"length": length, "memory": memory, "time_ratios": ratios, "seconds": rounded(seconds)})
        print(f"attention at {length} tokens: done", file=sys.stderr)
    return results


def attention_memory(name: str, length: int, arguments: BenchLraArguments, device: torch.device) -> dict[str, int]:
    """What both passes need beside the model itself; what exactly is in `MEMORY`."""
    each = AttentionPasses(name, length, arguments, device)
    if device.type == "cuda":
        each.passes()
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        each.passes()
        synchronize(device)
        return {"bytes": torch.cuda.max_memory_allocated(device) - before}
    with saved_for_backward() as saved:
        each.loss()
    held = storages_of(each.model.parameters())
    with WrittenElements() as written:
        each.passes()
    return {"bytes": total_bytes(saved - held), "elements_written": written.count}


MEMORY = {
    "cpu": "bytes of all tensors saved for the backward pass, without the weights (torch keeps no peak on a CPU); elements "
    "that operations other than products and convolutions write in both passes, with fused attention as one operation",
    "cuda": "peak of torch.cuda.max_memory_allocated in both passes, above what the model holds",
}


# --- the whole measurement -------------------------------------------------------------------------------------------


def flags_of(case: str, arguments: BenchLraArguments) -> list[str]:
    """The script's flags of a case."""
    rows = ["--per_device_train_batch_size", str(arguments.batch_size)] if case == "published" else []
    return [*CASES[case], *rows, "--mixed_precision", arguments.mixed_precision, *(TINY if arguments.tiny else [])]


def interval_cells(ratio: dict[str, Any]) -> list[str]:
    interval = ratio["interval_95"]
    return [
        f"{ratio['median']:.3f}",
        "too few rounds" if interval is None else between(interval),
        between(ratio["quartiles"]),
    ]


SPREAD = ("median", "95 % interval", "middle half of the rounds")


def report(content: dict[str, Any]) -> str:
    """The Markdown page."""
    machine, settings = content["machine"], content["settings"]
    lines = ["# Long Range Arena: a training step, and its attention", ""]
    lines += ["Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    for case, found in content["loops"].items():
        lines += [f"## ListOps, {case}", ""]
        lines.append(
            f"{found['parameters']:,} parameters, {found['examples_per_step']} x {found['padded_length']:,} tokens (padding "
            f"among them), mixed precision {settings['mixed_precision']}, {settings['rounds']} rounds.\n"
        )
        rows = []
        for name, speed in found["tokens_per_second"].items():
            ratio = found["speed_ratios"].get(name)
            cells = ["–"] * 4 if ratio is None else [AGAINST[name], *interval_cells(ratio)]
            rows.append([name, f"{speed:,.0f}", *cells])
        lines.append(markdown_table(("step", "tokens/s", "tokens/s over those of", *SPREAD), rows))
    lines += ["## Nystrom against softmax attention", ""]
    lines.append(
        f"{settings['attention_batch_size']} sequences without padding, {settings['num_landmarks']} landmarks, forward and "
        f"backward pass of the whole model, float32, dropout 0, {settings['rounds']} rounds.\n"
    )
    rows = []
    for result in content["attention"]:
        for name, values in result["seconds"].items():
            ratio, memory = result["time_ratios"].get(name), result["memory"].get(name, {})
            spread = ["–"] * 3 if ratio is None else interval_cells(ratio)
            sizes = [f"{memory[key] / 1e6:,.1f}" if key in memory else "–" for key in ("bytes", "elements_written")]
            rows.append([f"{result['length']:,}", name, f"{1000 * median(values):,.1f}", *spread, *sizes])
    spread = tuple(f"{name} of the time over nystrom's" if name == "median" else name for name in SPREAD)
    header = ("tokens", "attention", "both passes, median (ms)", *spread, "memory (MB)", "other elements written (M)")
    lines += [markdown_table(header, rows), NOTE, f"- Memory: {MEMORY[content['device']]}.", ""]
    return "\n".join(lines)


NOTE = (
    "- Ratios are of the same round; their interval is that of the median (sign test). One that contains 1 or overlaps the "
    "control's shows no difference, which is not to show that there is none.\n"
    "- The plain loop: a DataLoader, AdamW at one learning rate, and the published model in plain PyTorch with the weights "
    "of ours, compared with it before. Ours has besides: the schedule, beta1, the order of batches that any number of "
    "processes shares, the mean of the loss, the gradient's norm, and the check that both are finite."
)


def main(argv: Sequence[str] | None = None) -> None:
    dataclasses: Any = BenchLraArguments
    parser = HfArgumentParser(dataclasses, description=" ".join(str(__doc__).split("\n\n")[0].split()))
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else list(argv))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    register()
    loops = {}
    with tempfile.TemporaryDirectory() as folder:
        where = ["--task", "listops", "--output_dir", str(Path(folder) / "run"), "--disable_tqdm"]
        first, _ = script.parse_arguments([*where, *flags_of(arguments.cases[0], arguments)], "")
        accelerator = runs.build_accelerator(first)
        for name in runs.LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        for case in arguments.cases:
            loops[case] = measure_loops([*where, *flags_of(case, arguments)], arguments.rounds, accelerator)
            accelerator.free_memory()
            print(f"loops, {case}: done", file=sys.stderr)
    device = accelerator.device
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    content = {"machine": describe_machine(device.type), "device": device.type, "settings": settings, "loops": loops}
    content |= {"attention": measure_attention(arguments, device), "memory": MEMORY[device.type]}
    text, output = report(content), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"bench_lra_{device.type}.json", content)
    write_bytes(output / f"bench_lra_{device.type}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
