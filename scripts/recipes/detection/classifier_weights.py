"""From an ImageNet classifier, stock or conditioned, to the body of a detector: its weights, and its corrections."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig
from transformers.utils import CONFIG_NAME

from hf_specattn.config import SpectralConfig
from hf_specattn.preconditioner import PreconditionerConfig

from ..run.messages import one_line
from ..run.run_metrics import METRICS_FILE
from ..run.spectral_arguments import SpectralArguments
from ..run.usable_model import ModelError, load_model
from .detector import DetectorError, describe_body

TIMM_KEYS = "timm_model."
NEW_IN_BODIES = "hidden_states_norms."  # of transformers' backbones: no classifier has them
# What a classifier says of itself and a body does not take.
NOT_OF_BODIES = ("num_classes", "global_pool", "drop_path_rate")


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        path: Where it was found.
        body: Name, arguments of the body of its architecture, for `describe_body`.
        weights: By the names within it.
        spectral: How it is conditioned; None: not at all, or folded.
        preconditioner: How its attention is preconditioned; None: not at all.
    """

    path: str
    body: tuple[str, dict[str, Any]]
    weights: dict[str, Tensor]
    spectral: SpectralConfig | None
    preconditioner: PreconditionerConfig | None = None


def read_classifier(path: str) -> Classifier:
    """Load a classifier that the Auto classes load, or a checkpoint of a finished run with a conditioned model of timm.

    `train_image_classification.py` saves the latter folded in the end, `W + C` being its weights; its folders
    `checkpoint-<step>` hold W and C apart.

    Raises:
        DetectorError: for anything else.
    """
    if (Path(path) / "model.safetensors").is_file() and not (Path(path) / CONFIG_NAME).is_file():
        return _read_timm_checkpoint(Path(path))
    try:
        model = load_model(AutoModelForImageClassification, path, dtype=torch.float32)
    except ModelError as error:
        raise DetectorError(f"--classifier {error}") from error
    spectral = getattr(model.config, "spectral_config", None)
    weights = model.state_dict()
    if isinstance(model.config, TimmWrapperConfig):
        arguments = {**(model.config.model_args or {})}
        return Classifier(path, (model.config.architecture, _of_bodies(arguments)), _bare(weights), spectral)
    config = model.config.to_stock() if hasattr(model.config, "to_stock") else model.config
    arguments = {name: value for name, value in config.to_diff_dict().items() if name in config.__class__().to_dict()}
    arguments.pop("model_type", None)
    preconditioner = getattr(model.config, "preconditioner_config", None)
    return Classifier(path, (config.model_type, arguments), weights, spectral, preconditioner)


def _read_timm_checkpoint(folder: Path) -> Classifier:
    record = folder.parent / METRICS_FILE
    try:
        arguments = json.loads(record.read_text(encoding="utf-8"))["arguments"]
        weights = load_file(folder / "model.safetensors")
        given = json.loads(arguments["timm_model_args"] or "{}")
        spectral = SpectralArguments(
            **{item.name: arguments[item.name] for item in fields(SpectralArguments) if item.init}
        )
        spectral.found_lambda = arguments.get("found_lambda")
        body = (str(arguments["timm_model"]), _of_bodies(given))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DetectorError(
            f"--classifier {folder} has no {CONFIG_NAME}, and {record} does not say which run of "
            f"train_image_classification.py it is of ({one_line(error)}). Name a folder that the Auto classes "
            "load, or a checkpoint of a finished run."
        ) from error
    return Classifier(str(folder), body, _bare(weights), spectral.to_config())


def _of_bodies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in NOT_OF_BODIES}


def _bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(TIMM_KEYS): value for name, value in weights.items()}


@torch.no_grad()
def load_into_body(body: nn.Module, classifier: Classifier) -> list[str]:
    """Copy a classifier's weights, and its corrections where the body is conditioned as it is, into a body.

    timm's bodies have their model's names, with `model.` before them, or with the first dot as an underscore; those of
    transformers have the classifier's own.

    Returns:
        What of the classifier the body has no place for: its head, and what follows the last stage.

    Raises:
        DetectorError: if a tensor of the body is not among the classifier's, or has another shape; nothing is changed.
    """
    own = {**body.state_dict(keep_vars=True)}
    found: dict[str, Tensor] = {}
    unused = []
    for name, value in classifier.weights.items():
        place = next((each for each in (name, f"model.{name}", name.replace(".", "_", 1)) if each in own), None)
        if place is None:
            unused.append(name)
        elif own[place].shape == value.shape:
            found[place] = value
    if missing := [name for name in own if name not in found and not name.startswith(NEW_IN_BODIES)]:
        raise DetectorError(
            f"--classifier {classifier.path} is of another architecture than the body: {_some(missing)} of the body "
            f"{'has' if len(missing) == 1 else 'have'} no counterpart of the same shape in it. Leave out --body and "
            "--body_args to take the classifier's own."
        )
    for place, value in found.items():
        own[place].copy_(value)
    return unused


def body_of(classifier: Classifier, arguments: Mapping[str, Any], out_indices: Sequence[int] | None) -> dict[str, Any]:
    """The body of a classifier's architecture, as `describe_body` describes it."""
    name, own = classifier.body
    return describe_body(name, {**own, **arguments}, out_indices)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
