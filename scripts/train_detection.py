r"""Train Mask R-CNN on a stock or spectrally conditioned body: boxes and masks.

Without arguments: a small XCiT on shapes (circles, squares, triangles), minutes on two CPU cores.

    accelerate launch scripts/train_detection.py --draw 8
    python scripts/train_detection.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/shapes-identity

Your own images or COCO, in COCO's layout (`coco/train2017/*.jpg`, `coco/annotations/instances_train2017.json`, ...),
on a body of timm or transformers, from random weights or an ImageNet classifier, of which a conditioned one keeps its
corrections:

    python scripts/train_detection.py --coco_dir coco --body xcit_nano_12_p8_224 --min_size 320 --max_size 512
    python scripts/train_detection.py --coco_dir coco --classifier runs/imagenet-swin --augmentation multi_scale ...

What a published recipe on COCO would do here, and what a command changes of it; then that run:

    python scripts/train_detection.py --preset xcit_s12_p16 --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/train_detection.py \
        --preset xcit_s12_p16 --coco_dir coco --output_dir runs/xcit-s12

A run that was stopped or killed goes on from its newest good checkpoint; a trained detector is measured:

    python scripts/train_detection.py --output_dir runs/shapes ... --resume_from_checkpoint
    python scripts/train_detection.py --eval_only --model_name_or_path runs/shapes

The output folder holds the detector (for `recipes.detection.detector.load_detector`), what it finds in COCO's results format
(`detections.json`), `metrics.json`, `loss_curve.png`, `evaluations.json`, pictures in `predictions` (`--draw`), and the last
checkpoints.
"""

import sys

from accelerate.utils import DistributedType, set_seed

from recipes.detection.coco_files import DetectionDataError
from recipes.detection.detection_arguments import parse_arguments
from recipes.detection.detection_plan import describe_plan
from recipes.detection.detection_task import DetectionTask
from recipes.detection.detector import DetectorError
from recipes.detection.detector_building import build_detector
from recipes.run.conditioned_model import SAMPLES
from recipes.run.runs import evaluate_only, run, show_plan, started


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    with started(arguments, DetectionDataError, DetectorError) as accelerator:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise DetectorError("These models fit on one GPU: use several processes without FSDP (DDP).")
        if arguments.eval_only:
            task = DetectionTask(arguments, spectral, accelerator)
            evaluate_only(task, arguments.model_name_or_path, accelerator)
            return
        show_plan(describe_plan, arguments, spectral, accelerator)
        if arguments.show_plan:
            return
        # The images are found and looked at: bad ones end the run here. They decide the classes.
        task = DetectionTask(arguments, spectral, accelerator)
        set_seed(arguments.seed)
        samples = task.samples(SAMPLES)
        model = build_detector(arguments, spectral, task.train.class_names, samples, accelerator)
        # Train, with checkpoints, from the newest one where the run is resumed; save, and measure what was saved.
        run(task, model, arguments, spectral, accelerator)


if __name__ == "__main__":
    main()
