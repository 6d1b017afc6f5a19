"""Which architectures can be conditioned: each built tiny, conditioned, and compared with an independent W + C.

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

Each model has a process of its own, so that one that fails, hangs or takes too much memory ends alone.
"""

import copy
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.figures import markdown_table
from hf_specattn.files import write_bytes
from hf_specattn.layers import spectral_layers
from recipes.survey.tiny_models import IMAGE_SIZE, randomize, tiny_config, tiny_inputs, tiny_model
from recipes.survey.tracing import ROLES, TracedAttention, trace_attention

STATUSES = ("exact", "refused", "not built", "wrong")
TASKS: dict[str, Any] = {
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
ENCODER_TASKS = ("masked LM", "image classification")
# Each another number, and small: with 10 the softmax saturates, and its output barely depends on the rest of Q and K.
LAMBDAS = {"query": 0.5, "key": 0.25, "value": 2.0}
# float64; models that compute a norm or a softmax in float32 whatever their weights are round a difference up to it.
TOLERANCE = 1e-5
WINDOWS = {"window_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}

# What a model type needs beside small sizes.
CHANGES: dict[str, dict[str, Any]] = {
    "donut-swin": WINDOWS,
    "codegen": {"n_ctx": 64, "rotary_dim": 8, "n_embd": 64, "n_head": 4},
    "esm": {"vocab_size": 64, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "neomme": {"hidden_size": 64, "head_dim": 16},
    "nystromformer": {"segment_means_seq_len": 12, "num_landmarks": 12},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "xmod": {"default_language": "en_XX"},
}

# timm's families with attention, the smallest of each, and three without; settings make them smaller where that is simple.
SMALL_VIT = {"img_size": 32, "depth": 2}
TIMM_FAMILIES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "cait_xxs24_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "coat_tiny": {},
    "coatnet_nano_rw_224": {"img_size": 224},
    "convnext_atto": {},
    "crossvit_tiny_240": {},
    "davit_tiny": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)},
    "davit_base_fl": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)},
    "deit_tiny_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "deit_tiny_distilled_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "deit3_small_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "fastvit_t8": {},
    "flexivit_small": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "gcvit_xxtiny": {},
    "hiera_tiny_224": {},
    "levit_128s": {},
    "maxvit_pico_rw_256": {},
    "mixer_s32_224": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "pit_ti_224": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32} | WINDOWS | {"depths": (2, 1), "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"img_size": 32} | WINDOWS | {"depths": (2, 1), "num_heads": (2, 4)},
    "swinv2_cr_tiny_224": {},
    "tiny_vit_5m_224": {},
    "tnt_s_legacy_patch16_224": {},
    "twins_svt_small": {},
    "visformer_tiny": {},
    "vit_tiny_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "vit_relpos_small_patch16_224": SMALL_VIT | {"embed_dim": 32, "num_heads": 4},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 4},
    "volo_d1_224": {},
    "xcit_nano_12_p16_224": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4},
}


@dataclass
class SurveyArguments:
    """Arguments of the survey."""

    output_file: str = field(default="docs/survey.md", metadata={"help": "Where the table goes."})
    only: list[str] | None = field(
        default=None,
        metadata={"help": "Survey only these rows, as `task/name` or `name`; the table goes to the terminal."},
    )
    num_processes: int = field(default=2, metadata={"help": "How many models at once."})
    timeout_seconds: float = field(default=300.0, metadata={"help": "When a model's process is ended."})
    max_memory_gb: float = field(default=16.0, metadata={"help": "Address space of a model's process, in GiB."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name in ("num_processes", "timeout_seconds", "max_memory_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be > 0.")


@dataclass(frozen=True)
class Row:
    """One architecture to be surveyed: a task of transformers and a model type, or timm and a model name."""

    task: str
    name: str

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"


@dataclass(frozen=True)
class Result:
    """What was found. `attends`: whether attention ran in the stock model; None where it was not built."""

    row: Row
    status: str
    reason: str = ""
    attends: bool | None = None


def all_rows() -> list[Row]:
    rows = [Row(task, name) for task, mapping in TASKS.items() for name in mapping]
    return rows + [Row("timm", name) for name in TIMM_FAMILIES]


def chosen_rows(only: Sequence[str] | None) -> list[Row]:
    """All rows, or those asked for.

    Raises:
        ValueError: for a name that no row has.
    """
    rows = all_rows()
    if only is None:
        return rows
    known = {name for row in rows for name in (str(row), row.name)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(
            f"--only {unknown[0]}: no such row. Give a model type of transformers' masked-LM, image-classification or "
            f"causal-LM mapping, one of {', '.join(TIMM_FAMILIES)}, or task/name with a task of {[*TASKS, 'timm']}."
        )
    return [row for row in rows if row.name in only or str(row) in only]


# --- one model -------------------------------------------------------------------------------------------------------


def build(row: Row) -> tuple[nn.Module, dict[str, Tensor]]:
    """The tiny stock model of a row in float64, and inputs for it."""
    if row.task == "timm":
        return _build_timm(row.name)
    class_names = TASKS[row.task][row.name]
    model_class = getattr(transformers, class_names if isinstance(class_names, str) else class_names[0])
    model = tiny_model(model_class, tiny_config(model_class.config_class, CHANGES.get(row.name)))
    return model, tiny_inputs(model)


def _build_timm(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import timm

    settings = TIMM_FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=False, num_classes=3, **settings).double().eval()
        randomize(model)
    size = settings.get("img_size") or model.default_cfg["input_size"][-1]
    size = IMAGE_SIZE if "embed_dims" in settings else size
    generator = torch.Generator().manual_seed(1)
    return model, {"x": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}


def survey(row: Row) -> Result:
    """Build, trace, condition, compare."""
    try:
        stock, inputs = build(row)
        expected = outputs_of(stock, inputs)
        if not expected or not all(torch.isfinite(value).all() for value in expected.values()):
            raise ValueError("the stock model gives no finite output")
        traced = trace_attention(stock, lambda: stock(**inputs))
    except Exception as error:
        return Result(row, "not built", describe(error))
    attends = bool(traced)
    reasons = []
    for method in ("identity", "svd"):
        try:
            problem = compare(stock, inputs, traced, method)
        except Refused as refusal:
            return Result(row, "refused", describe(refusal), attends)
        except Exception as error:
            problem = f"{type(error).__name__} ({describe(error)})"
        if problem:
            reasons.append(f"{method}: {problem}")
    return Result(row, "wrong" if reasons else "exact", "; ".join(reasons), attends)


class Refused(ValueError):
    """`condition` refused the model."""


def compare(
    stock: nn.Module, inputs: Mapping[str, Tensor], traced: Sequence[TracedAttention], method: str
) -> str | None:
    """What is wrong with the conditioned model; None where nothing is."""
    config = SpectralConfig(method, lambda_=LAMBDAS if method == "identity" else None)
    conditioned = copy.deepcopy(stock)
    try:
        condition(conditioned, config)
    except ValueError as error:
        raise Refused(str(error)) from None
    unplaced = [f"{item.module[0]} ({item.module[1]})" for item in traced if not item.is_plain]
    if unplaced or not traced:
        return f"conditioned, but the trace cannot say where queries, keys and values come from: {unplaced[:2]}"

    expected = independent(stock, traced, method)
    idle = idle_modules(stock, inputs)
    for name, weight in effective_weights(conditioned).items():
        gap = difference(weight, expected.get_parameter(name))
        if gap > TOLERANCE and name.removesuffix(".weight") not in idle:
            return f"{name} is not W + C (relative difference {gap:.2g})"
    outputs, expected_outputs = outputs_of(conditioned, inputs), outputs_of(expected, inputs)
    if largest_difference(expected_outputs, outputs_of(stock, inputs)) < 100 * TOLERANCE:
        return "W + C does not change the outputs, so that comparing them says nothing"
    if (gap := largest_difference(outputs, expected_outputs)) > TOLERANCE:
        return f"outputs differ by {gap:.2g}"
    if (gap := largest_difference(gradients(conditioned, inputs), gradients(expected, inputs))) > TOLERANCE:
        return f"gradients differ by {gap:.2g}"
    classes = [type(module) for module in stock.modules()]
    fold(conditioned)
    if [type(module) for module in conditioned.modules()] != classes:
        return "fold did not give the stock classes back"
    if (gap := largest_difference(outputs_of(conditioned, inputs), expected_outputs)) > TOLERANCE:
        return f"folded outputs differ by {gap:.2g}"
    return None


def idle_modules(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Names of modules that do not run: the cross-attention of a decoder without an encoder, say. No trace finds them."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in model.named_modules()
    ]
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    return {name for name, _ in model.named_modules()} - ran


@torch.no_grad()
def independent(stock: nn.Module, traced: Sequence[TracedAttention], method: str) -> nn.Module:
    """A stock model with W + C in the traced rows, by NumPy."""
    model = copy.deepcopy(stock)
    modules = dict(model.named_modules())
    done = set()
    for item in traced:
        for role in ROLES:
            ((name, rows),) = item.rows[role].items()
            if (name, rows) in done:
                continue
            done.add((name, rows))
            module: Any = modules[name]
            weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
            block = weight[list(rows)].numpy()
            weight[list(rows)] = torch.from_numpy(block + correction(block, LAMBDAS[named_role(item, role)], method))
    return model


def named_role(item: TracedAttention, role: str) -> str:
    """What a model's own code calls this role, where that is something else."""
    if item.module[1] == "ChannelAttention":  # timm's DaViT: softmax(k^T v), applied to q
        return {"query": "key", "key": "value", "value": "query"}[role]
    return role


def correction(block: np.ndarray, lambda_: float, method: str) -> np.ndarray:
    if method == "identity":
        return lambda_ * np.eye(*block.shape)
    left, singular_values, right = np.linalg.svd(block, full_matrices=False)
    return singular_values[0] * (left @ right)


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, conditioned weights as W + C."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights | {f"{name}.weight": layer.effective_weight().detach() for name, layer in spectral_layers(model)}


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors_in(model(**inputs))


def tensors_in(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): value for name, value in items if isinstance(value, Tensor) and value.is_floating_point()}


def gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of squares of the outputs, by parameter: C is a constant, so those to W and to W + C are the same."""
    model.zero_grad()
    loss = sum((value.double() ** 2).sum() for value in tensors_in(model(**inputs)).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def difference(value: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest expected value; 0 of nothing (MobileBERT has an empty weight)."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((value.double() - expected.double()).abs().max() / scale).item()


def largest_difference(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all tensors, relative to the greatest value of the greatest of them; infinite where the names differ."""
    if values.keys() != expected.keys():
        return float("inf")
    names = [name for name, value in expected.items() if value.numel()]
    scale = max(expected[name].abs().max().item() for name in names)
    return max((values[name].double() - expected[name].double()).abs().max().item() for name in names) / scale


def describe(error: BaseException) -> str:
    """The first line of an error, short enough for a table, without what is a machine's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
    known = re.match(r"(No query, key or value projection found in \w+)", text)
    seen = re.search(r"Attention-like modules in it: ([^.]*(?:\.\d[^.]*)*)", text)
    if known:
        names = sorted(set(re.findall(r"\((\w+)\)", text[seen.start() :]))) if seen else []
        return f"{known[1]}; it attends in {', '.join(names)}" if names else known[1]
    return text if len(text) <= 160 else f"{text[:157]}..."


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
        "# What can be conditioned\n",
        "Made by `make survey` (`scripts/survey.py`, which says what the words mean); do not edit. "
        f"transformers {transformers.__version__}, timm {_timm_version()}, torch {torch.__version__.partition('+')[0]}.\n",
        summary(results),
    ]
    for task in dict.fromkeys(result.row.task for result in results):
        chosen = [result for result in results if result.row.task == task]
        rows = [[f"`{r.row.name}`", r.status, attends(r), r.reason] for r in chosen]
        parts += [f"\n## {task}\n", markdown_table(["architecture", "result", "attention", "reason"], rows)]
    return "\n".join(parts).rstrip() + "\n"


def _timm_version() -> str:
    import timm

    return str(timm.__version__)


def attends(result: Result) -> str:
    return {True: "yes", False: "none ran", None: ""}[result.attends]


def summary(results: Sequence[Result]) -> str:
    rows = []
    for task in dict.fromkeys(result.row.task for result in results):
        chosen = [result.status for result in results if result.row.task == task]
        rows.append([task, *(str(chosen.count(status)) for status in STATUSES), str(len(chosen))])
    every = [result.status for result in results]
    rows.append(["all", *(str(every.count(status)) for status in STATUSES), str(len(every))])
    table = markdown_table(["", *STATUSES, "rows"], rows)
    encoders = [r for r in results if r.row.task in ENCODER_TASKS and r.attends]
    exact = sum(result.status == "exact" for result in encoders)
    if not encoders:
        return table
    return (
        f"{table}\n\nOf the {len(encoders)} encoders (masked LM and image classification) that were built and attend, "
        f"{exact} are exact: {100 * exact / len(encoders):.0f} %.\n"
    )


def main() -> int:
    (arguments,) = HfArgumentParser(SurveyArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    rows = chosen_rows(arguments.only)
    output = Path(arguments.output_file)
    if arguments.only is None and not output.parent.is_dir():
        raise ValueError(f"--output_file={output}: there is no folder {output.parent}; make it, or name another file.")
    results = survey_all(rows, arguments)
    text = report(results)
    if arguments.only is None:
        write_bytes(output, text.encode())
        print(summary(results))
    else:
        print(text)
    wrong = [result for result in results if result.status == "wrong"]
    for result in wrong:
        print(f"wrong: {result.row}: {result.reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
