"""A training step (forward, backward, optimizer) of a stock model against that of a spectrally conditioned one.

    python benchmarks/bench_step.py                                    # BERT-base and ViT-B/16, some minutes on a CPU
    python benchmarks/bench_step.py --device cuda --dtypes fp32 bf16 --modes eager compile --batch_size 32 --rounds 100
    python benchmarks/bench_step.py --models vit deit swin xcit davit  # the families of the paper's Table 7 (needs timm)

All variants, and stock a second time as the control, step in turns in one process: each round steps every one of them
once, and the ratio to stock is taken within the round, so that whatever else the machine does falls on both sides. What the
control's ratio leaves open, this machine cannot tell. Beside it stands what needs no clock: memory, floating-point
operations, elements written, and under `torch.compile` the kernels. Writes `bench_step_<device>.json` and `.md`.
"""

import importlib.util
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from math import comb, prod
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_specattn import AttentionSpec, SpectralConfig, fold, refresh
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes, write_json
from hf_specattn.layers import make_spectral
from hf_specattn.preconditioner import PreconditionerConfig
from hf_specattn.preconditioning import attach_preconditioner, find_output_projections
from hf_specattn.projections import find_projections
from hf_specattn.refreshing import recompute, recompute_by_products

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where `recipes` is
from recipes.run.memory import saved_for_backward, storages_of, total_bytes
from recipes.run.run_metrics import package_versions

STOCK, CONTROL = "stock", "stock again (A/A control)"
NOTHING = "–"
WARMUP_ROUNDS = 3


@dataclass(frozen=True)
class Variant:
    """What distinguishes a step from stock's.

    Args:
        prepare: changes a stock model, in place on its device.
        after_step: called with the model after each of the optimizer's steps; its time counts.
        folds: whether `fold` makes stock modules of it.
    """

    prepare: Callable[[nn.Module], None]
    after_step: Callable[[nn.Module], None] | None = None
    folds: bool = True


def conditioned(*args: Any, after_step: Callable[[nn.Module], None] | None = None, **kwargs: Any) -> Variant:
    """A variant by the arguments of [`SpectralConfig`]."""
    config = SpectralConfig(*args, **kwargs)
    return Variant(lambda model: condition_model(model, config), after_step)


# Another row here is another variant to choose.
VARIANTS = {
    "identity": conditioned("identity"),
    "identity_head": conditioned("identity", granularity="head"),
    "svd": conditioned("svd"),
    "svd_head": conditioned("svd", granularity="head"),
    # Refreshed in every step. Beside svd, `--refresh_every` has the shares of a refresh timed by itself.
    "svd_products": conditioned("svd", refresh_every=1, after_step=partial(refresh, exact=False)),
    "svd_exact": conditioned("svd", refresh_every=1, after_step=partial(refresh, exact=True)),
    "preconditioned": Variant(lambda model: precondition_model(model, PreconditionerConfig()), folds=False),
}
# timm's names of the paper's families, by scale; ViT-B itself is "vit".
TIMM = {
    "deit": {"base": "deit_base_patch16_224", "tiny": "deit_tiny_patch16_224"},
    "swin": {"base": "swin_base_patch4_window7_224", "tiny": "swin_tiny_patch4_window7_224"},
    "xcit": {"base": "xcit_medium_24_p16_224", "tiny": "xcit_nano_12_p16_224"},
    "davit": {"base": "davit_base", "tiny": "davit_tiny"},
}
TIMM_ATTENTION = AttentionSpec(
    ("Attention", "WindowAttention", "ChannelAttention", "XCA"),
    {"qkv": ("query", "key", "value")},
    query_heads="num_heads",
)
# They attend between channels, which leaves no heads to precondition.
WITHOUT_HEADS = ("xcit", "davit")
MODELS = ["bert", "vit", *TIMM]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as in pretraining here
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class BenchArguments:
    """Arguments of the benchmark; every combination of models, dtypes and modes is measured."""

    models: list[str] = field(
        default_factory=lambda: ["bert", "vit"],
        metadata={
            "help": "bert: BertForMaskedLM; vit: ViTForImageClassification; the others are timm's, whole and at 224 pixels.",
            "choices": MODELS,
        },
    )
    variants: list[str] = field(
        default_factory=lambda: ["identity", "svd"],
        metadata={"help": "What to measure against stock.", "choices": list(VARIANTS)},
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["fp32"], metadata={"help": "bf16: by autocast.", "choices": list(AUTOCAST)}
    )
    modes: list[str] = field(
        default_factory=lambda: ["eager"],
        metadata={"help": "compile: through torch.compile.", "choices": ["eager", "compile"]},
    )
    scale: str = field(
        default="base", metadata={"help": "base: BERT-base, ViT-B/16; tiny: for tests.", "choices": ["base", "tiny"]}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers. None: those of the scale."})
    batch_size: int = field(default=4, metadata={"help": "Sequences or images per step."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens per sequence (bert), at most 512."})
    image_size: int = field(default=224, metadata={"help": "Pixels per side (vit), a multiple of 16."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"choices": ["cpu", "cuda"]})
    rounds: int = field(default=30, metadata={"help": "Timed rounds; an interval needs at least 6."})
    refresh_every: list[int] = field(
        default_factory=lambda: [1, 10, 100],
        metadata={
            "help": "Beside svd: a step with its share of a refresh, by products and exact. Nothing: leave out."
        },
    )
    refresh_rounds: int = field(default=6, metadata={"help": "Timed rounds of refreshing, each beside a stock step."})
    seed: int = field(default=0, metadata={"help": "Decides weights, inputs and the order within a round."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder for the two files."})

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "batch_size", "sequence_length", "image_size", "rounds", "refresh_rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if min(self.refresh_every, default=1) < 1:
            raise ValueError(f"--refresh_every {min(self.refresh_every)} must be at least 1.")
        if self.sequence_length > 512:
            raise ValueError(f"--sequence_length {self.sequence_length} exceeds the 512 positions of BERT.")
        if self.image_size % 16:
            raise ValueError(f"--image_size {self.image_size} must be a multiple of the patch size, 16.")
        if whole := sorted({*self.models} & {*TIMM}):
            if self.num_hidden_layers is not None or self.image_size != 224:
                raise ValueError(
                    f"--models {' '.join(whole)} have their own number of layers and 224 pixels; leave out "
                    "--num_hidden_layers and --image_size."
                )
            if importlib.util.find_spec("timm") is None:
                raise ValueError(f"--models {' '.join(whole)} need timm; pip install timm, or leave them out.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu.")


# --- what is stepped -------------------------------------------------------------------------------------------------


class TimmClassifier(nn.Module):
    """A timm model that takes and gives what a transformers one does."""

    def __init__(self, name: str, num_labels: int) -> None:
        import timm  # an extra, which BERT and ViT do not need

        super().__init__()
        self.timm_model = timm.create_model(name, pretrained=False, num_classes=num_labels)
        attentions = [m for m in self.modules() if type(m).__name__ in TIMM_ATTENTION.class_names]
        self.config = SimpleNamespace(
            model_type="vit", num_channels=3, num_labels=num_labels, num_hidden_layers=len(attentions)
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        """The mean cross-entropy, as `loss`."""
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.timm_model(pixel_values), labels))

    def num_parameters(self) -> int:
        """As transformers models have it."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(name: str, arguments: BenchArguments) -> Any:
    """A stock model with the weights of the seed, on the CPU."""
    torch.manual_seed(arguments.seed)
    tiny = arguments.scale == "tiny"
    if name in TIMM:
        return TimmClassifier(TIMM[name][arguments.scale], 10 if tiny else 1000).train()
    sizes: dict[str, Any] = NO_DROPOUT | (TINY if tiny else {})
    if arguments.num_hidden_layers is not None:
        sizes["num_hidden_layers"] = arguments.num_hidden_layers
    if name == "bert":
        return BertForMaskedLM(BertConfig(**sizes | ({"vocab_size": 128} if tiny else {}))).train()
    classes: dict[str, Any] = {"num_labels": 10 if tiny else 1000}
    return ViTForImageClassification(ViTConfig(**sizes | classes, image_size=arguments.image_size)).train()


def build_batch(model: Any, arguments: BenchArguments) -> dict[str, Tensor]:
    """Random inputs with labels, on the device."""
    generator = torch.Generator().manual_seed(arguments.seed)
    rows, config = arguments.batch_size, model.config
    if config.model_type == "vit":
        size = (rows, config.num_channels, arguments.image_size, arguments.image_size)
        labels = torch.randint(config.num_labels, (rows,), generator=generator)
        batch = {"pixel_values": torch.randn(size, generator=generator), "labels": labels}
    else:
        tokens = torch.randint(config.vocab_size, (2, rows, arguments.sequence_length), generator=generator)
        batch = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
    return {key: value.to(arguments.device) for key, value in batch.items()}


def condition_model(model: nn.Module, config: SpectralConfig) -> None:
    """Condition in place on the model's device, timm's models by their own description.

    As `condition` does, but for the reports: their SVDs in float64 on a CPU would take longer than what a GPU measures.
    """
    architecture = TIMM_ATTENTION if isinstance(model, TimmClassifier) else None
    layers = [make_spectral(item.module, item.layout, config) for item in find_projections(model, architecture)]
    if config.method == "identity":
        return
    if layers[0].weight.device.type == "cuda":
        recompute_by_products(layers)
    else:
        for layer in layers:
            recompute(layer)


def precondition_model(model: nn.Module, config: PreconditionerConfig) -> None:
    """Precondition in place on the model's device, without the probe and the reports of `precondition`."""
    attach_preconditioner(model, find_output_projections(model), config)


class TrainingStep:
    """One variant: its model, optimizer and batch.

    Args:
        model: name of the model.
        variant: name in `VARIANTS`; anything else is stock.
        dtype: "fp32" or "bf16".
        mode: "eager" or "compile".
    """

    def __init__(self, model: str, variant: str, dtype: str, mode: str, arguments: BenchArguments) -> None:
        self.name = model
        self.model, self.batch = self.build(model, arguments)
        self.device, self.autocast = torch.device(arguments.device), AUTOCAST[dtype]
        self.model.to(self.device)
        self.after_step = None
        if variant in VARIANTS:
            VARIANTS[variant].prepare(self.model)
            self.after_step = VARIANTS[variant].after_step
        self.forward: Callable[..., Any] = torch.compile(self.model) if mode == "compile" else self.model
        # A rate so small that the model stays what it is over any number of rounds.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-7, fused=self.device.type == "cuda")

    def build(self, model: str, arguments: BenchArguments) -> tuple[Any, dict[str, Any]]:
        """A stock model on the CPU, and its batch on the device."""
        built = build_model(model, arguments)
        return built, build_batch(built, arguments)

    def loss(self, compiled: bool = True) -> Tensor:
        """The forward pass; without `compiled` in eager mode whatever the mode is."""
        forward = self.forward if compiled else self.model
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return forward(**self.batch).loss

    def __call__(self) -> float:
        """One step; returns its seconds, until the device is done."""
        self.synchronize()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.model)
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- what is measured ------------------------------------------------------------------------------------------------


def time_rounds(steps: Mapping[str, Callable[[], float]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each step in each round. Each second round goes through the order of the one before backwards."""
    generator, names = random.Random(seed), list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        names = names[::-1] if index % 2 else generator.sample(names, len(names))
        for name in names:
            seconds[name].append(steps[name]())
    return seconds


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval of the sign test for the median: the values of one rank from below and from above.

    It covers the median of independent values of any distribution with at least `confidence`. None for too few values
    (below 6 at 95 %).
    """
    count, rank, outside = len(values), 0, 0.0
    while 2 * (rank + 1) <= count:
        # The median lies below the value of rank `rank + 1` if at most `rank` of `count` coins show heads.
        outside += 2 * comb(count, rank) / 2**count
        if 1 - outside < confidence:
            break
        rank += 1
    ordered = sorted(values)
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For every variant but stock the ratio of its time to stock's in the same round."""
    result = {}
    for name in [name for name in seconds if name != STOCK]:
        values = [own / stock for own, stock in zip(seconds[name], seconds[STOCK])]
        quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        result[name] = {"median": median(values), "quartiles": quartiles[::2], "interval_95": median_interval(values)}
    return result


def peak_memory(step: TrainingStep, base: int) -> int:
    """Bytes that one variant needs for training; what exactly is in `MEMORY`.

    Args:
        base: bytes that were allocated on the CUDA device before `step` was built.
    """
    step()  # the optimizer's state exists from the first step on
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        return torch.cuda.max_memory_allocated(step.device) - base
    held = [*step.model.buffers()]
    for parameter in step.model.parameters():
        state = (item for item in step.optimizer.state[parameter].values() if isinstance(item, Tensor))
        held += [parameter, *state] if parameter.grad is None else [parameter, parameter.grad, *state]
    with saved_for_backward() as saved:
        step.loss()
    return total_bytes(storages_of(held) | saved)


REFRESHES = {"products": False, "exact": True}


def refreshing(steps: Mapping[str, TrainingStep], arguments: BenchArguments) -> dict[str, Any]:
    """Seconds of a refresh by products and by the SVD, and the ratio to stock of an svd step with its share of them.

    The refresh is timed by itself and its n-th part added to the svd step of the same round: every step counts, and no
    round has to wait for the hundredth.
    """
    dynamic = build_model(steps["svd"].name, arguments).to(arguments.device)
    condition_model(dynamic, SpectralConfig("svd", refresh_every=1))

    def timed(exact: bool) -> Callable[[], float]:
        def run() -> float:
            steps["svd"].synchronize()
            started = time.perf_counter()
            refresh(dynamic, exact=exact)
            steps["svd"].synchronize()
            return time.perf_counter() - started

        return run

    parts: dict[str, Callable[[], float]] = {STOCK: steps[STOCK], "svd": steps["svd"]}
    parts |= {name: timed(exact) for name, exact in REFRESHES.items()}
    time_rounds(parts, 1, arguments.seed)
    seconds = time_rounds(parts, arguments.refresh_rounds, arguments.seed)
    result: dict[str, Any] = {"seconds": {name: [round(x, 6) for x in values] for name, values in seconds.items()}}
    for name, every in product(REFRESHES, arguments.refresh_every):
        with_share = [step + own / every for step, own in zip(seconds["svd"], seconds[name])]
        label = f"svd, refresh_every {every}, {name}"
        result[label] = ratios({STOCK: seconds[STOCK], label: with_share})[label]
    return result


MEMORY = {
    "cpu": "bytes of parameters, gradients, buffers, optimizer state and all tensors saved for the backward pass "
    "(temporary workspace is not in it: torch keeps no peak on a CPU)",
    "cuda": "peak of torch.cuda.max_memory_allocated in a step of this variant alone",
}


class WrittenElements(TorchDispatchMode):
    """Counts the elements that operations other than matrix products and convolutions write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in flop_registry and not func.__name__.startswith("empty"):
            read = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and (func._schema.is_mutable or x.untyped_storage() not in read):
                    self.count += x.numel()
        return result


def copied_by_products(call: Callable[[], Any]) -> int:
    """Elements that matrix products and convolutions copy before they multiply, which only the profiler sees.

    `torch.addmm` copies what it adds to into its output first: a bias on a CPU, a matrix everywhere.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    products = {f"aten::{packet.__name__}" for packet in flop_registry}

    def copied(event: Any, within: bool) -> int:
        within = within or event.name in products
        own = prod(event.input_shapes[0]) if within and event.name == "aten::copy_" else 0
        return own + sum(copied(child, within) for child in event.cpu_children)

    return sum(copied(event, False) for event in profiler.events() if event.cpu_parent is None)


def count_work(step: TrainingStep) -> tuple[int, int]:
    """FLOPs and elements written by one forward and backward pass, with attention as plain products and a softmax.

    The fused attention kernels of a CPU have no FLOP formula in torch; the plain form counts the same on every device.
    Of products, what they copy counts, and not their results, which are the same for every variant.
    """

    def forward_and_backward() -> None:
        step.optimizer.zero_grad()  # adding to gradients would count
        step.loss(compiled=False).backward()

    with sdpa_kernel(SDPBackend.MATH):
        copied = copied_by_products(forward_and_backward)
        with FlopCounterMode(display=False) as flops, WrittenElements() as written:
            forward_and_backward()
    return flops.get_total_flops(), written.count + copied


def kernel_calls(codes: Iterable[str]) -> Counter[str]:
    """How often the wrappers that inductor wrote call each kernel; the running number at a name's end is left out."""
    calls: Counter[str] = Counter()
    for code in codes:
        generated = set(re.findall(r"^(\w+) = async_compile\.", code, re.MULTILINE))
        called = re.findall(r"^\s+(?:\w+ = )?([\w.]+?)(?:\.run)?\(", code, re.MULTILINE)
        kernels = [name for name in called if name in generated or name.startswith(("extern_kernels.", "torch.ops."))]
        calls.update(re.sub(r"_\d+$", "", name) for name in kernels)
    return calls


def compiled_kernels(step: TrainingStep) -> Counter[str]:
    """The kernels of the forward and backward pass of a compiled step."""
    from torch._inductor.utils import run_and_get_code  # slow to import, and needed here alone

    _, codes = run_and_get_code(lambda: step.loss().backward())
    return kernel_calls(codes)


def variants_of(model: str, variants: Sequence[str]) -> list[str]:
    """Those of the variants that a model can be."""
    return [name for name in variants if name != "preconditioned" or model not in WITHOUT_HEADS]


def check_fold(model: nn.Module, stock: nn.Module) -> None:
    """Raise a RuntimeError unless `model`, folded, has the modules of `stock`: then it also costs the same."""
    folded, expected = ({name: type(part) for name, part in whole.named_modules()} for whole in (fold(model), stock))
    if folded != expected:
        raise RuntimeError(f"After fold() the modules are not those of stock: {folded.items() ^ expected.items()}.")


# --- the whole measurement -------------------------------------------------------------------------------------------


def measure(model: str, dtype: str, mode: str, arguments: BenchArguments) -> dict[str, Any]:
    """Everything about one model in one dtype and mode; variant -> its numbers under "variants"."""
    torch.compiler.reset()
    steps: dict[str, TrainingStep] = {}
    variants: dict[str, dict[str, Any]] = {}
    names = variants_of(model, arguments.variants)
    for name in (STOCK, CONTROL, *names):
        base = torch.cuda.memory_allocated() if arguments.device == "cuda" else 0
        step = steps[name] = TrainingStep(model, name, dtype, mode, arguments)
        kernels = dict(sorted(compiled_kernels(step).items())) if mode == "compile" else None
        memory = peak_memory(step, base)
        flops, elements = count_work(step)
        variants[name] = {"memory_bytes": memory, "flops": flops, "elements_written": elements, "kernels": kernels}
        print(f"{model}, {dtype}, {mode}: {name} is ready", file=sys.stderr)
    time_rounds(steps, WARMUP_ROUNDS, arguments.seed)
    seconds = time_rounds(steps, arguments.rounds, arguments.seed)
    ratio_to_stock = ratios(seconds)
    for name, numbers in variants.items():
        numbers |= {"median_seconds": median(seconds[name]), "ratio": ratio_to_stock.get(name)}
        numbers["seconds"] = [round(value, 6) for value in seconds[name]]
    dynamic = refreshing(steps, arguments) if "svd" in steps and arguments.refresh_every else None
    for name in names:
        if VARIANTS[name].folds:
            check_fold(steps[name].model, steps[STOCK].model)
    stock = steps[STOCK].model
    size = {"layers": stock.config.num_hidden_layers, "parameters": stock.num_parameters()}
    return {"model": model, "dtype": dtype, "mode": mode, **size, "variants": variants, "refreshing": dynamic}


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, without anything that names the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else []
    facts = {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()}
    facts["threads"] = torch.get_num_threads()
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "float32_matmul": torch.get_float32_matmul_precision()}
    versions = package_versions()
    return facts | {package: versions[package] for package in ("python", "torch", "transformers", "hf_specattn")}


COLUMNS = (
    "variant",
    "step, median (ms)",
    "ratio to stock, median",
    "95 % interval",
    "middle half of the rounds",
    "memory (MB)",
    "FLOPs (G)",
    "other elements written (M)",
    "kernel calls",
)


def report(results: Sequence[Mapping[str, Any]], arguments: BenchArguments, machine: Mapping[str, Any]) -> str:
    """The Markdown page."""
    sizes = dict.fromkeys(MODELS, f"{arguments.image_size}² pixels")
    sizes["bert"] = f"{arguments.sequence_length} tokens"
    lines = ["# A training step: stock against spectrally conditioned", ""]
    lines += ["Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    for result in results:
        variants = result["variants"]
        lines += [f"## {result['model']} ({arguments.scale}), {result['dtype']}, {result['mode']}", ""]
        lines.append(
            f"{result['layers']} layers, {result['parameters']:,} parameters; {arguments.batch_size} x "
            f"{sizes[result['model']]}, dropout 0, AdamW, {arguments.rounds} rounds.\n"
        )
        rows = [row(name, numbers, variants[STOCK]) for name, numbers in variants.items()]
        lines += [markdown_table(COLUMNS, rows), *refresh_lines(result), *kernel_lines(variants)]
    return "\n".join([*lines, *EXPLANATIONS, f"- Memory: {MEMORY[arguments.device]}.", ""])


EXPLANATIONS = (
    "- Ratio: to stock's time in the same round. Its interval is that of the median (sign test). One that contains 1 or "
    "overlaps the control's shows no difference, which is not to show that there is none.",
    "- Dynamic: a step of svd with its share of the time of a refresh, against the stock step of the same round. Products "
    "and exact: `refresh(model, exact=False)` and `exact=True`.",
    "- The paper's Table 7 (A100, full training): its svd took 1.41 (ViT-B), 1.44 (DeiT-B), 1.29 (Swin-B), 1.20 (XCiT-M) and "
    "1.24 (DaViT) times the hours of stock.",
    "- FLOPs: of the matrix products and convolutions in a forward and a backward pass (torch's FlopCounterMode). The "
    "optimizer, the same for all, is not in it.",
    "- Other elements written: by all other operations of those passes, and copied by products, in eager mode with attention "
    "as plain products and a softmax. This is where a correction shows. W + C is formed in the forward and in the backward "
    "pass, so its share falls as the batch grows; identity in half precision is added to the outputs in place, and keeps its "
    "share (torch.compile fuses it).",
    "- After `fold` each conditioned variant has the same module types as stock (checked), so it costs the same. A "
    "preconditioner stays; it writes the heads' output once more in each direction, in half precision three times "
    "(torch.compile fuses it). XCiT and DaViT attend between channels, which leaves no heads to precondition.",
)


def row(name: str, numbers: Mapping[str, Any], stock: Mapping[str, Any]) -> list[str]:
    ratio, kernels = numbers["ratio"], numbers["kernels"]
    spread = [NOTHING] * 3
    if ratio is not None:
        interval = ratio["interval_95"]
        spread = [f"{ratio['median']:.3f}", "too few rounds" if interval is None else between(interval)]
        spread.append(between(ratio["quartiles"]))
    counts = [
        f"{numbers[key] / unit:,.1f}" + ("" if name == STOCK else f" ({numbers[key] / stock[key]:.4f}x)")
        for key, unit in (("memory_bytes", 1e6), ("flops", 1e9), ("elements_written", 1e6))
    ]
    calls = NOTHING if kernels is None else str(sum(kernels.values()))
    return [name, f"{1000 * numbers['median_seconds']:,.1f}", *spread, *counts, calls]


def refresh_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of steps with their share of a refresh; nothing where none was measured."""
    measured = result["refreshing"]
    if measured is None:
        return []
    rows = []
    for label, ratio in measured.items():
        if label != "seconds":
            method = label.rpartition(", ")[2]
            interval = "too few rounds" if ratio["interval_95"] is None else between(ratio["interval_95"])
            seconds = median(measured["seconds"][method])
            rows.append([label, f"{1000 * seconds:,.1f}", f"{ratio['median']:.3f}", interval])
    return [markdown_table(("dynamic", "a refresh, median (ms)", "ratio to stock, median", "95 % interval"), rows)]


def between(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def kernel_lines(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The kernels of stock with their calls, and for each variant what differs from that; nothing in eager mode."""
    stock, lines = variants[STOCK]["kernels"], []
    for name, numbers in variants.items() if stock is not None else ():
        change = Counter(numbers["kernels"])
        change.subtract(stock if name != STOCK else {})
        listed = ", ".join(f"{calls:+d} x `{kernel}`" for kernel, calls in sorted(change.items()) if calls)
        heading = "Kernel calls of stock" if name == STOCK else f"{name}, against those"
        lines += [f"{heading}: {listed or 'no difference'}.", ""]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    dataclasses: Any = BenchArguments
    parser = HfArgumentParser(dataclasses, description=__doc__.splitlines()[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else list(argv))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    logging.disable_progress_bar()
    machine = describe_machine(arguments.device)
    results = [
        measure(model, dtype, mode, arguments)
        for model, dtype, mode in product(arguments.models, arguments.dtypes, arguments.modes)
    ]
    text, output = report(results, arguments, machine), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    content = {"machine": machine, "settings": settings, "memory": MEMORY[arguments.device], "results": results}
    write_json(output / f"bench_step_{arguments.device}.json", content)
    write_bytes(output / f"bench_step_{arguments.device}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
