"""How query, key and value begin, on separate and fused tensors."""

import pytest
import torch
from models import ARCHITECTURES, HEADS, assert_bit_equal
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, ViTConfig, ViTModel

from hf_specattn import AttentionSpec, PreconditionerConfig, SpectralConfig, condition, initialize, precondition
from hf_specattn.initialization import Initialization, mimetic_factors

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(params=["separate", "fused"])
def model(request):
    if request.param == "separate":
        return ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)).double()
    return GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)).double()


ENDS = (".query.weight", ".key.weight", ".value.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")


def names_of(model):
    """The names of the modules with query, key and value, of a model that keeps them apart."""
    return [name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(ENDS)]


def blocks_of(model):
    """Each query, key and value weight, `(out, in)`, by layer; written out for the two models."""
    if isinstance(model, GPT2Model):
        return [part.T for block in model.h for part in block.attn.c_attn.weight.detach().clone().split(16, dim=1)]
    return [weight.detach().clone() for name, weight in model.named_parameters() if name.endswith(ENDS)]


def others_of(model):
    projections = ("query.weight", "key.weight", "value.weight", "_proj.weight", "c_attn.weight")
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(projections)}


def test_the_scale_multiplies_the_projections_alone(model):
    before, others = blocks_of(model), others_of(model)
    initialize(model, "default", scale=3.0)
    for old, new in zip(before, blocks_of(model), strict=True):
        torch.testing.assert_close(new, 3 * old)
    assert all(torch.equal(value, others[name]) for name, value in others_of(model).items())


def test_orthogonal_blocks_have_equal_singular_values_and_the_old_norm(model):
    before = blocks_of(model)
    initialize(model, "orthogonal", scale=2.0)
    after = blocks_of(model)
    assert len(after) == 6
    for old, new in zip(before, after):
        sigma = torch.linalg.svdvals(new)
        torch.testing.assert_close(sigma, torch.full_like(sigma, 2 * old.norm().item() / 4))  # sqrt(16) equal ones


@pytest.mark.parametrize("reference", [SpectralConfig(lambda_=1.5), SpectralConfig("svd")], ids=["identity", "svd"])
@pytest.mark.parametrize("kind", ["default", "orthogonal", "mimetic", "conditioned"])
def test_the_norm_is_that_of_the_conditioned_model(model, reference, kind):
    before = blocks_of(model)
    initialize(model, kind, norm_reference=reference)
    for old, new in zip(before, blocks_of(model), strict=True):
        if reference.method == "svd":
            left, sigma, right = torch.linalg.svd(old)
            correction = sigma[0] * left @ right
        else:
            correction = 1.5 * torch.eye(16, dtype=old.dtype)
        torch.testing.assert_close(new.norm(), (old + correction).norm())
        if kind == "default":
            torch.testing.assert_close(new / new.norm(), old / old.norm())


def test_mimetic_factors_are_the_best_approximation():
    torch.manual_seed(0)
    one, two = mimetic_factors(12, 12, 0.7, 0.7)
    torch.manual_seed(0)
    target = 0.7 * torch.randn(12, 12) / 12**0.5 + 0.7 * torch.eye(12)
    torch.testing.assert_close(one @ two.T, target, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    one, two = mimetic_factors(12, 4, 0.7, 0.7)
    sigma = torch.linalg.svdvals(target)
    torch.testing.assert_close((one @ two.T - target).norm(), sigma[4:].norm(), atol=1e-5, rtol=1e-4)


def test_a_mimetic_start_is_near_the_identity_and_its_opposite():
    width = 64
    config = BertConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    model = BertModel(config)
    initialize(model, "mimetic")
    layer = model.encoder.layer[0].attention
    value, out = layer.self.value.weight.detach(), layer.output.dense.weight.detach()
    product = value.T @ out.T  # the paper's W_V W_O
    assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert (product - product.diagonal().diag()).std().item() == pytest.approx(0.4 / width**0.5, rel=0.1)
    for head in (slice(0, 32), slice(32, 64)):
        query, key = (part.weight.detach()[head] for part in (layer.self.query, layer.self.key))
        kept = query.T @ key
        assert torch.linalg.matrix_rank(kept) == 32
        assert kept.diagonal().mean() > 0.3  # of 0.7, the part in the leading half of the spectrum


def test_a_conditioned_start(model):
    others = others_of(model)
    torch.manual_seed(0)
    initialize(model, "conditioned", scale=0.5)
    blocks = blocks_of(model)
    assert len(blocks) == 6
    order = ["query", "key", "value"] * 2 if isinstance(model, GPT2Model) else names_of(model)
    heads = []
    for name, block in zip(order, blocks, strict=True):
        if name.startswith("v"):
            assert torch.equal(block, torch.eye(16, dtype=torch.float64))
            continue
        for head in block.split(8):
            torch.testing.assert_close(head @ head.T, 0.25 * torch.eye(8, dtype=torch.float64))
            heads.append(head)
    assert len(heads) == 8
    assert all((one - two).abs().max() > 0.1 for index, one in enumerate(heads) for two in heads[:index])
    assert all(torch.equal(value, others[name]) for name, value in others_of(model).items())


def test_a_conditioned_start_with_grouped_heads_and_in_half_precision():
    llama = ARCHITECTURES["llama"].model(dtype=torch.bfloat16)
    initialize(llama, "conditioned")
    attention = llama.layers[1].self_attn
    assert torch.equal(attention.v_proj.weight, torch.eye(16, 32, dtype=torch.bfloat16))
    for projection, heads in ((attention.q_proj, HEADS), (attention.k_proj, 2)):
        assert projection.weight.dtype == torch.bfloat16
        for head in projection.weight.double().chunk(heads):
            torch.testing.assert_close(head @ head.T, torch.eye(8, dtype=torch.float64), atol=0.02, rtol=0)


def output_of(model):
    """W_O, `(out, in)`, by layer."""
    ends = ("attn.c_proj.weight", "attention.output.dense.weight", "o_proj.weight")
    found = [value.detach().clone() for name, value in model.named_parameters() if name.endswith(ends)]
    assert len(found) == 2
    return found


def test_each_projection_has_its_scale_and_others_stay(model):
    before, outputs, others = blocks_of(model), output_of(model), others_of(model)
    initialize(model, "default", scale={"query": 3.0, "output": 5.0})
    for index, (old, new) in enumerate(zip(before, blocks_of(model), strict=True)):
        assert torch.equal(new, 3 * old if index % 3 == 0 else old)
    for old, new in zip(outputs, output_of(model), strict=True):
        assert torch.equal(new, 5 * old)
    changed = {name for name, value in others_of(model).items() if not torch.equal(value, others[name])}
    assert all("output.dense" in name for name in changed)


def test_value_and_output_alone_become_orthogonal(model):
    before, outputs = blocks_of(model), output_of(model)
    initialize(model, "orthogonal", scale={"query": 3.0, "value": 2.0}, targets=("value", "output"))
    for index, (old, new) in enumerate(zip(before, blocks_of(model), strict=True)):
        if index % 3 == 2:
            sigma = torch.linalg.svdvals(new)
            torch.testing.assert_close(sigma, torch.full_like(sigma, 2 * old.norm().item() / 4))
        else:
            assert torch.equal(new, 3 * old if index % 3 == 0 else old)
    for old, new in zip(outputs, output_of(model), strict=True):
        sigma = torch.linalg.svdvals(new)
        torch.testing.assert_close(sigma, torch.full_like(sigma, old.norm().item() / 4))


def test_the_norm_of_a_conditioned_output(model):
    outputs = output_of(model)
    reference = SpectralConfig("svd", targets=("output",))
    initialize(model, "default", norm_reference=reference, targets=("output",))
    for old, new in zip(outputs, output_of(model), strict=True):
        left, sigma, right = torch.linalg.svd(old)
        torch.testing.assert_close(new, old * ((old + sigma[0] * left @ right).norm() / old.norm()))


def test_what_cannot_be_is_refused(model):
    for settings, message in (
        ({"kind": "mimetic", "targets": ("value", "output")}, "initializes all projections; leave targets out"),
        ({"kind": "orthogonal", "targets": ("values",)}, "non-empty subset"),
        ({"kind": "default", "scale": {"values": 2.0}}, "non-empty subset"),
        ({"kind": "default", "scale": {"value": 0.0}}, "finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(model, **settings)
    with pytest.raises(
        ValueError, match=r"kind='random' is unknown; choose one of 'default', 'orthogonal', 'mimetic', 'c"
    ):
        initialize(model, "random")
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number above 0"):
            initialize(model, "default", scale=scale)
    with pytest.raises(ValueError, match="pass only one of the two"):
        Initialization("default", 2.0, SpectralConfig("svd"))
    with pytest.raises(ValueError, match="No query, key or value projection"):
        initialize(torch.nn.Linear(2, 2), "default", scale=2.0)
    condition(model, SpectralConfig("svd"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is already conditioned.*initialize the stock model, then condition it"):
        initialize(model, "conditioned")
    assert_bit_equal(model.state_dict(), before)


def test_nothing_is_done_by_default(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    initialize(model, "default")
    assert_bit_equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mimetic_start_needs_the_output_projection():
    llama = ARCHITECTURES["llama"].model()
    with pytest.raises(ValueError, match="needs as many key heads as query heads"):
        initialize(llama, "mimetic")
    spec = AttentionSpec("BertSelfAttention", {name: name for name in ("query", "key", "value")})
    with pytest.raises(ValueError, match=r"the output projection of .* is not known; pass architecture="):
        initialize(ARCHITECTURES["bert"].model(), "mimetic", architecture=spec)


def test_a_preconditioned_model_may_be_initialized():
    first, second = (ARCHITECTURES["bert"].model(dtype=torch.float32) for _ in range(2))
    precondition(first, PreconditionerConfig())
    for model in (first, second):
        torch.manual_seed(0)
        initialize(model, "mimetic")
    assert_bit_equal(first.state_dict(), second.state_dict())
