import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, ViTConfig, ViTModel

from hf_specattn import SpectralConfig, condition
from recipes.run.initialization import (
    Initialization,
    initialize_projections,
    mimetic_factors,
    parse_norm_reference,
    remove_layer_norms,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(params=["separate", "fused"])
def model(request):
    if request.param == "separate":
        return ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)).double()
    return GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)).double()


def blocks_of(model):
    """Each query, key and value weight, `(out, in)`, by layer; written out for the two models."""
    if isinstance(model, GPT2Model):
        return [part.T for block in model.h for part in block.attn.c_attn.weight.detach().clone().split(16, dim=1)]
    names = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(
            (".query.weight", ".key.weight", ".value.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
        )
    ]
    return [model.get_parameter(name).detach().clone() for name in names]


def others_of(model):
    projections = ("query.weight", "key.weight", "value.weight", "_proj.weight", "c_attn.weight")
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(projections)}


def test_the_scale_multiplies_the_projections_alone(model):
    before, others = blocks_of(model), others_of(model)
    initialize_projections(model, Initialization(scale=3.0))
    for old, new in zip(before, blocks_of(model), strict=True):
        torch.testing.assert_close(new, 3 * old)
    assert all(torch.equal(value, others[name]) for name, value in others_of(model).items())


def test_orthogonal_blocks_have_equal_singular_values_and_the_old_norm(model):
    before = blocks_of(model)
    initialize_projections(model, Initialization("orthogonal", scale=2.0))
    after = blocks_of(model)
    assert len(after) == 6
    for old, new in zip(before, after):
        sigma = torch.linalg.svdvals(new)
        torch.testing.assert_close(sigma, torch.full_like(sigma, 2 * old.norm().item() / 4))  # sqrt(16) equal ones


@pytest.mark.parametrize("text", ["identity=1.5", "svd"])
@pytest.mark.parametrize("kind", ["default", "orthogonal"])
def test_the_norm_is_that_of_the_conditioned_model(model, text, kind):
    before = blocks_of(model)
    initialize_projections(model, Initialization(kind, norm_reference=parse_norm_reference(text)))
    for old, new in zip(before, blocks_of(model), strict=True):
        if text == "svd":
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
    initialize_projections(model, Initialization("mimetic"))
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


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="projection_init"):
        Initialization("random")
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number above 0"):
            Initialization(scale=scale)
    for text in ("identity", "identity=0", "svd=3", "norm", "identity=x"):
        with pytest.raises(ValueError, match="--match_norm_of"):
            parse_norm_reference(text)
    with pytest.raises(ValueError, match="No query, key or value projection"):
        initialize_projections(torch.nn.Linear(2, 2), Initialization(scale=2.0))


def test_layer_norms_are_taken_out_and_the_model_refuses_to_be_saved(tmp_path):
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES))
    assert remove_layer_norms(model) == 5
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    condition(model, SpectralConfig(lambda_=1.0))
    assert model(pixel_values=torch.randn(1, 3, 8, 8)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="no layer norm any more"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--no_layer_norm: .* has no torch\.nn\.LayerNorm"):
        remove_layer_norms(model)
