"""Finding the attentions of a model, and the modules that hold their projections."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from .architectures import ARCHITECTURES, MORE_ARCHITECTURES, AttentionSpec, attention_specs, output_module
from .layers import SPECTRAL_CLASSES, OutputLayout, ProjectionLayout, SpectralLayer
from .ordinary import module_problem

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Projection:
    """A module, stock or conditioned, that holds one or more of a model's projections."""

    name: str
    module: Any
    layout: ProjectionLayout

    def orient(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as `(out_features, in_features)`: a view."""
        module = type(self.module)
        return (module if issubclass(module, SpectralLayer) else SPECTRAL_CLASSES[module]).orient(weight)


@dataclass(frozen=True)
class AttentionModule:
    """An attention of a model, stock or conditioned.

    Attributes:
        name: its full name.
        module: itself.
        spec: the row of the table that it matches.
        holders: the modules that hold its query, key and value.
        root: the model.
    """

    name: str
    module: nn.Module
    spec: AttentionSpec
    holders: tuple[Projection, ...]
    root: nn.Module

    @property
    def heads(self) -> dict[str, int]:
        """The number of heads of each projection."""
        layouts = [item.layout for item in self.holders]
        return {name: count for layout in layouts for name, count in zip(layout.projections, layout.heads)}

    @property
    def head_dims(self) -> dict[str, int]:
        """The length of a head of each projection."""
        layouts = [item.layout for item in self.holders]
        return {name: dim for layout in layouts for name, dim in zip(layout.projections, layout.head_dims)}

    def projections(self, output: bool = False) -> list[Projection]:
        """What holds query, key and value, and behind them, where asked for, what holds W_O."""
        return [*self.holders, *([self.output_projection()] if output else [])]

    def head_weights(self, effective: bool = True) -> dict[str, Tensor]:
        """The `(heads, head_dim, in_features)` blocks of W + C, or of W, of each projection; detached, in its dtype."""
        blocks = {}
        for item in self.holders:
            conditioned = effective and isinstance(item.module, SpectralLayer)
            weight = item.module.effective_weight() if conditioned else item.module.weight
            for name, part in item.layout.split(item.orient(weight.detach())).items():
                blocks[name] = item.layout.head_blocks(name, part)
        return blocks

    def head_biases(self) -> dict[str, Tensor]:
        """The `(heads, head_dim)` biases of the projections that have one; detached."""
        blocks = {}
        for item in self.holders:
            if item.module.bias is not None:
                for name, part in item.layout.split(item.module.bias.detach()).items():
                    blocks[name] = item.layout.head_blocks(name, part)
        return blocks

    def located_output(self) -> tuple[str, nn.Module] | None:
        """Name and module of W_O, as `output_module` finds it."""
        return output_module(self.root, self.name, self.spec)

    def check_output_inputs(self, name: str, inputs: int) -> None:
        """Refuse a module with W_O that does not take a value's head for each head of the query.

        Raises:
            ValueError: naming both numbers.
        """
        heads, head_dim = self.heads["query"], self.head_dims["value"]
        if inputs != heads * head_dim:
            raise ValueError(
                f"{name} takes {inputs} inputs, but {heads} query heads with values of length {head_dim} give "
                f"{heads * head_dim}; pass architecture=AttentionSpec(...) with the right output and numbers of heads."
            )

    def output_projection(self) -> Projection:
        """The module with W_O to be conditioned, whose columns are the heads of the query.

        Raises:
            ValueError: where it is not known, or of another class than the stock ones.
        """
        located = self.located_output()
        if located is None:
            raise ValueError(
                f"targets: the output projection of {self.name or 'the model'} ({type(self.module).__name__}) is not known; "
                "leave 'output' out, or pass architecture=AttentionSpec(..., output='<path to the output projection>')."
            )
        full_name: str = located[0]
        module: Any = located[1]
        if isinstance(module, SpectralLayer):
            return Projection(full_name, module, module.layout)
        if type(module) not in SPECTRAL_CLASSES:
            raise ValueError(
                f"{full_name} is a {type(module).__module__}.{type(module).__name__}; only exact torch.nn.Linear and "
                "transformers Conv1D modules can be conditioned, and an output projection has either a correction or a "
                "preconditioner."
            )
        rows, columns = SPECTRAL_CLASSES[type(module)].orient(module.weight).shape
        head_dim, remainder = divmod(columns, count := self.heads.get("query", max(self.heads.values())))
        if remainder:
            raise ValueError(
                f"{full_name} takes {columns} inputs, which {count} heads do not divide; pass architecture=AttentionSpec(...)"
                " with the right output and numbers of heads."
            )
        return Projection(full_name, module, OutputLayout.of(rows, count, head_dim))


def find_projections(
    model: nn.Module, architecture: AttentionSpec | Sequence[AttentionSpec] | None = None, *, output: bool = False
) -> list[Projection]:
    """Every module of `model` that holds a query, key or value projection, in the order of `named_modules`.

    Args:
        output: whether to add the output projection of each attention, behind its others.

    Raises:
        ValueError: where none is found, one cannot be conditioned, or the model contains `nn.MultiheadAttention`.
    """
    return [item for found in find_attention_modules(model, architecture) for item in found.projections(output)]


def find_attention_modules(
    model: nn.Module, architecture: AttentionSpec | Sequence[AttentionSpec] | None = None
) -> list[AttentionModule]:
    """Every attention of `model` whose projections are known, in the order of `named_modules`.

    Raises:
        ValueError: as `find_projections`.
    """
    specs = attention_specs(architecture)
    model_config = getattr(model, "config", None)
    found, unmatched = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{name or 'The model'} is a torch.nn.MultiheadAttention, which hands its in_proj_weight straight to a fused "
                "kernel, so no module can add C to it. Use an attention with Linear projections (such as a transformers "
                "model), or condition only the part of the model without it."
            )
        spec = next((spec for spec in specs if spec.matches(module)), None)
        if spec is not None:
            holders = tuple(_projections_of(name, module, spec, model_config))
            found.append(AttentionModule(name, module, spec, holders, model))
        elif _looks_like_attention(module):
            unmatched.append(f"{name} ({type(module).__name__})")
    if not found:
        raise ValueError(_nothing_found_message(model, unmatched, architecture))
    if unmatched:
        logger.warning(
            f"{len(unmatched)} attention-like modules match no architecture and stay as they are: "
            f"{', '.join(unmatched[:4])}{', ...' if len(unmatched) > 4 else ''}. Pass architecture=AttentionSpec(...) if "
            "they hold query, key and value projections."
        )
    return found


def projection_names(model: nn.Module, targets: Sequence[str]) -> set[str]:
    """Full names of the modules, of whatever class, in which the table finds one of `targets`."""
    names: set[str] = set()
    for name, attention in model.named_modules():
        spec = next((spec for spec in attention_specs(None) if spec.matches(attention)), None)
        if spec is None:
            continue
        held = [child for child, projections in spec.projections_of.items() if set(projections) & set(targets)]
        names.update(f"{name}.{child}" if name else child for child in held)
        if "output" in targets and (located := output_module(model, name, spec)) is not None:
            names.add(located[0])
    return names


def _projections_of(name: str, attention: nn.Module, spec: AttentionSpec, model_config: Any) -> Iterator[Projection]:
    for child in spec.projections_of:
        module = getattr(attention, child)
        full_name = f"{name}.{child}" if name else child
        if isinstance(module, SpectralLayer):
            yield Projection(full_name, module, module.layout)
        elif type(module) in SPECTRAL_CLASSES:
            out_features = SPECTRAL_CLASSES[type(module)].orient(module.weight).shape[0]
            yield Projection(full_name, module, spec.layout(attention, child, out_features, model_config))
        elif (problem := module_problem(module, "condition")) is not None:
            raise ValueError(f"{full_name} {problem}")
        else:
            raise ValueError(
                f"{full_name} is a {type(module).__module__}.{type(module).__name__}; only exact torch.nn.Linear and "
                "transformers Conv1D modules can be conditioned. Condition before quantizing, and before wrapping with "
                "PEFT or similar."
            )


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    named = "attention" in name.lower() or "Attn" in name
    return named and any(type(child) in SPECTRAL_CLASSES for child in module.children())


def _nothing_found_message(model: nn.Module, unmatched: list[str], architecture: Any) -> str:
    names = ", ".join((*ARCHITECTURES, *MORE_ARCHITECTURES))
    known = (
        f"architecture={architecture!r} matches no module"
        if architecture is not None
        else f"none of its modules is an attention of a known architecture ({names})"
    )
    seen = f" Attention-like modules in it: {', '.join(unmatched[:4])}." if unmatched else ""
    return (
        f"No query, key or value projection found in {type(model).__name__}: {known}.{seen} Pass "
        "architecture=AttentionSpec(attention='<class name>', modules={'<child>': 'query', ...})."
    )
