"""Which weights make the queries, keys and values of a model, and read what its heads give: found by watching it run.

Nothing here reads a class name, a child name or a table. The model runs once; every scaled dot product attention, and
every softmax between two products, gives three tensors, and autograd says which rows of the weights in the same module
each of them depends on, and which linear map is the first to read what came of them. That is a second opinion on where the
projections are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

ROLES = ("query", "key", "value")
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
# Reformer takes its softmax as exp(scores - logsumexp(scores)).
NORMALIZERS = (torch.logsumexp, Tensor.logsumexp)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum)
SUMMED_PRODUCTS = (torch.baddbmm, Tensor.baddbmm)


@dataclass(frozen=True)
class TracedAttention:
    """One attention as it ran.

    Args:
        module: name and class name of the innermost module that holds all weights found.
        rows: query, key and value -> module name of a weight -> the output rows that this role reads, in order.
            A role with two weights is no single projection (a low-rank factorization, say); without any the weights could
            not be placed (those of `nn.MultiheadAttention`, say).
        output: name of the first linear map that reads what the heads give; None where none does.
    """

    module: tuple[str, str]
    rows: dict[str, dict[str, tuple[int, ...]]]
    output: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether query, key and value are one weight each."""
        return all(len(self.rows.get(role, {})) == 1 for role in ROLES)


def trace_attention(model: nn.Module, run: Callable[[], Any]) -> list[TracedAttention]:
    """Run the model once, in eval mode, and find where its queries, keys and values come from.

    Args:
        model: any module; its parameters must require gradients.
        run: calls the model.

    Returns:
        One entry for each module that attends, in the order of their first calls.
    """
    was_training = model.training
    model.eval()
    watch = _Watch(model)
    try:
        with torch.enable_grad(), watch:
            run()
        found = [traced for call in watch.calls for traced in [_trace(watch.modules, call)] if traced is not None]
    finally:
        watch.close()
        model.train(was_training)
    return _merged(found)


def with_changed_heads(model: nn.Module, run: Callable[[], Any], change: Callable[[Tensor], Tensor]) -> Any:
    """What `run()` returns where what each attention gives, `(..., positions, head_dim)`, is changed.

    Without the names of any module: the outputs of scaled dot product attention, and of the product with the values.
    """
    watch = _Watch(model, change)
    try:
        with watch:
            return run()
    finally:
        watch.close()


@dataclass
class _Call:
    """One attention call: the tensors, and the names of the modules that were running, outermost first."""

    stack: tuple[str, ...]
    tensors: dict[str, Tensor]
    scores_size: int = 0
    heads: Tensor | None = None
    output: str | None = None


@dataclass
class _Product:
    stack: tuple[str, ...]
    operands: tuple[Tensor, Tensor]
    size: int = field(default=0)


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor] = lambda heads: heads) -> None:
        super().__init__()
        self.change = change
        self.modules = dict(model.named_modules())
        self.stack: list[str] = []
        self.calls: list[_Call] = []
        self.products: list[_Product] = []
        self.seen: set[str] = set()
        self.handles = [handle for name, module in self.modules.items() for handle in self._hooks(name, module)]

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        def enter(_: nn.Module, args: Sequence[Any]) -> None:
            self.stack.append(name)
            if isinstance(module, (nn.Linear, Conv1D)) and args:
                self._reads(name, args[0])

        def leave(*_: Any) -> None:
            self.stack.pop()

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)

    def _reads(self, name: str, entering: Tensor) -> None:
        for call in self.calls if entering.requires_grad else ():
            if call.output is None and call.heads is not None and call.heads.requires_grad:
                (gradient,) = torch.autograd.grad(entering.sum(), call.heads, retain_graph=True, allow_unused=True)
                call.output = None if gradient is None else name

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(ROLES))
            self.calls.append(_Call(tuple(self.stack), {"query": query, "key": key, "value": value}))
            output = self.calls[-1].heads = self.change(output)
        elif func is F.multi_head_attention_forward:  # nn.MultiheadAttention: its weights are no module's
            self.calls.append(_Call(tuple(self.stack), {}))
        elif func in SOFTMAXES:
            self._softmax(args[0] if args else kwargs["input"])
        elif func in NORMALIZERS and args[0].dim() > 3:
            self.calls.append(_Call(tuple(self.stack), {}))
        elif func in PRODUCTS:
            operands = [item for item in args if isinstance(item, Tensor)]
            operands += [
                item for name in ("input", "other", "mat2", "tensor2") if (item := kwargs.get(name)) is not None
            ]
            output = self._product(operands, output)
        elif func in SUMMED_PRODUCTS:
            names = ("batch1", "batch2")
            operands = [args[i + 1] if i + 1 < len(args) else kwargs[n] for i, n in enumerate(names)]
            output = self._product(operands, output)
        return output

    def _product(self, operands: Sequence[Tensor], output: Tensor) -> Tensor:
        if len(operands) != 2 or min(item.dim() for item in operands) < 3:
            return output
        for call in self.calls:
            # The first product of the weights of a softmax is with the values.
            if call.scores_size and "value" not in call.tensors and call.stack[:1] == tuple(self.stack)[:1]:
                sizes = [item.numel() for item in operands]
                if call.scores_size in sizes and _common(call.stack, self.stack):
                    call.tensors["value"] = operands[1 - sizes.index(call.scores_size)]
                    call.heads = self.change(output)
                    return call.heads
        self.products.append(_Product(tuple(self.stack), (operands[0], operands[1]), output.numel()))
        return output

    def _softmax(self, scores: Tensor) -> None:
        made = [item for item in self.products if item.size == scores.numel() and _common(item.stack, self.stack)]
        if not made and scores.dim() > 2:
            # With an attention sink each row of scores has one more, which is dropped behind the softmax.
            size = scores.numel() - scores.numel() // scores.shape[-1]
            made = [item for item in self.products if item.size == size and _common(item.stack, self.stack)]
        if scores.dim() < 3 or not made:
            if scores.dim() > 3:  # over scores in a form of their own, such as Longformer's diagonals
                self.calls.append(_Call(tuple(self.stack), {}))
            return
        query, key = made[-1].operands
        self.calls.append(_Call(tuple(self.stack), {"query": query, "key": key}, made[-1].size))
        self.products.clear()


def _common(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two calls ran in the same module, or one of them in a child of it (a softmax may be a module)."""
    shorter = min(len(first), len(second))
    return abs(len(first) - len(second)) <= 1 and tuple(first)[: shorter - 1] == tuple(second)[: shorter - 1]


def _trace(modules: Mapping[str, nn.Module], call: _Call) -> TracedAttention | None:
    if call.tensors and not any(tensor.requires_grad for tensor in call.tensors.values()):
        return None  # a pass that the model makes without gradients; the same modules attend again with them
    for name in reversed(call.stack) if call.tensors else ():
        rows = {role: _rows_read(modules[name], name, tensor) for role, tensor in call.tensors.items()}
        if rows["query"] and rows["key"] and ("value" not in rows or rows["value"]):
            return TracedAttention((name, type(modules[name]).__name__), _without_derived_values(rows), call.output)
    innermost = call.stack[-1]
    return TracedAttention((innermost, type(modules[innermost]).__name__), {})


def _rows_read(module: nn.Module, prefix: str, tensor: Tensor) -> dict[str, tuple[int, ...]]:
    """Weights of `module` on which `tensor` depends -> their output rows."""
    if not tensor.requires_grad:
        return {}
    holders = {
        ".".join(part for part in (prefix, name) if part): child
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D, nn.Conv2d, nn.Conv1d)) and child.weight.requires_grad
    }
    if not holders:
        return {}
    # A random functional: the sum of a normalized tensor, say, would depend on nothing.
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) + 0.5
    gradients = torch.autograd.grad(
        (tensor * weights).sum(), [child.weight for child in holders.values()], retain_graph=True, allow_unused=True
    )
    found = {}
    for (name, child), gradient in zip(holders.items(), gradients):
        if gradient is not None:
            matrix = gradient.mT if isinstance(child, Conv1D) else gradient.flatten(1)
            rows = tuple(matrix.abs().amax(dim=1).nonzero().flatten().tolist())
            if rows:
                found[name] = rows
    # Where a convolution shortens the sequence first, the linear map behind it is the projection.
    linear = {name: rows for name, rows in found.items() if isinstance(holders[name], (nn.Linear, Conv1D))}
    return linear or found


def _without_derived_values(rows: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Leaves out a "value" that itself came from queries and keys: a product of two softmaxes (Nystromformer)."""
    if "value" not in rows:
        return rows
    taken = {(name, row) for role in ("query", "key") for name, found in rows[role].items() for row in found}
    if any((name, row) in taken for name, found in rows["value"].items() for row in found):
        return {role: rows[role] for role in ("query", "key")}
    return rows


def _merged(found: Sequence[TracedAttention]) -> list[TracedAttention]:
    """One entry per module. A module may attend in several calls, each with a part of the rows (differential attention)
    or of the roles (Nystromformer)."""
    by_module: dict[tuple[str, str], TracedAttention] = {}
    for traced in found:
        before = by_module.get(traced.module)
        rows = traced.rows if before is None else _united(before.rows, traced.rows)
        output = traced.output if before is None else before.output or traced.output
        by_module[traced.module] = TracedAttention(traced.module, rows, output)
    return list(by_module.values())


def _united(
    first: Mapping[str, dict[str, tuple[int, ...]]], later: Mapping[str, dict[str, tuple[int, ...]]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    # A role's weights are those of its first call: when layers share weights, the inputs of a later call depend on them too.
    united = {**later, **first}
    for role in first.keys() & later.keys():
        united[role] = {name: tuple(sorted({*rows, *later[role].get(name, ())})) for name, rows in first[role].items()}
    return united
