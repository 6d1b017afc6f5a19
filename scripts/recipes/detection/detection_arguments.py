"""The command line of `train_detection.py`: flags, presets, and everything that is refused before work starts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..run.command_line import flag
from ..run.preset_files import on_one_gpu, read_yaml
from ..run.projection_init import check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.spectral_arguments import SpectralArguments, check_bounds
from .detection_batches import AUGMENTATIONS

_FILE = read_yaml(Path(__file__).with_name("detection_presets.yaml"))
RECIPES: dict[str, dict[str, Any]] = _FILE["published"]


# The defaults of the flags, and each recipe.
PRESETS: dict[str, dict[str, Any]] = {"shapes": {}} | {
    name: on_one_gpu(recipe, _FILE["one_gpu"]) for name, recipe in RECIPES.items()
}
REPLACED = {
    "model_name_or_path": ("classifier", "body", "body_args", "out_indices"),
    "classifier": ("body", "body_args"),
    "body": ("classifier", "body_args", "out_indices"),
    "max_steps": ("num_train_epochs", "milestones"),
}
# What decides the images of a run's validation: --eval_only takes these from the run's metrics.json.
DATA_SETTINGS = ("coco_dir", "train_split", "validation_split", "max_train_samples", "max_validation_samples")
# The body without --body and --classifier: half a million parameters, so that the demonstration takes minutes on two cores.
SMALL_BODY = ("xcit_nano_12_p8_224", {"embed_dim": 96, "depth": 4, "num_heads": 4, "eta": 1.0})
BATCH_NORMS = ("frozen", "train", "sync")
AT_LEAST_ONE = ("fpn_channels", "box_head_size", "min_size", "max_size")
OPTIONAL_COUNTS = ("max_train_samples", "max_validation_samples")


@dataclass
class DetectionArguments(RunArguments):
    """Arguments of the run; the defaults are the demonstration on shapes."""

    preset: str | None = flag(
        None,
        "Defaults for the other flags, which the command line overrides: shapes (the usual defaults), a published "
        "recipe on COCO (xcit_s12_p16, xcit_s12_p8, swin_b), or your own YAML file.",
    )

    # Data.
    coco_dir: str | None = flag(
        None, "Folder in COCO's layout: images in <split>/, annotations/instances_<split>.json. None: shapes."
    )
    train_split: str = flag("train2017", "To train on.")
    validation_split: str = flag("val2017", "To validate on; may be the same.")
    max_train_samples: int | None = flag(None, "Number of images to train on, from the start.")
    max_validation_samples: int | None = flag(None, "The same, for validation.")
    check_images: str = flag(
        "decode",
        "Before training, read every image (decode), or only its header (header).",
        ["decode", "header"],
    )
    augmentation: str = flag(
        "flip", "none, flip, or multi_scale: that of the published detectors on COCO.", AUGMENTATIONS
    )
    dataloader_num_workers: int = flag(0, "Additional processes that read images; 0: none.")

    # Model.
    model_name_or_path: str | None = flag(None, "A detector that this script trained.")
    classifier: str | None = flag(
        None,
        "An ImageNet classifier that provides the body's initial weights, and its corrections if it is conditioned: "
        "a folder from train_image_classification.py, or a model on the Hub (timm/<name> for timm's). None: random "
        "weights.",
    )
    body: str | None = flag(
        None,
        "Of four stages, with random weights: a model of timm, or a model type, folder or repository of "
        "transformers with a backbone (swin). None: the classifier's, or a small XCiT.",
    )
    body_args: str | None = flag(
        None, 'Further arguments for timm, or for the configuration, as JSON: {"embed_dim": 96}.'
    )
    out_indices: list[int] | None = flag(
        None, "Blocks or stages of a body of timm whose outputs are read, from 0. None: the last 4."
    )
    drop_path_rate: float | None = flag(None, "Stochastic depth of the body. None: as the body has it.")
    batch_norm: str | None = flag(
        None,
        "The body's batch norms: frozen, train, sync (all of the model's, over GPUs). None: sync on several "
        "GPUs, else frozen where the body is pretrained, and train where it is not.",
        BATCH_NORMS,
    )
    fpn_channels: int = flag(64, "Channels of the feature pyramid.")
    box_head_size: int = flag(128, "Width of the box head.")
    mask_layers: list[int] = field(
        default_factory=lambda: [64, 64], metadata={"help": "Channels of the mask head's convolutions."}
    )
    anchor_sizes: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64, 96], metadata={"help": "Anchors of the five levels, in pixels."}
    )
    min_size: int = flag(128, "Short side that images are resized to.")
    max_size: int = flag(128, "Greatest long side of resized images.")

    # Optimization.
    num_train_epochs: float = flag(3.0, "Passes over the training images.")
    max_steps: int | None = default_of("max_steps", None, "Optimizer steps, instead of passes, along a cosine.")
    milestones: list[float] | None = flag(
        None, "Passes after which the learning rate is divided by 10. None: a cosine to 0."
    )
    warmup_steps: int = flag(30, "Steps of linear warmup.")
    warmup_factor: float = flag(0.001, "Of the learning rate at the first step.")
    per_device_train_batch_size: int = default_of(
        "per_device_train_batch_size", 4, "Images per process and forward pass."
    )
    per_device_eval_batch_size: int = default_of("per_device_eval_batch_size", 10)
    learning_rate: float = default_of("learning_rate", 1e-3, "Peak learning rate.")
    weight_decay: float = default_of("weight_decay", 0.05, "Decoupled decay; norms and position tables are exempt.")
    max_grad_norm: float = default_of("max_grad_norm", 5.0)
    seed: int = default_of("seed", 0, "Decides initialization, order, augmentation and what is sampled.")

    # Reporting and saving.
    output_dir: str = default_of("output_dir", "runs/train_detection")
    eval_steps: int | None = flag(0, "Steps between validations; 0: only at the end. None: one after each pass.")
    draw: int = flag(0, "Draw the detections on this many validation images, the first ones, into --output_dir.")

    def __post_init__(self) -> None:
        self.check_run()
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        bounds += [(name, 1, 2**31) for name in OPTIONAL_COUNTS if getattr(self, name) is not None]
        bounds += [
            ("num_train_epochs", 1e-9, 1e9),
            ("warmup_factor", 0, 1),
            ("warmup_steps", 0, 2**31),
            ("draw", 0, 2**31),
        ]
        bounds += [("dataloader_num_workers", 0, 4096)]
        bounds += [("eval_steps", 0, 2**31)] if self.eval_steps is not None else []
        bounds += [("drop_path_rate", 0, 0.99)] if self.drop_path_rate is not None else []
        check_bounds(self, bounds)
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) < 1:
            raise ValueError(f"--anchor_sizes {self.anchor_sizes}: give five sizes in pixels, one for each level.")
        if not self.mask_layers or min(self.mask_layers) < 1:
            raise ValueError(f"--mask_layers {self.mask_layers}: give at least one number of channels.")
        if self.max_size < self.min_size:
            raise ValueError(f"--max_size {self.max_size} is less than --min_size {self.min_size}.")
        if self.milestones is not None and sorted(set(self.milestones)) != self.milestones:
            raise ValueError(f"--milestones {self.milestones} must rise.")
        if self.body_args is not None and self.body is None:
            raise ValueError("--body_args: for the body that --body names; also give --body.")
        self.body_arguments()
        if self.torch_compile:
            raise ValueError("--torch_compile: what a detector computes depends on what it finds; leave the flag out.")

    def body_arguments(self) -> dict[str, Any]:
        """`--body_args`, and the stochastic depth.

        Raises:
            ValueError: for anything but a JSON object.
        """
        try:
            arguments = json.loads(self.body_args or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"--body_args {self.body_args!r} is not a JSON object; write it as '{{\"embed_dim\": 96}}'."
            )
        return arguments if self.drop_path_rate is None else {**arguments, "drop_path_rate": self.drop_path_rate}

    def steps_of(self, images: int, batch: int) -> int:
        """Return the optimizer steps of a run over this many training images."""
        return self.max_steps or max(1, round(self.num_train_epochs * images / batch))


def parse_arguments(argv: Sequence[str], description: str) -> tuple[DetectionArguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts."""
    return parse_run_arguments(
        DetectionArguments,
        argv,
        description,
        presets=PRESETS,
        replaced=REPLACED,
        data_settings=DATA_SETTINGS,
        refuse=_refuse_contradictions,
    )


def _refuse_contradictions(
    parser: HfArgumentParser, arguments: DetectionArguments, spectral: SpectralArguments, argv: list[str]
) -> None:
    given = [name for name in ("classifier", "body") if getattr(arguments, name) is not None]
    if arguments.model_name_or_path is not None and given:
        raise ValueError(f"--{given[0]}: --model_name_or_path has a body already; give one of the two.")
    check_initialization(arguments, spectral)
