r"""Pretrain a Crammed BERT as a masked language model, stock or spectrally conditioned.

Without arguments: a small model on the documentation that every Python carries, three to four minutes on two CPU cores.

    python scripts/pretrain_mlm.py
    python scripts/pretrain_mlm.py --spectral_conditioning --lambda_ 1.0 --output_dir runs/identity

On text of your own, through accelerate's launcher, and on two processes of one machine:

    accelerate launch --num_cpu_threads_per_process 2 scripts/pretrain_mlm.py --output_dir runs/books \
        --train_file train.txt.gz --validation_file val.txt.gz --max_steps 200 \
        --spectral_conditioning --spectral_method svd
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/pretrain_mlm.py --per_device_train_batch_size 16

What the published recipe would do here, and what a command changes of it; then a day of one GPU:

    python scripts/pretrain_mlm.py --preset crammed-bert --show_plan
    accelerate launch --config_file scripts/accelerate_configs/one_gpu.yaml scripts/pretrain_mlm.py --preset crammed-bert \
        --output_dir runs/crammed-bert

A run that was stopped (SIGTERM, Ctrl-C) or killed goes on from its newest good checkpoint, to the same weights:

    python scripts/pretrain_mlm.py --output_dir runs/books ... --resume_from_checkpoint

The validation loss of a saved model, on the data it was validated on:

    python scripts/pretrain_mlm.py --eval_only --model_name_or_path runs/books

The output folder holds the model and its tokenizer (for the Auto classes), `metrics.json`, `loss_curve.png`,
`evaluations.json` (for the model card), and the last checkpoints, each a folder `checkpoint-<step>`.
"""

import logging
import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from hf_specattn.crammed_bert import CrammedBertForMaskedLM
from recipes.run.conditioned_model import SAMPLES, condition_model
from recipes.run.projection_init import initialize_projections
from recipes.run.runs import evaluate_only, run, started
from recipes.run.sharding import will_shard
from recipes.run.spectral_arguments import SpectralArguments
from recipes.text.documents import CorpusError
from recipes.text.pretrain_arguments import PretrainArguments, parse_arguments
from recipes.text.pretrain_plan import describe_plan
from recipes.text.pretrain_task import DROPOUT_SETTINGS, MlmTask

logger = logging.getLogger("pretrain_mlm")
LOGGERS = ("pretrain_mlm", "recipes", "hf_specattn")  # the others say what is prepared, and skipped


def show_plan(arguments: PretrainArguments, spectral: SpectralArguments, accelerator: Accelerator) -> None:
    """Log what the run will do, before any of it is done."""
    if not accelerator.is_main_process:
        return
    half_precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    plan = describe_plan(
        arguments,
        spectral,
        processes=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
        autocast=lambda: torch.autocast("cpu", half_precision) if half_precision else nullcontext(),
    )
    for line in plan:
        logger.info(line)


def build_model(arguments: PretrainArguments, vocab_size: int) -> PreTrainedModel:
    """Build or load the model, without dropout, and set how its projections begin.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    if arguments.model_name_or_path is not None:
        return load_model(arguments.model_name_or_path, vocab_size)
    model = CrammedBertForMaskedLM(arguments.new_model_config(vocab_size))
    initialize_projections(model, arguments.initialization())
    return model


def load_model(path: str, vocab_size: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    no_dropout = {name: 0.0 for name in DROPOUT_SETTINGS if hasattr(config, name)}
    model = AutoModelForMaskedLM.from_pretrained(path, **no_dropout)
    if model.config.vocab_size < vocab_size:
        raise CorpusError(
            f"The tokenizer has {vocab_size} tokens and the model of {path} only {model.config.vocab_size}; name the "
            "tokenizer it was trained with by --tokenizer_name."
        )
    return model


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    with started(arguments, LOGGERS, CorpusError) as accelerator:
        if arguments.spectral_monitor_every and will_shard(accelerator):
            raise CorpusError(
                "--spectral_monitor_every needs whole weights, and FSDP shards them; leave it out, or use DDP."
            )
        if arguments.decay_toward_start_on and will_shard(accelerator):
            raise CorpusError(
                "--decay_toward_start_on needs whole weights, and FSDP shards them; leave it out, or use DDP."
            )
        if arguments.eval_only:
            evaluate_only(MlmTask(arguments, accelerator), arguments.model_name_or_path, accelerator)
            return
        show_plan(arguments, spectral, accelerator)
        if arguments.show_plan:
            return
        # The corpus is read, or found prepared; it decides the tokenizer, and that the size of the model.
        task = MlmTask(arguments, accelerator)
        model = build_model(arguments, task.vocab_size)
        condition_model(model, arguments, spectral, task.samples(SAMPLES), accelerator)
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Train, with checkpoints, from the newest one where the run is resumed; save, and measure what was saved.
        run(task, model, arguments, spectral, accelerator)


if __name__ == "__main__":
    main()
