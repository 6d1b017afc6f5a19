r"""Train an image classifier, stock or spectrally conditioned.

Without arguments: a small vision transformer on the 8 x 8 digits that scikit-learn carries, minutes on two CPU cores.

    accelerate launch scripts/train_image_classification.py
    python scripts/train_image_classification.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/digits-identity

Images of your own, one folder for each class; Fashion-MNIST; a model of timm; a pretrained checkpoint:

    python scripts/train_image_classification.py --train_dir train --validation_dir validation --image_size 64 --patch_size 8
    python scripts/train_image_classification.py --idx_dir fashion-mnist --patch_size 4 --num_train_epochs 10
    python scripts/train_image_classification.py --timm_model swin_tiny_patch4_window7_224 --train_dir ... \
        --validation_dir ...
    python scripts/train_image_classification.py --model_name_or_path google/vit-base-patch16-224 --train_dir ... \
        --validation_dir ... --spectral_conditioning --spectral_method svd --spectral_init preserve --learning_rate 5e-5

What the published recipe of a model on ImageNet-1k would do here, and what a command changes of it; then that run:

    python scripts/train_image_classification.py --preset deit-base --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/train_image_classification.py \
        --preset deit-base --output_dir runs/deit-base

A run that was stopped (SIGTERM, Ctrl-C) or killed goes on from its newest good checkpoint, to the same weights:

    python scripts/train_image_classification.py --output_dir runs/digits ... --resume_from_checkpoint

The accuracy of a saved model, on the images it was validated on:

    python scripts/train_image_classification.py --eval_only --model_name_or_path runs/digits

The output folder holds the model and its image processor (for the Auto classes and pipelines), `metrics.json`,
`loss_curve.png`, `evaluations.json` (for the model card), and the last checkpoints, each a folder `checkpoint-<step>`.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_specattn import refresh
from hf_specattn.checkpoints.evaluations import write_evaluations
from hf_specattn.conditioning import refresh_interval
from recipes.images.arguments import ImageArguments, parse_arguments
from recipes.images.augmentation import evaluation_transform, normalization, training_transform
from recipes.images.batches import Batches, ImageOrder, TrainingImages, ValidationImages, load_batches
from recipes.images.evaluation import ImageEvaluation, evaluate_images
from recipes.images.models import (
    ImageModelError,
    build_stock_model,
    condition_model,
    image_processor,
    model_input,
    save_classifier,
)
from recipes.images.optimization import AveragedWeights, build_adamw
from recipes.images.plan import describe_plan
from recipes.images.sources import ImageData, ImageDataError, load_image_data
from recipes.run.arguments import SpectralArguments
from recipes.run.checkpointing import CheckpointError, Checkpoints, Progress, TrainingParts
from recipes.run.distributed import run_on_main_process
from recipes.run.initialization import initialize_projections, remove_layer_norms
from recipes.run.interruption import stop_on_signals
from recipes.run.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    NonFiniteLossError,
    RunMetrics,
    require_finite_gradient,
    require_finite_loss,
)
from recipes.run.run_description import model_description
from recipes.run.runs import (
    begin,
    build_accelerator,
    is_due,
    is_finished,
    last_checkpoint,
    show_progress,
    tracker_config,
)
from recipes.run.schedules import Budget, BudgetSchedule, cosine_factor
from recipes.run.throughput import LossWindow

logger = logging.getLogger("train_image_classification")

LOSS_NAME = "cross-entropy (nats per image)"
# What the model card says of the saved model: the names of its metrics on the Hub, and in words.
MEASURED = {
    "validation_accuracy": ("accuracy", "Accuracy (top 1)"),
    "validation_loss": ("loss", "Loss (nats per image)"),
}
DEFAULT_IMAGE_SIZE = 224

# What decides a run beside its data and model: a resumed run must have the same. How the global batch is cut among processes
# and forward passes may change, and so may everything about reading, reporting and saving.
RUN_SETTINGS = (
    "seed",
    "learning_rate",
    "warmup_learning_rate",
    "min_learning_rate",
    "weight_decay",
    "max_grad_norm",
    "model_ema_decay",
    "crop_share",
    "random_resized_crop",
    "random_shift",
    "horizontal_flip",
    "rand_augment",
    "random_erasing",
    "repeated_augmentation",
    "mixup",
    "cutmix",
    "label_smoothing",
    "model_name_or_path",
    "config_name",
    "timm_model",
    "projection_init",
    "initialization_scale",
    "match_norm_of",
    "no_layer_norm",
)


def show_plan(arguments: ImageArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """Log what the run will do, before any of it is done."""
    if not accelerator.is_main_process:
        return
    precision = accelerator.mixed_precision
    for line in describe_plan(arguments, spectral, processes=accelerator.num_processes, mixed_precision=precision):
        logger.info(line)


@dataclass(frozen=True)
class ImageTask:
    """What is learned: the images, in which size and colours, and their order."""

    data: ImageData
    size: int
    channels: int
    crop_share: float
    order: ImageOrder

    @property
    def mode(self) -> str:
        """PIL's name of the colours that the model reads."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def validation(self) -> ValidationImages:
        """The images to validate on, as the model reads them."""
        transform = evaluation_transform(self.size, *normalization(self.channels), self.crop_share)
        return ValidationImages(self.data.validation, self.mode, transform)

    def training(self, arguments: ImageArguments) -> TrainingImages:
        """The images to train on: augmented and mixed."""
        augmentation = arguments.augmentation()
        mean, std = normalization(self.channels)
        transform = training_transform(augmentation, self.size, mean, std, self.crop_share)
        classes = len(self.data.class_names)
        is_random, mixing = augmentation.is_random, arguments.mixing()
        return TrainingImages(self.data.train, self.order, self.mode, transform, is_random, mixing, classes)


def load_task(arguments: ImageArguments, accelerator: Accelerator) -> ImageTask:
    """Find the images on every process; the main one looks whether they can be read."""
    own_size, own_channels = model_input(arguments.model_settings())
    data = load_image_data(
        arguments.data_settings(),
        show_progress=show_progress(arguments, accelerator),
        once=lambda work: run_on_main_process(accelerator, work),
    )
    logger.info(f"Images: {data.origin}; {len(data.train):,} to train on, {len(data.validation):,} to validate on.")
    size = arguments.image_size or own_size or (max(data.size) if data.size else DEFAULT_IMAGE_SIZE)
    channels = own_channels if arguments.timm_model is None and own_channels else data.channels
    order = ImageOrder(len(data.train), arguments.seed, arguments.repeated_augmentation)
    return ImageTask(data, size, channels, arguments.crop_share, order)


def build_model(arguments: ImageArguments, spectral: SpectralArguments, task: ImageTask) -> PreTrainedModel:
    """Build or load the model, set how its projections begin, and condition it if asked to.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    model = build_stock_model(arguments.model_settings(), task.data.class_names, task.size, task.channels)
    try:
        initialize_projections(model, arguments.initialization())
        if arguments.no_layer_norm:
            logger.info(f"Took {remove_layer_norms(model)} layer norms out of the model.")
    except ValueError as error:
        raise ImageModelError(str(error)) from error
    if reports := condition_model(model, spectral):
        before, after = (
            max(getattr(report, kappa) for report in reports) for kappa in ("kappa_before", "kappa_after")
        )
        config = spectral.to_config()
        assert config is not None
        logger.info(
            f"Conditioned {len(reports)} projections by {config.describe()}, init {spectral.init}: the largest "
            f"condition number was {before:.4g} of W and is {after:.4g} of W + C."
        )
    return model


@dataclass(frozen=True)
class Amounts:
    """How much a run does: images per forward pass and step over all processes, steps, warmup steps."""

    micro_batch: int
    batch: int
    steps: int
    warmup: float
    eval_steps: int


def find_amounts(arguments: ImageArguments, accelerator: Accelerator, images: int) -> Amounts:
    micro_batch = arguments.per_device_train_batch_size * accelerator.num_processes
    batch = micro_batch * arguments.gradient_accumulation_steps
    one_pass = max(1, round(images / batch))
    eval_steps = one_pass if arguments.eval_steps is None else arguments.eval_steps
    steps, warmup = arguments.steps_of(images, batch), arguments.warmup_of(images, batch)
    return Amounts(micro_batch, batch, steps, warmup, eval_steps)


def describe_run(
    accelerator: Accelerator, model: PreTrainedModel, task: ImageTask, amounts: Amounts
) -> dict[str, Any]:
    """Log what is about to happen, and return it for `metrics.json`."""
    data = task.data
    facts = {
        "images": data.origin,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "classes": len(data.class_names),
        "image_size": task.size,
        "channels": task.channels,
        "train_images": len(data.train),
        "validation_images": len(data.validation),
        "skipped_images": list(data.skipped),
        "train_fingerprint": data.train.fingerprint,
        "validation_fingerprint": data.validation.fingerprint,
        "global_batch_size": amounts.batch,
        "images_per_step": amounts.batch,
        "planned_images": amounts.batch * amounts.steps,
        "epochs": round(task.order.epochs(amounts.batch * amounts.steps), 3),
        "device": accelerator.device.type,
        "device_name": torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else None,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }
    logger.info(
        f"{facts['model_type']}: {facts['parameters']:,} parameters, {facts['classes']} classes, images of {task.size} x "
        f"{task.size} with {task.channels} channel(s)."
    )
    logger.info(
        f"{amounts.steps:,} steps of {amounts.batch:,} images are {facts['epochs']} passes over the training images, on "
        f"{facts['processes']} {facts['device']} process(es) with {facts['threads']} thread(s), mixed precision "
        f"{facts['mixed_precision']}."
    )
    return facts


def settings_to_keep(
    arguments: ImageArguments,
    spectral: SpectralArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    task: ImageTask,
    amounts: Amounts,
) -> dict[str, Any]:
    """Return what must be the same when the run is resumed, by the names of flags and of the model's configuration."""
    config = spectral.to_config()
    return {
        **model_description(model.config),
        **{name: getattr(arguments, name) for name in RUN_SETTINGS},
        "max_steps": amounts.steps,
        "warmup_steps": amounts.warmup,
        "global_batch_size": amounts.batch,
        "mixed_precision": accelerator.mixed_precision,
        # Not every model's configuration says how it is conditioned.
        "spectral_settings": None if config is None else config.describe(),
        "spectral_init": spectral.init,
        "image_size": task.size,
        "channels": task.channels,
        "train_fingerprint": task.data.train.fingerprint,
        "validation_fingerprint": task.data.validation.fingerprint,
    }


@dataclass(frozen=True)
class Training:
    """What a step of training moves, and what saves it.

    Attributes:
        model: The model itself.
        wrapped: The model as accelerate wrapped it.
        optimizer: As accelerate wrapped it.
        schedule: Of the learning rate.
        averaged: The moving average of the weights, where it is asked for.
        checkpoints: Of all of these.
    """

    model: PreTrainedModel
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: BudgetSchedule
    averaged: AveragedWeights | None
    checkpoints: Checkpoints

    @property
    def result(self) -> PreTrainedModel:
        """The model that is validated and saved in the end."""
        return self.model if self.averaged is None else self.averaged.model


def prepare_training(
    arguments: ImageArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    task: ImageTask,
    amounts: Amounts,
    description: dict[str, Any],
) -> Training:
    optimizer = build_adamw(model, arguments.learning_rate, arguments.weight_decay)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    start, floor = (
        rate / arguments.learning_rate for rate in (arguments.warmup_learning_rate, arguments.min_learning_rate)
    )
    schedule = BudgetSchedule(
        prepared, lambda used: cosine_factor(used, amounts.warmup, amounts.steps, start=start, floor=floor)
    )
    averaged = None if arguments.model_ema_decay is None else AveragedWeights(model, arguments.model_ema_decay)
    processor = image_processor(task.size, *normalization(task.channels), task.crop_share)
    parts = TrainingParts(model, prepared, scaler=accelerator.scaler, processor=processor, averaged=averaged)
    limit = arguments.save_total_limit
    checkpoints = Checkpoints(arguments.output_dir, accelerator, parts, description, keep_last=limit)
    # Dropout and stochastic depth differ between processes.
    set_seed(arguments.seed, device_specific=True)
    return Training(model, wrapped, prepared, schedule, averaged, checkpoints)


def train(
    arguments: ImageArguments,
    accelerator: Accelerator,
    task: ImageTask,
    training: Training,
    amounts: Amounts,
    metrics: RunMetrics,
    begun: Progress,
) -> Progress:
    """Run the loop from `begun` on; returns how far it came: to the end, unless a signal stopped it."""
    metrics.history, metrics.validation = begun.record.get("history", []), begun.record.get("validation", [])
    window = LossWindow()
    window.restore(begun.record.get("loss_window"))
    budget = Budget(steps=amounts.steps)
    step, started = begun.step, time.perf_counter() - begun.seconds
    seconds = begun.seconds
    refresh_every = refresh_interval(training.model)
    micro_batches = training_batches(arguments, accelerator, task, step, amounts.steps)
    with_bar = show_progress(arguments, accelerator)
    progress = tqdm(total=amounts.steps, initial=step, desc="Training", unit="step", disable=not with_bar)
    training.wrapped.train()
    with stop_on_signals(accelerator) as stop:
        while budget.share(step, seconds) < 1:
            learning_rate = training.schedule.set(step)
            step += 1
            loss = train_step(arguments, accelerator, training, micro_batches, step)
            if refresh_every is not None and step % refresh_every == 0:
                refresh(training.model)
            if training.averaged is not None:
                training.averaged.update()
            seconds = time.perf_counter() - started
            last = step == amounts.steps

            window.add(loss, tokens=amounts.batch)
            progress.update()
            if is_due(step, arguments.logging_steps) or last:
                train_loss, speed = window.take()
                values = {
                    "epoch": round(task.order.epochs(step * amounts.batch), 4),
                    "train_loss": train_loss,
                    "learning_rate": learning_rate,
                    "train_images_seen": step * amounts.batch,
                    "images_per_second": speed,
                }
                metrics.history.append({"step": step, **values})
                accelerator.log(values, step=step)
                progress.set_postfix_str(f"loss {train_loss:.4f}, {speed:,.0f} images/s")
                if not with_bar:
                    logger.info(f"step {step}/{amounts.steps}: loss {train_loss:.4f}, {speed:,.0f} images/s")
            if is_due(step, amounts.eval_steps) and not last:
                with window.paused():
                    metrics.validation.append(validate(arguments, accelerator, task, training, step))

            stopping = stop.requested()
            if stopping or is_due(step, arguments.save_steps) or (last and arguments.save_steps > 0):
                record = {
                    "history": metrics.history,
                    "validation": metrics.validation,
                    "loss_window": window.state(),
                }
                with window.paused():
                    training.checkpoints.save(Progress(step, seconds, record))
            if stopping:
                break
    progress.close()
    return Progress(step, seconds)


def training_batches(
    arguments: ImageArguments, accelerator: Accelerator, task: ImageTask, begin_step: int, end_step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's images and targets of each forward pass, from the first step to be taken to the last."""
    keys = Batches(
        begin_step,
        end_step,
        arguments.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        arguments.per_device_train_batch_size,
    )
    on_gpu = accelerator.device.type == "cuda"
    return iter(load_batches(task.training(arguments), keys, arguments.dataloader_num_workers, pin_memory=on_gpu))


def train_step(
    arguments: ImageArguments,
    accelerator: Accelerator,
    training: Training,
    micro_batches: Iterator[tuple[Tensor, Tensor]],
    step: int,
) -> float:
    """Take one optimizer step over its micro-batches; returns its loss over all processes."""
    micro_steps, device = arguments.gradient_accumulation_steps, accelerator.device
    step_loss = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        images, targets = next(micro_batches)
        # Gradients are exchanged once, in the last backward pass.
        accumulating = micro_step < micro_steps - 1
        with accelerator.no_sync(training.wrapped) if accumulating else nullcontext():
            logits = training.wrapped(pixel_values=images.to(device, non_blocking=True)).logits
            loss = F.cross_entropy(logits.float(), targets.to(device, non_blocking=True)) / micro_steps
            accelerator.backward(loss)
        step_loss += loss.detach()
    # Every process and micro-batch has equally many images: the mean of their means is the mean.
    step_loss = accelerator.reduce(step_loss, reduction="mean")
    require_finite_loss(step_loss.item(), step)
    norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), arguments.max_grad_norm or math.inf)
    if accelerator.scaler is None:  # fp16's loss scaling skips a step whose gradient overflowed
        require_finite_gradient(float(norm), step)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return step_loss.item()


def validate(
    arguments: ImageArguments, accelerator: Accelerator, task: ImageTask, training: Training, step: int
) -> dict[str, Any]:
    """Measure accuracy and loss on all processes together, log them and return their record."""
    model = training.wrapped if training.averaged is None else training.averaged.model
    result = evaluate_images(
        model,
        task.validation,
        batch_size=arguments.per_device_eval_batch_size,
        workers=arguments.dataloader_num_workers,
        accelerator=accelerator,
    )
    return report_validation(accelerator, result, step)


def report_validation(accelerator: Accelerator, result: ImageEvaluation, step: int) -> dict[str, Any]:
    """Log one evaluation and return its record."""
    require_finite_loss(result.loss, step, "validation")
    values = {"validation_accuracy": result.accuracy, "validation_loss": result.loss}
    accelerator.log(values, step=step)
    logger.info(f"step {step}: validation accuracy {result.accuracy:.2%}, loss {result.loss:.6f}")
    return {"step": step, **values}


def evaluate_saved(arguments: ImageArguments, path: str, accelerator: Accelerator, task: ImageTask) -> ImageEvaluation:
    """Evaluate what is on the disk, in float32 and on this process alone: the number that whoever loads it will find."""
    model = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32).to(accelerator.device)
    return evaluate_images(model, task.validation, batch_size=arguments.per_device_eval_batch_size)


def train_classifier(arguments: ImageArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """The whole run: images, model, loop, saving, and the saved model's accuracy."""
    show_plan(arguments, spectral, accelerator)
    if arguments.show_plan:
        return
    task = load_task(arguments, accelerator)
    amounts = find_amounts(arguments, accelerator, len(task.data.train))
    model = build_model(arguments, spectral, task)
    metrics = RunMetrics(arguments=asdict(arguments) | asdict(spectral))
    metrics.facts = describe_run(accelerator, model, task, amounts)

    finished = is_finished(arguments, accelerator)
    if not finished:
        accelerator.init_trackers("train_image_classification", config=tracker_config(metrics.arguments))
    description = settings_to_keep(arguments, spectral, accelerator, model, task, amounts)
    training = prepare_training(arguments, accelerator, model, task, amounts, description)
    # Last before the loop: it restores the random number generators.
    begun = begin(arguments, accelerator, training.checkpoints)
    if finished:
        logger.info(f"The run in {arguments.output_dir} is finished; there is nothing to continue.")
    else:
        done = train(arguments, accelerator, task, training, amounts, metrics, begun)
        if done.step < amounts.steps:
            instead = " in place of --overwrite_output_dir" if arguments.overwrite_output_dir else ""
            logger.info(
                f"Stopped after step {done.step} of {amounts.steps}, with a checkpoint in {arguments.output_dir}. The same "
                f"command with --resume_from_checkpoint{instead} continues."
            )
        elif accelerator.is_main_process:
            finish(arguments, accelerator, task, training, amounts, metrics, done)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def finish(
    arguments: ImageArguments,
    accelerator: Accelerator,
    task: ImageTask,
    training: Training,
    amounts: Amounts,
    metrics: RunMetrics,
    done: Progress,
) -> None:
    """Save the model, measure what was saved, and write the record."""
    path = arguments.output_dir
    if save_classifier(training.result, training.checkpoints.parts.processor, path):
        result = evaluate_saved(arguments, path, accelerator, task)
    else:
        result = evaluate_images(training.result, task.validation, batch_size=arguments.per_device_eval_batch_size)
    metrics.validation.append(report_validation(accelerator, result, done.step))
    images = done.step * amounts.batch
    metrics.final = {**metrics.validation[-1], "train_images_seen": images, "seconds": done.seconds}
    if accelerator.device.type == "cuda":
        metrics.facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(accelerator.device)
    results = metrics.evaluations("image-classification", metrics.facts["images"], MEASURED)
    write_evaluations(path, Path(path).resolve().name, results)
    metrics.write(path, LOSS_NAME)
    logger.info(
        f"Trained for {done.seconds:.1f} s on {images:,} images. Model, image processor, {METRICS_FILE} and "
        f"{LOSS_CURVE_FILE} are in {path}."
    )


def evaluate_only(arguments: ImageArguments, accelerator: Accelerator) -> None:
    """Measure a saved model on the validation images of its run, or on those of the flags given."""
    path = str(arguments.model_name_or_path)
    task = load_task(arguments, accelerator)
    if accelerator.is_main_process:
        recorded = Path(path) / METRICS_FILE
        if recorded.is_file():
            facts = json.loads(recorded.read_text(encoding="utf-8")).get("facts", {})
            if facts.get("validation_fingerprint") != task.data.validation.fingerprint:
                logger.warning(f"These are not the validation images that {path} was trained with.")
        model = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32)
        classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if classes != list(task.data.class_names):
            raise ImageModelError(
                f"{path} knows {len(classes)} classes ({', '.join(classes[:5])}, ...), and the images are of "
                f"{len(task.data.class_names)} ({', '.join(task.data.class_names[:5])}, ...); give the images of its classes."
            )
        result = evaluate_saved(arguments, path, accelerator, task)
        print(json.dumps({"validation_accuracy": result.accuracy, "validation_loss": result.loss}))
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    try:
        accelerator = build_accelerator(arguments, ["train_image_classification", "recipes", "hf_specattn"])
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("These models fit on one GPU: use several processes without FSDP (DDP).")
    except ValueError as error:  # what accelerate refuses on this machine
        raise SystemExit(f"error: {error}") from error
    try:
        with logging_redirect_tqdm():
            if arguments.eval_only:
                evaluate_only(arguments, accelerator)
            else:
                train_classifier(arguments, spectral, accelerator)
    # A message for what a user can change; a traceback for anything else.
    except NonFiniteLossError as error:
        raise SystemExit(f"error: {error} {last_checkpoint(arguments)}") from error
    except (ImageDataError, ImageModelError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
