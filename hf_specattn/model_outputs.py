"""The outputs of a model on a small input, and how far they lie from others: whether two models compute the same."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# A float64 model has no more exact one to be measured against. Roundoff of the gauge itself is far below this.
FLOAT64_TOLERANCE = 1e-10
# The balanced weights are rounded to the stored dtype once more, and the outputs compared are each off by its error.
ERRORS_ALLOWED = 4.0

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OutputChange:
    """How far outputs lie from others.

    Attributes:
        absolute: the greatest absolute difference.
        relative: the greatest difference in a tensor relative to the greatest value in it (absolute where that is 0), of
            the tensor with the greatest.
    """

    absolute: float
    relative: float


def probe_batch(model: nn.Module) -> dict[str, Tensor]:
    """A small random input for a text or image model of transformers: 16 tokens, or one image; the same each time.

    Raises:
        ValueError: where the configuration does not say what the model takes.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    name = model.main_input_name if isinstance(model, PreTrainedModel) else None
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    if name == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        # Half of the positions: some models count them from an offset.
        length = max(1, min(16, (getattr(config, "max_position_embeddings", None) or 32) // 2))
        return {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator).to(like.device)}
    if name == "pixel_values" and hasattr(config, "image_size") and hasattr(config, "num_channels"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, generator=generator).to(like)}
    raise ValueError(
        f"No probe batch can be made for {type(model).__name__} (its main input is {name!r}); pass probe={{...}}, the "
        "keyword arguments of a forward pass."
    )


@torch.no_grad()
def probe_outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensors:
    """The floating-point tensors that `model(**batch)` returns, in eval mode; key/value caches do not count.

    The random generators are set before and restored after, so that calls can be compared; each module keeps its mode.

    Raises:
        ValueError: if the forward pass fails, or returns no such tensor.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _seeded(), torch.compiler.set_stance("force_eager"):  # a compiled graph may not see a substituted weight
            outputs = dict(_float_tensors(model(**batch)))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} could not run on the probe ({', '.join(batch)}): {type(error).__name__}: {error}. Pass "
            "probe={...}, the keyword arguments of a forward pass."
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if not outputs:
        raise ValueError(
            f"{type(model).__name__} returned no floating-point tensor for the probe ({', '.join(batch)})."
        )
    return outputs


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        yield


def _float_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "past_key_values":  # keys and values are what the gauge changes
                yield from _float_tensors(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _float_tensors(item, f"{name}.{index}")


def output_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> OutputChange:
    """The greatest difference between two results of `probe_outputs`; relative to `before`.

    Raises:
        ValueError: if they are not of the same tensors and shapes.
    """
    shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Outputs of different shapes cannot be compared: {shapes[0]} and {shapes[1]}.")
    differences, ratios = [0.0], [0.0]
    for name, value in before.items():
        expected, found = value.double(), after[name].double()
        # Infinite values, such as masked logits, differ from themselves by nan, and give no scale.
        difference = torch.where(found == expected, 0.0, (found - expected).abs())
        scale = torch.where(expected.isfinite(), expected.abs(), 0.0)
        differences.append(difference.max().item())
        ratios.append(differences[-1] / (scale.max().item() or 1.0))
    # Of tensors, the maximum of nan and a number is nan.
    return OutputChange(*(torch.tensor(values, dtype=torch.float64).max().item() for values in (differences, ratios)))


def measured_tolerance(
    model: nn.Module, probe: Mapping[str, Any], outputs: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[float, float | None]:
    """How far outputs may lie from `outputs`, those of `probe`, and still be those of the same function.

    Returns:
        The greatest relative change, and the dtype's own error that it is 4 times: the relative change of the outputs when
        the same weights compute in float64 (at least one rounding is allowed, the dtype's `eps`); for float64, which has no
        more exact one to be measured against, 1e-10 and None.
    """
    if dtype == torch.float64:
        return FLOAT64_TOLERANCE, None
    error = output_change(float64_outputs(model, probe), outputs).relative
    return ERRORS_ALLOWED * max(error, torch.finfo(dtype).eps), error


def float64_outputs(model: nn.Module, probe: Mapping[str, Any]) -> Tensors:
    """As `probe_outputs`, of the same weights in float64, of which one module's exist at a time; the model is not changed.

    Raises:
        ValueError: as there, and where the model cannot compute in float64.
    """

    def upcast(module: nn.Module) -> Tensors:
        return {name: tensor.detach().double() for name, tensor in _own_float_tensors(module)}

    sources = {
        module: lambda module=module: upcast(module)
        for module in model.modules()
        if any(True for _ in _own_float_tensors(module))
    }
    try:
        with substituted(sources, input_dtype=torch.float64):
            return probe_outputs(model, probe)
    except ValueError as error:
        raise ValueError(
            f"The error of the dtype could not be measured: {error} The model may not be able to compute in float64; then "
            "pass tolerance=, the greatest relative change of an output."
        ) from error


def _own_float_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _own_tensors(module).items():
        if tensor.is_floating_point():
            yield name, tensor


def _own_tensors(module: nn.Module) -> Tensors:
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


@contextlib.contextmanager
def substituted(
    sources: Mapping[nn.Module, Callable[[], Tensors]], input_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """While the forward pass of one of these modules runs, its own tensors are those of its source.

    With `input_dtype`, floating-point tensors among its arguments are cast to it.
    """
    originals: dict[nn.Module, Tensors] = {}
    handles = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = sources[module]()
        originals[module] = _own_tensors(module)
        for name, tensor in tensors.items():
            is_parameter = isinstance(originals[module][name], nn.Parameter)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return (_cast(args, input_dtype), _cast(kwargs, input_dtype)) if input_dtype else None

    def leave(module: nn.Module, *_: Any) -> None:
        for name, tensor in originals.pop(module, {}).items():
            setattr(module, name, tensor)

    try:
        for module in sources:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(originals):
            leave(module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
