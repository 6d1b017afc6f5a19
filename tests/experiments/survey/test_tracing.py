"""Queries, keys and values found by watching a model run, against what its code says."""

import re

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, HEADS, LAYERS, ToyAttention, each_architecture
from torch import nn

from recipes.survey.tracing import trace_attention


def inputs(width=16):
    return torch.randn(2, 7, width, dtype=torch.float64)


def placed(traced):
    return [(item.module[0], item.rows) for item in traced]


class Eager(nn.Module):
    """Products and a softmax, in several spellings; `key` from a low-rank pair where wanted."""

    def __init__(self, spelling, low_rank=False):
        super().__init__()
        self.q, self.v = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))
        self.k = nn.Linear(16, 16, dtype=torch.float64)
        self.down = nn.Linear(16, 16, dtype=torch.float64) if low_rank else None
        self.spelling, self.activation = spelling, nn.Softmax(dim=-1)

    def forward(self, x):
        q, v = self.q(x), self.v(x)
        k = self.k(x if self.down is None else self.down(x))
        if self.spelling == "operators":
            return (q @ k.mT / 4).softmax(-1) @ v
        if self.spelling == "functions":
            return torch.bmm(F.dropout(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), 0.1, False), v)
        if self.spelling == "einsum":
            scores = torch.einsum("bqd,bkd->bqk", q, k) + torch.zeros(7, 7)
            return torch.einsum("bqk,bkd->bqd", F.softmax(scores, dim=-1), v)
        if self.spelling == "sink":
            scores = F.pad(q @ k.mT, (0, 1), value=0.3).softmax(-1)
            return scores[..., :-1] @ v
        if self.spelling == "baddbmm":
            scores = torch.baddbmm(torch.zeros(2, 7, 7, dtype=q.dtype), q, k.mT, alpha=0.5)
            return self.activation(scores).matmul(v)
        # cross-covariance: channels attend to channels, of normalized columns
        q, k, v = (item.unflatten(-1, (2, 8)).permute(0, 2, 3, 1) for item in (q, k, v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return (scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


@pytest.mark.parametrize("spelling", ["operators", "functions", "einsum", "sink", "baddbmm", "channels"])
def test_attention_in_several_spellings(spelling):
    beside, reader, later = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))
    model = nn.ModuleList([Eager(spelling), beside, reader, later])
    x = inputs()

    def run():
        heads = model[0](x)
        return later(reader(heads.tanh() * beside(x)))  # a gate that reads something else stands before

    (found,) = trace_attention(model, run)
    assert found.module == ("0", "Eager")
    assert found.output == "2"
    rows = tuple(range(16))
    assert found.rows == {"query": {"0.q": rows}, "key": {"0.k": rows}, "value": {"0.v": rows}}
    assert found.is_plain


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_of_a_fused_tensor_with_grouped_heads(interleaved):
    model = nn.Sequential(ToyAttention(interleaved=interleaved))
    x = inputs()
    (found,) = trace_attention(model, lambda: model(x))
    # 4 query heads and 2 groups of 4 rows each, written out by hand.
    expected = (
        {"query": [*range(8), *range(16, 24)], "key": [*range(8, 12), *range(24, 28)]}
        if interleaved
        else {"query": [*range(16)], "key": [*range(16, 24)]}
    )
    expected["value"] = [*range(12, 16), *range(28, 32)] if interleaved else [*range(24, 32)]
    assert found.rows == {role: {"0.in_proj": tuple(rows)} for role, rows in expected.items()}


@each_architecture
def test_every_architecture_as_its_weights_are_named(tiny):
    model = tiny.model()
    batch = tiny.batch()
    found = trace_attention(model, lambda: model(**batch))
    assert len(found) == LAYERS
    by_name = {f"{name}.weight" for item in found for rows in item.rows.values() for name in rows}
    assert by_name == {name for name, _, _ in tiny.projections(model)}
    for item in found:
        assert item.is_plain
        assert re.search(tiny.outputs, f"{item.output}.weight")
        for role, rows in item.rows.items():
            ((_, numbers),) = rows.items()
            assert len(numbers) == 32 // HEADS * tiny.heads_of(role)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_low_rank_projection_is_two_weights_and_not_plain():
    model = Eager("operators", low_rank=True)
    x = inputs()
    (found,) = trace_attention(model, lambda: model(x))
    assert found.rows["key"].keys() == {"k", "down"}
    assert not found.is_plain


def test_attention_whose_weights_are_no_modules_cannot_be_placed():
    model = nn.TransformerEncoderLayer(16, 2, batch_first=True, dtype=torch.float64)
    x = inputs()
    (found,) = trace_attention(model, lambda: model(x))
    assert found.module == ("self_attn", "MultiheadAttention")
    assert found.rows == {}
    assert not found.is_plain


def test_calls_that_share_a_module_are_taken_together():
    class Halves(Eager):
        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return torch.cat([F.scaled_dot_product_attention(q, k, part) for part in v.chunk(2, dim=-1)], dim=-1)

    model = Halves("halves")
    # twice, with its own outputs: the second time everything depends on everything
    (found,) = trace_attention(model, lambda: model(model(inputs())))
    rows = tuple(range(16))
    assert found.rows == {"query": {"q": rows}, "key": {"k": rows}, "value": {"v": rows}}
    # The second time its own projections are the first to read what it gave.
    assert found.output == "q"


def test_a_softmax_over_something_else_is_no_attention():
    router = nn.Sequential(nn.Linear(16, 4, dtype=torch.float64), nn.Softmax(dim=-1))
    x = inputs()
    assert trace_attention(router, lambda: router(x)) == []


def test_a_failing_model_keeps_no_hook_and_its_mode():
    model = ARCHITECTURES["bert"].model().train()
    with pytest.raises(ValueError, match="input_ids"):
        trace_attention(model, lambda: model())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
