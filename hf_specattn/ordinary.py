"""Whether a projection is an ordinary module: one that computes what its class says, from a weight that is in memory.

Some libraries attach their own forward method, weight or storage to a module. A change of class has no effect on those, and
a write to their `weight` is lost. Code that changes projections calls [`refuse_unordinary`] before anything is written.
"""

import functools
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compat import forward_under_hooks, hooks_of_accelerate, set_forward_under_hooks


def refuse_no_module(model: Any, verb: str) -> None:
    """Refuse what is not a model, such as the name of one.

    Raises:
        ValueError: saying what to pass.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{verb}({model!r}): that is a {type(model).__name__}, but a model (a torch.nn.Module) is needed. Load it "
            "first: AutoModel.from_pretrained(...)."
        )


def refuse_unordinary(
    model: nn.Module,
    parts: Iterable[tuple[str, Any]],
    verb: str,
    tensors: Iterable[str] = ("weight",),
    *,
    sharded: bool = False,
    offloaded: bool = False,
    reads_only: bool = False,
) -> None:
    """Refuse to change modules of `model` on which the change would be lost, or would reach more than it should.

    Args:
        model: what the modules belong to; a tensor that two of its modules share is tied.
        parts: name and module of each.
        verb: what will be done, for the message: "condition", "fold", "refresh", "balance", "initialize".
        tensors: names of the parameters that are read or written.
        sharded: accept DTensors.
        offloaded: accept weights that accelerate keeps elsewhere and that [`write`] reaches.
        reads_only: the parameters are not changed, so they may be tied.

    Raises:
        ValueError: naming the module, the problem, and what to do.
    """
    parts, tensors = list(parts), tuple(tensors)
    owners = {} if reads_only else _owners(model)
    seen: dict[int, str] = {}
    for name, module in parts:
        if (other := seen.setdefault(id(module), name)) is not name and not reads_only:
            raise ValueError(f"{name} and {other} are one module. Give each its own (copy.deepcopy), then {verb}.")
        if problem := module_problem(module, verb):
            raise ValueError(f"{name or type(model).__name__} {problem}")
        for tensor_name in tensors:
            tensor = getattr(module, tensor_name)
            if tensor is None:
                continue
            problem = _tensor_problem(module, tensor_name, tensor, verb, sharded, offloaded)
            shared = owners.get(id(tensor), ())
            if not reads_only and len(shared) > 1:
                problem = f"is tied: {shared} share it. Untie it first, or do not change the model"
            if problem:
                raise ValueError(f"The {tensor_name} of {name or type(model).__name__} {problem}.")


def module_problem(module: nn.Module, verb: str) -> str | None:
    """What makes a module compute something else than its class says, with what to do; None if it is ordinary."""
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return (
            f"has a parametrization of {names} (torch.nn.utils.parametrize): its value is computed from other "
            f"tensors. Make it plain with torch.nn.utils.parametrize.remove_parametrizations(module, {names!r}), then "
            f"{verb}."
        )
    if "forward" in vars(module) and not _is_hooked_by_accelerate(module):
        hook = " over a hook of accelerate" if hooks_of_accelerate(module) else ""
        return (
            f"has its own forward method{hook} ({_describe(vars(module)['forward'])}), which a change of the module "
            "does not reach. Remove it (del module.forward; hooks by "
            f"accelerate.hooks.remove_hook_from_submodules(model)), {verb}, and set it again."
        )
    return None


def _describe(forward: Any) -> str:
    function = getattr(forward, "func", forward)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(forward).__name__)}"


def _is_hooked_by_accelerate(module: nn.Module) -> bool:
    """Whether the forward pass of the instance is accelerate's, around that of the module's class."""
    forward, old = vars(module)["forward"], forward_under_hooks(module)
    return (
        isinstance(forward, functools.partial)
        and forward.func.__module__ == "accelerate.hooks"
        and len(forward.args) == 1
        and forward.args[0] is module
        and getattr(old, "__self__", None) is module
        and getattr(old, "__func__", None) is type(module).forward
    )


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give an ordinary module another class; a hook of accelerate calls that one's forward pass from then on."""
    module.__class__ = new
    if forward_under_hooks(module) is not None:
        set_forward_under_hooks(module, new.forward.__get__(module))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _tensor_problem(
    module: nn.Module, name: str, tensor: Any, verb: str, sharded: bool, offloaded: bool
) -> str | None:
    if name not in _own_names(module.named_parameters):
        return _computed_problem(module, name, verb)
    if is_foreign(tensor) or not tensor.is_floating_point() or tensor.element_size() < 2:
        return (
            f"is quantized or not a floating-point parameter ({type(tensor.data).__name__}, {tensor.dtype}). "
            f"{verb.capitalize()} the model before quantizing it"
        )
    if hasattr(tensor, "full_tensor") and not sharded:
        return (
            f"is sharded (a DTensor). {verb.capitalize()} before fully_shard or tensor parallelism, or gather it first"
        )
    if tensor.is_meta and not (offloaded and _store(module, name) is not None):
        return (
            "is on the meta device and has no values: it is offloaded, or was never loaded. Load the model with "
            f"device_map='cpu' (or on one device), {verb}, save it with save_pretrained, and offload that"
        )
    if tensor.numel() == 0:
        return f"is empty: it is partitioned (DeepSpeed ZeRO-3) or was never created. Gather it, or {verb} before that"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was created under torch.inference_mode and cannot be written. Load the model outside of it"
    return None


def _computed_problem(module: nn.Module, name: str, verb: str) -> str:
    """Not a real parameter: pruning and normalization recompute it before each forward pass."""
    own = [*_own_names(module.named_parameters), *_own_names(module.named_buffers)]
    parts = [each for each in own if each.startswith(f"{name}_")]
    if f"{name}_mask" in own:
        what, way_out = "pruned", f"torch.nn.utils.prune.remove(module, {name!r})"
    elif f"{name}_g" in own:
        what, way_out = "normalized by weight_norm", f"torch.nn.utils.remove_weight_norm(module, {name!r})"
    elif f"{name}_u" in own:
        what, way_out = "normalized by spectral_norm", f"torch.nn.utils.remove_spectral_norm(module, {name!r})"
    else:
        what, way_out = "not a parameter of its module", "whatever put it there"
    made_of = f" (computed from {', '.join(parts)})" if parts else ""
    return f"is {what}{made_of}, and anything written to it is lost. Make it plain first: {way_out}, then {verb}"


def _own_names(tensors: Callable[..., Iterable[tuple[str, Tensor]]]) -> list[str]:
    return [name for name, _ in tensors(recurse=False, remove_duplicate=False)]


def is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor's class stores its values in its own way (torchao's, bitsandbytes', quanto's)."""
    kind = type(tensor.data)
    of_torch = kind.__module__.partition(".")[0] == "torch"
    return not of_torch or kind.__module__.startswith(("torch.sparse", "torch.ao"))


# --- weights that accelerate keeps elsewhere -------------------------------------------------------------------------


def _weights_map(module: nn.Module) -> Any:
    maps = (getattr(hook, "weights_map", None) for hook in hooks_of_accelerate(module))
    return next((each for each in maps if each is not None), None)


def _store(module: nn.Module, name: str) -> tuple[MutableMapping[str, Tensor], str] | None:
    """Where a new value for an offloaded tensor goes, and under which key; None if there is no such place."""
    weights, key = _weights_map(module), name
    if weights is None or name not in weights:
        return None
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    # A loader of files takes what is in its `state_dict` first, so that no file (it may be the checkpoint) is written.
    store = getattr(weights, "state_dict", weights)
    return (store, key) if isinstance(store, MutableMapping) else None


def read(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, from where accelerate keeps it if it is offloaded."""
    tensor: Tensor = getattr(module, name)
    return _weights_map(module)[name] if tensor.is_meta else tensor


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter in place, in its dtype; an offloaded one where accelerate keeps it, in memory."""
    tensor: Tensor = getattr(module, name)
    if not tensor.is_meta:
        tensor.copy_(value)
        return
    found = _store(module, name)
    assert found is not None  # `refuse_unordinary` was asked
    store, key = found
    store[key] = value.to(tensor.dtype)


def forget(module: nn.Module, name: str) -> None:
    """Remove a buffer; accelerate's hook, if there is one, would look for it when it is taken off."""
    delattr(module, name)
    for hook in hooks_of_accelerate(module):
        getattr(hook, "original_devices", {}).pop(name, None)
