"""Whether a device computes W + C right, in every precision: the checks of `gpu.py`.

The references are float64 on the CPU and share no code with the library: C comes from NumPy, block by block. What is allowed
follows from the precision's epsilon and the size of the reference. Whole models are held to what stock of the same
architecture loses at the same precision, because softmax and layer norms amplify rounding by themselves.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from gpu_parts import NOT_HERE, Options, Outcome, Part, one_line
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_specattn import SpectralConfig, condition, fold, refresh
from hf_specattn.layers import ProjectionLayout, make_spectral, spectral_layers
from hf_specattn.polar import ACCURACY, KAPPA_LIMIT
from hf_specattn.projections import find_projections
from hf_specattn.refreshing import recompute

QKV = ("query", "key", "value")
CHECK_COLUMNS = ("check", "measured", "allowed", "passed")


# --- precisions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """How a product is computed.

    Args:
        name: for the page.
        weights: the dtype of weights and inputs.
        autocast: to which dtype, if any.
        tf32: whether products of float32 matrices may round their operands to TF32.
    """

    name: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def output_eps(self) -> float:
        """Of what a projection returns."""
        return torch.finfo(self.autocast or self.weights).eps

    @property
    def operand_eps(self) -> float:
        """Of the rounding that a product's operands suffer; TF32 keeps 10 bits of the mantissa."""
        if self.tf32:
            return 2.0**-10
        return self.output_eps if self.output_eps > torch.finfo(torch.float32).eps else 0.0

    def tolerance(self, terms: int) -> float:
        """How far a sum of this many products may be off, relative to the largest result: rounding of the result, of both
        operands, and of a sum in float32, whose errors grow as those of a random walk."""
        return self.output_eps + 2 * self.operand_eps + terms**0.5 * torch.finfo(torch.float32).eps

    def missing_on(self, device: str) -> str | None:
        """Why a device does not have it."""
        return "TF32 is a format of NVIDIA's GPUs" if self.tf32 and device == "cpu" else None

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Products of float32 matrices as this precision has them."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def casting(self, device: str) -> Any:
        """The context of a forward pass."""
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)


FLOAT32, TF32 = Precision("float32"), Precision("TF32", tf32=True)
BF16, FP16 = (
    Precision(f"{name} by autocast", autocast=dtype)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
)
BF16_WEIGHTS, FP16_WEIGHTS = Precision("bf16 weights", torch.bfloat16), Precision("fp16 weights", torch.float16)


class Checks:
    """The rows of one part: what was measured, what is allowed."""

    def __init__(self, section: str, notes: Sequence[str] = ()) -> None:
        self.outcome = Outcome(section, CHECK_COLUMNS, [], [], [], notes)

    def at_most(self, name: str, measured: float, allowed: float, form: str = ".1e") -> None:
        """A number that must not exceed another; nan never passes."""
        passed = bool(measured <= allowed)
        cells = [name, format(measured, form), format(allowed, form), "yes" if passed else "**no**"]
        self.outcome.rows = [*self.outcome.rows, cells]
        self.outcome.numbers.append({"check": name, "measured": measured, "allowed": allowed, "passed": passed})
        if not passed:
            failure = f"{name}: {cells[1]}, where {cells[2]} is allowed"
            self.outcome.failures = [*self.outcome.failures, failure]

    def raised(self, name: str, error: Exception) -> None:
        """A check that an error kept from being made."""
        self.outcome.rows = [*self.outcome.rows, [name, one_line(error), "", "**no**"]]
        self.outcome.numbers.append({"check": name, "error": one_line(error), "passed": False})
        self.outcome.failures = [*self.outcome.failures, f"{name}: {one_line(error)}"]

    def missing(self, name: str, why: str) -> None:
        """A check that this device has nothing for."""
        self.outcome.rows = [*self.outcome.rows, [name, f"{NOT_HERE}: {why}", "", ""]]
        self.outcome.numbers.append({"check": name, "not_on_this_device": why})


def greatest_difference(value: Tensor, expected: Tensor) -> float:
    """Of the entries, relative to the greatest expected one; nan where either has one."""
    expected = expected.double().cpu()
    return ((value.double().cpu() - expected).abs().max() / expected.abs().max()).item()


# --- one projection --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A projection of one layout."""

    name: str
    layout: ProjectionLayout
    in_features: int
    conv1d: bool = False


def cases(tiny: bool) -> list[Case]:
    """Every layout that the library knows, at head dimension 64 (8 in tiny models)."""
    dim = 8 if tiny else 64
    width = 4 * dim
    return [
        Case("separate", ProjectionLayout(("query",), (4,), (dim,)), width),
        Case("separate, more rows than columns", ProjectionLayout(("query",), (8,), (dim,)), width),
        Case("fused Conv1D", ProjectionLayout(QKV, (4, 4, 4), (dim,) * 3), width, conv1d=True),
        Case("fused, grouped keys and values", ProjectionLayout(QKV, (4, 2, 2), (dim,) * 3), width),
        Case("interleaved", ProjectionLayout(QKV, (4, 4, 4), (dim,) * 3, groups=4), width),
    ]


METHODS = {"identity": {"lambda_": 10.0}, "svd": {}}
# Of the weights that are drawn: an svd correction is found to some times this many epsilons, by any algorithm.
KAPPA = 10.0


def draw_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`(rows, columns)` in float64 with geometric singular values from 1 to 1 / KAPPA."""
    left, right = (
        torch.linalg.qr(torch.randn(size, min(rows, columns), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return left * torch.logspace(0, -np.log10(KAPPA), min(rows, columns), dtype=torch.float64) @ right.mT


def rows_of_heads(layout: ProjectionLayout) -> dict[str, list[list[int]]]:
    """For each projection and head its rows: the groups follow each other, and in a group the projections and their heads."""
    rows: dict[str, list[list[int]]] = {name: [] for name in layout.projections}
    first = 0
    for _ in range(layout.groups):
        for name, heads, dim in zip(layout.projections, layout.heads, layout.head_dims):
            for _ in range(heads // layout.groups):
                rows[name].append(list(range(first, first + dim)))
                first += dim
    return rows


def blocks_of(heads: Sequence[Sequence[int]], spectral: SpectralConfig) -> list[list[int]]:
    """The rows of each matrix that has a C of its own: a head's, or all heads' together."""
    return [list(rows) for rows in heads] if spectral.granularity == "head" else [[*chain.from_iterable(heads)]]


def effective_by_numpy(weight: np.ndarray, layout: ProjectionLayout, spectral: SpectralConfig) -> np.ndarray:
    """W + C of an `(out_features, in_features)` weight in float64, block by block."""
    effective = weight.copy()
    for name, heads in rows_of_heads(layout).items():
        for rows in blocks_of(heads, spectral):
            block = weight[rows]
            if spectral.method == "identity":
                effective[rows] += spectral.lambda_for(name) * np.eye(*block.shape)
            else:
                left, sigma, right = np.linalg.svd(block, full_matrices=False)
                effective[rows] += sigma[0] * (left @ right)
    return effective


def new_layer(case: Case, spectral: SpectralConfig, precision: Precision, device: str) -> Any:
    """The conditioned layer of a case, and float64 copies on the CPU of what it stores: weight as rows by columns, bias."""
    generator = torch.Generator().manual_seed(0)
    rows = case.layout.out_features
    module: Any = Conv1D(rows, case.in_features) if case.conv1d else nn.Linear(case.in_features, rows)
    weight = torch.cat(
        [draw_weight(part, case.in_features, generator) for part in case.layout.rows_per_group * case.layout.groups]
    )
    with torch.no_grad():
        module.weight.copy_(weight.mT if case.conv1d else weight)
        module.bias.copy_(torch.randn(rows, generator=generator))
    module.to(device, precision.weights)
    layer = make_spectral(module, case.layout, spectral)
    if spectral.method == "svd":
        recompute(layer)
    return layer


def check_projection(checks: Checks, case: Case, spectral: SpectralConfig, precision: Precision, device: str) -> None:
    """Output and gradients of one layer against float64."""
    layer = new_layer(case, spectral, precision, device)
    generator = torch.Generator().manual_seed(1)
    shape = (4, 32, case.in_features)
    inputs = torch.randn(shape, generator=generator).to(device, precision.weights).requires_grad_()
    with precision.products():
        with precision.casting(device):
            output = layer(inputs)
        towards = torch.randn(output.shape, generator=generator).to(output)
        found = torch.autograd.grad(output, (inputs, layer.weight, layer.bias), towards)

    stored, bias, x, g = (tensor.detach().double().cpu() for tensor in (layer.matrix(), layer.bias, inputs, towards))
    effective = torch.from_numpy(effective_by_numpy(stored.numpy(), case.layout, spectral))
    expected = {
        "output": (x @ effective.mT + bias, case.in_features),
        "gradient of X": (g @ effective, case.layout.out_features),
        "gradient of W": (g.flatten(0, 1).mT @ x.flatten(0, 1), g[..., 0].numel()),
        "gradient of b": (g.flatten(0, 1).sum(0), g[..., 0].numel()),
    }
    by_svd = 8 * KAPPA * torch.finfo(torch.float32).eps if spectral.method == "svd" else 0.0
    title = f"{spectral.method}, {case.name}{', per head' if spectral.granularity == 'head' else ''}"
    for (name, (reference, terms)), value in zip(expected.items(), (output, *found)):
        value = value.mT if name == "gradient of W" and case.conv1d else value
        measured = greatest_difference(value.detach(), reference)
        checks.at_most(f"{title}: {name}", measured, precision.tolerance(terms) + by_svd)


def projections(precision: Precision, options: Options) -> Outcome:
    """W + C in every layout, method and granularity."""
    checks = Checks(f"W + C in {precision.name}, against float64", [PROJECTION_NOTE])
    if why := precision.missing_on(options.device):
        checks.missing("all layouts", why)
        return checks.outcome
    for case in cases(options.tiny):
        for method, settings in METHODS.items():
            for granularity in ("projection", "head"):
                spectral = SpectralConfig(method, **settings, granularity=granularity)
                check_projection(checks, case, spectral, precision, options.device)
    return summarized(checks.outcome, lambda check: check.rpartition(": ")[2])


PROJECTION_NOTE = (
    "W + C: the greatest difference, relative to the greatest entry of the reference. Allowed: the epsilon of the result, "
    "twice that of a product's operands, and the square root of the number of terms times that of float32; for svd 80 "
    "epsilons of float32 besides, because kappa(W) is 10. Where it says how many passed, the check that comes closest stands "
    "for all of its kind; `gpu.json` has all."
)


def summarized(outcome: Outcome, key: Callable[[str], str]) -> Outcome:
    """One row for all checks of the same `key`: the one that comes closest to what is allowed, and how many there are."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for number in outcome.numbers:
        groups.setdefault(key(number["check"]), []).append(number)
    rows = []
    for numbers in groups.values():
        # A measured nan is the worst there is.
        worst = max(numbers, key=lambda n: n["measured"] / n["allowed"] if n["measured"] == n["measured"] else np.inf)
        passed = f"{sum(number['passed'] for number in numbers)} of {len(numbers)}"
        rows.append([worst["check"], f"{worst['measured']:.1e}", f"{worst['allowed']:.1e}", passed])
    outcome.rows = rows
    return outcome


def diagonal(options: Options) -> Outcome:
    """Whether W's diagonal, which W + lambda I in half precision rounds away, is in the output."""
    checks = Checks("The diagonal of W in half precision", [DIAGONAL_NOTE])
    width, tokens = (32, 4096) if options.tiny else (256, 16384)
    case = Case("separate", ProjectionLayout(("query",), (4,), (width // 4,)), width)
    for precision in (BF16, FP16, BF16_WEIGHTS, FP16_WEIGHTS):
        spectral = SpectralConfig("identity", 10.0)
        layer = new_layer(case, spectral, precision, options.device)
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(tokens, width, generator=generator).to(options.device, precision.weights)
        with torch.no_grad(), precision.casting(options.device):
            output = layer(inputs).double().cpu()
        stored, bias, x = (tensor.detach().double().cpu() for tensor in (layer.matrix(), layer.bias, inputs))
        effective = torch.from_numpy(effective_by_numpy(stored.numpy(), case.layout, spectral))
        off = output - (x @ effective.mT + bias)
        # Least squares: by how much the diagonal that explains the output differs from W's.
        lost = (off * x).sum(0) / x.square().sum(0)
        there = stored.diagonal().square().mean().sqrt()
        measured = (lost.square().mean().sqrt() / there).item()
        checks.at_most(f"{precision.name}: share of W's diagonal that is lost", measured, 0.1, ".4f")
    return checks.outcome


DIAGONAL_NOTE = (
    "The diagonal of W: near lambda = 10 the spacing of bf16 is 1/16, so a sum W + lambda I would lose nearly all of it (a "
    "share of 1). The share is that of the root mean square, by least squares over all tokens."
)


# --- whole models ----------------------------------------------------------------------------------------------------


def build_model(name: str, tiny: bool) -> Any:
    """A small stock model in float32 on the CPU, in evaluation mode.

    Its projections are separate (bert; llama, with grouped keys), fused (gpt2) or interleaved (gpt_neox).
    """
    torch.manual_seed(0)
    width, layers, heads = (32, 2, 4) if tiny else (256, 3, 4)
    usual = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 128}
    usual |= {"intermediate_size": 2 * width, "max_position_embeddings": 128}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if name == "bert":
        model: Any = BertForMaskedLM(BertConfig(**usual))
    elif name == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 128, "vocab_size": 128}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
    elif name == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**usual, **tokens))
    else:
        model = LlamaForCausalLM(LlamaConfig(**usual, **tokens, num_key_value_heads=2))
    return model.eval()


# lambda 1: at 10 the softmax of a small random model saturates, and a last bit decides which token it attends to.
MODEL_SPECTRAL = {"identity": SpectralConfig("identity", 1.0), "svd": SpectralConfig("svd")}


def token_batch(options: Options) -> Tensor:
    """`(sequences, tokens)` of random ids on the device."""
    shape = (2, 16) if options.tiny else (8, 64)
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(3)).to(options.device)


def evaluate(
    model: nn.Module, tokens: Tensor, precision: Precision, forward: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters of a fixed sum over them."""
    model.zero_grad()
    with precision.products():
        with precision.casting(tokens.device.type):
            logits = (model if forward is None else forward)(input_ids=tokens).logits
        generator = torch.Generator().manual_seed(4)
        towards = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        logits.backward(towards.to(logits))
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return {"logits": logits.detach().double().cpu(), "gradients": torch.cat(gradients)}


@cache  # every precision is compared with the same
def float64_reference(name: str, method: str | None, options: Options) -> dict[str, Tensor]:
    """What `evaluate` gives in float64 on the CPU, of the stock model, or of one whose weights became W + C by NumPy."""
    model = build_model(name, options.tiny).double()
    if method is not None:
        for item in find_projections(model):
            matrix = item.orient(item.module.weight.detach())
            effective = effective_by_numpy(matrix.numpy().copy(), item.layout, MODEL_SPECTRAL[method])
            matrix.copy_(torch.from_numpy(effective))
    return evaluate(model, token_batch(options).cpu(), Precision("float64", torch.float64))


def conditioned(name: str, spectral: SpectralConfig, options: Options) -> Any:
    """A conditioned model on the device."""
    model = build_model(name, options.tiny)
    condition(model, spectral)
    return model.to(options.device)


class ModelChecks(Checks):
    """Checks of whole models, one architecture after the other."""

    def __init__(self, section: str) -> None:
        super().__init__(section, [MODEL_NOTE])

    def prepare(self, name: str, precision: Precision, options: Options) -> None:
        """Turn to an architecture, and measure what stock loses by itself."""
        self.name, self.precision, self.options = name, precision, options
        self.tokens = token_batch(options)
        stock, reference = build_model(name, options.tiny).to(options.device), float64_reference(name, None, options)
        found = evaluate(stock, self.tokens, precision)
        eps = max(precision.output_eps, precision.operand_eps)
        self.of_stock = {key: max(greatest_difference(found[key], reference[key]), 2 * eps) for key in found}

    def condition(self, method: str) -> Any:
        """A conditioned model on the device, with whose reference `compare` compares from now on."""
        self.method, self.reference = method, float64_reference(self.name, method, self.options)
        return conditioned(self.name, MODEL_SPECTRAL[method], self.options)

    def compare(self, what: str, found: Mapping[str, Tensor]) -> None:
        """Hold logits and gradients to the reference."""
        by_svd = 32 * torch.finfo(torch.float32).eps if self.method == "svd" else 0.0
        for key, value in found.items():
            name = f"{self.name}, {self.method}, {self.precision.name}, {what}: {key}"
            self.at_most(name, greatest_difference(value, self.reference[key]), 4 * self.of_stock[key] + by_svd)


MODEL_NOTE = (
    "Whole models: the greatest difference from float64 on the CPU (logits, or all gradients together), relative to the "
    "greatest entry. Allowed: four times what stock of the same architecture loses at this precision, or 8 epsilons; for svd "
    "32 epsilons of float32 besides, to which C is found at kappa(W) near a thousand. lambda is 1."
)


def models(precision: Precision, options: Options) -> Outcome:
    """Conditioned models, and the same folded, in each layout."""
    checks = ModelChecks("Whole models, conditioned and folded, against float64")
    if why := precision.missing_on(options.device):
        checks.missing(precision.name, why)
        return checks.outcome
    for name in ("bert", "gpt2", "gpt_neox", "llama"):
        checks.prepare(name, precision, options)
        for method in MODEL_SPECTRAL:
            model = checks.condition(method)
            checks.compare("conditioned", evaluate(model, checks.tokens, precision))
            fold(model)
            checks.compare("folded", evaluate(model, checks.tokens, precision))
    return summarized(checks.outcome, lambda check: check.partition(", ")[0])


BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ON_GPUS_ONLY = (SDPBackend.EFFICIENT_ATTENTION,)


def attention_kernels(options: Options) -> Outcome:
    """Each kernel of scaled_dot_product_attention, forced; another one would be an error of torch."""
    checks = ModelChecks("Attention kernels, each forced")
    for name in ("bert", "gpt2"):
        checks.prepare(name, BF16, options)
        for method in MODEL_SPECTRAL:
            model = checks.condition(method)
            for backend, kernel in BACKENDS.items():
                if options.device == "cpu" and kernel in ON_GPUS_ONLY:
                    checks.missing(f"{name}, {method}, {backend}", "torch has this kernel for GPUs only")
                    continue
                try:
                    with sdpa_kernel(kernel):
                        found = evaluate(model, checks.tokens, BF16)
                except RuntimeError as error:  # torch has no such kernel for these inputs
                    checks.raised(f"{name}, {method}, {backend}", error)
                else:
                    checks.compare(backend, found)
    return checks.outcome


def compiled(name: str, method: str, options: Options) -> Outcome:
    """`torch.compile(fullgraph=True)`, outputs and gradients."""
    checks = ModelChecks("torch.compile with fullgraph=True, against float64")
    checks.prepare(name, BF16, options)
    model = checks.condition(method)
    torch.compiler.reset()
    checks.compare("eager", evaluate(model, checks.tokens, BF16))
    checks.compare("compiled", evaluate(model, checks.tokens, BF16, torch.compile(model, fullgraph=True)))
    return checks.outcome


def generation(options: Options) -> Outcome:
    """Greedy generation with a cache, token for token."""
    checks = Checks("Greedy generation in float32", [GENERATION_NOTE])
    prompt, new = token_batch(options)[:, :8], 8 if options.tiny else 32
    settings = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    for name in ("gpt2", "llama"):
        for method, spectral in MODEL_SPECTRAL.items():
            model = conditioned(name, spectral, options)
            with FLOAT32.products(), torch.no_grad():
                cached = model.generate(prompt, use_cache=True, **settings)
                plain = model.generate(prompt, use_cache=False, **settings)
                folded = fold(model).generate(prompt, use_cache=True, **settings)
            if cached.shape[1] != prompt.shape[1] + new:
                raise RuntimeError(f"{name} generated {cached.shape[1] - prompt.shape[1]} tokens instead of {new}.")
            for what, other in (("without a cache", plain), ("folded", folded)):
                different = int((cached != other).sum())
                checks.at_most(f"{name}, {method}: tokens that differ from {what}", different, 0, "d")
    return checks.outcome


GENERATION_NOTE = "Generation: 8 tokens given; the tokens that follow must be the same."


def refreshing(options: Options) -> Outcome:
    """C by products and by the device's SVD, against an SVD in float64 on the CPU."""
    checks = Checks("Refreshing svd", [REFRESH_NOTE])
    for granularity in ("projection", "head"):
        spectral = SpectralConfig("svd", granularity=granularity, refresh_every=1)
        model = conditioned("llama", spectral, options)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, layer in spectral_layers(model):
                layer.weight.copy_(0.05 * torch.randn(layer.weight.shape, generator=generator))
        for precision, exact in ((FLOAT32, True), (FLOAT32, False), (TF32, True), (TF32, False)):
            title = f"{'SVD' if exact else 'products'}, {precision.name}{', per head' * (granularity == 'head')}"
            if why := precision.missing_on(options.device):
                checks.missing(title, why)
                continue
            with precision.products():
                refresh(model, exact=exact)
            check_corrections(checks, model, title, precision)
    title = "products: how often the host waits for the device"
    if options.device == "cpu":
        checks.missing(title, "a CPU waits for nothing")
        return checks.outcome
    for _, layer in spectral_layers(model):
        torch.nn.init.orthogonal_(layer.weight)  # what passes the first check
    refresh(model, exact=False)  # brings to the device what is kept there
    checks.at_most(title, host_waits(lambda: refresh(model, exact=False)), 1, ".0f")
    return checks.outcome


def host_waits(work: Callable[[], object]) -> int:
    """How often torch lets the host wait for the GPU, by its own account."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


REFRESH_NOTE = (
    "Refreshing: the error of C is relative, in the Frobenius norm, the largest of all weights; allowed are three times the "
    f"{ACCURACY[torch.float32]:.0e} at which the products end and four epsilons times kappa(W). In TF32 only kappa(W + C) is "
    "promised."
)


def check_corrections(checks: Checks, model: nn.Module, title: str, precision: Precision) -> None:
    """Error and condition number of the stored corrections of all blocks, the worst of them."""
    errors, kappas, kappas_of_w = [], [], []
    for _, layer in spectral_layers(model):
        weight, correction = (
            tensor.detach().double().cpu().numpy() for tensor in (layer.matrix(), layer.orient(layer.correction))
        )
        expected = effective_by_numpy(weight, layer.layout, layer.spectral) - weight
        for heads in rows_of_heads(layer.layout).values():
            for rows in blocks_of(heads, layer.spectral):
                errors.append(np.linalg.norm((correction - expected)[rows]) / np.linalg.norm(expected[rows]))
                kappas.append(np.linalg.cond((weight + correction)[rows]))
                kappas_of_w.append(np.linalg.cond(weight[rows]))
    if not precision.tf32:
        allowed = 3 * ACCURACY[torch.float32] + 4 * torch.finfo(torch.float32).eps * float(max(kappas_of_w))
        checks.at_most(f"{title}: error of C", float(max(errors)), allowed)
    checks.at_most(f"{title}: kappa(W + C)", float(max(kappas)), KAPPA_LIMIT, ".4f")


def lora(options: Options) -> Outcome:
    """A LoRA adapter on a conditioned model, merged and not."""
    try:
        import peft  # an extra
    except ImportError as error:
        checks = Checks("LoRA")
        checks.missing("LoRA, merged", f"PEFT is not installed ({error})")
        return checks.outcome
    checks = ModelChecks("LoRA on a conditioned model, merged and not")
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}
    for name, modules in targets.items():
        checks.prepare(name, FLOAT32, options)
        for method in MODEL_SPECTRAL:
            adapted = checks.condition(method).cpu()
            torch.manual_seed(6)
            settings = peft.LoraConfig(
                r=4, target_modules=modules, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
            )
            adapted = peft.get_peft_model(adapted, settings).eval()
            whole = copy.deepcopy(adapted).double()
            with torch.no_grad():
                without = checks.reference["logits"]
                checks.reference = {"logits": whole(input_ids=checks.tokens.cpu()).logits}
            adapted.to(options.device)
            with FLOAT32.products(), torch.no_grad():
                checks.compare("unmerged", {"logits": adapted(input_ids=checks.tokens).logits})
                merged = adapted.merge_and_unload()
                checks.compare("merged", {"logits": merged(input_ids=checks.tokens).logits})
            if greatest_difference(without, checks.reference["logits"]) < 1e-3:
                raise RuntimeError(f"The adapter on {name} changes nothing, so that merging it proves nothing.")
    return checks.outcome


def parts(options: Options) -> list[Part]:
    """The parts of the item "correctness", in order of worth."""

    def part(name: str, work: Callable[..., Outcome], *arguments: Any) -> Part:
        return Part(name, lambda: work(*arguments, options))

    listed = [
        part(f"W + C, {each.name}", projections, each)
        for each in (BF16, FLOAT32, TF32, FP16, BF16_WEIGHTS, FP16_WEIGHTS)
    ]
    listed += [part("diagonal", diagonal), part("refreshing", refreshing)]
    listed += [part(f"models, {each.name}", models, each) for each in (BF16, FLOAT32, TF32, FP16)]
    listed += [part("attention kernels", attention_kernels)]
    listed += [part("compiled, bert identity", compiled, "bert", "identity")]
    listed += [part("generation", generation), part("LoRA", lora)]
    # On a CPU generating code takes long, and one model runs all that is ours here.
    others = (
        [] if options.tiny else [("bert", "svd"), ("gpt2", "identity"), ("gpt_neox", "svd"), ("llama", "identity")]
    )
    listed += [part(f"compiled, {name} {method}", compiled, name, method) for name, method in others]
    return listed
