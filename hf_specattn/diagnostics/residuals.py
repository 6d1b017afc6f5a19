"""Whether tokens pass a layer only through attention, without a residual connection around it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attentions import Architecture, find_attentions
from .capture import evaluating


def lacks_residual(model: nn.Module, inputs: Mapping[str, Any], architecture: Architecture = None) -> bool | None:
    """Whether some attention has no residual connection around it.

    Found by a forward pass in which every output projection gives zeros: if nothing bypasses an attention, all tokens
    of all sequences are then identical when they reach the next one.

    Args, errors: as in [`capture`].

    Returns:
        None if it cannot be determined: an output projection is not known, or the model has a single attention.
    """
    attentions = find_attentions(model, architecture)
    outputs = [attention.output() for attention in attentions]
    if len(attentions) < 2 or any(output is None for output in outputs):
        return None
    arriving: list[Tensor] = []
    handles = [output.register_forward_hook(_zeros) for output in outputs if output is not None]
    handles += [
        attention.holders[0].module.register_forward_pre_hook(lambda module, args: arriving.append(args[0]))
        for attention in attentions
    ]
    try:
        with evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return any(_all_rows_equal(tokens) for tokens in arriving[1:])


def _zeros(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _all_rows_equal(tokens: Tensor) -> bool:
    rows = tokens.flatten(0, -2)
    spread, size = (rows - rows[0]).abs().max(), rows.abs().max()
    # Equal up to the order of sums; a single row says nothing.
    return len(rows) > 1 and bool(spread <= 100 * torch.finfo(rows.dtype).eps * size)
