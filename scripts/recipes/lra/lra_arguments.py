"""The command line of `train_lra.py`: flags, presets of each task, and everything that is refused before work starts."""

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..run.command_line import flag
from ..run.preset_files import read_yaml
from ..run.projection_init import INITIALIZATION_SETTINGS, check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.spectral_arguments import SpectralArguments, check_bounds, check_heads, explicitly_given
from .lra_data import GENERATED, PROTOCOLS, LraDataSettings
from .lra_sources import CLASSES
from .nystromformer import LraNystromformerConfig

PRESETS = read_yaml(Path(__file__).with_name("lra_presets.yaml"))
VOCABULARY = {"listops": 32, "text": 512, "retrieval": 512, "image": 512, "pathfinder": 512}
# What decides a run's results beside its model: --eval_only takes these from its metrics.json. With the published
# pseudo-inverse an output depends on its batch.
DATA_SETTINGS = (
    *(item.name for item in fields(LraDataSettings) if item.name not in ("cache_dir", "preprocessing_num_workers")),
    "per_device_eval_batch_size",
)
MODEL_SETTINGS = (
    *(
        "attention_type",
        "num_landmarks",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ),
    *("hidden_dropout_prob", "padding_in_landmarks", "batch_wide_inverse", "mean_over_padding"),
)
AT_LEAST_ONE = (
    *("num_landmarks", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_length"),
    "preprocessing_num_workers",
)


@dataclass
class LraArguments(RunArguments):
    """Arguments of the run; the defaults are the published settings of ListOps."""

    task: str = flag("listops", "Which task.", CLASSES)
    preset: str | None = flag(
        "small",
        "Defaults for the other flags, which the command line overrides: lra (the published settings), small "
        "(shorter sequences, minutes on two cores), or your own YAML file.",
    )

    # Data.
    data_dir: str | None = flag(
        None, "Folder with the task's data, of any form in docs/lra.md. None: made (listops and pathfinder)."
    )
    protocol: str = flag(
        "lra",
        "lra: as published: text picks its checkpoint on the test part; clean: on part of the training data.",
        PROTOCOLS,
    )
    max_length: int = flag(2000, "Cut here; padded to the next power of 2.")
    listops_min_length: int = flag(500, "Expressions that are made are longer than this.")
    train_samples: int | None = flag(
        None, "Number of examples to train on, drawn at random. None: all, or the published number of generated ones."
    )
    validation_samples: int | None = flag(None, "The same, to validate on.")
    test_samples: int | None = flag(None, "The same, to test on.")
    data_seed: int = flag(0, "Decides what is made, held out and drawn; --seed does not.")
    cache_dir: str | None = flag(
        None, "Folder of prepared data. None: hf_specattn in the home of Hugging Face's libraries."
    )
    preprocessing_num_workers: int = flag(1, "Processes that make data.")

    # Model.
    model_name_or_path: str | None = flag(None, "Checkpoint of this script to continue from.")
    attention_type: str = flag("nystrom", "nystrom, or softmax for exact attention.", ["nystrom", "softmax"])
    num_landmarks: int = flag(64, "Of Nystrom attention; published are 32, 64, 128 and 256.")
    hidden_size: int = flag(64, "Width.")
    num_hidden_layers: int = flag(2, "Layers.")
    num_attention_heads: int = flag(2, "Attention heads.")
    intermediate_size: int = flag(128, "Feed-forward width, and that of the head.")
    hidden_dropout_prob: float = flag(0.1, "Dropout.")
    padding_in_landmarks: bool = flag(True, "As published: landmarks also average padding.")
    batch_wide_inverse: bool = flag(
        True, "As published: the pseudo-inverse starts from a maximum over the whole batch."
    )
    mean_over_padding: bool = flag(True, "As published: the head's mean counts padding.")
    zero_is_padding: bool = flag(True, "As published: black pixels are padding.")
    no_layer_norm: bool = flag(False, "Ablation: take every layer norm out of the model.")

    # Optimization.
    max_steps: int | None = default_of("max_steps", 5000)
    warmup_steps: int = flag(1000, "Steps in which the learning rate rises from a 25th.")
    learning_rate: float = default_of("learning_rate", 1e-4)
    cycle_beta1: bool = flag(True, "As published: AdamW's beta1 from 0.95 down to 0.85 and back; else 0.9.")
    weight_decay: float = default_of("weight_decay", 0.0)
    max_grad_norm: float = default_of("max_grad_norm", 0.0)
    eval_steps: int = flag(50, "Steps between validations, of which the best picks the weights; 0: the last ones.")
    output_dir: str = default_of("output_dir", "runs/train_lra")

    def __post_init__(self) -> None:
        self.check_run()
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        samples = ("train_samples", "validation_samples", "test_samples")
        bounds += [(name, 1, 2**31) for name in samples if getattr(self, name) is not None]
        bounds += [("eval_steps", 0, 2**31), ("data_seed", 0, 2**31), ("listops_min_length", 0, 2**31)]
        bounds += [("warmup_steps", 0, self.steps), ("hidden_dropout_prob", 0, 0.99)]
        check_bounds(self, bounds)
        check_heads(self)
        if self.data_dir is None and self.task not in GENERATED:
            raise ValueError(
                f"--task {self.task} needs --data_dir, the folder with its data (docs/lra.md says in which forms); those of "
                f"{' and '.join(GENERATED)} can be made."
            )
        if self.task in ("image", "pathfinder") and self.max_length != 1024:
            raise ValueError(
                f"--max_length {self.max_length}: {self.task} reads whole images of 1024 pixels; leave it out."
            )
        equal_parts = (
            self.attention_type == "nystrom" and self.padding_in_landmarks and self.model_name_or_path is None
        )
        if equal_parts and self.padded_length % self.num_landmarks:
            raise ValueError(
                f"--num_landmarks {self.num_landmarks} must divide the padded length {self.padded_length}; give a power of "
                "2, or --padding_in_landmarks False."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        assert self.max_steps is not None
        return self.max_steps

    @property
    def padded_length(self) -> int:
        """What every sequence is padded to, as published: a power of 2."""
        return 2 ** math.ceil(math.log2(self.max_length))

    def data_settings(self) -> LraDataSettings:
        """The part that decides the data."""
        return LraDataSettings(**{item.name: getattr(self, item.name) for item in fields(LraDataSettings)})

    def new_model_config(self) -> LraNystromformerConfig:
        """The configuration of a new model."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in MODEL_SETTINGS}
        settings["num_labels"] = CLASSES[self.task]
        return LraNystromformerConfig(
            vocab_size=VOCABULARY[self.task],
            max_position_embeddings=self.padded_length,
            attention_probs_dropout_prob=self.hidden_dropout_prob,
            layer_norm=not self.no_layer_norm,
            pad_token_id=0 if self.zero_is_padding else None,
            pairs=self.task == "retrieval",
            **settings,
        )


def parse_arguments(argv: Sequence[str], description: str) -> tuple[LraArguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="listops")
    first.add_argument("--preset", default="small")
    known, _ = first.parse_known_args(list(argv))
    return parse_run_arguments(
        LraArguments,
        # A preset is always in force, and says so.
        ["--preset", known.preset, *argv],
        description,
        presets={name: values.get(known.task, {}) for name, values in PRESETS.items()},
        replaced={},
        data_settings=DATA_SETTINGS,
        refuse=_refuse_contradictions,
    )


def _refuse_contradictions(
    parser: HfArgumentParser, arguments: LraArguments, spectral: SpectralArguments, argv: list[str]
) -> None:
    check_initialization(arguments, spectral)
    if arguments.task not in ("image", "pathfinder") and not arguments.zero_is_padding:
        raise ValueError(f"--zero_is_padding False is of images; in {arguments.task} 0 is nothing but padding.")
    if arguments.task != "listops" and explicitly_given(parser, ["listops_min_length"], argv):
        raise ValueError(f"--listops_min_length: not of --task {arguments.task}; leave it out.")
    if arguments.model_name_or_path is not None:
        names = (*MODEL_SETTINGS, "zero_is_padding", "no_layer_norm", *INITIALIZATION_SETTINGS)
        if given := explicitly_given(parser, names, argv):
            flags = ", ".join(f"--{name}" for name in sorted(given))
            raise ValueError(f"{flags}: for a new model only; leave out together with --model_name_or_path.")
