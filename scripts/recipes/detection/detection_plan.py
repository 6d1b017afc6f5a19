"""What a detection run is about to do, in sentences, before any image is read."""

from pathlib import Path

import torch

from ..run.model_changes import model_changes
from ..run.spectral_arguments import SpectralArguments
from .classifier_weights import read_classifier
from .detection_arguments import RECIPES, DetectionArguments
from .detection_task import load_splits
from .detector import body_name
from .detector_building import load_trained, new_detector

# Training images and classes of a data set that nobody downloads for a plan.
KNOWN_SIZES = {"train2017": (118_287, 80)}


def describe_plan(
    arguments: DetectionArguments, spectral: SpectralArguments, *, processes: int, mixed_precision: str
) -> list[str]:
    """Say what the run will do; for the presets of published recipes the deviations from them follow, one line each.

    `processes` share the work, and the precision is as accelerate resolved it.

    Raises:
        DetectionDataError, DetectorError: where a run would raise them.
    """
    images, names = planned_images(arguments)
    with torch.random.fork_rng(devices=[]):
        if arguments.model_name_or_path is not None:
            model = load_trained(arguments.model_name_or_path, names)
        else:
            own = arguments.classifier if arguments.body is None else None
            model = new_detector(arguments, names, None if own is None else read_classifier(own))
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    steps = arguments.steps_of(images, batch)
    changes = model_changes(arguments, spectral)
    begun = arguments.model_name_or_path or arguments.classifier or "random weights"
    rate = "along a cosine to 0"
    if arguments.milestones is not None:
        rate = f"a tenth after passes {', '.join(f'{value:g}' for value in arguments.milestones)}"
    lines = [
        f"Model: Mask R-CNN on {body_name(model.config.body)}, from {begun}; {model.num_parameters():,} parameters, "
        f"{len(names)} classes; {'; '.join(changes) or 'not conditioned'}.",
        f"Images: {arguments.coco_dir or 'shapes'}, {images:,} to train on; augmentation {arguments.augmentation}; evaluated "
        f"at {arguments.min_size}/{arguments.max_size} pixels.",
        f"Steps: {steps:,} of {batch:,} images, {steps * batch / images:.4g} passes.",
        f"Learning rate: {arguments.learning_rate:g} after {arguments.warmup_steps} steps of warmup, then {rate}; weight "
        f"decay {arguments.weight_decay:g}, gradient clipped at {arguments.max_grad_norm or 'no norm'}.",
    ]
    if arguments.preset in RECIPES:
        changed = deviations(arguments, batch, mixed_precision) + changes
        lines.append(f"Deviations from the published recipe: {'none.' if not changed else ''}".rstrip())
        lines += [f"  - {line}" for line in changed]
        lines.append("What torchvision's Mask R-CNN does otherwise than mmdetection's: docs/detection.md.")
    return lines


def planned_images(arguments: DetectionArguments) -> tuple[int, list[str]]:
    """Return how many images a run trains on, and the names of its classes.

    Raises:
        DetectionDataError: where a run would raise it.
    """
    is_here = arguments.coco_dir is None or (Path(arguments.coco_dir) / "annotations").is_dir()
    if is_here or arguments.train_split not in KNOWN_SIZES:
        train, _ = load_splits(arguments)
        return len(train), train.class_names
    images, classes = KNOWN_SIZES[arguments.train_split]
    return min(images, arguments.max_train_samples or images), [str(number) for number in range(classes)]


def deviations(arguments: DetectionArguments, batch: int, mixed_precision: str) -> list[str]:
    """Return one line for each setting in which a run of a published preset is not its recipe."""
    run = vars(arguments) | {"global_batch_size": batch}
    recipe = RECIPES[str(arguments.preset)]
    compared = {name: value for name, value in recipe.items() if name != "coco_dir"}  # wherever COCO lies
    lines = [f"{name}: {run[name]} (published: {value})" for name, value in compared.items() if run[name] != value]
    if mixed_precision == "bf16":
        lines.append("mixed precision bf16, in body and FPN alone (published: fp16)")
    return lines
