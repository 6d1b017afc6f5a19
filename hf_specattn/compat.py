"""Every name of transformers that is not public: what it is for, and what happens if a release lacks it.

This file travels with checkpoints as remote code, so it imports transformers and torch alone (what concerns PEFT,
datasets and accelerate is in `compat_extras`, but for what hooks leave on a module, because files that travel ask for
that). Each name is looked up when it is needed: if it was renamed, the consequence is the one stated with it, and the
package can still be imported.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.utils import logging

logger = logging.get_logger(__name__)


class UnsupportedTransformersError(RuntimeError):
    """This release of transformers lacks something without which results would be wrong."""


def _private(module: str, name: str, consequence: str) -> Any:
    """The attribute `name` of a module of transformers.

    Raises:
        UnsupportedTransformersError: saying what cannot be done without it.
    """
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTransformersError(
            f"transformers {transformers.__version__} has no transformers.{module}.{name}, without which "
            f"{consequence}. Install a supported release (pip install hf_specattn), and report this one."
        ) from error


def dynamic_module_name() -> str:
    """The package that transformers imports a checkpoint's own code into; its name so far where it is not told."""
    return getattr(transformers.utils, "TRANSFORMERS_DYNAMIC_MODULE_NAME", "transformers_modules")


# Whether this file was loaded from a checkpoint, without the package (see `checkpoints/remote_code.py`).
IS_REMOTE_CODE = __name__.partition(".")[0] == dynamic_module_name()


try:
    from transformers.pytorch_utils import Conv1D
except (
    ImportError
):  # nothing is an instance of this one: GPT-2's projections are unknown then, and `condition` says so

    class Conv1D(nn.Module):  # type: ignore[no-redef]
        """Stands for transformers' class of the same name."""


def share_key_conversions(stock_name: str, conditioned_name: str) -> None:
    """Rename the keys of a conditioned class's checkpoints as those of the stock class or model type.

    transformers looks renamings up by class name and model type; without them a ViT's checkpoint loads at random.

    Raises:
        UnsupportedTransformersError: if they cannot be looked up.
    """
    consequence = f"the checkpoint keys of {stock_name} cannot be told from those of other releases"
    conversions = _private("conversion_mapping", "get_checkpoint_conversion_mapping", consequence)(stock_name)
    if conversions is not None:
        register = _private("conversion_mapping", "register_checkpoint_conversion_mapping", consequence)
        register(conditioned_name, conversions, overwrite=True)


def record_outputs_as(conditioned: type, stock: type) -> None:
    """Let `output_attentions` and `output_hidden_states` record the same of both classes.

    What may be recorded is looked up by class, and entered when a model is constructed: one that takes its class later
    (`condition`) would find nothing. Without the registry such a model returns neither, with transformers' own warning.
    """
    try:
        registry = importlib.import_module("transformers.utils.output_capturing")._CAN_RECORD_REGISTRY
    except (ImportError, AttributeError):
        logger.warning_once(
            f"transformers {transformers.__version__} keeps no registry of outputs: output_attentions and "
            "output_hidden_states of a model conditioned in memory may be missing; save it and load it again."
        )
        return
    dict.__setitem__(registry, str(conditioned), getattr(stock, "_can_record_outputs", None))


def enter_names(mapping: str, model_type: str, names: Any) -> None:
    """Enter the class (or classes) for a model type in one of transformers' tables of class names.

    The Trainer shifts the labels for label smoothing where it finds the class of a model by name among the causal ones, and
    model cards take their task from these tables. The Auto classes look at the types of transformers' own configurations.

    Raises:
        UnsupportedTransformersError: for the causal models, whose loss would be wrong; another table is cosmetic.
    """
    try:
        table = _private("models.auto.modeling_auto", f"{mapping}_NAMES", "label smoothing would not shift the labels")
    except UnsupportedTransformersError:
        if "CAUSAL_LM" in mapping:
            raise
        return
    table[model_type] = names


def decide_by_source_as(conditioned: type, stock: type) -> None:
    """Let a conditioned class answer as its stock class what transformers reads out of the source of a class's module."""
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(stock, name):  # a bound class method, which stays bound to the stock class
            setattr(conditioned, name, getattr(stock, name))


def was_loaded(tensor: Tensor) -> bool:
    """Whether `from_pretrained` filled a tensor, by the mark that transformers puts on it.

    A release with another mark makes corrections look unfilled; loading a conditioned checkpoint then is an error
    (`modeling.SpectralModelMixin.from_pretrained` compares with the keys that transformers reports as missing).
    """
    return bool(getattr(tensor, "_is_hf_initialized", False))


def expect_missing(model: Any, pattern: str) -> None:
    """Let keys that match `pattern` be missing from a checkpoint without a warning; without it there is one."""
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None)
    if isinstance(ignored, set):
        ignored.add(pattern)


def not_saved(model: Any) -> set[str]:
    """Names of the tensors that `save_pretrained` leaves out; none if a release does not say."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def attention_implementation(config: Any) -> Any:
    """The attention implementation in use, such as "sdpa": a public setter exists, but no public getter."""
    return getattr(config, "_attn_implementation", None)


def saved_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as `save_pretrained` writes it: tied weights once, and keys as the source's release named them.

    Raises:
        UnsupportedTransformersError: if that cannot be known: the file would load at random.
    """
    consequence = "a checkpoint cannot be written with the keys that it was read with"
    untie = _private("modeling_utils", "remove_tied_weights_from_state_dict", consequence)
    revert = _private("core_model_loading", "revert_weight_conversion", consequence)
    return revert(model, untie(state, model))


def add_metadata_on_save(
    add: Callable[[Mapping[str, Any], Mapping[str, str] | None], dict[str, str] | None],
    finish: Callable[[Any], None],
) -> None:
    """Let `add` complete the metadata of every safetensors file that a model's `save_pretrained` writes, from now on.

    `save_pretrained` takes none, and adding it afterwards would mean writing each file twice. If a release writes
    files differently, there is a warning, and the files have no checksums.

    Args:
        add: `(tensors, metadata)` -> metadata.
        finish: what to do with the name of a file to whose metadata something was added.
    """
    try:
        module: Any = importlib.import_module("transformers.modeling_utils")
        write = module.safe_save_file
    except AttributeError:
        logger.warning_once(
            f"transformers {transformers.__version__} does not write safetensors as this package expects: corrections "
            "are saved without checksums, so damage to the file may go unnoticed."
        )
        return
    if getattr(write, "adds_checksums", False):
        return

    def write_with_metadata(tensors: Any, filename: Any, metadata: Any = None) -> None:
        complete = add(tensors, metadata)
        write(tensors, filename, metadata=complete)
        if complete != metadata:
            finish(filename)

    write_with_metadata.adds_checksums = True  # type: ignore[attr-defined]
    module.safe_save_file = write_with_metadata


def relative_imports(file: Path) -> list[Path]:
    """The files that travel with a module as remote code: those that it imports from its own folder, and so on.

    Raises:
        UnsupportedTransformersError: if transformers does not say which it copies.
    """
    find = _private("dynamic_module_utils", "get_relative_import_files", "remote code cannot be collected")
    return sorted({Path(found) for found in find(file)})


def tasks_of_pipelines() -> Mapping[str, Mapping[str, str]]:
    """Task of the Hub -> stock classes for it; empty if a release has no such table, so that a card names no task."""
    try:
        return importlib.import_module("transformers.modelcard").TASK_MAPPING
    except (ImportError, AttributeError):
        return {}


# --- torch, and what accelerate leaves on modules --------------------------------------------------------------------


def submodules(module: nn.Module) -> dict[str, Any]:
    """The dictionary in which torch keeps the children of a module: every way to replace one ends in an entry here."""
    return module._modules


def set_submodules(module: nn.Module, children: dict[str, Any]) -> None:
    """Put another dictionary in its place."""
    vars(module)["_modules"] = children


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way; true where torch does not say.

    A function of `torch.autograd` would need rules of its own for them.
    """
    functorch = getattr(torch._C, "_are_functorch_transforms_active", None)
    level = getattr(forward_ad, "_current_level", 0)
    return functorch is None or functorch() or level >= 0


def hooks_of_accelerate(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module; none where it has none, or a release keeps them elsewhere.

    Then its forward pass, which is on the instance, is one of unknown origin, and the module is not touched.
    """
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", () if hook is None else (hook,)))


def forward_under_hooks(module: nn.Module) -> Any:
    """The bound method that accelerate's hooks call; None where there is none."""
    return getattr(module, "_old_forward", None)


def set_forward_under_hooks(module: nn.Module, forward: Any) -> None:
    """Let them call another one."""
    module._old_forward = forward
