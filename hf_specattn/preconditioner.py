"""The preconditioner of attention: its settings, and the output projections that apply it.

Each head's output is equilibrated before the output projection (a third-party reading of arXiv 2603.27153; see
`preconditioning`). A stock output projection becomes a preconditioned one only by a change of its class: there is no
parameter and no buffer.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compat import Conv1D
from .config import check_choice, is_positive_number
from .corrections import at_least_float32
from .layers import ChangedLayer
from .ordinary import change_class

AXES = ("row", "column")
GRADIENTS = ("detached", "through")
SCALES = ("unit", "rms", "match")


@dataclass(frozen=True)
class PreconditionerConfig:
    """How the output of each head is scaled before the output projection (a third-party reading of arXiv 2603.27153).

    Args:
        axis: `"row"` divides each position's output by its norm over the head's channels; `"column"` each channel by its
            norm over the positions. A column mixes positions, so it is refused where they are masked.
        gradient: `"detached"` treats the norm as a constant in the backward pass, `"through"` differentiates it too.
        scale: what the norm becomes. `"unit"`: 1. `"rms"`: the root of the number of entries, so that their root mean
            square is 1 (of rows: RMSNorm per head, without gain). `"match"`: the mean norm that the layer's heads had
            on a probe when the preconditioner was added, a fixed number; this control separates the equilibration from
            the change of scale that the other two cause.
        eps: norms below it count as `eps`, so that a head's output of zero stays zero.

    Raises:
        ValueError: for a value outside these sets; the message says what is allowed.
    """

    axis: str = "row"
    gradient: str = "detached"
    scale: str = "unit"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choice("axis", self.axis, AXES)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("scale", self.scale, SCALES)
        if not is_positive_number(self.eps):
            raise ValueError(f"eps={self.eps!r} is not allowed; give a finite number > 0, such as 1e-6.")
        object.__setattr__(self, "eps", float(self.eps))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def describe(self) -> str:
        """One short line for `extra_repr`, logs and reports, such as `row(unit, detached)`."""
        eps = "" if self.eps == type(self).eps else f", eps={self.eps:g}"
        return f"{self.axis}({self.scale}, {self.gradient}{eps})"


# --- the layer -------------------------------------------------------------------------------------------------------


def precondition_heads(
    input: Tensor, heads: int, preconditioner: PreconditionerConfig, stock_norm: float | None = None
) -> Tensor:
    """Each head's output divided by its norms along the axis, `max(norm, eps)`, times what the scale says.

    Norms and quotients are formed in at least float32.

    Args:
        input: `(..., positions, heads * head_dim)`.
        heads: the number of heads.
        preconditioner: the settings.
        stock_norm: what the norms become with `scale="match"`.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: for the column axis, if `input` has no dimension of positions beside the batch's.
    """
    if preconditioner.axis == "column" and input.dim() < 3:
        raise ValueError(
            "axis='column' needs (batch, positions, channels), but the input of the output projection has the shape "
            f"{tuple(input.shape)}, in which positions of several samples may be mixed; use axis='row'."
        )
    dim = -1 if preconditioner.axis == "row" else -3
    values = at_least_float32(input.unflatten(-1, (heads, -1)))
    measured = values.detach() if preconditioner.gradient == "detached" else values
    norms = torch.linalg.vector_norm(measured, dim=dim, keepdim=True).clamp_min(preconditioner.eps)
    if preconditioner.scale == "match":
        assert stock_norm is not None  # measured before the layer took its class
        factor: Any = stock_norm
    else:
        factor = 1.0 if preconditioner.scale == "unit" else values.shape[dim] ** 0.5
    return (values * (factor / norms)).to(input.dtype).flatten(-2)


class PreconditionedLayer(ChangedLayer):
    """What preconditioned `Linear` and `Conv1D` share. Created by `make_preconditioned`, never constructed directly.

    Attributes:
        preconditioner: the settings.
        heads: how many heads the input is split into.
        stock_norm: what the norms become with `scale="match"`; a Python number, which no cast and no sharding changes.
    """

    lost = (
        "would get its input without preconditioning. No weight holds a preconditioner: do not quantize the output "
        "projections or convert them to fp8."
    )
    weight: Any  # nn.Parameter; declared by the stock class too
    preconditioner: PreconditionerConfig
    heads: int
    stock_norm: float | None

    def forward(self, input: Tensor) -> Tensor:
        """The stock product with the preconditioned input: `(..., heads * head_dim)` to `(..., out_features)`."""
        preconditioned = precondition_heads(input, self.heads, self.preconditioner, self.stock_norm)
        output: Tensor = super().forward(preconditioned)
        return output

    def _describe(self) -> str:
        return f"preconditioner={self.preconditioner.describe()} of {self.heads} heads"


class PreconditionedLinear(PreconditionedLayer, nn.Linear):
    """`nn.Linear` with preconditioned input."""

    def extra_repr(self) -> str:
        """The stock line, and what was applied."""
        return f"{super().extra_repr()}, {self._describe()}"


class PreconditionedConv1D(PreconditionedLayer, Conv1D):
    """transformers' `Conv1D` with preconditioned input."""

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}, {self._describe()})"


# Exact types only, as for the corrections: a subclass may read its weight in another way, or its input twice.
PRECONDITIONED_CLASSES: dict[type[nn.Module], type[PreconditionedLayer]] = {
    nn.Linear: PreconditionedLinear,
    Conv1D: PreconditionedConv1D,
}
STOCK_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    preconditioned: stock for stock, preconditioned in PRECONDITIONED_CLASSES.items()
}


def stock_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the preconditioner if it has one."""
    return STOCK_CLASSES.get(type(module), type(module))


def make_preconditioned(
    module: nn.Module, heads: int, preconditioner: PreconditionerConfig, stock_norm: float | None = None
) -> PreconditionedLayer:
    """Turn a stock output projection into a preconditioned one, in place."""
    change_class(module, PRECONDITIONED_CLASSES[type(module)])
    assert isinstance(module, PreconditionedLayer)
    module.preconditioner, module.heads, module.stock_norm = preconditioner, heads, stock_norm
    return module


def is_preconditioned(model: nn.Module) -> bool:
    """Whether anything in `model` is preconditioned."""
    return next(preconditioned_layers(model), None) is not None


def preconditioned_layers(model: nn.Module) -> Iterator[tuple[str, PreconditionedLayer]]:
    """`(full name, layer)` of each preconditioned output projection of `model`, each once."""
    for name, module in model.named_modules():
        if isinstance(module, PreconditionedLayer):
            yield name, module
