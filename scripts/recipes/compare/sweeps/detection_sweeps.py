"""The sweeps on object detection: tables 2 and 10 of the conditioning paper, with the controls of its claim.

At scale "small" they train on the embedded shapes, on a CPU; at scale "paper" on COCO by the published recipes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .cost import PASSES
from .design import Setting, Sweep, SweepError, Variant
from .sweep_presets import CONDITIONED_START, ROW, SCALE, SEEDS, STOCK, TUNED_STOCK, TUNING_SEEDS, identity, svd

DETECTION_SCRIPT = "train_detection.py"
# The largest strength up to 10 that saturates no layer.
IDENTITY = Variant("identity, auto lambda", ("--spectral_conditioning", "True"))
PRECONDITIONED = Variant("row preconditioner", ROW)  # attention between channels, as XCiT's, has no such thing
COLUMNS = ("model", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75")
RESULTS = tuple(
    zip(
        (f"validation_{part}_ap{threshold}" for part in ("box", "mask") for threshold in ("", "50", "75")),
        COLUMNS[1:],
        strict=True,
    )
)
TABLE_2 = (
    "Table 2 of the paper: COCO, Mask R-CNN with FPN on XCiT-S12, five seeds",
    (
        COLUMNS,
        ("original", "44.9 ± 0.33", "66.1 ± 0.31", "48.9 ± 0.35", "40.1 ± 0.29", "63.1 ± 0.31", "42.8 ± 0.34"),
        ("conditioned", "45.6 ± 0.31", "66.7 ± 0.36", "49.6 ± 0.32", "40.5 ± 0.33", "63.4 ± 0.28", "43.3 ± 0.32"),
    ),
)
TABLE_10 = (
    "Table 10 of the paper: COCO, Mask R-CNN with FPN on Swin-B",
    (
        COLUMNS,
        ("original", "45.9", "67.1", "50.1", "41.1", "63.7", "43.8"),
        ("conditioned", "46.8", "68.1", "50.7", "41.8", "64.2", "44.6"),
    ),
)
SMALL_XCIT = Setting("XCiT, shapes")  # the script's own
SMALL_SWIN = Setting(
    "Swin, shapes",
    (
        *("--body", "swin", "--body_args"),
        '{"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}',
        *("--max_steps", "600"),
    ),
)
# Of regions on which a training step computes the heads.
BOX_REGIONS, MASK_REGIONS = 512, 128
COUNTED_SIDE = 256  # pixels; everything before the heads is linear in the number of pixels
ASPECT = 4 / 3  # of most of COCO's images


def table2(scale: str, scripts: Path) -> Sweep:
    """XCiT-S12, stock and conditioned; small: a small XCiT on shapes, with controls."""
    variants = (STOCK, TUNED_STOCK, IDENTITY, svd(), CONDITIONED_START)
    small = Sweep("table2", "Mask R-CNN on XCiT", scripts / DETECTION_SCRIPT, (SMALL_XCIT,), variants, SEEDS[:3])
    paper = Setting("XCiT-S12", ("--preset", "xcit_s12_p16"))
    return replace(_at_scale(small, scale, paper), published=TABLE_2)


def table10(scale: str, scripts: Path) -> Sweep:
    """Swin-B, stock, conditioned and preconditioned; small: a small Swin on shapes, with controls."""
    variants = (STOCK, TUNED_STOCK, IDENTITY, svd(), CONDITIONED_START, PRECONDITIONED)
    small = Sweep("table10", "Mask R-CNN on Swin", scripts / DETECTION_SCRIPT, (SMALL_SWIN,), variants, SEEDS[:3])
    return replace(_at_scale(small, scale, Setting("Swin-B", ("--preset", "swin_b"))), published=TABLE_10)


def _at_scale(small: Sweep, scale: str, paper: Setting) -> Sweep:
    """At scale "paper" each variant begins with a classifier that was trained as it is, as the paper's models did."""
    small = replace(small, layout="results", results=RESULTS)
    if scale == "small":
        tuning = replace(SCALE, values=SCALE.values[:4])
        references = (TUNED_STOCK.label,)
        return replace(small, tunings=(tuning,), tuning_seeds=TUNING_SEEDS[:1], second_references=references)
    preset = paper.flags[1]
    kept = {"stock": STOCK, "identity": identity(10.0), "svd": svd(), "row": PRECONDITIONED}
    variants = tuple(
        # What a classifier's corrections are is in its checkpoint; its preconditioner is said again.
        replace(variant, flags=("--classifier", f"imagenet/{preset}/{name}", *(ROW if name == "row" else ())))
        for name, variant in kept.items()
        if name != "row" or PRECONDITIONED in small.variants
    )
    return replace(small, settings=(paper,), variants=variants, seeds=SEEDS)


DETECTION_SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {"table2": table2, "table10": table10}


# pycocotools is needed for these sweeps alone, so the experiment is imported by the functions.
def parse_detection_arguments(argv: Sequence[str], description: str) -> tuple[Any, Any]:
    """The arguments of a run, as its script reads them."""
    from ...detection.detection_arguments import parse_arguments

    return parse_arguments(argv, description)


def detection_operations(arguments: Any) -> float:
    """Floating-point operations of a run's training, as `training_operations` counts those of images.

    Images count as large as in evaluation, each with as many regions as training samples.

    Raises:
        SweepError: where a run would not start.
    """
    from ...detection.detection_plan import planned_images
    from ...detection.detector_building import new_detector

    try:
        images, names = planned_images(arguments)
        with torch.random.fork_rng(devices=[]):
            parts = new_detector(arguments, names).eval().mask_rcnn
    except ValueError as error:
        raise SweepError(str(error)) from error
    width = arguments.fpn_channels
    pixels, regions = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad():
        with pixels:
            levels = parts.backbone(torch.zeros(1, 3, COUNTED_SIDE, COUNTED_SIDE))
            parts.rpn.head(list(levels.values()))
        with regions:
            parts.roi_heads.box_predictor(parts.roi_heads.box_head(torch.zeros(BOX_REGIONS, width, 7, 7)))
            parts.roi_heads.mask_predictor(parts.roi_heads.mask_head(torch.zeros(MASK_REGIONS, width, 14, 14)))
    long = min(arguments.max_size, arguments.min_size * ASPECT)
    area = arguments.min_size * long / COUNTED_SIDE**2
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    operations = area * pixels.get_total_flops() + regions.get_total_flops()
    return float(PASSES * operations * arguments.steps_of(images, batch) * batch)
