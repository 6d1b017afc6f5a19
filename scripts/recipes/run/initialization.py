"""How query, key and value begin: controls for experiments on conditioning, and the ablation of layer norm.

An identity correction is an initialization with `lambda I` added, and it also makes the weights larger. Whether a
gain is the conditioning's or the scale's is told by stock models that differ from the usual one in the scale, or in the
spectrum, alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_specattn.architectures import ARCHITECTURES, AttentionSpec, attention_specs
from hf_specattn.conditioning import Projection, find_projections, refuse_to_save
from hf_specattn.config import SpectralConfig, check_choice
from hf_specattn.layers import SPECTRAL_CLASSES, correction_matrix

PROJECTION_INITS = ("default", "orthogonal", "mimetic")

# Trockman and Kolter, "Mimetic initialization of self-attention layers" (ICML 2023), section 4: of noise and identity in
# W_Q W_K^T, and in W_V W_O.
MIMETIC_QUERY_KEY = (0.7, 0.7)
MIMETIC_VALUE_OUTPUT = (0.4, -0.4)
# What an attention module that the table says nothing about calls its output projection.
OUTPUT_NAMES = ("proj", "o_proj", "out_proj")


@dataclass(frozen=True)
class Initialization:
    """What is done to the query, key and value weights of a stock model, in this order.

    Attributes:
        kind: "default" keeps them, "orthogonal" replaces each of them by a random matrix with equal singular values and
            the same Frobenius norm, "mimetic" draws them so that `W_Q W_K^T` is near a multiple of I and `W_V W_O` near one
            of -I.
        scale: A factor, above 0.
        norm_reference: Scale each to the Frobenius norm that `W + C` of the weights as they stood would have.

    Raises:
        ValueError: for values that cannot be, and for a scale beside a norm.
    """

    kind: str = "default"
    scale: float = 1.0
    norm_reference: SpectralConfig | None = None

    def __post_init__(self) -> None:
        check_choice("projection_init", self.kind, PROJECTION_INITS)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"initialization_scale={self.scale} must be a finite number above 0.")
        if self.norm_reference is not None and self.scale != 1:
            raise ValueError(
                f"initialization_scale={self.scale} would change the norm that match_norm_of sets; give one of the two."
            )

    @property
    def is_default(self) -> bool:
        """Whether nothing is done."""
        return self == Initialization()


def parse_norm_reference(text: str | None) -> SpectralConfig | None:
    """Read `--match_norm_of`: `svd`, or `identity=` and lambda.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    method, equals, number = text.partition("=")
    try:
        if method == "svd" and not equals:
            return SpectralConfig("svd")
        if method == "identity":
            return SpectralConfig("identity", float(number))
    except ValueError:
        pass
    raise ValueError(f"--match_norm_of {text!r}: give svd, or identity with its lambda as identity=1.0.")


@torch.no_grad()
def initialize_projections(model: nn.Module, initialization: Initialization) -> None:
    """Set the query, key and value weights of a stock model; each block of a fused tensor for itself.

    Draws from torch's global generator. Biases stay as they are.

    Args:
        model: Not conditioned yet.
        initialization: What to do.

    Raises:
        ValueError: for a model in which no projections are known, and for a mimetic start of one whose output projection
            is not.
    """
    if initialization.is_default:
        return
    projections = find_projections(model)
    norms = [_target_norms(item, initialization) for item in projections]
    if initialization.kind == "mimetic":
        _initialize_mimetic(model, projections)
    for item, targets in zip(projections, norms):
        matrix = item.orient(item.module.weight)
        blocks = {}
        for name, block in item.layout.split(matrix.clone()).items():
            if initialization.kind == "orthogonal":
                block = nn.init.orthogonal_(torch.empty_like(block))
            # A mimetic start has a norm of its own.
            keeps_norm = initialization.kind == "mimetic" and initialization.norm_reference is None
            factor = 1.0 if keeps_norm else (targets[name] / block.norm()).item()
            blocks[name] = block * (factor * initialization.scale)
        matrix.copy_(item.layout.join(blocks))


def _target_norms(item: Projection, initialization: Initialization) -> dict[str, Tensor]:
    """The Frobenius norm that each block is to have before it is scaled."""
    matrix = item.orient(item.module.weight)
    if initialization.norm_reference is not None:
        matrix = matrix + correction_matrix(matrix, item.layout, initialization.norm_reference)
    return {name: block.norm() for name, block in item.layout.split(matrix).items()}


# --- mimetic ---------------------------------------------------------------------------------------------------------


def mimetic_factors(width: int, rank: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return `A` and `B`, each `(width, rank)`, with `A B^T` the best approximation of that rank to `noise Z + identity I`.

    `Z` has independent entries of variance `1 / width`, drawn from torch's global generator.
    """
    target = noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)
    left, sigma, right = torch.linalg.svd(target)
    roots = sigma[:rank].sqrt()
    return left[:, :rank] * roots, right[:rank].T * roots


def _initialize_mimetic(model: nn.Module, projections: list[Projection]) -> None:
    for name, attention, spec in _attentions(model, projections):
        items = [item for item in projections if item.name.rpartition(".")[0] == name]
        output = _output_projection(model, name, attention, spec)
        parts: dict[str, Tensor] = {}
        heads: dict[str, int] = {}
        for item in items:
            parts |= item.layout.split(item.orient(item.module.weight).clone())
            heads |= dict(zip(item.layout.projections, item.layout.heads))
        if set(parts) != {"query", "key", "value"} or heads["query"] != heads["key"]:
            raise ValueError(
                f"--projection_init mimetic: {name} has not as many query as key heads, all from one input; take another "
                "start for this model."
            )
        width, head_dim = parts["query"].shape[1], len(parts["query"]) // heads["query"]
        pairs = [mimetic_factors(width, head_dim, *MIMETIC_QUERY_KEY) for _ in range(heads["query"])]
        parts["query"], parts["key"] = (torch.cat([pair[side].T for pair in pairs]) for side in (0, 1))
        value, out = mimetic_factors(width, len(parts["value"]), *MIMETIC_VALUE_OUTPUT)
        parts["value"] = value.T
        SPECTRAL_CLASSES[type(output)].orient(output.weight).copy_(out)
        for item in items:
            item.orient(item.module.weight).copy_(item.layout.join(parts))


def _attentions(model: nn.Module, projections: list[Projection]) -> Iterator[tuple[str, nn.Module, AttentionSpec]]:
    specs = attention_specs(None)
    for name in dict.fromkeys(item.name.rpartition(".")[0] for item in projections):
        attention = model.get_submodule(name)
        yield name, attention, next(spec for spec in specs if spec.matches(attention))


def _output_projection(model: nn.Module, name: str, attention: nn.Module, spec: AttentionSpec) -> Any:
    """The module with W_O: where the table has it, else the child with a usual name."""
    if spec.output is not None:
        owner, path = name, spec.output
        while path.startswith(".."):
            owner, path = owner.rpartition(".")[0], path[2:]
        found: nn.Module | None = model.get_submodule(f"{owner}.{path}" if owner else path)
    else:
        found = next((getattr(attention, child) for child in OUTPUT_NAMES if hasattr(attention, child)), None)
    if type(found) not in SPECTRAL_CLASSES:
        raise ValueError(
            f"--projection_init mimetic: the output projection of {name} ({type(attention).__name__}) is not known; take "
            f"another start, or a model of these: {', '.join(ARCHITECTURES)}."
        )
    assert found is not None
    return found


# --- ablation --------------------------------------------------------------------------------------------------------


def remove_layer_norms(model: PreTrainedModel) -> int:
    """Replace every `nn.LayerNorm` of the model by the identity, in place; returns how many there were.

    No stock class is such a model, so it refuses `save_pretrained` from then on.

    Raises:
        ValueError: if there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not names:
        raise ValueError(
            f"--no_layer_norm: {type(model).__name__} has no torch.nn.LayerNorm; leave the flag out, or take another model."
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    refuse_to_save(
        model,
        "has no layer norm any more, and a checkpoint of it would load with new ones; save its state_dict() instead.",
    )
    return len(names)
