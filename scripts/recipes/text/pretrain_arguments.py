"""The command line of `pretrain_mlm.py`: flags, presets, and everything that is refused before work starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_specattn.crammed_bert import CrammedBertConfig

from ..run.projection_init import INITIALIZATION_SETTINGS, check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.schedules import SCHEDULES, Budget
from ..run.spectral_arguments import SpectralArguments, check_bounds, check_heads, explicitly_given
from ..run.usable_model import check_tokens, load_config
from .cleaning import Cleaning
from .crammed_recipe import PRESETS
from .mlm_data import MlmDataSettings
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
AT_LEAST_ONE = (*NEW_MODEL_SETTINGS, "max_seq_length")
# At least 1 where they are given at all.
OPTIONAL_COUNTS = ("max_documents", "validation_documents")
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
class PretrainArguments(RunArguments):
    """Arguments of the run; the defaults are the demonstration."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Values for the other flags, which those given on the command line replace: demo (the defaults), "
            "crammed-bert (the published recipe, a day of one A6000), crammed-bert-small (hours of a consumer GPU); "
            "or a YAML file of your own.",
        },
    )

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
    max_steps: int | None = default_of(
        "max_steps", None, f"Optimizer steps. None: {DEFAULT_STEPS}, or as many as --max_train_hours has."
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
    per_device_train_batch_size: int = default_of(
        "per_device_train_batch_size", 32, "Sequences per process and forward pass."
    )
    batch_size_ramp: float = field(
        default=0.0,
        metadata={
            "help": "Share of the run over which accumulation grows from 1 forward pass to all (published: 0.6)."
        },
    )
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps of linear warmup. None: a tenth (of the time under --max_train_hours)."}
    )
    max_grad_norm: float = default_of("max_grad_norm", 0.5)
    no_attention_residual: bool = field(
        default=False, metadata={"help": "Ablation of a new model: let attention replace its input in every layer."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )
    seed: int = default_of("seed", 0, "Decides initialization, batch order and masking.")

    # Reporting and saving.
    output_dir: str = default_of("output_dir", "runs/pretrain_mlm")
    eval_steps: int = field(default=100, metadata={"help": "Steps between validations; 0: only at the end."})

    def __post_init__(self) -> None:
        self.check_run()
        self._check_numbers()
        self._check_data()
        self._check_budget()
        check_heads(self)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 2:
                raise ValueError(f"--{name} {getattr(self, name)} must be even (position table, gated feed-forward).")
        if round(self.mlm_probability * self.max_seq_length) < 1:
            raise ValueError(
                f"--mlm_probability {self.mlm_probability} of --max_seq_length {self.max_seq_length} predicts no token."
            )

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
            attention_residual=not self.no_attention_residual,
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
            ("batch_size_ramp", 0, 1),
        ]
        check_bounds(self, bounds)
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
    """Parse and check the command line; anything wrong ends the program before work starts."""
    return parse_run_arguments(
        PretrainArguments,
        argv,
        description,
        presets=PRESETS,
        replaced=REPLACED,
        data_settings=DATA_SETTINGS,
        refuse=_refuse_contradictions,
        replaced_of_preset=PRESET_REPLACED,
    )


def _refuse_contradictions(
    parser: HfArgumentParser, arguments: PretrainArguments, spectral: SpectralArguments, argv: list[str]
) -> None:
    check_initialization(arguments, spectral)
    if arguments.model_name_or_path is not None:
        if given := explicitly_given(
            parser, (*NEW_MODEL_SETTINGS, *INITIALIZATION_SETTINGS, "no_attention_residual"), argv
        ):
            flags = ", ".join(f"--{name}" for name in sorted(given))
            raise ValueError(f"{flags}: for a new model only; leave out beside --model_name_or_path.")
        _check_checkpoint(arguments, spectral)
    elif arguments.tokenizer_name is not None and explicitly_given(parser, ["vocab_size"], argv):
        raise ValueError("--vocab_size: for a trained tokenizer only; leave it out beside --tokenizer_name.")


def _check_checkpoint(arguments: PretrainArguments, spectral: SpectralArguments) -> None:
    """Refuse a checkpoint that does not exist, is conditioned otherwise, or is too short, by its config alone."""
    path = str(arguments.model_name_or_path)
    settings = spectral.to_loading_kwargs()
    settings.pop("spectral_init", None)  # of the model, and not of its configuration
    config = load_config(path, **settings)
    check_tokens(path, config, arguments.max_seq_length)
