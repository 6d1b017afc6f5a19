"""Pretrain a stock and two spectrally conditioned models from one seed on the same batches, and compare them.

    python scripts/demo.py

Three runs of `pretrain_mlm.py` on the documentation that every Python carries, some six minutes on two CPU cores. It
ends with a table (`comparison.md`) and a picture (`comparison.png`, `.svg`): validation loss, condition numbers of W and
of W + C before and after training, attention entropy, and what `fold` changes. At this size the losses say little.
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForMaskedLM, HfArgumentParser, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_specattn import fold
from hf_specattn.config import PROJECTIONS
from hf_specattn.diagnostics import attention_entropy, spectra
from hf_specattn.training import atomic_files
from hf_specattn.training.metrics import METRICS_FILE, OKABE_ITO
from hf_specattn.training.mlm_data import MlmDataSettings, prepare_mlm_data

PRETRAIN = Path(__file__).with_name("pretrain_mlm.py")
# What `accelerate launch` would otherwise remark on at length.
LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
# The first corrections to try: svd has no lambda to choose, and lambda 1 does not saturate a small model's softmax as the
# paper's 10 does.
RUNS: dict[str, list[str]] = {
    "stock": [],
    "identity, lambda 1": ["--spectral_conditioning", "--lambda_", "1.0"],
    "svd": ["--spectral_conditioning", "--spectral_method", "svd"],
}
COLORS = dict(zip(RUNS, (OKABE_ITO["blue"], OKABE_ITO["vermillion"], OKABE_ITO["green"])))
MARKERS = dict(zip(RUNS, "os^"))


@dataclass
class DemoArguments:
    """Arguments of the demonstration."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Folder for the runs, the table and the picture."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier demonstration there."})
    # 150 steps of three models stay under ten minutes on two cores, and the losses are well below that of word frequencies.
    max_steps: int = field(default=150, metadata={"help": "Optimizer steps of each run."})
    seed: int = field(default=0, metadata={"help": "Seed of every run: the same W and the same batches."})


@dataclass
class Comparison:
    """What is shown of one run.

    Attributes:
        loss, perplexity: of the saved model on the validation documents (loss in nats per predicted token).
        kappa: moment ("start" or "end") -> projection -> (median condition number of W, of W + C) over the layers.
        entropy: mean attention entropy per layer, in nats; log of the sequence length is uniform attention.
        fold_difference: largest change of a logit by `fold`, relative to the largest logit.
        history: the training losses, from `metrics.json`.
    """

    loss: float
    perplexity: float
    kappa: dict[str, dict[str, tuple[float, float]]]
    entropy: list[float]
    fold_difference: float
    history: list[dict[str, Any]]


def folder_of(run: str) -> str:
    return run.split(",")[0]


def pretrain(arguments: DemoArguments, run: str) -> Path:
    """One run as a user would start it, in a process of its own."""
    directory = Path(arguments.output_dir) / folder_of(run)
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, str(PRETRAIN), *RUNS[run]]
    command += ["--max_steps", str(arguments.max_steps), "--seed", str(arguments.seed), "--output_dir", str(directory)]
    print(f"\n=== {run}", flush=True)
    # accelerate would otherwise give a CPU run one thread.
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    return directory


def compare(directory: Path, seed: int, batch: dict[str, torch.Tensor]) -> Comparison:
    metrics = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))
    model = AutoModelForMaskedLM.from_pretrained(directory)
    # The model that the run started from: its seed decides the initialization.
    set_seed(seed)
    start = AutoModelForMaskedLM.from_config(model.config)
    kappa = {"start": median_kappas(start), "end": median_kappas(model)}
    entropy = attention_entropy(model, batch).mean(dim=1).tolist()
    return Comparison(
        loss=metrics["final"]["validation_loss"],
        perplexity=metrics["final"]["validation_perplexity"],
        kappa=kappa,
        entropy=entropy,
        fold_difference=fold_difference(model, batch),
        history=metrics["history"],
    )


def median_kappas(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    rows = spectra(model)
    return {
        projection: (
            median(row.raw.kappa for row in rows if row.projection == projection),
            median(row.effective.kappa for row in rows if row.projection == projection),
        )
        for projection in PROJECTIONS
    }


@torch.no_grad()
def fold_difference(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """How far the folded model's logits lie from the conditioned one's; a stock model has nothing to fold."""
    if not getattr(model.config, "spectral_conditioning", False):
        return 0.0
    before = model(**batch).logits
    after = fold(model)(**batch).logits
    return ((after - before).abs().max() / before.abs().max()).item()


def table(results: dict[str, Comparison], length: int) -> str:
    """A Markdown table, one column per run."""
    rows: list[tuple[str, Sequence[str]]] = [
        ("validation loss (nats per token)", [f"{r.loss:.4f}" for r in results.values()]),
        ("validation perplexity", [f"{r.perplexity:.1f}" for r in results.values()]),
    ]
    for moment in ("start", "end"):
        for projection in PROJECTIONS:
            pairs = [result.kappa[moment][projection] for result in results.values()]
            rows.append((f"kappa({projection}), {moment}: W", [f"{raw:.3g}" for raw, _ in pairs]))
            rows.append((f"kappa({projection}), {moment}: W + C", [f"{effective:.3g}" for _, effective in pairs]))
    rows += [
        (
            f"attention entropy (nats; uniform is {math.log(length):.2f})",
            [f"{sum(r.entropy) / len(r.entropy):.2f}" for r in results.values()],
        ),
        ("largest change of a logit by fold (relative)", [f"{r.fold_difference:.1e}" for r in results.values()]),
    ]
    header = f"| | {' | '.join(results)} |\n|---|{'---:|' * len(results)}\n"
    return header + "".join(f"| {name} | {' | '.join(values)} |\n" for name, values in rows)


def picture(results: dict[str, Comparison], length: int) -> dict[str, bytes]:
    """Losses, condition numbers and entropy side by side; file ending -> image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, kappas, entropies = figure.subplots(1, 3)
    for run, result in results.items():
        style = {"color": COLORS[run], "label": run}
        losses.plot([r["step"] for r in result.history], [r["train_loss"] for r in result.history], **style)
        layers = range(1, len(result.entropy) + 1)
        entropies.plot(layers, result.entropy, marker=MARKERS[run], **style)
    draw_kappas(kappas, results)
    losses.set(xlabel="optimizer step", ylabel="training loss (nats per predicted token)", title="Training loss")
    entropies.axhline(math.log(length), color="0.5", linestyle=":", label="uniform")
    entropies.set(xlabel="layer", ylabel="attention entropy (nats)", title="Attention entropy", ylim=(0, None))
    entropies.set_xticks(list(layers))
    for axes in (losses, kappas, entropies):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # off the data
    images = {}
    for ending in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending)
        images[ending] = buffer.getvalue()
    return images


def draw_kappas(axes: Any, results: dict[str, Comparison]) -> None:
    """For each projection and run an open marker at kappa(W), and a filled one at kappa(W + C), after training."""
    for offset, (run, result) in zip((-0.2, 0.0, 0.2), results.items()):
        positions = [index + offset for index in range(len(PROJECTIONS))]
        raw, effective = zip(*(result.kappa["end"][projection] for projection in PROJECTIONS))
        style = {"color": COLORS[run], "marker": MARKERS[run], "linestyle": "none"}
        axes.plot(positions, raw, fillstyle="none", label=f"{run}: W", **style)
        if raw != effective:
            axes.vlines(positions, effective, raw, color=COLORS[run], alpha=0.4)
            axes.plot(positions, effective, label=f"{run}: W + C", **style)
    axes.set_yscale("log")
    axes.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
    axes.set(xlabel="projection", ylabel="condition number (median over layers)", title="Conditioning after training")


def validation_batch(directory: Path, sequences: int = 16) -> dict[str, torch.Tensor]:
    """The first validation sequences of a run, unmasked."""
    recorded = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))["arguments"]
    settings = MlmDataSettings(
        validation_fraction=recorded["validation_fraction"],
        tokenizer_name=str(directory),
        max_seq_length=recorded["max_seq_length"],
    )
    data = prepare_mlm_data(settings, training_sequences=0)
    return {"input_ids": torch.from_numpy(data.validation[:sequences].astype("int64"))}


def check_output_dir(arguments: DemoArguments) -> Path:
    output = Path(arguments.output_dir)
    if output.exists() and any(output.iterdir()):
        if not arguments.overwrite_output_dir:
            raise SystemExit(
                f"error: --output_dir {output} is not empty; name another, or add --overwrite_output_dir."
            )
        for run in RUNS:  # and nothing else that may lie there
            shutil.rmtree(output / folder_of(run), ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    return output


def main() -> None:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    output = check_output_dir(arguments)
    directories = {run: pretrain(arguments, run) for run in RUNS}

    transformers_logging.disable_progress_bar()
    batch = validation_batch(directories["stock"])
    length = batch["input_ids"].shape[1]
    results = {run: compare(directory, arguments.seed, batch) for run, directory in directories.items()}
    comparison = table(results, length)
    atomic_files.write_bytes(output / "comparison.md", comparison.encode())
    atomic_files.write_json(output / "comparison.json", {run: asdict(result) for run, result in results.items()})
    for ending, image in picture(results, length).items():
        atomic_files.write_bytes(output / f"comparison.{ending}", image)
    print(f"\n{comparison}")
    print(
        "One seed and a small model: a difference of the losses here is no evidence for or against conditioning. The larger "
        "scale of W + C alone, which a stock model can be given too, may explain it.\n"
        f"Table and picture: {output}/comparison.md, {output}/comparison.png"
    )


if __name__ == "__main__":
    main()
