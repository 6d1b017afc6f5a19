"""What a run measured: `metrics.json` and the picture of its loss."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers.utils import logging

from hf_specattn.figures import OKABE_ITO, new_figure, render
from hf_specattn.files import write_bytes, write_json
from hf_specattn.version import __version__

METRICS_FILE = "metrics.json"
LOSS_CURVE_FILE = "loss_curve.png"

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "torchvision", "timm", "pillow")

MLM_LOSS_NAME = "masked-LM loss (nats per predicted token)"

logger = logging.get_logger(__name__)


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became nan or infinite; the message names the step."""


@dataclass
class RunMetrics:
    """The record of a run.

    Attributes:
        arguments: Every argument of the run by its flag's name.
        facts: What was derived from them: data, model, hardware.
        history: Per logged step `step`, `epoch`, `train_loss` (the mean since the entry before), `learning_rate`, the speed.
        validation: Per evaluation `step`, and what the task measures.
        final: The same for the saved model, and `seconds` of training.
    """

    arguments: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: str | Path, loss_name: str = MLM_LOSS_NAME) -> None:
        """Write `metrics.json` and, where matplotlib is installed, `loss_curve.png` of losses named with their unit."""
        directory = Path(directory)
        try:
            picture = loss_curve(self.history, self.validation, loss_name)
        except ImportError:
            logger.warning(
                f"matplotlib is not installed, so {LOSS_CURVE_FILE} is left out; {METRICS_FILE} has the data."
            )
        else:
            write_bytes(directory / LOSS_CURVE_FILE, picture)
        # Last: it is what marks a run as finished.
        write_json(directory / METRICS_FILE, {**asdict(self), "versions": package_versions()})

    def evaluations(self, task: str, origin: str, measured: Mapping[str, tuple[str, str]]) -> list[EvalResult]:
        """Return the saved model's results on the validation data, for its model card.

        Args:
            task: As the Hub names it, such as "fill-mask".
            origin: Where the data came from, in words; a dataset of the Hub goes by its name.
            measured: Key of `final` -> the metric's name on the Hub, and in words. What the run has not is left out.
        """
        common: dict[str, Any] = {
            "task_type": task,
            "dataset_type": self.arguments.get("dataset_name") or origin,
            "dataset_name": origin,
            "dataset_split": "validation",
        }
        return [
            EvalResult(**common, metric_type=kind, metric_name=title, metric_value=self.final[key])
            for key, (kind, title) in measured.items()
            if self.final.get(key) is not None
        ]


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide a run's numbers; None where not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "hf_specattn": __version__}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def perplexity(loss: float) -> float | None:
    """Return `exp(loss)`, or None where a float cannot hold it (JSON has no infinity)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def require_finite_loss(loss: float, step: int, kind: str = "training") -> None:
    """Raise `NonFiniteLossError` if the loss of a step, counted from 1, is nan or infinite."""
    _require_finite(loss, f"{kind} loss", step)


def require_finite_gradient(norm: float, step: int) -> None:
    """Raise `NonFiniteLossError` if the norm of the whole gradient, before clipping, is, though the loss was not."""
    _require_finite(norm, "gradient's norm", step)


def _require_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"The {name} is {value} at step {step}; the run stops here. Lower --learning_rate, lengthen "
            "--warmup_steps, or use --mixed_precision no; with spectral conditioning a smaller --lambda_ also helps."
        )


def loss_curve(
    history: list[dict[str, Any]], validation: list[dict[str, Any]], loss_name: str = MLM_LOSS_NAME
) -> bytes:
    """Draw training and validation loss over optimizer steps, the records of `RunMetrics`; returns a PNG image.

    Raises:
        ImportError: if matplotlib is missing.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for records, key, label, style in (
        (history, "train_loss", "training", {"color": OKABE_ITO["blue"], "linewidth": 1.2}),
        (validation, "validation_loss", "validation", {"color": OKABE_ITO["vermillion"], "marker": "o"}),
    ):
        if records:
            axes.plot(
                [record["step"] for record in records], [record[key] for record in records], label=label, **style
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(loss_name)
    axes.grid(alpha=0.3)
    if history or validation:
        axes.legend()
    return render(figure, LOSS_CURVE_FILE)["png"]
