"""Image classifiers: a new small ViT, any architecture of transformers or timm from random weights, or a checkpoint."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_specattn.conditioning import can_be_saved, fold
from hf_specattn.files import write_bytes
from hf_specattn.layers import spectral_layers
from hf_specattn.preconditioner import preconditioned_layers

from ..run.ablations import is_ablated
from ..run.command_line import flag
from ..run.saving import save_pretrained
from ..run.usable_model import ModelError, check_forward, load_config, load_model

TIMM_PREFIX = "timm/"

MOST_PATCHES = 256  # that a small ViT cuts an image into by default
DEFAULT_IMAGE_SIZE = 224  # of files of any size, for a model of any size


@dataclass
class ImageModelSettings:
    """Which model, by flags. Without any of the first three a small ViT of the sizes below is built.

    By default it has 203,000 parameters, so that the demonstration takes minutes on two cores.
    """

    model_name_or_path: str | None = flag(None, "Pretrained checkpoint; timm's on the Hub are timm/<name>.")
    config_name: str | None = flag(None, "Path of the configuration of an architecture to train from random weights.")
    timm_model: str | None = flag(None, "Name of a timm architecture to train from random weights.")
    timm_model_args: str | None = flag(None, 'Further arguments for timm, as JSON: {"img_size": 32, "patch_size": 4}.')
    drop_path_rate: float | None = flag(
        None, "Stochastic depth, for models that have it. None: the model's own value."
    )
    hidden_size: int = flag(64, "Width of the small ViT.")
    num_hidden_layers: int = flag(6, "Layers of the small ViT.")
    num_attention_heads: int = flag(4, "Attention heads of the small ViT.")
    intermediate_size: int = flag(128, "Feed-forward width of the small ViT.")
    patch_size: int | None = flag(
        None, "Height and width of the small ViT's patches. None: the smallest that give at most 256 patches."
    )

    @property
    def timm_arguments(self) -> dict[str, Any]:
        """What else `timm.create_model` is given.

        Raises:
            ValueError: for what is not a JSON object.
        """
        try:
            arguments = json.loads(self.timm_model_args or "{}")
        except ValueError as error:
            arguments = error
        if not isinstance(arguments, dict):
            raise ValueError(
                f"--timm_model_args {self.timm_model_args!r} is not a JSON object; write it as '{{\"img_size\": 32}}'."
            )
        return arguments

    @property
    def is_small_vit(self) -> bool:
        """Whether the model is built from the sizes."""
        return self.model_name_or_path is None and self.config_name is None and self.timm_model is None

    @property
    def named(self) -> str:
        """The model in words."""
        if self.model_name_or_path is not None:
            return f"{self.model_name_or_path}, pretrained"
        if self.is_small_vit:
            return "a small ViT, new"
        return f"{self.config_name or f'timm {self.timm_model}'}, new"


def model_input(settings: ImageModelSettings) -> tuple[int | None, int | None]:
    """Return the height (and width) and the channels that a named model is made for; None where it does not say.

    Raises:
        ModelError: if the model or its configuration does not exist.
    """
    if settings.is_small_vit:
        return None, None
    if settings.timm_model is not None:
        shape = _timm_default_config(settings.timm_model).get("input_size")
        size = settings.timm_arguments.get("img_size", shape[-1] if shape else None)
        return size, settings.timm_arguments.get("in_chans", shape[0] if shape else None)
    config = load_config(str(settings.model_name_or_path or settings.config_name))
    arguments = getattr(config, "model_args", None) or {}  # of timm's checkpoints, as the next two
    shape = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    if shape is None and isinstance(config, TimmWrapperConfig):
        shape = _timm_default_config(config.architecture).get("input_size")
    size = arguments.get("img_size") or getattr(config, "image_size", None) or (shape[-1] if shape else None)
    channels = arguments.get("in_chans") or getattr(config, "num_channels", None) or (shape[0] if shape else None)
    return (max(size) if isinstance(size, (list, tuple)) else size), channels


def default_patch_size(size: int) -> int:
    """Return the smallest power of two above one pixel that cuts an image into whole patches, at most 256; else any number.

    Raises:
        ModelError: if that leaves a single patch: for prime numbers of pixels.
    """
    fitting = [patch for patch in range(2, size) if size % patch == 0 and (size // patch) ** 2 <= MOST_PATCHES]
    if not fitting:
        raise ModelError(
            f"Images of {size} x {size} cannot be cut into 2 to {MOST_PATCHES} equal patches. Give another --image_size, to "
            "which they are resized, or a --patch_size."
        )
    return next((patch for patch in fitting if patch.bit_count() == 1), fitting[0])


def tokens_per_image(config: PreTrainedConfig, size: int) -> int | None:
    """Return how many tokens that attend to all of an image it becomes, special ones apart; None: it cannot be told."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or getattr(config, "window_size", None) is not None:
        return None
    return (size // patch) ** 2


def check_named_model(settings: ImageModelSettings, image_size: int | None) -> PreTrainedModel | None:
    """Build or load a model that is named, for two classes, before any image is looked at; the small ViT needs the images."""
    if settings.is_small_vit:
        return None
    own_size, own_channels = model_input(settings)
    return build_stock_model(settings, ("0", "1"), image_size or own_size or DEFAULT_IMAGE_SIZE, own_channels or 3)


def build_stock_model(
    settings: ImageModelSettings, class_names: Sequence[str], size: int, channels: int
) -> PreTrainedModel:
    """Build or load the model without conditioning it (a conditioned checkpoint loads as it is).

    Random weights come from torch's global generator: a stock and a conditioned model of one seed start from the same.

    Raises:
        ModelError: for a model that does not exist or does not take these images.
    """
    labels: dict[str, Any] = {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: number for number, name in enumerate(class_names)},
    }
    if settings.model_name_or_path is not None:
        model = _load(settings, labels)
    elif settings.timm_model is not None:
        model = _new_timm_model(settings, labels, size, channels)
    else:
        model = _new_model(settings, labels, size, channels)
    _check_model(model, size, channels, len(class_names))
    return model


def image_processor(size: int, mean: Sequence[float], std: Sequence[float], crop_share: float) -> Any:
    """Return a processor that prepares images as validation does, for `AutoImageProcessor` and pipelines.

    Resizing rounds differently there (on tensors, not on PIL's images); images of the right size come out the same.
    """
    return CLIPImageProcessor(
        size={"shortest_edge": int(size / crop_share)},
        crop_size={"height": size, "width": size},
        do_resize=True,
        do_center_crop=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=len(mean) == 3,
        image_mean=list(mean),
        image_std=list(std),
    )


# --- building --------------------------------------------------------------------------------------------------------


def _load(settings: ImageModelSettings, labels: dict[str, Any]) -> PreTrainedModel:
    path = str(settings.model_name_or_path)
    config = load_config(path)
    _set_drop_path(config, settings)
    another_head = config.num_labels != labels["num_labels"]
    return load_model(
        AutoModelForImageClassification,
        path,
        config=_with_labels(config, labels),
        ignore_mismatched_sizes=another_head,
    )


def _new_model(settings: ImageModelSettings, labels: dict[str, Any], size: int, channels: int) -> PreTrainedModel:
    if settings.config_name is not None:
        config = load_config(settings.config_name)
        for name, value in (("image_size", size), ("num_channels", channels)):
            if hasattr(config, name):
                setattr(config, name, value)
        _set_drop_path(config, settings)
        try:
            return AutoModelForImageClassification.from_config(_with_labels(config, labels))
        except (ValueError, ImportError) as error:
            raise ModelError(f"--config_name {settings.config_name}: no such model can be built ({error}).") from error
    patch_size = default_patch_size(size) if settings.patch_size is None else settings.patch_size
    if size % patch_size:
        raise ModelError(
            f"Images of {size} x {size} cannot be cut into patches of --patch_size {patch_size}; it must divide {size} "
            "(--image_size)."
        )
    if settings.drop_path_rate:
        raise ModelError(
            f"--drop_path_rate {settings.drop_path_rate}: transformers' ViT has no stochastic depth. Take one of timm, such "
            "as --timm_model vit_tiny_patch16_224, or leave it out."
        )
    config = ViTConfig(
        image_size=size,
        num_channels=channels,
        patch_size=patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(_with_labels(config, labels))


def _new_timm_model(settings: ImageModelSettings, labels: dict[str, Any], size: int, channels: int) -> PreTrainedModel:
    """A new model with timm's initialization; transformers' wrapper would draw its weights again, with another one."""
    name = str(settings.timm_model)
    given = {**settings.timm_arguments, "in_chans": channels}
    if settings.drop_path_rate is not None:
        given["drop_path_rate"] = settings.drop_path_rate
    default_size = _timm_default_config(name).get("input_size", (channels, size, size))[-1]
    try:
        initialized, given = _create_timm_model(
            name, labels["num_labels"], given, size if size != default_size else None
        )
    except TypeError as error:
        raise ModelError(
            f"timm's {name} takes none of these arguments, or not all: {json.dumps(given)} ({error}). Leave out of "
            "--timm_model_args and --drop_path_rate what it has not."
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(f"timm's {name} cannot be built with {json.dumps(given)}: {error}") from error
    config = _with_labels(TimmWrapperConfig(architecture=name, model_args=given), labels)
    with torch.random.fork_rng(devices=[]):
        model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(initialized.state_dict())
    return model


def _create_timm_model(
    name: str, classes: int, arguments: dict[str, Any], size: int | None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a model of timm for images of another size than its own (convolutional ones do not ask); and its arguments."""
    if size is not None and "img_size" not in arguments:
        with_size = {**arguments, "img_size": size}
        generator = torch.get_rng_state()
        try:
            return timm.create_model(name, num_classes=classes, **with_size), with_size
        except TypeError:
            torch.set_rng_state(generator)
    return timm.create_model(name, num_classes=classes, **arguments), arguments


def _timm_default_config(name: str) -> dict[str, Any]:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ModelError(
            f"--timm_model {name}: timm {timm.__version__} has no such model; "
            f"{'near it: ' + ', '.join(near) if near else 'timm.list_models() lists them'}. A pretrained one is loaded by "
            f"--model_name_or_path {TIMM_PREFIX}<name>."
        )
    config = timm.get_pretrained_cfg(name)
    return {} if config is None else {"input_size": config.input_size}


def _with_labels(config: Any, labels: dict[str, Any]) -> Any:
    for name, value in labels.items():
        setattr(config, name, value)
    return config


def _set_drop_path(config: Any, settings: ImageModelSettings) -> None:
    if settings.drop_path_rate is None:
        return
    if isinstance(config, TimmWrapperConfig):
        config.model_args = {**(config.model_args or {}), "drop_path_rate": settings.drop_path_rate}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = settings.drop_path_rate
    else:
        raise ModelError(
            f"--drop_path_rate {settings.drop_path_rate}: {config.model_type} of transformers has no stochastic depth; leave "
            "it out, or take a model of timm."
        )


def _check_model(model: PreTrainedModel, size: int, channels: int, classes: int) -> None:
    """Let the model classify one black image, before any data are read for it."""
    own = getattr(model.config, "image_size", None)
    advice = "Choose --image_size to fit the model (images are resized to it), or another model."
    if own is not None:
        advice = f"It is made for {own} x {own}. {advice}"
    images = torch.zeros(1, channels, size, size)
    logits = check_forward(model, {"pixel_values": images}, type(model).__name__, advice).logits
    if logits.shape != (1, classes):
        raise ModelError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for one image of {classes} classes; name "
            "a model for image classification."
        )


# --- saving ----------------------------------------------------------------------------------------------------------

# Not a name by which it would be taken for a model's checkpoint.
BARE_WEIGHTS_FILE = "weights_alone.safetensors"


def save_classifier(model: PreTrainedModel, processor: Any, directory: str) -> bool:
    """Save a trained model and its processor as the Auto classes load it; returns whether they can.

    A conditioned model that has no class of its own (one of timm) is saved folded: stock, with weights `W + C`. Of one
    without layer norms or residual connections, or of timm's with a preconditioner, which no class is, the weights alone are
    saved, as `weights_alone.safetensors`.
    """
    stock_when_folded = not is_ablated(model) and next(preconditioned_layers(model), None) is None
    if not can_be_saved(model) and next(spectral_layers(model), None) is not None and stock_when_folded:
        model = fold(copy.deepcopy(model))  # type: ignore[assignment]
    if can_be_saved(model):
        save_pretrained(model, processor, directory)
        return True
    Path(directory).mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    write_bytes(Path(directory) / BARE_WEIGHTS_FILE, safetensors.torch.save(weights))
    return False
