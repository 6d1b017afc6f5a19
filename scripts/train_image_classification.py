r"""Train an image classifier, stock or spectrally conditioned.

Without arguments: a small vision transformer on the 8 x 8 digits that ship with scikit-learn, minutes on two CPU cores.

    accelerate launch scripts/train_image_classification.py
    python scripts/train_image_classification.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/digits-identity

Your own images, one folder for each class; Fashion-MNIST; a model of timm; a pretrained checkpoint:

    python scripts/train_image_classification.py --train_dir train --validation_dir validation --image_size 64 --patch_size 8
    python scripts/train_image_classification.py --idx_dir fashion-mnist --patch_size 4 --num_train_epochs 10
    python scripts/train_image_classification.py --timm_model swin_tiny_patch4_window7_224 --train_dir ... \
        --validation_dir ...
    python scripts/train_image_classification.py --model_name_or_path google/vit-base-patch16-224 --train_dir ... \
        --validation_dir ... --spectral_conditioning --spectral_method svd --spectral_init preserve --learning_rate 5e-5

What the published recipe of a model on ImageNet-1k would do here, and what a command changes; then that run:

    python scripts/train_image_classification.py --preset deit-base --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/train_image_classification.py \
        --preset deit-base --output_dir runs/deit-base

A run that was stopped (SIGTERM, Ctrl-C) or killed continues from its newest good checkpoint, to the same weights:

    python scripts/train_image_classification.py --output_dir runs/digits ... --resume_from_checkpoint

The accuracy of a saved model, on the images it was validated on:

    python scripts/train_image_classification.py --eval_only --model_name_or_path runs/digits

The output folder holds the model and its image processor (for the Auto classes and pipelines), `metrics.json`,
`loss_curve.png`, `evaluations.json` (for the model card), and the last checkpoints, each a folder `checkpoint-<step>`.
"""

import sys

from accelerate.utils import DistributedType, set_seed
from transformers import AutoModelForImageClassification, PreTrainedModel

from recipes.images.classification_task import ImageTask
from recipes.images.image_arguments import ImageArguments, parse_arguments
from recipes.images.image_models import build_stock_model, check_named_model
from recipes.images.image_plan import describe_plan
from recipes.images.image_sources import ImageDataError
from recipes.run.ablations import remove_attention_residuals, remove_layer_norms
from recipes.run.conditioned_model import SAMPLES, condition_model
from recipes.run.projection_init import initialize_projections
from recipes.run.runs import evaluate_only, run, show_plan, started
from recipes.run.usable_model import ModelError, check_conditioning, load_model


def build_model(arguments: ImageArguments, task: ImageTask) -> PreTrainedModel:
    """Build or load the model, and initialize its projections.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    model = build_stock_model(arguments, task.data.class_names, task.size, task.channels)
    try:
        initialize_projections(model, arguments.initialization())
        if arguments.no_layer_norm:
            remove_layer_norms(model)
        if arguments.no_attention_residual:
            remove_attention_residuals(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    with started(arguments, ImageDataError) as accelerator:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ModelError("These models fit on one GPU: use several processes without FSDP (DDP).")
        # Problems with a named model show before the images are read.
        if arguments.eval_only:
            load_model(AutoModelForImageClassification, str(arguments.model_name_or_path), with_head=True)
        elif (model := check_named_model(arguments, arguments.image_size)) is not None:
            check_conditioning(model, spectral, arguments.named)
        if arguments.eval_only:
            task = ImageTask(arguments, spectral, accelerator)
            evaluate_only(task, arguments.model_name_or_path, accelerator)
            return
        show_plan(describe_plan, arguments, spectral, accelerator)
        if arguments.show_plan:
            return
        # The images are found and checked; they determine the classes, and what the model reads.
        task = ImageTask(arguments, spectral, accelerator)
        model = build_model(arguments, task)
        condition_model(model, arguments, spectral, task.samples(SAMPLES), accelerator)
        # Train, with checkpoints, from the newest one if the run is resumed; save, and evaluate what was saved.
        run(task, model, arguments, spectral, accelerator)


if __name__ == "__main__":
    main()
