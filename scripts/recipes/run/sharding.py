"""FSDP2 through accelerate: what its preparation needs to know about our models."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_specattn import compat_extras

logger = logging.get_logger(__name__)


def will_shard(accelerator: Accelerator) -> bool:
    """Whether `configure_sharding` will have the model sharded."""
    on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU and _is_asked_for()
    return on_cpu or accelerator.distributed_type == DistributedType.FSDP


def configure_sharding(accelerator: Accelerator, model: PreTrainedModel) -> bool:
    """Make accelerate's FSDP ready for `model`, which is not yet prepared; returns whether it will be sharded.

    - The layers become the units of sharding unless the configuration names others. (accelerate would take
      `_no_split_modules`, of which the embeddings' module holds the tied weight that it then shards a second time.)
    - On CPU processes accelerate leaves FSDP out without a word. It works there all the same, over gloo, so that what
      a cluster will run can be tried and tested.

    Raises:
        ValueError: for FSDP of version 1, which shards flattened weights and so cannot condition them.
        MissingNameError: if this release of accelerate keeps FSDP's settings elsewhere.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU and _is_asked_for():
        compat_extras.shard_on_cpu(accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    plugin = compat_extras.fsdp_plugin(accelerator)
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP of version {plugin.fsdp_version} flattens the weights, which spectral conditioning needs as matrices. "
            "Set fsdp_version: 2 in accelerate's configuration (or FSDP_VERSION=2)."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
        logger.info(f"FSDP2 shards by {', '.join(plugin.transformer_cls_names_to_wrap)}.")
    return True


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Return the names of the classes that are not to be split and do not hold the input embeddings."""
    wanted = compat_extras.layer_class_names(model)
    embeddings = model.get_input_embeddings()
    modules = [module for module in model.modules() if type(module).__name__ in wanted]
    holding = {type(module).__name__ for module in modules if embeddings in module.modules()}
    return sorted({type(module).__name__ for module in modules} - holding)


def _is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
