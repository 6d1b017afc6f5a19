"""The models of a comparison: which checkpoints, conditioned how, with which adapters; checked before any training."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, logging

from ..compare.comparison import spectral_label
from ..run.messages import one_line
from ..run.run_description import model_description
from ..run.run_metrics import RunMetrics
from ..run.saving import save_pretrained
from ..run.spectral_arguments import SpectralArguments
from ..run.usable_model import (
    ModelError,
    check_forward,
    check_tokens,
    load_config,
    padding_settings,
)
from ..run.usable_model import load_model as load_checkpoint
from ..text.streams import file_digest
from .features import Collator, tokenize
from .glue_arguments import LORA_SETTINGS, GlueArguments, folder_name
from .glue_files import Examples
from .prediction import accepted_inputs
from .protocols import Protocol
from .tasks import GlueTask

# The rates of BERT, RoBERTa, ELECTRA, Crammed BERT and the like; models with others keep their own.
DROPOUT_SETTINGS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
OTHER_WEIGHTS = ("training_state", "adapter_model")  # of files that match these patterns and hold no model

OUR_LOGGERS = (logging.get_logger("recipes"), logging.get_logger("hf_specattn"))


@dataclass(frozen=True)
class ModelVariant:
    """One row of the table.

    Attributes:
        loading: Keyword arguments for `from_pretrained` that condition a stock checkpoint; empty otherwise.
        conditioning: How the model is conditioned, in words; None for a stock model.
        lora: Rank, alpha, dropout and targets (None leaves them to PEFT) of its adapters; None trains all weights.
        fingerprint: Tells it from other checkpoints and other conditionings.
        ignore_mismatched_sizes: Whether a head of another size is replaced.
    """

    label: str
    path: str
    loading: dict[str, Any]
    conditioning: str | None
    lora: dict[str, Any] | None
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    ignore_mismatched_sizes: bool = False

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return folder_name(self.label)

    def settings(self) -> dict[str, Any]:
        """Return what about the model decides its scores, for the record."""
        return {
            "model_fingerprint": self.fingerprint,
            "conditioning": self.conditioning,
            "lora": self.lora,
        }


def plan_variants(arguments: GlueArguments, spectral: SpectralArguments) -> list[ModelVariant]:
    """Return the models to fine-tune, in the order of the checkpoints, each stock one before its conditioned form.

    Every configuration and tokenizer is read, and every model built without memory, so that what cannot work is refused
    here.

    Raises:
        ModelError: for a checkpoint that is missing, has no tokenizer, too few positions, no head for classification, or is
            conditioned already where flags ask for it; and for names that repeat.
    """
    names = arguments.labels or [Path(path).name or path for path in arguments.model_name_or_path]
    variants = []
    for name, path in zip(names, arguments.model_name_or_path):
        tokenizer = load_tokenizer(arguments.tokenizer_name or path)
        if arguments.compare_stock or not spectral.spectral_conditioning:
            variants.append(_variant(arguments, SpectralArguments(), name, path, tokenizer))
        if spectral.spectral_conditioning:
            words = spectral_label(RunMetrics(arguments=asdict(spectral)))
            variants.append(_variant(arguments, spectral, f"{name}, {words}", path, tokenizer))
    for kind, found in (("name", [each.label for each in variants]), ("folder", [each.folder for each in variants])):
        if repeated := [value for value, count in Counter(found).items() if count > 1]:
            raise ModelError(
                f"Several models would have the {kind} {', '.join(map(repr, repeated))}; give each checkpoint another name "
                "by --labels."
            )
    return variants


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        ModelError: where there is none, or it has no padding token.
    """
    advice = "save the model's tokenizer with it, or name one with --tokenizer_name."
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of whatever kind: `tokenizers` raises bare ones for a file it cannot parse
        raise ModelError(f"{path} has no tokenizer that can be loaded ({one_line(error)}); {advice}") from error
    # For a folder without any file of a tokenizer, transformers makes an empty one of the model's kind.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(f"{path} has no tokenizer: what it gives knows no token but special ones; {advice}")
    if tokenizer.pad_token is None:
        raise ModelError(
            f"The tokenizer of {path} has no padding token, which batches need. Set one (tokenizer.pad_token = ...), save "
            "it, and name it by --tokenizer_name."
        )
    return tokenizer


def _variant(
    arguments: GlueArguments, spectral: SpectralArguments, label: str, path: str, tokenizer: PreTrainedTokenizerBase
) -> ModelVariant:
    loading = spectral.to_loading_kwargs()
    config = _load_config(path, loading)
    check_tokens(path, config, arguments.resolved_protocol.max_seq_length, tokenizer)
    lora = None
    if arguments.peft == "lora":
        lora = {name.removeprefix("lora_"): getattr(arguments, name) for name in LORA_SETTINGS}
    _build_without_memory(config, path, lora)
    conditioning = None
    if spectral.spectral_conditioning:
        conditioning = spectral_label(RunMetrics(arguments=asdict(spectral)))
    elif hasattr(config, "spectral_config"):
        conditioning = config.describe_conditioning()
    fingerprint = model_fingerprint(path, config, spectral.init if loading else None)
    ignore = arguments.ignore_mismatched_sizes
    return ModelVariant(label, path, loading, conditioning, lora, fingerprint, tokenizer, ignore)


def _load_config(path: str, loading: dict[str, Any]) -> PreTrainedConfig:
    config = load_config(path)
    if not loading:
        return config
    if hasattr(config, "spectral_config"):
        raise ModelError(
            f"{path} is conditioned already ({config.describe_conditioning()}) and is fine-tuned as it is; leave out "
            "--spectral_conditioning, or name stock checkpoints."
        )
    return load_config(path, **{name: loading[name] for name in loading if name != "spectral_init"})


def _build_without_memory(config: PreTrainedConfig, path: str, lora: dict[str, Any] | None) -> None:
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForSequenceClassification.from_config(config)
            if lora is not None:
                add_lora(model, lora)
    except Exception as error:  # of whatever kind: what a configuration holds shows when a model is made of it
        targets = f" with --lora_targets {' '.join(lora['targets'])}" if lora is not None and lora["targets"] else ""
        raise ModelError(f"{path} cannot be fine-tuned here{targets}: {one_line(error)}") from error


def model_fingerprint(path: str, config: PreTrainedConfig, spectral_init: str | None) -> str:
    """Return a hash that tells a checkpoint, loaded with such a configuration, from others.

    It is made from the configuration, how weights enter a conditioning, and the commit on the Hub or the weights' files.
    """
    state: dict[str, Any] = {"config": model_description(config), "spectral_init": spectral_init}
    folder = Path(path)
    if folder.is_dir():
        files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
        state["weights"] = [file_digest(file) for file in files if not file.name.startswith(OTHER_WEIGHTS)]
    else:
        state["commit"] = [path, _cached_commit(path)]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weight_bytes(variant: ModelVariant) -> int:
    """Return about what a model saved by a run takes, from its checkpoint's files; 0 where they are not in a folder."""
    if variant.lora is not None:
        return 0
    return sum(file.stat().st_size for pattern in WEIGHT_FILES for file in Path(variant.path).glob(pattern))


def _cached_commit(path: str) -> str | None:
    """The commit of a checkpoint of the Hub whose configuration has been read: the name of its folder in the cache."""
    cached = try_to_load_from_cache(path, CONFIG_NAME)
    return Path(cached).parent.name if isinstance(cached, str) else None


def load_model(
    variant: ModelVariant, task: GlueTask, protocol: Protocol, loading_path: str | None = None
) -> nn.Module:
    """Load a model in float32 with a head for a task, and put its adapters on.

    The layers that the checkpoint lacks are drawn from torch's global generator. `loading_path` is a conditioned copy of the
    checkpoint to load instead (see `save_base`).

    Raises:
        ModelError: for a checkpoint whose classifier has another size, unless the variant replaces it.
    """
    path, kwargs = (variant.path, variant.loading) if loading_path is None else (loading_path, {})
    config = load_config(path)
    settings: dict[str, Any] = {name: protocol.dropout for name in DROPOUT_SETTINGS if hasattr(config, name)}
    settings |= padding_settings(config, variant.tokenizer)
    if task.is_regression:
        settings |= {"num_labels": 1, "problem_type": "regression"}
    else:
        settings |= {
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {name: number for number, name in enumerate(task.label_names)},
            "problem_type": "single_label_classification",
        }
    try:
        model = load_checkpoint(
            AutoModelForSequenceClassification,
            path,
            dtype=torch.float32,
            ignore_mismatched_sizes=variant.ignore_mismatched_sizes,
            **settings,
            **kwargs,
        )
    except ModelError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        raise ModelError(
            f"{path} has weights of other shapes than {task.title} needs, as the report above lists; its classifier was made "
            f"for another number of outputs than {task.num_outputs}. --ignore_mismatched_sizes draws a new one."
        ) from error
    return model if variant.lora is None else add_lora(model, variant.lora)


def check_models(variants: Iterable[ModelVariant], tasks: Iterable[GlueTask], protocol: Protocol) -> None:
    """Load every model for each number of outputs that the tasks have, and let it read a batch of a short and a long text.

    Raises:
        ModelError: for weights that are damaged or missing, a classifier of another size, and a model that cannot read
            what its tokenizer makes.
    """
    by_outputs = {task.num_outputs: task for task in tasks}
    device = torch.device("cpu")
    for variant in variants:
        for task in by_outputs.values():
            both = [("a", "b"), ("a " * protocol.max_seq_length, "b " * protocol.max_seq_length)]
            texts = [text[: len(task.hub_text_columns)] for text in both]
            examples = Examples(texts, None, ["0", "1"], "two texts")
            tokens = tokenize(examples, variant.tokenizer, protocol.max_seq_length, empty_second=protocol.empty_second)
            with quiet(), torch.random.fork_rng(devices=[]):
                model = load_model(variant, task, protocol)
            loaded: Any = model
            base = loaded.get_base_model() if variant.lora is not None else loaded
            collate = Collator(variant.tokenizer, accepted_inputs(base), device)
            for rows in ([0], [0, 1]):
                logits = check_forward(model, collate(tokens, rows), variant.path).logits
                if logits.shape != (len(rows), task.num_outputs):
                    raise ModelError(
                        f"{variant.path} ({type(base).__name__}) gives logits of shape {tuple(logits.shape)} for {len(rows)} "
                        f"example(s) of {task.title}, which has {task.num_outputs} output(s); it is not for sequences."
                    )


def add_lora(model: Any, lora: dict[str, Any]) -> nn.Module:
    """Put adapters on a model for sequence classification; its head stays trainable.

    Raises:
        ImportError: without PEFT.
        ValueError: for targets that the model does not have, or a kind of model for which PEFT knows none.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "--peft lora needs PEFT, which is not installed: pip install 'hf_specattn[peft]'."
        ) from error
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=lora["rank"],
        lora_alpha=lora["alpha"],  # a quotient's numerator need not be whole
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
    )
    return peft.get_peft_model(model, config)


def save_base(variant: ModelVariant, directory: str | Path) -> str:
    """Save what adapters are put on, where that is in memory only: a stock checkpoint conditioned while loading.

    An adapter then names it as its base model, so that `AutoPeftModel` rebuilds the conditioned model. Returns the path.
    """
    with quiet():
        model = AutoModel.from_pretrained(variant.path, dtype=torch.float32, **variant.loading)
    save_pretrained(model, variant.tokenizer, directory)
    return str(Path(directory).resolve())


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings of transformers and of this package, where they were or will be shown once."""
    verbosity, levels = logging.get_verbosity(), [logger.level for logger in OUR_LOGGERS]
    logging.set_verbosity_error()
    for logger in OUR_LOGGERS:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for logger, level in zip(OUR_LOGGERS, levels):
            logger.setLevel(level)
