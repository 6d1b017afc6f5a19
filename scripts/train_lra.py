r"""Train a Nystromformer on a task of Long Range Arena, stock or spectrally conditioned.

Without arguments: ListOps of at most 64 tokens, generated on the spot, some minutes on two CPU cores. All tasks at this size:

    python scripts/train_lra.py --task listops
    python scripts/train_lra.py --task listops --spectral_conditioning --output_dir runs/listops-identity
    python scripts/train_lra.py --task text --data_dir aclImdb --output_dir runs/text
    python scripts/train_lra.py --task retrieval --data_dir lra_release --output_dir runs/retrieval
    python scripts/train_lra.py --task image --data_dir cifar-10-batches-py --output_dir runs/image
    python scripts/train_lra.py --task pathfinder --preprocessing_num_workers 2 --output_dir runs/pathfinder

What the published settings of a task do here, and what a command changes; then that run on one GPU:

    python scripts/train_lra.py --task text --preset lra --data_dir aclImdb --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/train_lra.py --task text --preset lra \
        --data_dir aclImdb --output_dir runs/lra-text

A run that was stopped (SIGTERM, Ctrl-C) or killed continues from its newest good checkpoint, to the same weights:

    python scripts/train_lra.py --task listops --output_dir runs/listops ... --resume_from_checkpoint

Accuracy of a saved model on the validation and test parts of its run:

    python scripts/train_lra.py --eval_only --model_name_or_path runs/listops

The output folder holds the model (for the Auto classes, after `recipes.lra.nystromformer.register()`), `metrics.json` with
the test accuracy and that of guessing, `loss_curve.png`, and the last checkpoints. docs/lra.md says which data can be read.
"""

import sys

from accelerate.utils import DistributedType, set_seed
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from recipes.lra.lra_arguments import LraArguments, parse_arguments
from recipes.lra.lra_plan import describe_plan
from recipes.lra.lra_sources import LraDataError
from recipes.lra.lra_task import LraTask, check_model
from recipes.lra.nystromformer import LraNystromformerForSequenceClassification, register
from recipes.run.conditioned_model import SAMPLES, condition_model
from recipes.run.projection_init import initialize_projections
from recipes.run.runs import evaluate_only, run, show_plan, started
from recipes.run.spectral_arguments import SpectralArguments
from recipes.run.usable_model import ModelError, check_conditioning, load_model


def build_model(arguments: LraArguments) -> PreTrainedModel:
    """Build a new model, and initialize its projections.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    model = LraNystromformerForSequenceClassification(arguments.new_model_config())
    try:
        initialize_projections(model, arguments.initialization())
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model


def load_checked(arguments: LraArguments, spectral: SpectralArguments) -> PreTrainedModel:
    """Load the checkpoint, and refuse one that cannot be trained on the task, or measured on it."""
    set_seed(arguments.seed)
    path = str(arguments.model_name_or_path)
    model = load_model(AutoModelForSequenceClassification, path, with_head=arguments.eval_only)
    check_conditioning(model, spectral, path)
    check_model(model, arguments)
    return model


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    register()
    with started(arguments, LraDataError) as accelerator:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ModelError("These models fit on one GPU: use several processes without FSDP (DDP).")
        # What is wrong with a checkpoint shows before the data are prepared.
        loaded = None if arguments.model_name_or_path is None else load_checked(arguments, spectral)
        if arguments.eval_only:
            task = LraTask(arguments, spectral, accelerator)
            evaluate_only(task, arguments.model_name_or_path, accelerator)
            return
        show_plan(describe_plan, arguments, spectral, accelerator)
        if arguments.show_plan:
            return
        # The data are found or made, and cached; guessing is measured on them.
        task = LraTask(arguments, spectral, accelerator)
        model = build_model(arguments) if loaded is None else loaded
        condition_model(model, arguments, spectral, task.samples(SAMPLES), accelerator)
        # Train, with checkpoints, from the newest one where the run is resumed; save the best weights, and measure them.
        run(task, model, arguments, spectral, accelerator)


if __name__ == "__main__":
    main()
