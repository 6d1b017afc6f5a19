"""Named settings of `pretrain_mlm.py`, and what a run changes of the published recipe.

The recipe is that of Geiping and Goldstein, "Cramming: Training a Language Model on a Single GPU in One Day"
(https://arxiv.org/abs/2212.14034), as the configuration files of their repository have it.
"""

from collections.abc import Mapping
from typing import Any

# Values by the names of the flags.
PUBLISHED_RECIPE: dict[str, Any] = {
    # The Pile, of which the deduplicated copy is one of the recipe's sources: its first eight million documents.
    "dataset_name": "EleutherAI/the_pile_deduplicated",
    "dataset_config_name": None,
    "dataset_split": "train",
    "streaming": True,
    "max_documents": 8_000_000,
    "normalize_text": True,
    "max_tokens_per_character": 0.25,
    "sequence_order": "published",
    "vocab_size": 32_768,
    "max_seq_length": 128,
    "mlm_probability": 0.25,
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_train_hours": 24.0,
    "max_steps": None,
    "lr_scheduler_type": "triangle",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 512,
    "gradient_accumulation_steps": 16,
    "batch_size_ramp": 0.6,
    "mixed_precision": "fp16",
    "torch_compile": True,
}
PUBLISHED_BATCH_SIZE = (
    PUBLISHED_RECIPE["per_device_train_batch_size"] * PUBLISHED_RECIPE["gradient_accumulation_steps"]
)

# The range of float32 instead of scaled losses, and what the recipe says nothing about: validation and reporting at the
# pace of steps of a million tokens.
CRAMMED_BERT = PUBLISHED_RECIPE | {
    "mixed_precision": "bf16",
    "validation_documents": 2000,
    "per_device_eval_batch_size": 512,
    "eval_steps": 500,
    "save_steps": 250,
    "logging_steps": 10,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the flags: a small model on the embedded corpus, minutes on a CPU.
    "demo": {},
    # The published recipe: a day of one A6000 (48 GB), whose micro-batch of 512 fills it.
    "crammed-bert": CRAMMED_BERT,
    # Some hours of a consumer GPU: narrower and shallower, a sixteenth of the documents, a quarter of the batch.
    "crammed-bert-small": CRAMMED_BERT
    | {
        "max_documents": 500_000,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "max_train_hours": 4.0,
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 128,
    },
}

# How the batch is cut among forward passes and processes changes nothing; the global batch is compared instead. None of
# the others decides what is learned.
NOT_DEVIATING = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "streaming", "torch_compile"})


def deviations(settings: Mapping[str, Any], global_batch_size: int, conditioning: str | None) -> list[str]:
    """Return one line for each setting in which a run is not the published recipe.

    Args:
        settings: The run's, by the names of the flags.
        global_batch_size: Sequences per optimizer step at the end of the ramp, over all processes.
        conditioning: The spectral conditioning in words, None for a stock model.
    """
    lines = [
        f"{name}: {settings[name]} (published: {value})"
        for name, value in PUBLISHED_RECIPE.items()
        if name not in NOT_DEVIATING and settings[name] != value
    ]
    if global_batch_size != PUBLISHED_BATCH_SIZE:
        lines.append(
            f"global batch size: {global_batch_size} sequences (published: {PUBLISHED_BATCH_SIZE}; it is the product of "
            "per_device_train_batch_size, gradient_accumulation_steps and the number of processes)"
        )
    if settings["model_name_or_path"] is not None:
        lines.append(f"model: continued from {settings['model_name_or_path']} (published: from random weights)")
    if settings["tokenizer_name"] is not None:
        lines.append(f"tokenizer: {settings['tokenizer_name']} (published: trained on the corpus)")
    if conditioning is not None:
        lines.append(f"spectral conditioning: {conditioning} (published: none)")
    return lines
