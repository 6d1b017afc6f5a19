"""What must be the same when a run is resumed: values for the description that checkpoints are compared by."""

from typing import Any

from transformers import PreTrainedConfig

# Where a model came from and what wrote it, not what it is. The dtype, which only loaded models have here, is compared for
# each tensor of a checkpoint.
BOOKKEEPING = ("transformers_version", "architectures", "_name_or_path", "dtype")


def model_description(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration, spectral settings included, that say which function it computes."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in BOOKKEEPING}
