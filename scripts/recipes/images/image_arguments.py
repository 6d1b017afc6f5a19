"""The command line of `train_image_classification.py`: flags, presets, and everything that is refused before work starts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from transformers import HfArgumentParser

from ..run.command_line import flag
from ..run.projection_init import check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.spectral_arguments import SpectralArguments, check_bounds, check_heads, explicitly_given
from .augmentation import Augmentation
from .image_batches import Mixing
from .image_models import ImageModelSettings
from .image_sources import ImageDataSettings
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
class ImageArguments(ImageDataSettings, ImageModelSettings, Augmentation, Mixing, RunArguments):
    """Arguments of the run; the defaults are the demonstration on scikit-learn's digits."""

    preset: str | None = flag(
        None,
        "Defaults for the other flags, which the command line overrides: digits (the usual defaults), or the "
        "published recipe on ImageNet-1k of vit-base, deit-base, swin-base, xcit-medium, davit-base; or your own "
        "YAML file.",
    )

    image_size: int | None = flag(
        None, "Height and width that the model reads. None: the model's own, else that of the images."
    )
    crop_share: float = flag(1.0, "Share of the resized image's side that validation uses, in the middle.")
    dataloader_num_workers: int = flag(0, "Additional processes that read images; 0: none.")

    no_layer_norm: bool = flag(False, "Ablation: remove every layer norm from the model.")
    no_attention_residual: bool = flag(False, "Ablation: let attention replace its input in every block of a ViT.")

    # Optimization.
    num_train_epochs: float = flag(40.0, "Passes over the training images.")
    max_steps: int | None = default_of("max_steps", None, "Optimizer steps, instead of passes.")
    per_device_train_batch_size: int = default_of(
        "per_device_train_batch_size", 32, "Images per process and forward pass."
    )
    per_device_eval_batch_size: int = default_of("per_device_eval_batch_size", 128)
    learning_rate: float = default_of("learning_rate", 1e-3, "Peak learning rate, of a cosine.")
    warmup_learning_rate: float = flag(0.0, "Learning rate at the start of the warmup.")
    min_learning_rate: float = flag(0.0, "Learning rate at the end.")
    warmup_epochs: float = flag(5.0, "Passes of linear warmup.")
    weight_decay: float = default_of("weight_decay", 0.05, "Decoupled decay; vectors and tables are exempt.")
    model_ema_decay: float | None = flag(None, "Validate and save the moving average of the weights with this decay.")
    seed: int = default_of("seed", 0, "Decides initialization, order, augmentation and mixing.")

    # Reporting and saving.
    output_dir: str = default_of("output_dir", "runs/train_image_classification")
    save_steps: int = default_of("save_steps", 500)
    eval_steps: int | None = flag(None, "Steps between validations; 0: only at the end. None: one after each pass.")
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
        """Return the optimizer steps of a run over this many training images."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.num_train_epochs * images / global_batch_size))

    def warmup_of(self, images: int, global_batch_size: int) -> float:
        """Return the steps of its warmup, at most all."""
        steps = self.steps_of(images, global_batch_size)
        return min(self.warmup_epochs * images / global_batch_size, steps)

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
        if self.timm_model_args is not None and self.timm_model is None:
            raise ValueError("--timm_model_args: for a timm model only; also give --timm_model.")
        _ = self.timm_arguments  # refuses what is not a JSON object


def parse_arguments(argv: Sequence[str], description: str) -> tuple[ImageArguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts."""
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
    if not arguments.is_small_vit and (given := explicitly_given(parser, NEW_VIT_SETTINGS, argv)):
        raise ValueError(
            f"{_flags(sorted(given))}: of the small ViT only; leave out together with --model_name_or_path, "
            "--config_name and --timm_model (for which there is --timm_model_args)."
        )
    of_dataset = [name for name in OF_DATASET if name != "dataset_name"]
    if arguments.dataset_name is None and (given := explicitly_given(parser, of_dataset, argv)):
        raise ValueError(f"{_flags(sorted(given))}: for a dataset only; also give --dataset_name.")
    check_initialization(arguments, spectral)


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
