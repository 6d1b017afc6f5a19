"""Whether a script can use a checkpoint, checked before data are prepared: the same rule in every script."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig

from hf_specattn.config_fields import MODEL_TYPE_PREFIX
from hf_specattn.projections import find_projections

from .messages import one_line
from .spectral_arguments import SpectralArguments

# Of layers that come behind the model itself in many architectures, and that a checkpoint may lack.
OPTIONAL_LAYERS = ("pooler",)


TEXT_ADVICE = (
    "Give it sequences of a length that it takes (--max_seq_length), its own tokenizer (--tokenizer_name), or take another "
    "model."
)


class ModelError(ValueError):
    """A model that a script cannot use; the message says which, why, and what to do."""


def load_config(path: str, **kwargs: Any) -> PreTrainedConfig:
    """Load a checkpoint's configuration; `kwargs` are those of `AutoConfig.from_pretrained`.

    Raises:
        ModelError: where there is none, or it is damaged.
    """
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except Exception as error:  # of whatever kind a damaged file leads to
        raise ModelError(f"{path} cannot be loaded: {one_line(error)}") from error


def load_model(auto_class: Any, path: str, *, with_head: bool = False, **kwargs: Any) -> Any:
    """Load a checkpoint with an Auto class; its head may be missing, and is drawn then, but under `with_head`.

    Raises:
        ModelError: for weights that are missing, damaged or of another model, and for a model that has no such head.
    """
    try:
        model, found = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):  # of the machine, not of the checkpoint
        raise
    except Exception as error:  # of whatever kind a damaged file leads to
        task = auto_class.__name__.removeprefix("AutoModelFor")
        raise ModelError(f"{path} cannot be loaded as a model for {task}: {one_line(error)}") from error
    replaced = {entry[0] if isinstance(entry, tuple) else entry for entry in found["mismatched_keys"]}
    lacking = [
        name
        for name in found["missing_keys"]
        if (with_head or name.startswith(f"{model.base_model_prefix}."))
        and name not in replaced
        and not any(layer in name for layer in OPTIONAL_LAYERS)
    ]
    if lacking:
        raise ModelError(
            f"{path} lacks {len(lacking)} weights of a {type(model).__name__} ({', '.join(lacking[:3])}, ...), which "
            "would be random: it is damaged, or the checkpoint of another model."
        )
    return model


def check_conditioning(model: Any, spectral: SpectralArguments, path: str) -> None:
    """Refuse a checkpoint that the flags cannot condition.

    Raises:
        ModelError: for one without known projections, and for a conditioned one if the flags ask for a new conditioning.
    """
    if not spectral.spectral_conditioning:
        return
    if model.config.model_type.startswith(MODEL_TYPE_PREFIX):
        if spectral.spectral_init is not None:
            raise ModelError(
                f"--spectral_init {spectral.spectral_init} says how weights enter a new conditioning, and {path} is "
                "conditioned already; leave it out to continue with it as it is, or fold the checkpoint (`specattn "
                "fold`) first."
            )
        return
    try:
        find_projections(model)
    except ValueError as error:
        raise ModelError(f"{path} cannot be conditioned: {one_line(error)}") from error


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest input, in tokens; None for a model without a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "roberta" in config.model_type:
        return positions - config.pad_token_id - 1  # positions are counted from behind that of padding
    return positions


def check_tokens(path: str, config: PreTrainedConfig, length: int, tokenizer: Any = None) -> None:
    """Refuse sequences that are too long for a model, and a tokenizer, where it is known, with more tokens than it.

    Raises:
        ModelError: naming both numbers.
    """
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise ModelError(
            f"--max_seq_length {length} exceeds the {positions} positions of {path}; give --max_seq_length {positions} or "
            "less."
        )
    if not hasattr(config, "vocab_size"):
        raise ModelError(f"{path} ({config.model_type}) is not a text model; name one that is.")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {path} only {config.vocab_size}; name the tokenizer "
            "that it was trained with by --tokenizer_name."
        )


@torch.no_grad()
def check_forward(model: Any, inputs: Mapping[str, Tensor], path: str, advice: str = TEXT_ADVICE) -> Any:
    """Let a model read one batch; returns its output, and leaves it as it was.

    Raises:
        ModelError: where it cannot.
    """
    training = model.training
    model.eval()
    try:
        return model(**inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever kind: shapes and lengths show in the middle of a model
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise ModelError(
            f"{path} ({type(model).__name__}) cannot read a batch of {shapes}: {one_line(error)}. {advice}"
        ) from error
    finally:
        model.train(training)


def padding_settings(config: PreTrainedConfig, tokenizer: Any) -> dict[str, int]:
    """Settings by which a model finds padding as the tokenizer makes it.

    Causal models classify by the last token before the padding, and know it by their configuration alone. Others have
    learned theirs, where they have one.
    """
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if causal or getattr(config, "pad_token_id", None) is None:
        return {"pad_token_id": tokenizer.pad_token_id}
    return {}


def unusable_inputs(config: Any) -> frozenset[str]:
    """Inputs of tokenizers that a model's forward pass takes and its weights do not: token types, of which it has one."""
    return frozenset({"token_type_ids"} if getattr(config, "type_vocab_size", 2) < 2 else ())
