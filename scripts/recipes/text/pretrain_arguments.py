"""The command line of `pretrain_mlm.py`: flags, presets, and everything that is refused before work starts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from transformers import HfArgumentParser

from hf_specattn.crammed_bert import CrammedBertConfig

from ..run.command_line import flag
from ..run.projection_init import INITIALIZATION_SETTINGS, check_initialization
from ..run.run_arguments import RunArguments, default_of, parse_run_arguments
from ..run.schedules import SCHEDULES, Budget, ramped_micro_steps
from ..run.spectral_arguments import SpectralArguments, check_bounds, check_heads, explicitly_given
from ..run.usable_model import check_tokens, load_config
from .crammed_recipe import PRESETS
from .mlm_data import OF_DATASET, OF_VALIDATION, VALIDATION_SETTINGS, MlmDataSettings

DEFAULT_STEPS = 300

# Flags that shape a new model or tokenizer, and say nothing about a checkpoint.
NEW_MODEL_SETTINGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
AT_LEAST_ONE = (*NEW_MODEL_SETTINGS, "max_seq_length")
# At least 1 where they are given at all.
OPTIONAL_COUNTS = ("max_documents", "validation_documents")
# One corpus, one kind of validation data and one kind of budget: naming another by a flag replaces a preset's or a
# recorded run's.
REPLACED = {
    "train_file": OF_DATASET,
    "dataset_name": ("train_file",),
    **{
        name: tuple(other for other in OF_VALIDATION if other != name)
        for name in (*OF_VALIDATION, "validation_fraction")
    },
    "max_steps": ("max_train_hours",),
}
# How many documents a preset takes of its dataset says nothing about files.
PRESET_REPLACED = REPLACED | {"train_file": (*OF_DATASET, "max_documents", "validation_documents")}


@dataclass
class PretrainArguments(MlmDataSettings, RunArguments):
    """Arguments of the run; the defaults are the demonstration."""

    preset: str | None = flag(
        None,
        "Defaults for the other flags, which the command line overrides: demo (the usual defaults), crammed-bert "
        "(the published recipe, one day on one A6000), crammed-bert-small (hours on a consumer GPU); or your own "
        "YAML file.",
    )

    mlm_probability: float = flag(0.25, "Share of positions to predict.")  # cramming

    # Model: 3.7 million parameters, so that 300 steps take three to four minutes on two cores.
    model_name_or_path: str | None = flag(None, "Checkpoint to continue from.")
    hidden_size: int = flag(256, "Width of a new model.")
    num_hidden_layers: int = flag(4, "Layers of a new model.")
    num_attention_heads: int = flag(4, "Attention heads of a new model.")
    # Four times the width, halved by the gate: cramming's proportions.
    intermediate_size: int = flag(1024, "Feed-forward width of a new model, gate included.")
    position_scale: float | None = flag(
        None,
        "Initial value of the learned factor of a new model's position table. None: 1 / sqrt(hidden_size), as "
        "published; with 1, a small model learns to attend to neighbors much sooner.",
    )

    # Optimization: cramming's values (see recipes.run.optimization) at a batch that a CPU can do.
    max_steps: int | None = default_of(
        "max_steps", None, f"Optimizer steps. None: {DEFAULT_STEPS}, or as many as --max_train_hours allows."
    )
    max_train_hours: float | None = flag(None, "Train for this many hours instead; the schedule follows the clock.")
    lr_scheduler_type: str | None = flag(
        None,
        "linear: up over the warmup, then down to 0. triangle: from 1/4 up to the peak at 3/4 of the budget, "
        "then down to 0 (published). None: linear over steps, triangle over time.",
        SCHEDULES,
    )
    per_device_train_batch_size: int = default_of(
        "per_device_train_batch_size", 32, "Sequences per process and forward pass."
    )
    batch_size_ramp: float = flag(
        0.0, "Share of the run over which accumulation grows from 1 forward pass to the full number (published: 0.6)."
    )
    warmup_steps: int | None = flag(
        None, "Steps of linear warmup. None: a tenth (of the time under --max_train_hours)."
    )
    max_grad_norm: float = default_of("max_grad_norm", 0.5)
    no_attention_residual: bool = flag(
        False, "Ablation of a new model: let attention replace its input in every layer."
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass: less memory, but slower.")
    seed: int = default_of("seed", 0, "Determines initialization, batch order and masking.")

    # Reporting and saving.
    output_dir: str = default_of("output_dir", "runs/pretrain_mlm")
    eval_steps: int = flag(100, "Steps between validations; 0: only at the end.")

    def __post_init__(self) -> None:
        self.check_run()
        self._check_numbers()
        self.check_data()
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

    def training_tokens(self, micro_batch_tokens: int) -> int | None:
        """The tokens that a run of this many steps reads, including its ramp; None if the clock decides.

        Args:
            micro_batch_tokens: Tokens of one forward pass of all processes.
        """
        steps = self.budget.steps
        if steps is None:
            return None
        full, ramp = self.gradient_accumulation_steps, self.batch_size_ramp
        return micro_batch_tokens * sum(ramped_micro_steps(step / steps, full, ramp) for step in range(steps))

    def new_model_config(self, vocab_size: int) -> CrammedBertConfig:
        """The configuration of a new model, without dropout: pretraining has none."""
        return CrammedBertConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_seq_length,
            position_scale=self.position_scale,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attention_residual=not self.no_attention_residual,
        )

    def data_settings(self) -> MlmDataSettings:
        """The part that decides the data; the tokenizer is that of the checkpoint unless it is named."""
        settings = {item.name: getattr(self, item.name) for item in fields(MlmDataSettings)}
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
        if self.position_scale is not None and not 0 < self.position_scale < 1e6:
            raise ValueError(f"--position_scale {self.position_scale} must be a finite number above 0.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} must be above 0 and at most 1.")

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
                "--warmup_steps: for the linear schedule only; leave it out with --lr_scheduler_type triangle."
            )
        if not 0 <= self.warmup_steps <= self.budget.size:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} must be between 0 and --max_steps {self.budget.steps}."
            )


def parse_arguments(argv: Sequence[str], description: str) -> tuple[PretrainArguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts."""
    return parse_run_arguments(
        PretrainArguments,
        argv,
        description,
        presets=PRESETS,
        replaced=REPLACED,
        data_settings=(*VALIDATION_SETTINGS, "mlm_probability"),
        refuse=_refuse_contradictions,
        replaced_of_preset=PRESET_REPLACED,
    )


def _refuse_contradictions(
    parser: HfArgumentParser, arguments: PretrainArguments, spectral: SpectralArguments, argv: list[str]
) -> None:
    check_initialization(arguments, spectral)
    if arguments.model_name_or_path is not None:
        if given := explicitly_given(
            parser, (*NEW_MODEL_SETTINGS, *INITIALIZATION_SETTINGS, "position_scale", "no_attention_residual"), argv
        ):
            flags = ", ".join(f"--{name}" for name in sorted(given))
            raise ValueError(f"{flags}: for a new model only; leave out together with --model_name_or_path.")
        _check_checkpoint(arguments, spectral)
    elif arguments.tokenizer_name is not None and explicitly_given(parser, ["vocab_size"], argv):
        raise ValueError("--vocab_size: for a trained tokenizer only; leave it out together with --tokenizer_name.")


def _check_checkpoint(arguments: PretrainArguments, spectral: SpectralArguments) -> None:
    """Refuse a checkpoint that does not exist, is conditioned otherwise, or is too short, by its config alone."""
    path = str(arguments.model_name_or_path)
    settings = spectral.to_loading_kwargs()
    settings.pop("spectral_init", None)  # of the model, and not of its configuration
    config = load_config(path, **settings)
    check_tokens(path, config, arguments.max_seq_length)
