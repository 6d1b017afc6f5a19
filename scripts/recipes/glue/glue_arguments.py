"""The command line of `eval_glue.py`."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_specattn.files import require_writable

from ..run.command_line import ScriptParser, flag
from ..run.spectral_arguments import AUTO, SpectralArguments, explicitly_given
from .features import LEAST_LENGTH
from .protocols import PROTOCOLS, SCHEDULES, SETTINGS, Protocol
from .tasks import DEFAULT_DATASET, GlueTask, parse_tasks

LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass
class GlueArguments:
    """Arguments of fine-tuning and evaluation on GLUE; invalid values raise a ValueError that says what is allowed."""

    # Models.
    model_name_or_path: list[str] = field(metadata={"help": "Checkpoints to fine-tune: folders or names on the Hub."})
    labels: list[str] | None = flag(None, "One name per checkpoint for the table. None: the last part of its path.")
    tokenizer_name: str | None = flag(None, "Tokenizer of all checkpoints. None: the one saved with each.")
    compare_stock: bool = flag(False, "Also fine-tune each checkpoint without the conditioning of the flags.")
    ignore_mismatched_sizes: bool = flag(
        False, "Replace a checkpoint's classifier that has another number of classes."
    )

    # What is run.
    tasks: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": "all, or names separated by commas: cola,rte."}
    )
    # As in the tables of both papers.
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "One run per model and task with each of these seeds."},
    )
    reference: str | None = flag(
        None, "Name of the model that differences are taken to. None: the first without conditioning."
    )
    retry_failed: bool = flag(False, "Run again what failed before.")

    # Data.
    data_dir: str | None = flag(None, "Folder of the official TSV files, plain or .gz. None: the Hub.")
    dataset_name: str = flag(DEFAULT_DATASET, "Dataset on the Hub, or a folder in the layout of the default.")
    cache_dir: str | None = flag(None, "Folder for token ids, used by all runs. None: cache below the output folder.")
    max_train_samples: int | None = flag(None, "Number of examples to train on, the same for all runs. None: all.")
    max_eval_samples: int | None = flag(None, "Number of examples to evaluate on, the same for all runs. None: all.")

    # Training. None uses the protocol's value.
    protocol: str = flag("crammed", "crammed (default) or bert.", PROTOCOLS)
    learning_rate: float | None = flag(None, "Peak learning rate.")
    num_train_epochs: int | None = flag(None, "Passes over the training set.")
    train_batch_size: int | None = flag(None, "Examples per optimizer step, over all processes.")
    lr_scheduler_type: str | None = flag(None, "How the learning rate falls.", SCHEDULES)
    warmup_ratio: float | None = flag(None, "Share of the steps in which the rate rises.")
    weight_decay: float | None = flag(None, "Decoupled; biases and norms are exempt.")
    max_grad_norm: float | None = flag(None, "Clip the gradient's norm here; 0: never.")
    max_seq_length: int | None = flag(None, "Tokens per example, special ones included.")
    dropout: float | None = flag(None, "Dropout of hidden states and attention probabilities, if the model has these.")
    group_by_length: bool = flag(True, "Put examples of similar length into one batch, which saves padding.")
    mixed_precision: str | None = flag(None, "no or bf16. None: what accelerate is configured for.", ["no", "bf16"])
    per_device_eval_batch_size: int = flag(64, "Examples per process when evaluating.")

    # Adapters. Rank and alpha are those of PEFT's own defaults.
    peft: str | None = flag(None, "lora trains only adapters and the classifier. None: all weights.", ["lora"])
    lora_rank: int = flag(8, "Rank of the adapters.")
    lora_alpha: float = flag(8, "Adapters are scaled by alpha / rank.")
    lora_dropout: float = flag(0.0, "Dropout before the adapters.")
    lora_targets: list[str] | None = flag(
        None, "Names of the modules to adapt. None: PEFT's default for the architecture."
    )

    # Writing.
    output_dir: str = flag("runs/eval_glue", "Where everything is written.")
    overwrite_output_dir: bool = flag(
        False, "Discard the earlier results in the output folder. Otherwise they are kept."
    )
    do_predict: bool = flag(False, "Write test-set predictions in the format of GLUE's server.")
    save_models: bool = flag(False, "Save each fine-tuned model or adapter.")
    disable_tqdm: bool = flag(False, "No progress bars.")

    def __post_init__(self) -> None:
        if bad := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"--seeds {bad[0]} must be at least 0 and below 2^32.")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: a seed is named twice; name each once.")
        for name in ("per_device_eval_batch_size", "lora_rank", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if not 0 < self.lora_alpha < 1e9:
            raise ValueError(f"--lora_alpha {self.lora_alpha} must be a finite number above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1.")
        if self.labels is not None and len(self.labels) != len(self.model_name_or_path):
            raise ValueError(
                f"--labels gives {len(self.labels)} names to {len(self.model_name_or_path)} checkpoints; give one to each."
            )
        length = self.resolved_protocol.max_seq_length
        if length < LEAST_LENGTH:
            raise ValueError(f"--max_seq_length {length} must be at least {LEAST_LENGTH}.")

    @property
    def resolved_protocol(self) -> Protocol:
        """The protocol with the values that were given in place of its own."""
        given = {name: getattr(self, name, None) for name in SETTINGS}
        return replace(PROTOCOLS[self.protocol], **{name: value for name, value in given.items() if value is not None})

    @property
    def glue_tasks(self) -> list[GlueTask]:
        """The tasks, in the order given."""
        return parse_tasks(self.tasks)

    @property
    def runs_all_tasks(self) -> bool:
        """Whether the order of the tasks is the script's to choose."""
        return [name.lower() for name in self.tasks] == ["all"]

    @property
    def resolved_cache_dir(self) -> Path:
        """Where token ids are kept."""
        return Path(self.output_dir) / "cache" if self.cache_dir is None else Path(self.cache_dir)

    def training_settings(self) -> dict[str, Any]:
        """Return the settings that are the same for all models and decide their scores."""
        return {"protocol": self.protocol, **asdict(self.resolved_protocol), "group_by_length": self.group_by_length}


def parse_arguments(argv: Sequence[str], description: str) -> tuple[GlueArguments, SpectralArguments]:
    """Parse and check the command line; any error ends the program before work starts."""
    dataclasses: Any = (GlueArguments, SpectralArguments)
    parser = ScriptParser(dataclasses, description=description)
    try:
        arguments, spectral = parser.parse_args_into_dataclasses(args=list(argv))
        _check_together(arguments, spectral, explicitly_given(parser, LORA_SETTINGS, list(argv)))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments, spectral


def _check_together(arguments: GlueArguments, spectral: SpectralArguments, given_lora: set[str]) -> None:
    parse_tasks(arguments.tasks)
    if spectral.is_automatic:
        raise ValueError(f"--lambda_ {AUTO} works only in the training scripts; give a number, or leave it out (10).")
    if arguments.compare_stock and not spectral.spectral_conditioning:
        raise ValueError("--compare_stock compares with the conditioning of the flags; add --spectral_conditioning.")
    if given_lora and arguments.peft is None:
        flags = ", ".join(f"--{name}" for name in sorted(given_lora))
        raise ValueError(f"{flags} given without --peft lora; add that, or leave {flags} out.")
    require_writable(arguments.output_dir, "--output_dir")
    if not arguments.resolved_cache_dir.is_dir():  # a full one need not be written to
        require_writable(arguments.resolved_cache_dir, "--cache_dir")


def folder_name(label: str) -> str:
    """Return a model's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "model"
