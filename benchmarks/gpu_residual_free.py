"""Attention without its residual connection, on a GPU: how V and O must begin, for `gpu.py`.

A small ViT on CIFAR-10 (`--cifar10`), else on scikit-learn's digits, trained by `train_image_classification.py` in this
process. The scale of V and O is tuned for the stock model, on training images that are held out and with another seed; the
other arms begin with the norms of that model. Each run is a part, so that a later call goes on with the next one.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gpu_parts import Options, Outcome, Part, cifar10_files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import train_image_classification as script
from accelerate.state import AcceleratorState

from recipes.lra.lra_sources import table_rows

STOCK = "stock"
NO_RESIDUAL = ("--no_attention_residual", "True")
ON_VALUE_OUTPUT = ("value", "output")
ORTHOGONAL = ("--projection_init", "orthogonal", "--projection_init_targets", *ON_VALUE_OUTPUT)
SVD = ("--spectral_conditioning", "--spectral_method", "svd", "--spectral_targets", *ON_VALUE_OUTPUT)
ARMS: dict[str, tuple[str, ...]] = {
    STOCK: NO_RESIDUAL,
    "orthogonal V and O": (*NO_RESIDUAL, *ORTHOGONAL),
    "svd on V and O": (*NO_RESIDUAL, *SVD, "--match_norm_of", "stock"),
    "with the residual": (),
}
DEPTHS, SEEDS, TUNING_SEED, HELD_OUT = (12, 24), (0, 1, 2, 3), 100, "0.1"
# Times the usual start, whose standard deviation is 0.02. On the digits, at width 48, 14 and 20 were best, which is at the
# same `deviation * sqrt(width)` 7 and 10 here.
QUERY_KEY, VALUE_OUTPUT = 7, (5, 7, 10, 14)
WIDTH = ["--hidden_size", "192", "--num_attention_heads", "3", "--intermediate_size", "384"]
TINY_WIDTH = ["--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "32"]
# Of a run; tuning takes a quarter of the steps.
STEPS = {"CIFAR-10": 1500, "digits": 600}
RECIPES = {
    "CIFAR-10": ["--patch_size", "4", "--per_device_train_batch_size", "256", "--warmup_epochs", "0.5"],
    "digits": ["--patch_size", "2", "--per_device_train_batch_size", "64", "--warmup_epochs", "4"],
}
RECIPES["CIFAR-10"] += ["--horizontal_flip", "0.5", "--random_shift", "4", "--check_images", "header"]
RECIPES["CIFAR-10"] += ["--dataloader_num_workers", str(min(12, os.cpu_count() or 1))]

COLUMNS = ("model", "layers", "seed", "V and O x", "accuracy (%)", "minus stock", "mean training loss", "seconds")
NOTES = (
    "Tuning: stock, a quarter of the steps, on nine tenths of the training images, accuracy on the others; the best scale is "
    f"that of all arms, whose norms are equal. Q and K x {QUERY_KEY}, learning rate 1e-3, not tuned.",
    "Minus stock: of the same seed. Mean training loss: over all steps.",
)


def parts(options: Options) -> list[Part]:
    """The parts of the item "experiments": of each depth the tuning, then one seed of each arm after the other."""
    tiny = options.tiny
    depths, scales, seeds = ((2,), VALUE_OUTPUT[:2], SEEDS[:1]) if tiny else (DEPTHS, VALUE_OUTPUT, SEEDS)
    listed = []
    for seed in seeds:
        for depth in depths:
            listed += [_tuning(options, depth, scale) for scale in scales if seed == seeds[0]]
            listed += [_arm(options, depth, name, seed, scales) for name in ARMS]
    return listed


def tuning_name(depth: int, scale: int) -> str:
    """A part's, which those after it look up."""
    return f"{depth} layers, tuning: V and O x {scale}"


def arm_name(depth: int, name: str, seed: int) -> str:
    """A part's, which those after it look up."""
    return f"{depth} layers, {name}, seed {seed}"


def _tuning(options: Options, depth: int, scale: int) -> Part:
    def work() -> Outcome:
        flags = [*ARMS[STOCK], "--held_out_share", HELD_OUT]
        found = train(options, depth, scale, flags, TUNING_SEED, share=0.25)
        return outcome(options, [f"{STOCK}, tuning", depth, TUNING_SEED, scale], found, None)

    return Part(tuning_name(depth, scale), work)


def _arm(options: Options, depth: int, name: str, seed: int, scales: Sequence[int]) -> Part:
    def work() -> Outcome:
        scale = best_scale(options.measured, depth, scales)
        found = train(options, depth, scale, ARMS[name], seed)
        stock = options.measured.get(arm_name(depth, STOCK, seed)) if name != STOCK else None
        return outcome(options, [name, depth, seed, scale], found, stock)

    return Part(arm_name(depth, name, seed), work)


def best_scale(measured: Mapping[str, Any], depth: int, scales: Sequence[int]) -> int:
    """The scale of V and O at which the stock model was best; the smallest of equal ones.

    Raises:
        ValueError: where one was not tried.
    """
    accuracies = {scale: measured.get(tuning_name(depth, scale), {}).get("accuracy") for scale in scales}
    if missing := [str(scale) for scale, accuracy in accuracies.items() if accuracy is None]:
        raise ValueError(
            f"{depth} layers: V and O x {', '.join(missing)} failed, and without them no scale is the best"
        )
    return max(scales, key=lambda scale: accuracies[scale])


def train(
    options: Options, depth: int, scale: int, flags: Sequence[str], seed: int, share: float = 1.0
) -> dict[str, float]:
    """Train a model by the script, and return what came out.

    Args:
        scale: of V and O.
        flags: of the arm.
        share: of the usual steps.

    Raises:
        RuntimeError: if the script ends otherwise than with a trained model.
    """
    data = data_name(options)
    steps = 4 if options.tiny else round(share * STEPS[data])
    scales = f"query={QUERY_KEY},key={QUERY_KEY},value={scale},output={scale}"
    command = [*RECIPES[data], *(TINY_WIDTH if options.tiny else WIDTH), "--num_hidden_layers", str(depth)]
    command += ["--initialization_scale", scales, *flags, "--max_steps", str(steps), "--seed", str(seed)]
    command += ["--mixed_precision", "bf16" if options.device == "cuda" else "no", "--learning_rate", "1e-3"]
    command += ["--save_steps", "0", "--eval_steps", "0", "--logging_steps", str(max(1, steps // 30))]
    if options.cifar10 is not None:
        folder = image_folders(options.cifar10)
        command += ["--train_dir", str(folder / "train"), "--validation_dir", str(folder / "test")]
    AcceleratorState._reset_state(reset_partial_state=True)  # another run in this process
    with tempfile.TemporaryDirectory() as output:
        try:
            script.main([*command, "--output_dir", output, "--disable_tqdm", "True"])
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{Path(script.__file__).name} {' '.join(command)}: {ended.code}") from ended
        record = json.loads((Path(output) / "metrics.json").read_text(encoding="utf-8"))
    losses = [window["train_loss"] for window in record["history"]]
    final = record["final"]
    return {"accuracy": final["validation_accuracy"], "mean_loss": fmean(losses), "seconds": final["seconds"]}


def outcome(
    options: Options, names: Sequence[object], found: Mapping[str, float], stock: Mapping[str, float] | None
) -> Outcome:
    """A row of the table; beside its accuracy the difference from stock's, where there is one."""
    accuracy = 100 * found["accuracy"]
    difference = "" if stock is None else f"{accuracy - 100 * stock['accuracy']:+.2f}"
    cells = [f"{accuracy:.2f}", difference, f"{found['mean_loss']:.4f}", f"{found['seconds']:.0f}"]
    title = f"Attention without its residual connection, {data_name(options)}"
    return Outcome(title, COLUMNS, [[*map(str, names), *cells]], dict(found), notes=NOTES)


# --- the images ------------------------------------------------------------------------------------------------------


def data_name(options: Options) -> str:
    """What is trained on, for the page."""
    return "digits" if options.cifar10 is None else "CIFAR-10"


def image_folders(cifar10: str) -> Path:
    """A temporary folder with `train` and `test`, in which each class is a folder of images; written once on a machine."""
    files = cifar10_files(cifar10)
    digest = hashlib.sha256(repr([(each.name, each.stat().st_size) for each in files]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"specattn-cifar10-{digest}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for file in files:
                _write_images(file, Path(temporary) / "whole" / file.name.partition("-")[0].partition(".")[0])
            (Path(temporary) / "whole").rename(folder)
    return folder


def _write_images(file: Path, folder: Path) -> None:
    rows = table_rows(file, {"images": ("image", "img"), "labels": ("label",)})
    for number, (_, (image, label)) in enumerate(rows):
        place = folder / str(label) / f"{file.stem}-{number:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image["bytes"] if isinstance(image, dict) else image)
