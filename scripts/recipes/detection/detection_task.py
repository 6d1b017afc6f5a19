"""Detection as a task of the loop: which images a step reads, their losses, COCO's evaluation, and what is drawn of it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..images.read_ahead import ReadAheadTask
from ..run.batching import BatchOrder
from ..run.distributed import run_on_main_process
from ..run.optimization import build_adamw
from ..run.projection_init import INITIALIZATION_SETTINGS
from ..run.saving import save_pretrained
from ..run.schedules import cosine_factor
from ..run.spectral_arguments import SpectralArguments
from .coco_evaluation import DETECTIONS_FILE, MEASURES, evaluate_detector
from .coco_files import DetectionDataError, DetectionSplit, check_images, read_coco
from .detection_arguments import DetectionArguments
from .detection_batches import Batch, TrainingExamples, as_input, training_transform
from .detector_building import load_trained, milestone_factor, parameter_groups
from .drawing import draw_detections
from .shapes import shapes

logger = logging.getLogger(__name__)

# What decides a run beside its data and model: a resumed run must have the same.
RUN_SETTINGS = (
    "seed",
    "learning_rate",
    "warmup_steps",
    "warmup_factor",
    "weight_decay",
    "max_grad_norm",
    "augmentation",
    "batch_norm",
    "drop_path_rate",
    "classifier",
    "model_name_or_path",
    *INITIALIZATION_SETTINGS,
)


class DetectionTask(ReadAheadTask):
    """Find objects, with their boxes and masks. Every process finds the images; the main one looks whether they can be read.

    Args:
        arguments: Of the run.
        spectral: How the model is conditioned.
        accelerator: The processes that share it.
    """

    name = "train_detection"
    loss_name = "sum of Mask R-CNN's losses"
    processor_name = DETECTIONS_FILE
    processor = None  # a detector reads images as they are
    hub_task = "object-detection"
    measured: ClassVar = {
        "validation_box_ap": ("mean_average_precision", "Box AP"),
        "validation_mask_ap": ("mean_average_precision", "Mask AP"),
        "validation_loss": ("loss", "Loss (sum of Mask R-CNN's)"),
    }

    def __init__(self, arguments: DetectionArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
        self.arguments, self.spectral, self.accelerator = arguments, spectral, accelerator
        self.train, self.validation = load_splits(arguments, accelerator)
        for split in (self.train, self.validation):
            logger.info(describe_split(split))
        self.order = BatchOrder(len(self.train), arguments.seed)
        self.amounts = self.amounts_of(len(self.train))
        self.dataset = self.train.origin
        self.validation_fingerprint = self.validation.fingerprint

    def samples(self, count: int) -> dict[str, Any]:
        numbers = range(min(count, len(self.validation)))
        return {"images": [as_input(self.validation.load(number)[0]) for number in numbers]}

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        planned = self.amounts.batch * self.steps
        return {
            "images": self.train.origin,
            "object_classes": len(self.train.class_names),
            "train_images": len(self.train),
            "validation_images": len(self.validation),
            "train_fingerprint": self.train.fingerprint,
            "validation_fingerprint": self.validation.fingerprint,
            "planned_images": planned,
            "epochs": round(self.epochs(planned), 3),
        }

    def describe(self, facts: dict[str, Any]) -> Iterator[str]:
        yield f"{facts['model_type']}: {facts['parameters']:,} parameters, {facts['object_classes']} classes."
        yield self.describe_steps(facts)

    def must_match(self) -> dict[str, Any]:
        return {
            **{name: getattr(self.arguments, name) for name in RUN_SETTINGS},
            "milestones": self.arguments.milestones,
            "train_fingerprint": self.train.fingerprint,
        }

    def optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        arguments = self.arguments
        return build_adamw(
            model, arguments, arguments.learning_rate, arguments.weight_decay, groups_of=parameter_groups
        )

    def learning_rate_factor(self) -> Callable[[float], float]:
        arguments, steps = self.arguments, self.steps
        warmup, start = min(arguments.warmup_steps, steps), arguments.warmup_factor
        if arguments.milestones is None:
            return lambda used: cosine_factor(used, warmup, steps, start=start)
        milestones = [milestone * len(self.train) / self.amounts.batch for milestone in arguments.milestones]
        return lambda used: milestone_factor(used, milestones, warmup, start)

    def training_examples(self) -> TrainingExamples:
        arguments = self.arguments
        transform = training_transform(arguments.augmentation, arguments.min_size, arguments.max_size)
        return TrainingExamples(self.train, self.order, transform)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        return model(images, targets).loss

    def evaluate(self, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        output_dir = None if self.arguments.eval_only else self.arguments.output_dir
        batch_size = self.arguments.per_device_eval_batch_size
        return evaluate_detector(
            model, self.validation, batch_size=batch_size, accelerator=accelerator, output_dir=output_dir
        )

    def describe_evaluation(self, values: dict[str, float | None]) -> str:
        columns = ", ".join(
            f"{name.replace('_', ' ').replace('ap', 'AP')} {values[f'validation_{name}']:.3f}" for name in MEASURES
        )
        return f"validation {columns}, loss {values['validation_loss']:.4f}"

    def save(self, model: PreTrainedModel, accelerator: Accelerator, directory: str) -> bool:
        if accelerator.is_main_process:
            save_pretrained(model, None, directory)
        return True

    def evaluate_saved(self, path: str, device: torch.device) -> dict[str, float | None]:
        model: Any = load_trained(path, self.validation.class_names)
        model.to(device)
        if self.arguments.draw:
            folder = Path(self.arguments.output_dir) / "predictions"
            drawn = draw_detections(model, self.validation, self.arguments.draw, folder)
            logger.info(f"Drew what is found on {drawn} images: {folder}.")
        return self.evaluate(model, None)


def load_splits(
    arguments: DetectionArguments, accelerator: Accelerator | None = None
) -> tuple[DetectionSplit, DetectionSplit]:
    """Find the images to train and to validate on.

    Args:
        accelerator: Its main process looks at all of the images; None: nobody does.

    Raises:
        DetectionDataError: for what cannot be used, and for splits of different classes.
    """
    limits = (arguments.max_train_samples, arguments.max_validation_samples)
    if arguments.coco_dir is None:
        train, validation = shapes("train"), shapes("validation")
    else:
        folder = Path(arguments.coco_dir)
        names = (arguments.train_split, arguments.validation_split)
        train, validation = (
            read_coco(folder / "annotations" / f"instances_{name}.json", folder / name) for name in names
        )

        def look() -> None:
            for split, name in zip((train, validation), names):
                check_images(split, folder / name, arguments.check_images)

        if accelerator is not None:
            run_on_main_process(accelerator, look)
    if (train.category_ids, train.class_names) != (validation.category_ids, validation.class_names):
        raise DetectionDataError(
            f"{train.origin} has the classes {', '.join(train.class_names[:5])}, ..., and {validation.origin} has "
            f"{', '.join(validation.class_names[:5])}, ...; both files must list the same categories."
        )
    splits = train.take(limits[0]), validation.take(limits[1])
    for split in splits:
        if not split.annotations:
            raise DetectionDataError(
                f"{split.origin} has no object on its {len(split):,} images (crowds and boxes without extent do not count): "
                "there is nothing to learn or to measure. Use more of the images (--max_train_samples, "
                "--max_validation_samples), or another file."
            )
    return splits


def describe_split(split: DetectionSplit) -> str:
    """What it holds, in words."""
    crowds = sum(bool(each.get("iscrowd")) for each in split.content["annotations"])
    empty = sum(image["id"] not in split.annotations for image in split.content["images"])
    objects = sum(map(len, split.annotations.values()))
    text = f"{split.origin}: {len(split):,} images, {objects:,} objects of {len(split.class_names)} classes, {crowds} crowds"
    text += f", {empty} images without objects"
    if split.degenerate:
        named = ", ".join(map(str, split.degenerate[:5])) + (", ..." if len(split.degenerate) > 5 else "")
        text += f"; training leaves out {len(split.degenerate)} boxes without width or height (annotations {named})"
    return f"{text}."
