"""The inputs, weights and masks of every attention in one real forward pass, recorded by hooks."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import attention_implementation
from .attentions import Architecture, Attention, find_attentions, to_dtype
from .heads import AttentionHead

# Attributes under which attention modules keep the factor of their logits.
SCALE_NAMES = ("scaling", "scale")


@dataclass(frozen=True, eq=False)
class CapturedAttention:
    """One attention module in one forward pass, in eval mode.

    Attributes:
        attention: the module and its projections.
        x: `(batch, N, D)`, the input of the query.
        x_key: `(batch, M, D)`, that of key and value; the same object as `x` in self-attention.
        weights: `(batch, heads, N, M)`, the attention weights that the module returned; where it returns none, those that its
            input gives, checked against its output.
        mask: `(batch, 1 or heads, N, M)`, what the model adds to the logits; None: nothing.
        real: `(batch, N)`, False for padded queries.
        rotary: cosines and sines of rotary position embeddings, each `(batch or 1, N, d)`; None: none.
        scale: factor of the logits.
    """

    attention: Attention
    x: Tensor
    x_key: Tensor
    weights: Tensor
    mask: Tensor | None
    real: Tensor
    rotary: tuple[Tensor, Tensor] | None
    scale: float

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.weights.shape[1]

    def visible(self) -> Tensor:
        """`(batch, 1 or heads, N, M)`, which keys each query may see."""
        if self.mask is None:
            return torch.ones_like(self.weights[:, :1], dtype=torch.bool)
        return self.mask > torch.finfo(self.mask.dtype).min / 2

    def head_outputs(self, sequence: int) -> Tensor:
        """`(heads, N, d)`: each head's attention weights times its values on one sequence, in float64, padding left out.

        Of a preconditioned model, before the preconditioner.
        """
        values = self.attention.head_weights()["value"]
        bias = self.attention.head_biases().get("value")
        products = to_dtype(self.x_key[sequence], torch.float64) @ to_dtype(values, torch.float64).mT
        if bias is not None:
            products = products + to_dtype(bias, torch.float64)[:, None]
        products = products.repeat_interleave(self.heads // len(products), dim=0)
        weights = to_dtype(self.weights[sequence], torch.float64).to(products.device)
        return (weights @ products)[:, self.real[sequence].to(products.device)]

    def head(self, head: int, sequence: int = 0, queries: int | None = None) -> AttentionHead:
        """One head on one sequence of the batch, padding left out, for its Jacobian.

        Args:
            head: which of the query heads.
            sequence: which of the batch.
            queries: take the output at no more than this many tokens, spread evenly; None: at all of them.

        Raises:
            ValueError: if the attention weights are not those that X, the weights, scale, mask and rotary embeddings
            give: the module then does something that this package does not know.
        """
        built = self._whole_head(head, sequence)
        self._check_explained(built, head, sequence)
        real = self.real[sequence].to(built.x.device).nonzero().flatten()
        if queries is not None and queries < len(real):
            real = real[torch.linspace(0, len(real) - 1, queries).round().long().to(real.device)]
        seen = self.visible()[sequence, _place(self.visible()[sequence], head)].to(real.device)[real].any(dim=0)
        if built.x_key is None and len(real) == len(built.x) and seen.all():
            return built
        return _at_keys(built.at_queries(real), seen.nonzero().flatten())

    def spread_heads(self, count: int | None) -> list[int]:
        """At most this many of the query heads, spread evenly; None: all."""
        count = self.heads if count is None else min(count, self.heads)
        return sorted({round(place) for place in np.linspace(0, self.heads - 1, count)})

    def _whole_head(self, head: int, sequence: int) -> AttentionHead:
        blocks, biases = self.attention.head_weights(), self.attention.head_biases()
        group = self.heads // self.attention.heads["key"]

        def of(tensors: dict[str, Tensor], projection: str) -> Tensor | None:
            tensor = tensors.get(projection)
            return None if tensor is None else tensor[head if projection == "query" else head // group]

        mask = None
        if self.mask is not None:
            visible, values = self.visible()[sequence], self.mask[sequence]
            mask = torch.where(visible, to_dtype(values, torch.float64), -torch.inf)[_place(values, head)]
            mask = mask.masked_fill(~visible[_place(visible, head)].any(dim=-1, keepdim=True), 0.0)  # a padded query
        rotation = None
        if self.rotary is not None:
            rotation = rotation_matrices(*(part.expand(len(self.x), -1, -1)[sequence] for part in self.rotary))
        return AttentionHead(
            self.x[sequence],
            blocks["query"][head],
            blocks["key"][head // group],
            blocks["value"][head // group],
            scale=self.scale,
            query_bias=of(biases, "query"),
            key_bias=of(biases, "key"),
            value_bias=of(biases, "value"),
            mask=mask,
            x_key=None if self.x_key is self.x else self.x_key[sequence],
            rotation=rotation,
        )

    def _check_explained(self, built: AttentionHead, head: int, sequence: int) -> None:
        real = self.real[sequence].to(built.x.device)
        found = to_dtype(self.weights[sequence, head], torch.float64)[real]
        logits = built.scale * built.queries() @ built.keys().mT
        # Roundoff of the logits is an error of the weights.
        tolerance = 32 * torch.finfo(self.weights.dtype).eps * max(1.0, logits[real].abs().max().item())
        difference = (found - built.weights()[real]).abs().max().item()
        if difference > max(tolerance, 1e-4):
            raise ValueError(
                f"The attention weights of {self.attention.name} differ by {difference:.2g} from softmax(scale * Q K^T + "
                f"mask) of its input (scale {self.scale:.4g}), so its Jacobian would not be the model's. Something stands "
                "between the projections and the softmax (a norm, relative positions, a learned temperature) that the "
                "diagnostics do not know; the spectra of the weights do not depend on it."
            )


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    architecture: Architecture = None,
    layers: Iterable[int] | None = None,
) -> list[CapturedAttention]:
    """Run `model(**inputs)` once and record every attention module, or those of the chosen layers.

    In eval mode, without gradients, with eager attention (other kernels do not return their weights), and without the
    compiled graph, if there is one. The model is not changed, and no random number is drawn from the global
    generators.

    Args:
        inputs: keyword arguments of the forward pass; `attention_mask` `(batch, N)` says which tokens are padding.
        architecture, layers: as in [`spectra`].

    Raises:
        ValueError: if an attention module is not run by these inputs, or does not return its weights.
    """
    records = [_Record(attention) for attention in find_attentions(model, architecture, layers)]
    handles = [handle for record in records for handle in record.register()]
    try:
        with evaluating(model), eager_attention(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [record.captured(inputs.get("attention_mask")) for record in records]


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Within it a transformers model computes attention by its definition: fused kernels do not return the weights."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = attention_implementation(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def rotation_matrices(cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embeddings `(..., d)` as matrices `(..., d, d)`, channel k being turned with channel `k + d/2`."""
    cosines, sines = to_dtype(cosines, torch.float64), to_dtype(sines, torch.float64)
    half = cosines.shape[-1] // 2
    turn = torch.zeros(2 * half, 2 * half, dtype=torch.float64, device=cosines.device)
    turn[:half, half:], turn[half:, :half] = -torch.eye(half), torch.eye(half)
    return torch.diag_embed(cosines) + sines[..., None] * turn


@dataclass
class _Record:
    """What the hooks of one attention module saw."""

    attention: Attention
    inputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None
    attended: Tensor | None = None  # the input of W_O

    def register(self) -> list[Any]:
        """Register the hooks."""
        handles = [
            item.module.register_forward_pre_hook(self._see_projection(item.layout.projections))
            for item in self.attention.holders
        ]
        module = self.attention.module
        handles.append(module.register_forward_pre_hook(self._see_call, with_kwargs=True))
        handles.append(module.register_forward_hook(self._see_output))
        if (output := self.attention.output()) is not None:
            handles.append(output.register_forward_pre_hook(self._see_attended))
        return handles

    def _see_projection(self, projections: tuple[str, ...]) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs |= dict.fromkeys(projections, args[0])

        return see

    def _see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.arguments = {**bound.get("kwargs", {}), **bound}

    def _see_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        heads = self.attention.heads.get("query")
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Tensor) and part.dim() == 4 and part.shape[1] == heads:
                self.weights = part

    def _see_attended(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.attended = args[0]

    def captured(self, padding: Tensor | None) -> CapturedAttention:
        """The record as a whole.

        Raises:
            ValueError: where something is missing.
        """
        name = self.attention.name
        if missing := {"query", "key", "value"} - set(self.inputs):
            raise ValueError(
                f"{name} was not run by these inputs, or has no {' and '.join(sorted(missing))}; pass inputs that run "
                "it (a decoder with cross-attention needs encoder_hidden_states), or choose layers=."
            )
        x, x_key = self.inputs["query"], self.inputs["key"]
        if x.dim() != 3:
            raise ValueError(f"{name} takes inputs of shape {tuple(x.shape)}; (batch, tokens, width) is needed.")
        mask = self.arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            mask = None
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        width = self.attention.head_weights()["query"].shape[1]
        module, found = self.attention.module, [getattr(self.attention.module, key, None) for key in SCALE_NAMES]
        scale = next((value for value in found if isinstance(value, (int, float))), width**-0.5)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if padding is not None and padding.shape == x.shape[:2]:
            real = padding.bool().to(x.device)
        captured = CapturedAttention(
            attention=self.attention,
            x=x,
            x_key=x_key,
            weights=x.new_zeros(0) if self.weights is None else self.weights,
            mask=None if mask is None else mask[..., : x_key.shape[1]],
            real=real,
            rotary=self.arguments.get("position_embeddings"),
            scale=float(scale),
        )
        return captured if self.weights is not None else self._with_computed_weights(captured, module)

    def _with_computed_weights(self, captured: CapturedAttention, module: nn.Module) -> CapturedAttention:
        """If the module returns no weights, those computed from its input, provided that they explain its output."""
        name, count = self.attention.name, self.attention.heads["query"]
        if self.attended is None:
            raise ValueError(
                f"{name} ({type(module).__name__}) returns no attention weights, and its output projection is not "
                "known, so they could not be checked. Pass architecture=AttentionSpec(..., output=...)."
            )
        batch, rows = captured.x.shape[0], captured.x.shape[1]
        placeholder = captured.x.new_zeros(batch, count, rows, captured.x_key.shape[1])
        captured = replace(captured, weights=placeholder)
        heads = [[captured._whole_head(head, row) for head in range(count)] for row in range(batch)]
        values = torch.stack(
            [torch.cat([h.output(h.query, h.key, h.value) for h in by_head], dim=-1) for by_head in heads]
        )
        expected = to_dtype(self.attended, torch.float64).reshape(values.shape)
        difference = ((values - expected).abs().max() / expected.abs().max()).item()
        if not difference < max(1e-3, 32 * torch.finfo(captured.x.dtype).eps):
            raise ValueError(
                f"{name} ({type(module).__name__}) returns no attention weights, and those of its input, "
                f"softmax({captured.scale:.4g} * Q K^T), do not give its output (relative difference {difference:.2g}). It "
                "masks, normalizes or biases in a way that the diagnostics do not know; the spectra do not depend on it."
            )
        weights = torch.stack([torch.stack([h.weights() for h in by_head]) for by_head in heads])
        return replace(captured, weights=weights.to(captured.x))


def _place(of_heads: Tensor, head: int) -> int:
    """The index of a head in a tensor whose first dimension has one entry for all of them, or one for each."""
    return head if of_heads.shape[0] > 1 else 0


def _at_keys(head: AttentionHead, places: Tensor) -> AttentionHead:
    return replace(
        head,
        x_key=head.keys_x[places],
        mask=None if head.mask is None else head.mask[:, places],
        key_rotation=None if head.keys_rotation is None else head.keys_rotation[places],
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a forward pass is one in eval mode, without gradients and without the compiled graph."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
