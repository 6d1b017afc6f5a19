"""COCO's own evaluation of detections, and the detections of a model in COCO's results format."""

import contextlib
import copy
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools import mask as run_lengths
from torch import Tensor, nn

from hf_specattn.files import write_bytes

from ..run.distributed import run_on_main_process
from .coco_files import DetectionSplit
from .detection_batches import validation_batches
from .detector import DetectorOutput

DETECTIONS_FILE = "detections.json"
MASK_THRESHOLD = 0.5
# Of COCO's summary: its place there, and the paper's columns.
STATISTICS = {"ap": 0, "ap50": 1, "ap75": 2}
KINDS = {"box": "bbox", "mask": "segm"}
MEASURES = tuple(f"{kind}_{statistic}" for kind in KINDS for statistic in STATISTICS)

Result = dict[str, Any]


def coco_classes() -> tuple[Any, Any]:
    """COCO's classes, faster-coco-eval's where it is installed: the same numbers in a third of the time."""
    if importlib.util.find_spec("faster_coco_eval") is not None:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def evaluate_results(split: DetectionSplit, results: Sequence[Result]) -> dict[str, float]:
    """Average precision of results in COCO's format, by the names of `MEASURES`, in [0, 1]."""
    if not results:
        return dict.fromkeys(MEASURES, 0.0)
    dataset, evaluation = coco_classes()
    truth = dataset()
    # The evaluation changes what it is given, and takes the id 0 for "no match": renumbered from 1.
    content = copy.deepcopy(dict(split.content))
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    measured: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        truth.dataset = content
        truth.createIndex()
        for kind, name in KINDS.items():
            # The area of a mask's result is that of its mask, unless there is a box.
            of_kind = [{key: value for key, value in each.items() if key != "bbox"} for each in results]
            found = truth.loadRes(copy.deepcopy(list(results)) if kind == "box" else of_kind)
            run = evaluation(truth, found, name)
            run.evaluate()
            run.accumulate()
            run.summarize()
            # -1 stands for "no object of that size"; of all sizes there is one.
            measured |= {f"{kind}_{statistic}": float(run.stats[place]) for statistic, place in STATISTICS.items()}
    return measured


def as_results(
    split: DetectionSplit, numbers: Sequence[int], detections: Sequence[Mapping[str, Tensor]]
) -> list[Result]:
    """Return the detections of images in COCO's format: x, y, width, height, and masks as run lengths."""
    results = []
    for number, found in zip(numbers, detections):
        boxes = found["boxes"].double().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        masks = (found["masks"][:, 0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
        for box, label, score, mask in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), masks):
            run = run_lengths.encode(np.asfortranarray(mask))
            results.append(
                {
                    "image_id": split.content["images"][number]["id"],
                    "category_id": split.category_ids[label - 1],
                    "bbox": [round(value, 3) for value in box],
                    "score": score,
                    "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
                }
            )
    return results


@torch.no_grad()
def evaluate_detector(
    model: nn.Module,
    split: DetectionSplit,
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    output_dir: str | None = None,
) -> dict[str, float | None]:
    """Detect on every image once, save the results, and measure them; the same for any number of processes.

    Args:
        model: A detector, wrapped by `accelerator.prepare` or not; its training mode is left as it was.
        batch_size: Images of a forward pass. Some bodies see the padding of images that differ in size; 1 has none.
        accelerator: The processes to share the work among; None: this one alone.
        output_dir: Where `detections.json` is written; None: nowhere.

    Returns:
        `validation_loss`, the mean of the batches' summed losses, weighted by images (what is sampled for it is the same each
        time), and `validation_<measure>` for each of `MEASURES`.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    results: list[Result] = []
    losses: list[tuple[int, float]] = []
    for numbers, (images, targets), counts in validation_batches(split, batch_size, rank, processes):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(numbers[0])
            output: DetectorOutput = model(images, targets)
        if counts:
            assert output.loss is not None
            assert output.detections is not None
            losses.append((len(numbers), float(output.loss)))
            results += as_results(split, numbers, output.detections)
    model.train(training)
    if accelerator is not None and processes > 1:
        results, losses = gather_object(results), gather_object(losses)

    def measure() -> dict[str, float]:
        if output_dir is None:
            return evaluate_results(split, results)
        file = Path(output_dir) / DETECTIONS_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, json.dumps(results).encode())
        return evaluate_results(split, json.loads(file.read_text(encoding="utf-8")))

    measured = measure() if accelerator is None else run_on_main_process(accelerator, measure)
    mean = sum(count * loss for count, loss in losses) / sum(count for count, _ in losses)
    return {"validation_loss": mean, **{f"validation_{name}": value for name, value in measured.items()}}
