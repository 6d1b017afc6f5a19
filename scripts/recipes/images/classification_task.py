"""Image classification as a task of the loop: which images a step reads, in which size and colors, and the loss."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..run.batching import BatchOrder
from ..run.distributed import run_on_main_process
from ..run.optimization import build_adamw
from ..run.projection_init import INITIALIZATION_SETTINGS
from ..run.runs import show_progress
from ..run.schedules import cosine_factor
from ..run.spectral_arguments import SpectralArguments
from ..run.usable_model import ModelError
from .augmentation import Augmentation, evaluation_transform, normalization, training_transform
from .classification_evaluation import evaluate_images
from .image_arguments import MODEL_SOURCES, ImageArguments
from .image_batches import Mixing, TrainingImages, ValidationImages
from .image_datasets import load_image_data
from .image_models import DEFAULT_IMAGE_SIZE, image_processor, model_input, save_classifier
from .read_ahead import ReadAheadTask
from .vision_optimization import AveragedWeights, not_decayed

logger = logging.getLogger(__name__)

# What decides a run beside its data and model: a resumed run must have the same.
RUN_SETTINGS = (
    "seed",
    "learning_rate",
    "warmup_learning_rate",
    "min_learning_rate",
    "weight_decay",
    "max_grad_norm",
    "model_ema_decay",
    "crop_share",
    *(item.name for item in (*fields(Augmentation), *fields(Mixing))),
    *MODEL_SOURCES,
    *INITIALIZATION_SETTINGS,
    "no_layer_norm",
    "no_attention_residual",
)


class ImageTask(ReadAheadTask):
    """Say which class an image is of.

    Every process finds the images; the main one looks whether they can be read. `spectral` says how the model is conditioned,
    which not every model's configuration does.
    """

    name = "train_image_classification"
    loss_name = "cross-entropy (nats per image)"
    processor_name = "image processor"
    hub_task = "image-classification"
    measured: ClassVar = {
        "validation_accuracy": ("accuracy", "Accuracy (top 1)"),
        "validation_loss": ("loss", "Loss (nats per image)"),
    }

    def __init__(self, arguments: ImageArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
        self.arguments, self.spectral, self.accelerator = arguments, spectral, accelerator
        own_size, own_channels = model_input(arguments)
        self.data = data = load_image_data(
            arguments,
            show_progress=show_progress(arguments, accelerator),
            once=lambda work: run_on_main_process(accelerator, work),
        )
        train, validation = len(data.train), len(data.validation)
        logger.info(f"Images: {data.origin}; {train:,} to train on, {validation:,} to validate on.")
        self.size = arguments.image_size or own_size or (max(data.size) if data.size else DEFAULT_IMAGE_SIZE)
        self.channels = own_channels if arguments.timm_model is None and own_channels else data.channels
        self.mode = "L" if self.channels == 1 else "RGB"  # PIL's name of the colors
        self.order = BatchOrder(train, arguments.seed, repeats=arguments.repeated_augmentation)
        self.amounts = self.amounts_of(train)
        self.dataset = data.origin
        self.validation_fingerprint = data.validation.fingerprint
        colors = normalization(self.channels)
        self.processor = image_processor(self.size, *colors, arguments.crop_share)
        transform = evaluation_transform(self.size, *colors, arguments.crop_share)
        self.validation = ValidationImages(data.validation, self.mode, transform)

    @property
    def warmup(self) -> float:
        """Steps of warmup."""
        return self.arguments.warmup_of(len(self.data.train), self.amounts.batch)

    def samples(self, count: int) -> dict[str, Tensor]:
        images = len(self.data.validation)
        # From all of it: images of a folder lie class by class.
        return {"pixel_values": self.validation[np.linspace(0, images - 1, min(count, images)).astype(np.int64)][0]}

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        data, planned = self.data, self.amounts.batch * self.steps
        return {
            "images": data.origin,
            "classes": len(data.class_names),
            "image_size": self.size,
            "channels": self.channels,
            "train_images": len(data.train),
            "validation_images": len(data.validation),
            "skipped_images": list(data.skipped),
            "train_fingerprint": data.train.fingerprint,
            "validation_fingerprint": data.validation.fingerprint,
            "planned_images": planned,
            "epochs": round(self.epochs(planned), 3),
        }

    def describe(self, facts: dict[str, Any]) -> Iterator[str]:
        yield (
            f"{facts['model_type']}: {facts['parameters']:,} parameters, {facts['classes']} classes, images of {self.size} x "
            f"{self.size} with {self.channels} channel(s)."
        )
        yield self.describe_steps(facts)

    def must_match(self) -> dict[str, Any]:
        config, preconditioner = self.spectral.to_config(), self.arguments.preconditioner()
        return {
            **{name: getattr(self.arguments, name) for name in RUN_SETTINGS},
            "warmup_steps": self.warmup,
            "spectral_settings": None if config is None else config.describe(),
            # Only where it was chosen: runs from before this flag can be resumed.
            **({} if preconditioner is None else {"preconditioner": preconditioner.describe()}),
            "image_size": self.size,
            "channels": self.channels,
            "train_fingerprint": self.data.train.fingerprint,
        }

    def optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        arguments, exempt = self.arguments, not_decayed(model)
        return build_adamw(model, arguments, arguments.learning_rate, arguments.weight_decay, not_decayed=exempt)

    def averaged(self, model: PreTrainedModel) -> AveragedWeights | None:
        decay = self.arguments.model_ema_decay
        return None if decay is None else AveragedWeights(model, decay)

    def learning_rate_factor(self) -> Callable[[float], float]:
        arguments, warmup, steps = self.arguments, self.warmup, self.steps
        start, floor = (
            rate / arguments.learning_rate for rate in (arguments.warmup_learning_rate, arguments.min_learning_rate)
        )
        return lambda used: cosine_factor(used, warmup, steps, start=start, floor=floor)

    def training_examples(self) -> TrainingImages:
        arguments, colors = self.arguments, normalization(self.channels)
        transform = training_transform(arguments, self.size, *colors, arguments.crop_share)
        classes, is_random = len(self.data.class_names), arguments.is_random
        return TrainingImages(self.data.train, self.order, self.mode, transform, is_random, arguments, classes)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        return F.cross_entropy(model(pixel_values=images).logits.float(), targets)

    def evaluate(self, model: nn.Module, accelerator: Accelerator | None) -> dict[str, float | None]:
        workers = 0 if accelerator is None else self.arguments.dataloader_num_workers
        batch_size = self.arguments.per_device_eval_batch_size
        found = evaluate_images(
            model, self.validation, batch_size=batch_size, workers=workers, accelerator=accelerator
        )
        return {"validation_accuracy": found.accuracy, "validation_loss": found.loss}

    def describe_evaluation(self, values: dict[str, float | None]) -> str:
        return f"validation accuracy {values['validation_accuracy']:.2%}, loss {values['validation_loss']:.6f}"

    def save(self, model: PreTrainedModel, accelerator: Accelerator, directory: str) -> bool:
        return accelerator.is_main_process and save_classifier(model, self.processor, directory)

    def evaluate_saved(self, path: str, device: torch.device) -> dict[str, float | None]:
        model = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32)
        classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if classes != list(self.data.class_names):
            raise ModelError(
                f"{path} knows {len(classes)} classes ({', '.join(classes[:5])}, ...), and the images are of "
                f"{len(self.data.class_names)} ({', '.join(self.data.class_names[:5])}, ...); give the images of its classes."
            )
        return self.evaluate(model.to(device), None)
