"""The detector of a run: built, begun from a classifier, conditioned; and its optimizer and learning rate."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_specattn import condition

from ..images.vision_optimization import NOT_DECAYED
from ..run.conditioned_model import condition_model
from ..run.projection_init import initialize_projections
from ..run.spectral_arguments import SpectralArguments
from .classifier_weights import Classifier, body_of, load_into_body, read_classifier
from .detection_arguments import SMALL_BODY, DetectionArguments
from .detector import (
    BATCH_NORMS,
    Detector,
    DetectorError,
    describe_body,
    detector_config,
    features_of,
    load_detector,
    register_detector,
)

logger = logging.getLogger(__name__)

NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
SIZES = ("fpn_channels", "box_head_size", "mask_layers", "anchor_sizes", "min_size", "max_size")


def build_detector(
    arguments: DetectionArguments,
    spectral: SpectralArguments,
    class_names: Sequence[str],
    samples: Mapping[str, Any],
    accelerator: Accelerator,
) -> Detector:
    """Build or load the detector, set how its projections begin, and condition it if asked to.

    A stock and a conditioned detector of one seed start from the same W.

    Args:
        samples: What the model reads of the first images; see `condition_model`.

    Raises:
        DetectorError, ConditioningError: for what cannot be built, loaded or conditioned.
    """
    register_detector()
    classifier = None if arguments.classifier is None else read_classifier(arguments.classifier)
    if arguments.model_name_or_path is not None:
        model = load_trained(arguments.model_name_or_path, class_names)
    else:
        model = new_detector(arguments, class_names, classifier)
    try:
        if classifier is not None:
            check_preconditioner(classifier, arguments)
            if classifier.spectral is not None:
                # Before the weights: so its own corrections, computed from the W that it began with, find their place.
                condition(model, classifier.spectral)
            unused = load_into_body(model.body, classifier)
            logger.info(f"The body begins with {classifier.path}, without its {', '.join(_parts(unused))}.")
        initialize_projections(model, arguments.initialization())
    except DetectorError:
        raise
    except ValueError as error:
        raise DetectorError(str(error)) from error
    condition_model(model, arguments, spectral, samples, accelerator)
    pretrained = classifier is not None or arguments.model_name_or_path is not None
    set_batch_norm(model, arguments.batch_norm, pretrained, accelerator)
    freeze_unused(model.body)
    return model


def new_detector(
    arguments: DetectionArguments, class_names: Sequence[str], classifier: Classifier | None = None
) -> Detector:
    """A detector of random weights."""
    if arguments.body is not None or classifier is None:
        name, defaults = SMALL_BODY if arguments.body is None else (arguments.body, {})
        body = describe_body(name, {**defaults, **arguments.body_arguments()}, arguments.out_indices)
    else:
        body = body_of(classifier, arguments.body_arguments(), arguments.out_indices)
    settings = {name: getattr(arguments, name) for name in SIZES}
    return Detector(detector_config(body, class_names, **settings))


def check_preconditioner(classifier: Classifier, arguments: DetectionArguments) -> None:
    """Refuse to lose a classifier's preconditioner, which no weight holds.

    Raises:
        DetectorError: unless the flags ask for the same, whose norms need not be measured again.
    """
    own = classifier.preconditioner
    if own is not None and (own != arguments.preconditioner() or own.scale == "match"):
        raise DetectorError(
            f"--classifier {classifier.path} was trained with the preconditioner {own.describe()}; give the same by "
            "--attention_preconditioner and its flags (match cannot be carried along: its norms are of another start)."
        )


def load_trained(path: str, class_names: Sequence[str]) -> Detector:
    """Load a trained detector of these classes.

    Raises:
        DetectorError: for another folder, and for other classes.
    """
    model = load_detector(path, dtype=torch.float32)
    labels: Any = model.config.id2label
    own = [labels[number] for number in range(len(labels))]
    if own != list(class_names):
        raise DetectorError(
            f"{path} knows {len(own)} classes ({', '.join(own[:5])}, ...), and the images are of {len(class_names)} "
            f"({', '.join(class_names[:5])}, ...); give the images of its classes."
        )
    return model


def _parts(names: Sequence[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names}) or ["nothing"]


def set_batch_norm(model: Detector, kind: str | None, pretrained: bool, accelerator: Accelerator) -> None:
    """Synchronize the batch norms, freeze those of the body, or leave them; see `--batch_norm`.

    Raises:
        DetectorError: for synchronized ones without GPUs.
    """
    on_gpus = accelerator.device.type == "cuda"
    if kind is None:
        kind = "sync" if on_gpus and accelerator.num_processes > 1 else "frozen" if pretrained else "train"
    if kind == "sync":
        if not on_gpus:
            raise DetectorError("--batch_norm sync needs GPUs; take frozen or train.")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif kind == "frozen":
        model.freeze_batch_norm()


def freeze_unused(body: nn.Module) -> None:
    """Take what no feature depends on (a last norm) out of the training: several processes would wait for its gradient."""
    training = body.training
    with torch.enable_grad():
        total = sum(feature.sum() for feature in features_of(body.eval(), torch.zeros(1, 3, 64, 64)))
        parameters = [each for each in body.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
    for parameter, gradient in zip(parameters, gradients):
        if gradient is None:
            parameter.requires_grad_(False)
    body.train(training)


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Sort the trainable parameters as the published recipes do: norms and position tables are exempt from decay."""
    norms = {id(each) for module in model.modules() if isinstance(module, NORMS) for each in module.parameters()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = id(parameter) in norms or name.endswith(NOT_DECAYED) or name in not_decayed
            groups[not exempt].append(parameter)
    decays = {True: weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": decays[decayed]} for decayed, group in groups.items() if group]


def milestone_factor(step: float, milestones: Sequence[float], warmup: float, start: float) -> float:
    """Rise linearly from `start` to 1 over `warmup` steps; a tenth after each milestone, in steps."""
    rising = start + (1 - start) * step / warmup if step < warmup else 1.0
    return rising * 0.1 ** sum(step >= milestone for milestone in milestones)
