"""The command line of `train_image_classification.py`: flags, presets, and everything that is refused before work starts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import HfArgumentParser

from ..run.projection_init import check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.spectral_arguments import SpectralArguments, check_bounds, check_heads, explicitly_given
from .augmentation import Augmentation
from .image_batches import Mixing
from .image_datasets import ImageDataSettings
from .image_models import ImageModelSettings
from .imagenet_recipes import PRESETS

# One source of images: naming another by a flag replaces a preset's or a recorded run's.
SOURCES = ("idx_dir", "train_dir", "dataset_name")
OF_DATASET = (
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "train_split",
    "validation_split",
    "image_column",
    "label_column",
)
REPLACED = {
    "idx_dir": ("train_dir", "validation_dir", *OF_DATASET),
    "train_dir": ("idx_dir", *OF_DATASET),
    "dataset_name": ("idx_dir", "train_dir", "validation_dir"),
    "model_name_or_path": ("config_name", "timm_model", "timm_model_args", "drop_path_rate"),
    "config_name": ("model_name_or_path", "timm_model", "timm_model_args", "drop_path_rate"),
    "timm_model": ("model_name_or_path", "config_name", "timm_model_args"),
    "max_steps": ("num_train_epochs",),
}
MODEL_SOURCES = ("model_name_or_path", "config_name", "timm_model")
NEW_VIT_SETTINGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
# What decides the validation images of a run: --eval_only takes these from the run's metrics.json.
DATA_SETTINGS = (*(item.name for item in fields(ImageDataSettings)), "image_size", "crop_share")
AT_LEAST_ONE = (*(name for name in NEW_VIT_SETTINGS if name != "patch_size"), "repeated_augmentation")
OPTIONAL_COUNTS = ("max_train_samples", "max_validation_samples", "image_size", "patch_size")
SHARES = ("horizontal_flip", "random_erasing", "label_smoothing")


@dataclass
class ImageArguments(RunArguments):
    """Arguments of the run; the defaults are the demonstration on scikit-learn's digits."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Values for the other flags, which those given on the command line replace: digits (the defaults), or "
            "the published recipe on ImageNet-1k of vit-base, deit-base, swin-base, xcit-medium, davit-base; or a YAML file "
            "of your own.",
        },
    )

    # Data.
    idx_dir: str | None = field(
        default=None, metadata={"help": "Folder with the four IDX files of MNIST, Fashion-MNIST, ..., plain or .gz."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of images per class. None of the three: the digits."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to validate on."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of the Hub with a column of images and one of class labels."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of the dataset to validate on."})
    image_column: str = field(default="image", metadata={"help": "Column of the dataset with the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the dataset with the labels."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, the first of each class in turn. None: all."}
    )
    max_validation_samples: int | None = field(default=None, metadata={"help": "The same, to validate on."})
    held_out_share: float | None = field(
        default=None,
        metadata={
            "help": "Validate on this share of the training images, which are not trained on then, in place of the "
            "validation images: to choose settings by. None: the validation images."
        },
    )
    check_images: str = field(
        default="decode",
        metadata={
            "help": "Before training read every image file (decode), or only the beginning of each (header).",
            "choices": ["decode", "header"],
        },
    )
    skip_unreadable_images: bool = field(
        default=False, metadata={"help": "Leave unreadable images out, with a warning, instead of ending the run."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width that the model reads. None: the model's own, else that of the images."},
    )
    crop_share: float = field(
        default=1.0, metadata={"help": "Share of the resized image's side that validation looks at, in the middle."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images; 0: none beside."})

    # Augmentation: none, for the digits fill their eight pixels.
    random_resized_crop: float | None = field(
        default=None, metadata={"help": "Random crops of at least this share of the area, resized. None: no crops."}
    )
    random_shift: int = field(default=0, metadata={"help": "Shift by up to so many pixels each way."})
    horizontal_flip: float = field(default=0.0, metadata={"help": "Probability of mirroring an image."})
    rand_augment: str | None = field(
        default=None, metadata={"help": "RandAugment, in timm's notation: rand-m9-mstd0.5-inc1. None: none."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    repeated_augmentation: int = field(
        default=1,
        metadata={"help": "Read each image of a pass so often, augmented anew; a pass has fewer images then."},
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0: none."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix; 0: none. With mixup, either per pair."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of the target spread over all classes."})

    # Model: 203,000 parameters, so that the demonstration takes minutes on two cores.
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained checkpoint; those of timm on the Hub are timm/<name>."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Random weights, of the architecture whose configuration lies there."}
    )
    timm_model: str | None = field(
        default=None, metadata={"help": "Random weights, of timm's architecture of that name."}
    )
    timm_model_args: str | None = field(
        default=None, metadata={"help": 'What else timm is told, as JSON: {"img_size": 32, "patch_size": 4}.'}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth, of models that have it. None: as the model has it."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the small ViT."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the small ViT."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of the small ViT."})
    intermediate_size: int = field(default=128, metadata={"help": "Feed-forward width of the small ViT."})
    patch_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the small ViT's patches. None: the smallest that are at most 256."},
    )

    no_layer_norm: bool = field(default=False, metadata={"help": "Ablation: take every layer norm out of the model."})
    no_attention_residual: bool = field(
        default=False, metadata={"help": "Ablation: let attention replace its input in every block of a ViT."}
    )

    # Optimization.
    num_train_epochs: float = field(default=40.0, metadata={"help": "Passes over the training images."})
    max_steps: int | None = default_of("max_steps", None, "Optimizer steps, instead of passes.")
    per_device_train_batch_size: int = default_of(
        "per_device_train_batch_size", 32, "Images per process and forward pass."
    )
    per_device_eval_batch_size: int = default_of("per_device_eval_batch_size", 128)
    learning_rate: float = default_of("learning_rate", 1e-3, "Peak learning rate, of a cosine.")
    warmup_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the start of the warmup."})
    min_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the end."})
    warmup_epochs: float = field(default=5.0, metadata={"help": "Passes of linear warmup."})
    weight_decay: float = default_of("weight_decay", 0.05, "Decoupled decay; vectors and tables are exempt.")
    model_ema_decay: float | None = field(
        default=None, metadata={"help": "Validate and save the moving average of the weights with this decay."}
    )
    seed: int = default_of("seed", 0, "Decides initialization, order, augmentation and mixing.")

    # Reporting and saving.
    output_dir: str = default_of("output_dir", "runs/train_image_classification")
    save_steps: int = default_of("save_steps", 500)
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between validations; 0: only at the end. None: one after each pass."}
    )
    logging_steps: int = default_of("logging_steps", 50)

    def __post_init__(self) -> None:
        self.check_run()
        self._check_numbers()
        self._check_sources()
        self._check_model()
        if (self.mixup or self.cutmix) and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size} must be even under --mixup and --cutmix, "
                "which mix pairs of images."
            )

    def steps_of(self, images: int, global_batch_size: int) -> int:
        """Return the optimizer steps of a run over so many training images."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.num_train_epochs * images / global_batch_size))

    def warmup_of(self, images: int, global_batch_size: int) -> float:
        """Return the steps of its warmup, at most all."""
        steps = self.steps_of(images, global_batch_size)
        return min(self.warmup_epochs * images / global_batch_size, steps)

    def data_settings(self) -> ImageDataSettings:
        """The part that decides the images."""
        return ImageDataSettings(**{item.name: getattr(self, item.name) for item in fields(ImageDataSettings)})

    def model_settings(self) -> ImageModelSettings:
        """The part that decides the model."""
        names = {item.name for item in fields(ImageModelSettings)} - {"timm_model_args"}
        arguments = {} if self.timm_model_args is None else json.loads(self.timm_model_args)
        return ImageModelSettings(timm_model_args=arguments, **{name: getattr(self, name) for name in names})

    def augmentation(self) -> Augmentation:
        """The part that decides the augmentation."""
        return Augmentation(
            self.random_resized_crop,
            self.random_shift,
            self.horizontal_flip,
            self.rand_augment,
            self.random_erasing,
            self.repeated_augmentation,
        )

    def mixing(self) -> Mixing:
        """The part that decides mixing and smoothing."""
        return Mixing(self.mixup, self.cutmix, self.label_smoothing)

    def _check_numbers(self) -> None:
        above_zero = ["num_train_epochs", "crop_share"]
        optional = ("random_resized_crop", "model_ema_decay", "held_out_share")
        above_zero += [name for name in optional if getattr(self, name) is not None]
        upper = {"crop_share": 1.0, "random_resized_crop": 1.0, "model_ema_decay": 1 - 1e-9, "held_out_share": 0.9}
        for name in above_zero:
            high = upper.get(name, 1e9)
            if not 0 < getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0 and at most {high:.10g}.")
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        bounds += [(name, 1, 2**31) for name in OPTIONAL_COUNTS if getattr(self, name) is not None]
        bounds += [(name, 0, 1) for name in SHARES]
        bounds += [(name, 0, 1e9) for name in ("mixup", "cutmix", "warmup_epochs")]
        bounds += [(name, 0, self.learning_rate) for name in ("warmup_learning_rate", "min_learning_rate")]
        bounds += [("random_shift", 0, 2**31), ("dataloader_num_workers", 0, 4096)]
        bounds += [("eval_steps", 0, 2**31)] if self.eval_steps is not None else []
        bounds += [("drop_path_rate", 0, 0.99)] if self.drop_path_rate is not None else []
        check_bounds(self, bounds)

    def _check_sources(self) -> None:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{_flags(given)}: one of them says which images; give one.")
        if (self.train_dir is None) != (self.validation_dir is None):
            raise ValueError("--train_dir and --validation_dir belong together; give both folders.")

    def _check_model(self) -> None:
        given = [name for name in MODEL_SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{_flags(given)}: one of them says which model; give one.")
        check_heads(self)
        if self.timm_model_args is None:
            return
        if self.timm_model is None:
            raise ValueError("--timm_model_args: of a model of timm; give --timm_model, too.")
        try:
            arguments = json.loads(self.timm_model_args)
        except ValueError as error:
            arguments = error
        if not isinstance(arguments, dict):
            raise ValueError(
                f"--timm_model_args {self.timm_model_args!r} is no JSON object; write it as '{{\"img_size\": 32}}'."
            )


def parse_arguments(argv: Sequence[str], description: str) -> tuple[ImageArguments, SpectralArguments]:
    """Parse and check the command line; anything wrong ends the program before work starts."""
    return parse_run_arguments(
        ImageArguments,
        argv,
        description,
        presets=PRESETS,
        replaced=REPLACED,
        data_settings=DATA_SETTINGS,
        refuse=_refuse_contradictions,
    )


def _refuse_contradictions(
    parser: HfArgumentParser, arguments: ImageArguments, spectral: SpectralArguments, argv: list[str]
) -> None:
    settings = arguments.model_settings()
    if not settings.is_small_vit and (given := explicitly_given(parser, NEW_VIT_SETTINGS, argv)):
        raise ValueError(
            f"{_flags(sorted(given))}: of the small ViT only; leave out beside --model_name_or_path, --config_name and "
            "--timm_model (for which there is --timm_model_args)."
        )
    of_dataset = [name for name in OF_DATASET if name != "dataset_name"]
    if arguments.dataset_name is None and (given := explicitly_given(parser, of_dataset, argv)):
        raise ValueError(f"{_flags(sorted(given))}: of a dataset; give --dataset_name, too.")
    check_initialization(arguments, spectral)


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
