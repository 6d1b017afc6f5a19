"""Projections with an effective weight `W + C`: `nn.Linear` and transformers' `Conv1D`, separate or fused.

A stock projection becomes conditioned only by a change of its class (`module.__class__ = SpectralLinear`): parameter
names, hooks, devices and tied references do not change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import Conv1D, set_submodules, submodules
from .config import SpectralConfig
from .corrections import at_least_float32, identity_correction, svd_correction
from .ordinary import change_class, forget, is_foreign, read, write
from .products import ShiftedProduct, SumProduct, autocasts, is_eager, needs_gradient

HALF_PRECISION = (torch.float16, torch.bfloat16)

# Each live layer with a dynamic correction -> optimizer steps since that was computed; `refreshing` counts them.
STEPS_SINCE_REFRESH: "WeakKeyDictionary[SpectralLayer, int]" = WeakKeyDictionary()


@dataclass(frozen=True)
class ProjectionLayout:
    """Which output rows of one weight belong to query, key and value, and to which head.

    The rows fall into `groups` runs of equal length; each run holds the rows of its first projection, then those of the
    second, and so on. One group is the blocked layout `[query | key | value]`; as many groups as key/value heads is the
    interleaved one. Query, key and value each get their own correction: one `eye` over a fused tensor would condition
    the query alone.

    Args:
        projections: the projections in the weight, in order.
        heads: the number of heads of each.
        head_dims: the rows of one head, for each.
        groups: the number of runs; divides each number of heads.
    """

    projections: tuple[str, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    groups: int = 1

    @property
    def kind(self) -> str:
        """`separate`, `qkv_blocked` or `qkv_interleaved`."""
        if len(self.projections) == 1:
            return "separate"
        return "qkv_blocked" if self.groups == 1 else "qkv_interleaved"

    @property
    def rows_per_group(self) -> list[int]:
        """The rows of each projection in one group."""
        return [heads * dim // self.groups for heads, dim in zip(self.heads, self.head_dims)]

    @property
    def out_features(self) -> int:
        """All rows of the weight."""
        return self.groups * sum(self.rows_per_group)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The `(heads * head_dim, in_features)` matrix of each projection in an `(out_features, in_features)` weight.

        Views where the layout allows it, copies where the projection's rows do not lie together.
        """
        return {name: part.flatten(0, 1) for name, part in self.grouped(matrix).items()}

    def grouped(self, matrix: Tensor) -> dict[str, Tensor]:
        """Views of each projection's rows in an `(out_features, in_features)` weight: `(groups, rows, in_features)`."""
        parts = matrix.unflatten(0, (self.groups, -1)).split(self.rows_per_group, dim=1)
        return dict(zip(self.projections, parts))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        grouped = [parts[name].unflatten(0, (self.groups, -1)) for name in self.projections]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def head_blocks(self, projection: str, matrix: Tensor) -> Tensor:
        """`(heads, head_dim, in_features)` of one projection's matrix."""
        return matrix.unflatten(0, (self.heads[self.projections.index(projection)], -1))

    def merge_heads(self, blocks: Tensor) -> Tensor:
        """The inverse of `head_blocks`."""
        return blocks.flatten(0, 1)


@dataclass(frozen=True)
class OutputLayout(ProjectionLayout):
    """The output projection W_O, whose heads are runs of columns: what each of them puts into the layer's output.

    Args:
        rows: of the weight, `out_features`.
        head_dims: here the columns of one head.
    """

    rows: int = 0

    @classmethod
    def of(cls, rows: int, heads: int, head_dim: int) -> "OutputLayout":
        """Of a `(rows, heads * head_dim)` weight."""
        return cls(("output",), (heads,), (head_dim,), rows=rows)

    @property
    def rows_per_group(self) -> list[int]:
        """All rows, of which none belongs to a head."""
        return [self.rows]

    def head_blocks(self, projection: str, matrix: Tensor) -> Tensor:
        """`(heads, out_features, head_dim)`: a view."""
        return matrix.unflatten(1, (self.heads[0], -1)).movedim(1, 0)

    def merge_heads(self, blocks: Tensor) -> Tensor:
        """The inverse of `head_blocks`."""
        return blocks.movedim(0, 1).flatten(1)

    def sum_heads(self, input: Tensor) -> Tensor:
        """`(..., heads * head_dim)` to `(..., head_dim)`, in at least float32: where each head has a C of its own, `X C^T`
        is lambda times a slice of this."""
        return at_least_float32(input).unflatten(-1, (self.heads[0], -1)).sum(-2)


def correction_matrix(matrix: Tensor, layout: ProjectionLayout, spectral: SpectralConfig) -> Tensor:
    """`C` for a whole `(out_features, in_features)` weight: zero on the rows that are not a target.

    At least float32. Identity reads only the weight's shape, dtype and device.
    """
    matrix = matrix.detach()
    if spectral.method == "identity":
        # One stored number seen as a whole matrix: splitting it by rows stays free of copies.
        matrix = matrix.new_zeros(()).expand(matrix.shape)
    parts = {
        name: _projection_correction(name, part, layout, spectral)
        if name in spectral.targets
        else torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
        for name, part in layout.split(matrix).items()
    }
    return next(iter(parts.values())) if len(parts) == 1 else layout.join(parts)


def _projection_correction(name: str, part: Tensor, layout: ProjectionLayout, spectral: SpectralConfig) -> Tensor:
    blocks = layout.head_blocks(name, part) if spectral.granularity == "head" else part
    if spectral.method == "svd":
        correction = svd_correction(blocks)
    else:
        lambda_ = spectral.lambda_for(name)
        assert lambda_ is not None  # an identity config has a lambda for each of its targets
        correction = identity_correction(blocks, lambda_)
    return layout.merge_heads(correction) if spectral.granularity == "head" else correction


def add_scaled_input(output: Tensor, input: Tensor, layout: ProjectionLayout, spectral: SpectralConfig) -> Tensor:
    """`output + X C^T` for the identity correction, without forming `C`: `X I_k^T` is a slice of `X`.

    Rounding `W + lambda I` to bf16 would replace most of the diagonal by lambda itself (the spacing near 10 is 1/16).
    Here the second term keeps the precision of `X`, and the sum is computed in float32: the add kernel of a
    half-precision tensor uses float32 internally, and a float32 `X` (autocast after a layer norm) promotes it.

    Args:
        output: `(..., out_features)`, `X W^T + b` in half precision.
        input: `X`, `(..., in_features)`, in half precision or float32.

    Returns:
        `(..., out_features)` in the dtype of `output`.
    """
    if isinstance(layout, OutputLayout):
        lambda_ = spectral.lambda_for("output")
        assert lambda_ is not None
        term = layout.sum_heads(input) if spectral.granularity == "head" else input
        return _add_slice(output, term, lambda_).to(output.dtype)
    parts = output.unflatten(-1, (layout.groups, -1)).split(layout.rows_per_group, dim=-1)
    summed = []
    for name, heads, part in zip(layout.projections, layout.heads, parts):
        lambda_ = spectral.lambda_for(name)
        if lambda_ is None:
            summed.append(part)
            continue
        columns = part.flatten(-2)
        if spectral.granularity == "head":
            columns = columns.unflatten(-1, (heads, -1))
            columns = _add_slice(columns, input.unsqueeze(-2), lambda_).flatten(-2)
        else:
            columns = _add_slice(columns, input, lambda_)
        summed.append(columns.to(output.dtype).unflatten(-1, (layout.groups, -1)))
    return (summed[0] if len(summed) == 1 else torch.cat(summed, dim=-1)).flatten(-2)


def add_scaled_input_(output: Tensor, input: Tensor, layout: ProjectionLayout, spectral: SpectralConfig) -> None:
    """The same in place, which reads and writes the output once: for an output that nobody else has seen."""
    if isinstance(layout, OutputLayout):
        lambda_ = spectral.lambda_for("output")
        assert lambda_ is not None
        term = layout.sum_heads(input) if spectral.granularity == "head" else input
        columns = min(output.shape[-1], term.shape[-1])
        output[..., :columns].add_(term[..., :columns], alpha=lambda_)
        return
    parts = output.unflatten(-1, (layout.groups, -1)).split(layout.rows_per_group, dim=-1)
    for name, heads, part in zip(layout.projections, layout.heads, parts):
        lambda_ = spectral.lambda_for(name)
        if lambda_ is None:
            continue
        if spectral.granularity == "head":
            part = part.unflatten(-1, (heads // layout.groups, -1))
            term = input[..., None, None, :]
        elif layout.groups > 1:  # one run of rows after the other goes on in X where the last one ended
            rows = part.shape[-2] * part.shape[-1]
            term = F.pad(input, (0, max(0, rows - input.shape[-1])))[..., :rows].unflatten(-1, part.shape[-2:])
        else:
            term = input[..., None, :]
        columns = min(part.shape[-1], term.shape[-1])
        part[..., :columns].add_(term[..., :columns], alpha=lambda_)


def add_identity_(matrix: Tensor, layout: ProjectionLayout, spectral: SpectralConfig) -> None:
    """Add the identity correction to an `(out_features, in_features)` matrix in place; only its diagonals are written."""
    for name, part in layout.grouped(matrix).items():
        lambda_ = spectral.lambda_for(name)
        if lambda_ is None:
            continue
        if isinstance(layout, OutputLayout) and spectral.granularity == "head":
            layout.head_blocks(name, part[0]).diagonal(dim1=-2, dim2=-1).add_(lambda_)
            continue
        if spectral.granularity == "head":
            heads = layout.heads[layout.projections.index(name)] // layout.groups
            part.unflatten(1, (heads, -1)).diagonal(dim1=-2, dim2=-1).add_(lambda_)
            continue
        for index, run in enumerate(part):
            if (offset := index * len(run)) < run.shape[1]:
                run.diagonal(offset).add_(lambda_)


def add_correction(weight: Tensor, correction: Tensor) -> Tensor:
    """`W + C` in the dtype of `weight`: formed in at least float32, cast once."""
    return (at_least_float32(weight) + at_least_float32(correction)).to(weight.dtype)


def _add_slice(output: Tensor, input: Tensor, lambda_: float) -> Tensor:
    rows, columns = output.shape[-1], input.shape[-1]
    term = input[..., :rows] if rows <= columns else F.pad(input, (0, rows - columns))
    return torch.add(output, term, alpha=lambda_)


class ChangedLayer(nn.Module):
    """A stock module that computes something else since its class was changed, so that nothing may silently replace it.

    Attributes:
        lost: what would be lost with it, and what to do.
    """

    lost: str


class SpectralLayer(ChangedLayer):
    """What conditioned `Linear` and `Conv1D` share. Created by `make_spectral`, never constructed directly.

    Attributes:
        spectral: the settings.
        layout: where query, key and value are among the output rows; for W_O, where its heads are among the columns.
        correction: svd only: `C` in the orientation of `weight`, a persistent buffer. Identity stores no tensor: the
            number in `spectral` cannot be cast, sharded or lost.
    """

    lost = (
        "would compute with W instead of W + C. Call hf_specattn.fold(model) before quantizing the model or converting it to "
        "fp8: the folded model has W + C as its plain weights."
    )
    weight: Any  # nn.Parameter; declared by the stock class too
    bias: Any
    correction: Tensor
    spectral: SpectralConfig
    layout: ProjectionLayout

    @staticmethod
    def orient(weight: Tensor) -> Tensor:
        """`weight` as `(out_features, in_features)`, and back: a view."""
        return weight

    def matrix(self) -> Tensor:
        """The raw `W` as `(out_features, in_features)`."""
        return self.orient(self.weight)

    def correction_of(self, matrix: Tensor) -> Tensor:
        """`C` of an `(out_features, in_features)` weight under this layer's settings, at least float32."""
        return correction_matrix(matrix, self.layout, self.spectral)

    def current_correction(self) -> Tensor:
        """The `C` in force, in the orientation of `weight`: the stored one for svd, `lambda_ * I_k` for identity."""
        return self.correction if self.spectral.method == "svd" else self.orient(self.correction_of(self.matrix()))

    def effective_weight(self) -> Tensor:
        """`W + C` in the orientation and dtype of `weight`: summed in at least float32, cast once."""
        return self.with_correction(self.weight)

    def with_correction(self, weight: Tensor) -> Tensor:
        """The same of another weight."""
        return add_correction(weight, self.current_correction())

    def sum_of(self, weight: Tensor, correction: Tensor | None) -> Tensor:
        """The same bits, of a weight and a stored correction (None for identity), with fewer writes."""
        return self.shifted(weight.clone()) if correction is None else add_correction(weight, correction)

    def shifted(self, weight: Tensor) -> Tensor:
        """`W + lambda I` in the dtype of a weight that nobody else needs: in place, unless that is to be differentiated."""
        if needs_gradient(weight):
            return add_correction(weight, self.orient(self.correction_of(self.orient(weight))))
        add_identity_(self.orient(weight), self.layout, self.spectral)
        return weight

    def add_input(self, output: Tensor, input: Tensor) -> None:
        """`X C^T` of the identity correction added to an output in place."""
        add_scaled_input_(output, input, self.layout, self.spectral)

    @staticmethod
    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The stock layer's product, by the same kernel, so that a folded model agrees to the last bit."""
        return F.linear(input, weight, bias)

    @staticmethod
    def outer(output: Tensor, input: Tensor) -> Tensor:
        """The gradient of `weight` from that of the output, `(rows, out_features)`, and X, `(rows, in_features)`."""
        return output.mT @ input

    def product(self, input: Tensor) -> Tensor:
        """`X (W + C)^T + b`: `(..., in_features)` to `(..., out_features)`."""
        if self._adds_scaled_input(input):
            return self._half_product(input)
        if not is_eager() or autocasts(input):
            return self.multiply(input, self.effective_weight(), self.bias)
        correction = self.correction if self.spectral.method == "svd" else None
        if needs_gradient(input, self.weight, self.bias):
            return SumProduct.apply(self, input, self.weight, self.bias, correction)
        return self.multiply(input, self.sum_of(self.weight, correction), self.bias)

    def _half_product(self, input: Tensor) -> Tensor:
        if is_eager() and needs_gradient(input, self.weight, self.bias):
            half = torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
            return ShiftedProduct.apply(self, input.to(half), input.detach(), self.weight, self.bias)
        output = self.multiply(input, self.weight, self.bias)
        if not is_eager():
            return add_scaled_input(output, input, self.layout, self.spectral)
        self.add_input(output, input)
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and is_foreign(value):
            raise ValueError(
                f"A {type(value.data).__module__}.{type(value.data).__name__} would become the weight of a "
                "conditioned projection, to which no correction can be added. Call hf_specattn.fold(model) first, "
                "which stores W + C as the plain weight, then quantize."
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.spectral.dynamic:  # a deepcopy, or unpickled
            STEPS_SINCE_REFRESH[self] = 0

    def _adds_scaled_input(self, input: Tensor) -> bool:
        """Whether the product runs in half precision and `lambda I` is to be added to the output instead of to W."""
        if self.spectral.method != "identity":
            return False
        if autocasts(input):
            return torch.get_autocast_dtype(input.device.type) in HALF_PRECISION
        return input.dtype in HALF_PRECISION

    def _describe(self) -> str:
        targets = "+".join(name for name in self.layout.projections if name in self.spectral.targets)
        layout = "" if self.layout.kind == "separate" else f", layout={self.layout.kind}"
        return f"spectral={self.spectral.describe()} on {targets}{layout}"


class SpectralLinear(SpectralLayer, nn.Linear):
    """`nn.Linear` with the effective weight `W + C`."""

    def forward(self, input: Tensor) -> Tensor:
        """`X (W + C)^T + b`: `(..., in_features)` to `(..., out_features)`."""
        return self.product(input)

    def extra_repr(self) -> str:
        """The stock line, and what was applied."""
        return f"{super().extra_repr()}, {self._describe()}"


class SpectralConv1D(SpectralLayer, Conv1D):
    """transformers' `Conv1D`, whose weight is stored as `(in_features, out_features)`, with `W + C`."""

    @staticmethod
    def orient(weight: Tensor) -> Tensor:
        """`weight` as `(out_features, in_features)`, and back: a view."""
        return weight.mT

    def forward(self, x: Tensor) -> Tensor:
        """`X (W + C) + b`: `(..., in_features)` to `(..., out_features)`."""
        return self.product(x)

    @staticmethod
    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The stock layer's product, by the same kernel, so that a folded model agrees to the last bit."""
        assert bias is not None  # a Conv1D always has one
        output = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight)
        return output.view(*input.shape[:-1], weight.shape[-1])

    @staticmethod
    def outer(output: Tensor, input: Tensor) -> Tensor:
        """The gradient of `weight` from that of the output, `(rows, out_features)`, and X, `(rows, in_features)`."""
        return input.mT @ output

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}, {self._describe()})"


# Exact types only: a subclass (for example a quantized or adapter layer) may store or read its weight differently.
SPECTRAL_CLASSES: dict[type[nn.Module], type[SpectralLayer]] = {nn.Linear: SpectralLinear, Conv1D: SpectralConv1D}
STOCK_CLASSES = {spectral: stock for stock, spectral in SPECTRAL_CLASSES.items()}


def make_spectral(module: nn.Module, layout: ProjectionLayout, spectral: SpectralConfig) -> SpectralLayer:
    """Turn a stock projection into a conditioned one, in place; an svd correction is left zero, to be computed."""
    change_class(module, SPECTRAL_CLASSES[type(module)])
    assert isinstance(module, SpectralLayer)
    module.layout = layout
    module.spectral = spectral
    if spectral.method == "svd":
        module.register_buffer("correction", torch.zeros_like(module.weight.detach()))
    if spectral.dynamic:
        STEPS_SINCE_REFRESH[module] = 0
    return module


def unmake_spectral(layer: SpectralLayer) -> None:
    """Undo `make_spectral`: restore the stock class, and keep the weight."""
    if layer.spectral.method == "svd":
        forget(layer, "correction")
    STEPS_SINCE_REFRESH.pop(layer, None)
    del layer.spectral, layer.layout
    change_class(layer, STOCK_CLASSES[type(layer)])


@torch.no_grad()
def make_stock(layer: SpectralLayer) -> nn.Module:
    """Turn a conditioned projection back into the stock class, in place, with `W + C` as its weight."""
    weight = read(layer, "weight")
    if layer.spectral.method == "svd":
        correction = read(layer, "correction").to(weight.device)
    else:
        correction = layer.orient(layer.correction_of(layer.orient(weight)))
    write(layer, "weight", at_least_float32(weight) + at_least_float32(correction))
    unmake_spectral(layer)
    return layer


class HeldModules(dict[str, Any]):
    """The submodules of an attention; it refuses to replace a projection whose class was changed.

    Quantizers and fp8 converters replace every `nn.Linear` by a module of their own with its `W`. They all do so by an entry
    here. Adapters, whose replacement contains the projection, are accepted.

    Attributes:
        held: names of the projections, and what would be lost with each.
    """

    held: Mapping[str, str] = MappingProxyType({})

    def __setitem__(self, name: str, module: Any) -> None:
        if name in self.held and module is not None and not is_kept(module):
            raise ValueError(replaced_message(name, module, self.held[name]))
        super().__setitem__(name, module)


def is_kept(module: nn.Module) -> bool:
    """Whether a module is one whose class was changed, or has one in it."""
    return any(isinstance(each, ChangedLayer) for each in module.modules())


def replaced_message(name: str, module: nn.Module, lost: str) -> str:
    """What is wrong with a module in the place of a conditioned projection."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return f"A {kind} in the place of the conditioned projection {name} {lost}"


def hold_projections(model: nn.Module) -> None:
    """Protect the conditioned projections of `model` from being replaced until it is folded."""
    for module in model.modules():
        lost = {name: child.lost for name, child in module.named_children() if isinstance(child, ChangedLayer)}
        if lost:
            held = HeldModules(submodules(module))
            held.held = lost
            set_submodules(module, held)


def release_projections(model: nn.Module) -> None:
    """Undo `hold_projections`."""
    for module in model.modules():
        if isinstance(submodules(module), HeldModules):
            set_submodules(module, dict(submodules(module)))


def refuse_replaced(model: nn.Module) -> None:
    """Refuse a model in which a conditioned projection was replaced nevertheless.

    Raises:
        ValueError: naming it.
    """
    for name, module in model.named_modules():
        children = submodules(module)
        for child, lost in sorted(getattr(children, "held", {}).items()):
            replacement = children.get(child)
            if replacement is not None and not is_kept(replacement):
                raise ValueError(replaced_message(f"{name}.{child}" if name else child, replacement, lost))


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """`(full name, layer)` of each conditioned projection of `model`, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            yield name, module
