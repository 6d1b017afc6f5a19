r"""Pretrain a Crammed BERT as a masked language model, stock or spectrally conditioned.

Without arguments: a small model on the documentation that ships with Python, three to four minutes on two CPU cores.

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

import sys

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForMaskedLM, PreTrainedModel

from hf_specattn.crammed_bert import CrammedBertForMaskedLM
from recipes.run.conditioned_model import SAMPLES, condition_model
from recipes.run.projection_init import initialize_projections
from recipes.run.runs import evaluate_only, run, show_plan, started
from recipes.run.sharding import will_shard
from recipes.run.spectral_arguments import SpectralArguments
from recipes.run.usable_model import check_conditioning, check_forward, check_tokens, load_config, load_model
from recipes.text.documents import CorpusError
from recipes.text.pretrain_arguments import PretrainArguments, parse_arguments
from recipes.text.pretrain_plan import describe_plan
from recipes.text.pretrain_task import DROPOUT_SETTINGS, MlmTask


def build_model(arguments: PretrainArguments, vocab_size: int) -> PreTrainedModel:
    """Build a new model, without dropout, and initialize its projections.

    A stock and a conditioned model of one seed start from the same W.
    """
    set_seed(arguments.seed)
    model = CrammedBertForMaskedLM(arguments.new_model_config(vocab_size))
    initialize_projections(model, arguments.initialization())
    return model


def load_checked(arguments: PretrainArguments, spectral: SpectralArguments) -> PreTrainedModel:
    """Load the checkpoint, without dropout, and refuse one that cannot be trained here, or be measured."""
    set_seed(arguments.seed)
    path = str(arguments.model_name_or_path)
    config = load_config(path)
    no_dropout = {name: 0.0 for name in DROPOUT_SETTINGS if hasattr(config, name)}
    model = load_model(AutoModelForMaskedLM, path, with_head=arguments.eval_only, **no_dropout)
    check_conditioning(model, spectral, path)
    check_tokens(path, config, arguments.max_seq_length)
    check_forward(model, {"input_ids": torch.full((2, arguments.max_seq_length), 1)}, path)
    return model


def main(argv: list[str] | None = None) -> None:
    arguments, spectral = parse_arguments(sys.argv[1:] if argv is None else argv, str(__doc__).splitlines()[0])
    with started(arguments, CorpusError) as accelerator:
        for name in ("spectral_monitor_every", "decay_toward_start_on"):
            if getattr(arguments, name) and will_shard(accelerator):
                raise CorpusError(f"--{name} needs whole weights, and FSDP shards them; leave it out, or use DDP.")
        # What is wrong with a checkpoint shows before the corpus is prepared.
        loaded = None if arguments.model_name_or_path is None else load_checked(arguments, spectral)
        if arguments.eval_only:
            evaluate_only(MlmTask(arguments, accelerator), arguments.model_name_or_path, accelerator)
            return
        show_plan(describe_plan, arguments, spectral, accelerator)
        if arguments.show_plan:
            return
        # The corpus is read, or found prepared; it decides the tokenizer, and that the size of the model.
        task = MlmTask(arguments, accelerator)
        if loaded is not None:
            check_tokens(str(arguments.model_name_or_path), loaded.config, task.units, task.processor)
        model = build_model(arguments, task.vocab_size) if loaded is None else loaded
        condition_model(model, arguments, spectral, task.samples(SAMPLES), accelerator)
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Train, with checkpoints, from the newest one where the run is resumed; save, and measure what was saved.
        run(task, model, arguments, spectral, accelerator)


if __name__ == "__main__":
    main()
