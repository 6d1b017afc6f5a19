import torch
from models import ARCHITECTURES, VOCABULARY

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition
from recipes.run.optimization import build_adamw, parameter_groups


def tiny_model() -> CrammedBertForMaskedLM:
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config())
    condition(model, SpectralConfig(method="svd"))
    return model


def test_each_parameter_is_in_one_group_once_tied_weights_included():
    model = tiny_model()
    assert model.decoder.weight is model.get_input_embeddings().weight
    groups = parameter_groups(model, 0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_norms_biases_and_scalars_are_exempt_and_matrices_are_not():
    model = tiny_model()
    model.decoder.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    decayed, exempt = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in exempt["params"]:
        name = names[id(parameter)]
        assert "norm" in name or name.endswith(("bias", "position_scale")), name
    assert {names[id(parameter)].rsplit(".", 1)[1] for parameter in decayed["params"]} == {"weight"}
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    (group,) = parameter_groups(model, 0.01)
    assert group["weight_decay"] == 0.0


def test_adamw_has_the_published_settings():
    optimizer = build_adamw(tiny_model())
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.98), 1e-12)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
