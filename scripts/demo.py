"""Pretrain a stock and two spectrally conditioned models from one seed on the same batches, and compare them.

    python scripts/demo.py

Three runs of `pretrain_mlm.py` on the documentation that ships with Python, some six minutes on two CPU cores. Their
losses are compared by `compare_runs.py` (`comparison.md`, `.png`, `.svg`). What conditioning did to the models is
reported separately (`conditioning.md`, `.json`, `.png`, `.svg`): condition numbers of W and of W + C before and after
training, attention entropy, and what `fold` changes. At this size the losses say little.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_specattn import fold
from hf_specattn.config import PROJECTIONS
from hf_specattn.diagnostics import attention_entropy, spectra
from hf_specattn.figures import COLORS, MARKERS, markdown_table, new_figure, render
from hf_specattn.files import CannotWriteError, holds_files, require_writable, write_bytes, write_json
from recipes.run.command_line import ScriptParser
from recipes.run.run_metrics import METRICS_FILE
from recipes.text.mlm_data import MlmDataSettings, prepare_mlm_data

NAME = "conditioning"
PRETRAIN = Path(__file__).with_name("pretrain_mlm.py")
COMPARE = Path(__file__).with_name("compare_runs.py")
# What `accelerate launch` would otherwise remark on at length.
LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
# The first corrections to try: svd has no lambda to choose, and lambda 1 does not saturate a small model's softmax as the
# paper's 10 does.
RUNS: dict[str, list[str]] = {
    "stock": [],
    "identity, lambda 1": ["--spectral_conditioning", "--lambda_", "1.0"],
    "svd": ["--spectral_conditioning", "--spectral_method", "svd"],
}
# In the order in which compare_runs.py gives them to its groups.
STYLES = {run: {"color": color, "marker": marker} for run, color, marker in zip(RUNS, COLORS, MARKERS)}
# Of the three runs with their checkpoints.
SPACE_BYTES = 500 * 10**6


@dataclass
class DemoArguments:
    """Arguments of the demonstration."""

    output_dir: str = field(
        default="runs/demo", metadata={"help": "Folder for the runs, the tables and the pictures."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier demonstration there."})
    # 150 steps of three models stay under ten minutes on two cores, and the losses are well below that of word frequencies.
    max_steps: int = field(default=150, metadata={"help": "Optimizer steps of each run."})
    seed: int = field(default=0, metadata={"help": "Seed of every run: the same W and the same batches."})


@dataclass
class Conditioning:
    """What is shown of one run's model.

    Attributes:
        kappa: moment ("start" or "end") -> projection -> (median condition number of W, of W + C) over the layers.
        entropy: mean attention entropy per layer, in nats; log of the sequence length is uniform attention.
        fold_difference: largest change of a logit by `fold`, relative to the largest logit.
    """

    kappa: dict[str, dict[str, tuple[float, float]]]
    entropy: list[float]
    fold_difference: float


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


def compare_losses(directories: Sequence[Path], output: Path) -> None:
    print("\n=== the losses", flush=True)
    subprocess.run([sys.executable, str(COMPARE), *map(str, directories), "--output_dir", str(output)], check=True)


def inspect(directory: Path, seed: int, batch: dict[str, torch.Tensor]) -> Conditioning:
    model = AutoModelForMaskedLM.from_pretrained(directory)
    # The model that the run started from: its seed decides the initialization.
    set_seed(seed)
    start = AutoModelForMaskedLM.from_config(model.config)
    kappa = {"start": median_kappas(start), "end": median_kappas(model)}
    entropy = attention_entropy(model, batch).mean(dim=1).tolist()
    return Conditioning(kappa, entropy, fold_difference(model, batch))


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


def table(results: dict[str, Conditioning], length: int) -> str:
    """A Markdown table, one column per run."""
    rows: list[list[str]] = []
    for moment in ("start", "end"):
        for projection in PROJECTIONS:
            pairs = [result.kappa[moment][projection] for result in results.values()]
            rows.append([f"kappa({projection}), {moment}: W", *(f"{raw:.3g}" for raw, _ in pairs)])
            rows.append([f"kappa({projection}), {moment}: W + C", *(f"{effective:.3g}" for _, effective in pairs)])
    entropies = [f"{fmean(result.entropy):.2f}" for result in results.values()]
    rows.append([f"attention entropy (nats; uniform is {math.log(length):.2f})", *entropies])
    folds = [f"{result.fold_difference:.1e}" for result in results.values()]
    rows.append(["largest change of a logit by fold (relative)", *folds])
    return markdown_table(["", *results], rows)


def picture(results: dict[str, Conditioning], length: int) -> dict[str, bytes]:
    """Condition numbers and entropy side by side; file ending -> image."""
    figure = new_figure(9, 4.6)
    kappas, entropies = figure.subplots(1, 2)
    draw_kappas(kappas, results)
    for run, result in results.items():
        layers = range(len(result.entropy))
        entropies.plot(layers, result.entropy, label=run, **STYLES[run])
    entropies.axhline(math.log(length), color="0.5", linestyle=":", label="uniform")
    entropies.set(
        xlabel="attention layer", ylabel="attention entropy (nats)", title="Attention entropy", ylim=(0, None)
    )
    entropies.set_xticks(list(layers))
    for axes in (kappas, entropies):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # off the data
    return render(figure, NAME)


def draw_kappas(axes: Any, results: dict[str, Conditioning]) -> None:
    """For each projection and run an open marker at kappa(W), and a filled one at kappa(W + C), after training."""
    for offset, (run, result) in zip((-0.2, 0.0, 0.2), results.items()):
        positions = [index + offset for index in range(len(PROJECTIONS))]
        raw, effective = zip(*(result.kappa["end"][projection] for projection in PROJECTIONS))
        style = STYLES[run] | {"linestyle": "none"}
        axes.plot(positions, raw, fillstyle="none", label=f"{run}: W", **style)
        if raw != effective:
            axes.vlines(positions, effective, raw, color=STYLES[run]["color"], alpha=0.4)
            axes.plot(positions, effective, label=f"{run}: W + C", **style)
    axes.set_yscale("log")
    axes.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
    axes.set(xlabel="projection", ylabel="condition number (median over layers)", title="Conditioning after training")


def validation_batch(directory: Path, sequences: int = 16) -> dict[str, torch.Tensor]:
    """The first validation sequences of a run, unmasked."""
    recorded = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))["arguments"]
    settings = {item.name: recorded[item.name] for item in fields(MlmDataSettings) if item.name in recorded}
    data = prepare_mlm_data(MlmDataSettings(**settings | {"tokenizer_name": str(directory)}), training_sequences=0)
    indices = np.arange(min(sequences, len(data.validation)))
    return {"input_ids": torch.from_numpy(data.validation[indices].astype("int64"))}


def check_output_dir(arguments: DemoArguments) -> Path:
    output = Path(arguments.output_dir)
    try:
        require_writable(output, "--output_dir", SPACE_BYTES)
    except CannotWriteError as error:
        raise SystemExit(f"error: {error}") from error
    if holds_files(output):
        if not arguments.overwrite_output_dir:
            raise SystemExit(
                f"error: --output_dir {output} is not empty; name another, or add --overwrite_output_dir."
            )
        for run in RUNS:  # and nothing else that may lie there
            shutil.rmtree(output / folder_of(run), ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    return output


def main() -> None:
    (arguments,) = ScriptParser(DemoArguments, description=str(__doc__).splitlines()[0]).parse_args_into_dataclasses()
    output = check_output_dir(arguments)
    directories = {run: pretrain(arguments, run) for run in RUNS}

    compare_losses(list(directories.values()), output)
    transformers_logging.disable_progress_bar()
    batch = validation_batch(directories["stock"])
    length = batch["input_ids"].shape[1]
    results = {run: inspect(directory, arguments.seed, batch) for run, directory in directories.items()}
    text = table(results, length)
    write_bytes(output / f"{NAME}.md", text.encode())
    write_json(output / f"{NAME}.json", {run: asdict(result) for run, result in results.items()})
    for ending, image in picture(results, length).items():
        write_bytes(output / f"{NAME}.{ending}", image)
    print(
        f"\n=== what conditioning did\n{text}\nOne seed and a small model: a difference of the losses is not evidence "
        "for or against conditioning. The larger scale of W + C alone, which a stock model can be given too, may "
        f"explain it.\nTable and figure: {output / NAME}.md, .png, .svg"
    )


if __name__ == "__main__":
    main()
