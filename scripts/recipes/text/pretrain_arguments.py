"""The command line of `pretrain_mlm.py`: flags, presets, and everything that is refused before work starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, HfArgumentParser

from hf_specattn.crammed_bert import CrammedBertConfig

from ..run.arguments import (
    SpectralArguments,
    check_bounds,
    check_heads,
    check_run_mode,
    explicitly_given,
    refuse_unknown_trackers,
)
from ..run.checkpointing import list_checkpoints
from ..run.initialization import INITIALIZATION_SETTINGS, InitializationArguments, check_initialization
from ..run.metrics import METRICS_FILE
from ..run.schedules import SCHEDULES, Budget
from .cleaning import Cleaning
from .mlm_data import MlmDataSettings
from .presets import PRESETS
from .token_cache import ORDERS

DEFAULT_STEPS = 300

# What decides the validation data of a run: --eval_only takes these from the run's metrics.json.
DATA_SETTINGS = (
    "train_file",
    "validation_file",
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "dataset_split",
    "dataset_validation_split",
    "streaming",
    "max_documents",
    "text_column",
    "validation_documents",
    "validation_fraction",
    "normalize_text",
    "max_tokens_per_character",
    "max_seq_length",
    "mlm_probability",
)
# Flags that shape a new model or tokenizer, and say nothing about a checkpoint.
NEW_MODEL_SETTINGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
AT_LEAST_ONE = (
    *NEW_MODEL_SETTINGS,
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_seq_length",
    "save_total_limit",
)
# At least 1 where they are given at all.
OPTIONAL_COUNTS = ("max_steps", "max_documents", "validation_documents")
# One corpus, one kind of validation data and one kind of budget: naming another by a flag replaces a preset's or a
# recorded run's.
REPLACED = {
    "train_file": (
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "dataset_split",
        "dataset_validation_split",
        "streaming",
    ),
    "dataset_name": ("train_file",),
    "validation_file": ("dataset_validation_split", "validation_documents"),
    "dataset_validation_split": ("validation_file", "validation_documents"),
    "validation_documents": ("validation_file", "dataset_validation_split"),
    "validation_fraction": ("validation_file", "dataset_validation_split", "validation_documents"),
    "max_steps": ("max_train_hours",),
}
# How many documents a preset takes of its dataset says nothing about files.
PRESET_REPLACED = REPLACED | {"train_file": (*REPLACED["train_file"], "max_documents", "validation_documents")}


@dataclass
class PretrainArguments(InitializationArguments):
    """Arguments of the run; the defaults are the demonstration."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Values for the other flags, which those given on the command line replace: demo (the defaults), "
            "crammed-bert (the published recipe, a day of one A6000), crammed-bert-small (hours of a consumer GPU).",
            "choices": list(PRESETS),
        },
    )
    show_plan: bool = field(default=False, metadata={"help": "Say what the run would do, and end."})

    # Data.
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Corpus: .txt, .jsonl, .json (each also .gz) or .parquet, one or several. None: embedded text."
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "Validation corpus, likewise. None: documents held out from the training corpus."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Corpus: a dataset of the Hub, or a folder in its layout, instead of files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. None: documents held out from the training split."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while downloading, keeping no copy."})
    max_documents: int | None = field(default=None, metadata={"help": "Read the first so many documents. None: all."})
    text_column: str = field(default="text", metadata={"help": "Key or column with the text (JSON, Parquet, Hub)."})
    validation_documents: int | None = field(
        default=None, metadata={"help": "Hold out the first so many documents for validation, not a share of them."}
    )
    # A tenth of the embedded corpus is some 440 sequences, 14,000 predictions; of a large corpus take less.
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of documents held out for validation."})
    normalize_text: bool = field(
        default=False,
        metadata={"help": "Lowercase, strip accents, drop what is not ASCII, collapse spaces (published recipe)."},
    )
    max_tokens_per_character: float | None = field(
        default=None,
        metadata={"help": "Leave out documents with more tokens than this per character (published: 0.25)."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer to load. None: train WordPiece."})
    vocab_size: int = field(default=4096, metadata={"help": "Largest vocabulary of a trained tokenizer."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per packed sequence."})  # as in cramming
    sequence_order: str = field(
        default="shuffled",
        metadata={
            "help": "shuffled: anew in each pass; published: by their count of '.' tokens, most first, in every pass.",
            "choices": list(ORDERS),
        },
    )
    mlm_probability: float = field(default=0.25, metadata={"help": "Share of positions to predict."})  # cramming
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared data. None: hf_specattn in the folder of HF_HOME."}
    )

    # Model: 3.7 million parameters, so that 300 steps take three to four minutes on two cores.
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to continue from."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a new model."})
    # Four times the width, halved by the gate: cramming's proportions.
    intermediate_size: int = field(
        default=1024, metadata={"help": "Feed-forward width of a new model, gate included."}
    )

    # Optimization: cramming's values (see recipes.run.optimization) at a batch that a CPU can do.
    max_steps: int | None = field(
        default=None,
        metadata={"help": f"Optimizer steps. None: {DEFAULT_STEPS}, or as many as --max_train_hours has."},
    )
    max_train_hours: float | None = field(
        default=None, metadata={"help": "Train for so many hours instead; the schedule follows the clock."}
    )
    lr_scheduler_type: str | None = field(
        default=None,
        metadata={
            "help": "linear: up over the warmup, then down to 0. triangle: from 1/4 up to the peak at 3/4 of the budget, "
            "then down to 0 (published). None: linear over steps, triangle over time.",
            "choices": list(SCHEDULES),
        },
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per process and forward pass."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same, for validation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    batch_size_ramp: float = field(
        default=0.0,
        metadata={
            "help": "Share of the run over which accumulation grows from 1 forward pass to all (published: 0.6)."
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps of linear warmup. None: a tenth (of the time under --max_train_hours)."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled decay; biases and norms are exempt."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Clip the gradient's norm here; 0: never."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no, fp16 (GPU only) or bf16. None: what accelerate is configured for.",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile (inductor)."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )
    seed: int = field(default=0, metadata={"help": "Decides initialization, batch order and masking."})

    # Reporting and saving.
    output_dir: str = field(default="runs/pretrain_mlm", metadata={"help": "Where everything is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow an output folder that has files; an earlier run in it is replaced."}
    )
    resume_from_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Continue the run in --output_dir from its newest good checkpoint, or begin it where there is none yet."
        },
    )
    # A checkpoint of the demonstration has 46 MB: weights, and twice as much of the optimizer's.
    save_steps: int = field(
        default=100,
        metadata={
            "help": "Steps between checkpoints; the last step has one, too. 0: only when a signal stops the run."
        },
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep; older ones are removed."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between validations; 0: only at the end."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between records of the training loss."})
    spectral_monitor_every: int = field(
        default=0,
        metadata={
            "help": "Steps between looks at the conditioning of attention, written to spectral_monitor.json; 0: never."
        },
    )
    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers of accelerate: tensorboard, wandb, trackio, ... None: none."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Log lines instead of progress bars."})
    eval_only: bool = field(
        default=False, metadata={"help": "Measure --model_name_or_path on its run's validation data; write nothing."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_data()
        self._check_budget()
        check_run_mode(self)
        check_heads(self)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 2:
                raise ValueError(f"--{name} {getattr(self, name)} must be even (position table, gated feed-forward).")
        if round(self.mlm_probability * self.max_seq_length) < 1:
            raise ValueError(
                f"--mlm_probability {self.mlm_probability} of --max_seq_length {self.max_seq_length} predicts no token."
            )
        self.initialization()  # refuses bad values
        refuse_unknown_trackers(self.report_to)

    @property
    def budget(self) -> Budget:
        """What the run may use up."""
        if self.max_train_hours is not None:
            return Budget(seconds=self.max_train_hours * 3600)
        return Budget(steps=DEFAULT_STEPS if self.max_steps is None else self.max_steps)

    @property
    def schedule_kind(self) -> str:
        """The learning-rate schedule, `lr_scheduler_type` resolved."""
        if self.lr_scheduler_type is not None:
            return self.lr_scheduler_type
        return "linear" if self.max_train_hours is None else "triangle"

    @property
    def warmup(self) -> float:
        """The warmup of the linear schedule, in the budget's unit; 0 for the triangle."""
        if self.schedule_kind == "triangle":
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        return self.budget.size / 10 if self.budget.steps is None else self.budget.steps // 10

    def new_model_config(self, vocab_size: int) -> CrammedBertConfig:
        """The configuration of a new model, without dropout: pretraining has none."""
        return CrammedBertConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_seq_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def data_settings(self) -> MlmDataSettings:
        """The part that decides the data."""
        names = MlmDataSettings.__dataclass_fields__
        settings = {name: getattr(self, name) for name in names}
        return MlmDataSettings(**settings | {"tokenizer_name": self.tokenizer_name or self.model_name_or_path})

    def _check_numbers(self) -> None:
        bounds: list[tuple[str, float, float]] = [(name, 1, 2**31) for name in AT_LEAST_ONE]
        bounds += [(name, 1, 2**31) for name in OPTIONAL_COUNTS if getattr(self, name) is not None]
        bounds += [
            ("eval_steps", 0, 2**31),
            ("save_steps", 0, 2**31),
            ("spectral_monitor_every", 0, 2**31),
            ("seed", 0, 2**32 - 1),
            ("weight_decay", 0, 1e9),
            ("max_grad_norm", 0, 1e9),
            ("batch_size_ramp", 0, 1),
        ]
        check_bounds(self, bounds)
        if not 0 < self.learning_rate < 1e9:
            raise ValueError(f"--learning_rate {self.learning_rate} must be a finite number above 0.")
        if self.max_train_hours is not None and not 0 < self.max_train_hours < 1e6:
            raise ValueError(f"--max_train_hours {self.max_train_hours} must be a finite number above 0.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} must be above 0 and at most 1.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction} must lie between 0 and 1.")
        Cleaning(self.normalize_text, self.max_tokens_per_character)  # refuses a bad limit

    def _check_data(self) -> None:
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError(
                f"--train_file {' '.join(self.train_file)} and --dataset_name {self.dataset_name}: give one of the two."
            )
        if self.dataset_name is None:
            flags = ("dataset_config_name", "dataset_revision", "dataset_validation_split")
            given = [name for name in flags if getattr(self, name) is not None]
            given += ["dataset_split"] * (self.dataset_split != "train") + ["streaming"] * self.streaming
            if given:
                raise ValueError(
                    f"{', '.join(f'--{name}' for name in given)}: of a dataset; give --dataset_name, too."
                )
            if self.train_file is None and (self.validation_file is not None or self.max_documents is not None):
                name = "max_documents" if self.validation_file is None else "validation_file"
                raise ValueError(f"--{name} without a corpus: give --train_file or --dataset_name as well.")
        separate = [
            name for name in ("validation_file", "dataset_validation_split") if getattr(self, name) is not None
        ]
        if len(separate) > 1 or (separate and self.validation_documents is not None):
            names = [*separate, *["validation_documents"] * (self.validation_documents is not None)]
            raise ValueError(f"{', '.join(f'--{name}' for name in names)}: one of them says what to validate on.")
        if self.max_documents is not None and (self.validation_documents or 0) >= self.max_documents:
            raise ValueError(
                f"--validation_documents {self.validation_documents} of --max_documents {self.max_documents} leaves none "
                "to train on; hold out fewer."
            )

    def _check_budget(self) -> None:
        if self.max_steps is not None and self.max_train_hours is not None:
            raise ValueError(
                f"--max_steps {self.max_steps} and --max_train_hours {self.max_train_hours}: give one of the two."
            )
        if self.warmup_steps is None:
            return
        if self.max_train_hours is not None:
            raise ValueError(
                "--warmup_steps counts steps and --max_train_hours does not; leave the former out (the triangle schedule "
                "has none, the linear one warms up for a tenth of the time)."
            )
        if self.schedule_kind == "triangle":
            raise ValueError(
                "--warmup_steps: of the linear schedule; leave it out under --lr_scheduler_type triangle."
            )
        if not 0 <= self.warmup_steps <= self.budget.size:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} must lie between 0 and --max_steps {self.budget.steps}."
            )


def parse_arguments(argv: Sequence[str], description: str) -> tuple[PretrainArguments, SpectralArguments]:
    """Parse and check the command line; anything wrong ends the program before work starts.

    Args:
        argv: Without the program's name.
        description: Of the program, for its help.
    """
    dataclasses: Any = (PretrainArguments, SpectralArguments)
    parser = HfArgumentParser(dataclasses, description=description)
    argv = list(argv)
    try:
        _set_preset(parser, argv)
        _set_recorded(parser, argv)
        arguments, spectral = parser.parse_args_into_dataclasses(args=argv)
        if not (arguments.eval_only or arguments.show_plan):
            check_output_dir(arguments)
        check_initialization(arguments, spectral)
        if arguments.model_name_or_path is not None:
            if given := explicitly_given(parser, (*NEW_MODEL_SETTINGS, *INITIALIZATION_SETTINGS), argv):
                flags = ", ".join(f"--{name}" for name in sorted(given))
                raise ValueError(f"{flags}: for a new model only; leave out beside --model_name_or_path.")
            check_checkpoint(arguments, spectral)
        elif arguments.tokenizer_name is not None and explicitly_given(parser, ["vocab_size"], argv):
            raise ValueError("--vocab_size: for a trained tokenizer only; leave it out beside --tokenizer_name.")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments, spectral


def _set_preset(parser: HfArgumentParser, argv: list[str]) -> None:
    """Make the preset's values the defaults, but for those that a flag on the command line replaces."""
    if "preset" in explicitly_given(parser, ["preset"], argv):
        name = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**_not_replaced(parser, PRESETS[name], PRESET_REPLACED, argv))


def _set_recorded(parser: HfArgumentParser, argv: list[str]) -> None:
    """Make the data of a saved model's run the defaults of measuring it, but for those that a flag replaces."""
    named = parser.parse_known_args(argv)[0]
    if named.eval_only and named.model_name_or_path is not None:
        recorded = recorded_data_settings(named.model_name_or_path)
        parser.set_defaults(**_not_replaced(parser, recorded, REPLACED, argv))


def _not_replaced(
    parser: HfArgumentParser, values: Mapping[str, Any], replaced: Mapping[str, Sequence[str]], argv: list[str]
) -> dict[str, Any]:
    """Leave out of `values` what the flags on the command line replace."""
    gone = {name for flag in explicitly_given(parser, replaced, argv) for name in replaced[flag]}
    return {name: value for name, value in values.items() if name not in gone}


def check_checkpoint(arguments: PretrainArguments, spectral: SpectralArguments) -> None:
    """Refuse a checkpoint that does not exist, is conditioned otherwise, or is too short, by its config alone."""
    if arguments.eval_only and spectral.spectral_conditioning:
        raise ValueError("--eval_only measures a model as it was saved; leave out --spectral_conditioning.")
    path = str(arguments.model_name_or_path)
    config = AutoConfig.from_pretrained(path, **spectral.to_loading_kwargs())
    positions = getattr(config, "max_position_embeddings", arguments.max_seq_length)
    if arguments.max_seq_length > positions:
        raise ValueError(f"--max_seq_length {arguments.max_seq_length} exceeds the {positions} positions of {path}.")


def check_output_dir(arguments: Any) -> None:
    """Refuse a folder in which files would be replaced that nobody said could be; for the arguments of any script."""
    directory = Path(arguments.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output_dir {directory} is a file; name a folder.")
    if arguments.overwrite_output_dir or not directory.is_dir() or not any(directory.iterdir()):
        return
    if not arguments.resume_from_checkpoint:
        raise ValueError(
            f"--output_dir {directory} is not empty. Name another folder, add --resume_from_checkpoint to continue the run "
            "in it, or add --overwrite_output_dir to replace the files of an earlier run."
        )
    # A run that was killed before its first checkpoint leaves neither; what is here would be lost.
    if not list_checkpoints(directory) and any((directory / name).exists() for name in ("config.json", METRICS_FILE)):
        raise ValueError(
            f"--resume_from_checkpoint: {directory} holds a saved model and no checkpoint to continue from. Name another "
            "folder, or give --overwrite_output_dir instead to train anew in this one."
        )


def recorded_data_settings(model_path: str) -> dict[str, Any]:
    """Read which data a saved model was validated on; empty for a model that no run of this script wrote."""
    file = Path(model_path) / METRICS_FILE
    if not file.is_file():
        return {}
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8"))["arguments"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the record of a run ({type(error).__name__}: {error}). Mend or remove it; without it, the "
            "validation data follow from the flags."
        ) from error
    return {name: recorded[name] for name in DATA_SETTINGS if name in recorded}
