import pytest
import torch
from models import ARCHITECTURES, VOCABULARY

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition
from recipes.run.optimization import OptimizationArguments, build_adamw, parameter_groups


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


def bert(dtype=torch.float64):
    torch.manual_seed(0)
    return ARCHITECTURES["bert"].model(dtype=dtype)


def weights_of(model, *projections):
    ends = tuple(f"self.{name}.weight" for name in projections)
    ends += ("attention.output.dense.weight",) * ("output" in projections)
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


def groups_of(model, **controls):
    """Name of each parameter -> its decay and learning rate."""
    optimizer = build_adamw(model, OptimizationArguments(**controls), 1e-2, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    return found


def steps(model, optimizer, parameters=None, count=5):
    """Some steps on a loss of the outputs; `parameters` stand in for the model's weights of those names."""
    batch = ARCHITECTURES["bert"].batch(dtype=torch.float64)
    for _ in range(count):
        outputs = torch.func.functional_call(model, {} if parameters is None else parameters(), (), batch)
        optimizer.zero_grad()
        outputs.last_hidden_state.sin().sum().backward()
        optimizer.step()


def test_adamw_as_asked_for():
    optimizer = build_adamw(tiny_model(), OptimizationArguments(), 3e-3, 0.02, betas=(0.9, 0.98), eps=1e-12)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.9, 0.98), 1e-12)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]


def test_projections_without_decay():
    model = bert()
    plain, found = groups_of(model), groups_of(model, no_decay_on=["query", "output"])
    exempt = weights_of(model, "query", "output")
    assert len(exempt) == 4
    assert all(found[name] == ((0.0, 1e-2) if name in exempt else plain[name]) for name in found)


def test_projections_that_learn_faster():
    model = bert()
    plain, found = groups_of(model), groups_of(model, projection_learning_rate_factor=3.0)
    faster = weights_of(model, "query", "key", "value")
    assert all(found[name] == (plain[name][0], 3e-2 if name in faster else 1e-2) for name in found)


def test_decay_toward_the_start_equals_decay_of_the_change():
    """W = W0 + D with D decayed toward 0, by torch's AdamW on D itself, for the anchored weights; and no other."""
    model, other = bert(), bert()
    chosen = weights_of(model, "query", "value")
    anchored = build_adamw(model, OptimizationArguments(decay_toward_start_on=["query", "value"]), 1e-2, 0.5)
    start = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    changes = {name: torch.zeros_like(start[name], requires_grad=True) for name in chosen}
    rest = [parameter for name, parameter in other.named_parameters() if name not in chosen]
    matrices = [parameter for parameter in rest if parameter.ndim >= 2]
    vectors = [parameter for parameter in rest if parameter.ndim < 2]
    by_change = torch.optim.AdamW(
        [
            {"params": [*matrices, *changes.values()], "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    steps(model, anchored)
    steps(other, by_change, lambda: {name: start[name] + change for name, change in changes.items()})
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # no softmax depends on it: its gradient is rounding alone
            continue
        expected = start[name] + changes[name] if name in chosen else dict(other.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12)
    assert all((changes[name] != 0).any() for name in chosen)


def test_what_cannot_be_controlled_is_refused():
    fused = ARCHITECTURES["gpt2"].model()
    with pytest.raises(ValueError, match=r"c_attn holds query, key, value in one weight.*name all of its projections"):
        build_adamw(fused, OptimizationArguments(no_decay_on=["query"]))
    assert build_adamw(fused, OptimizationArguments(no_decay_on=["query", "key", "value"]))
    with pytest.raises(ValueError, match="both name key; a projection has one of the two"):
        OptimizationArguments(no_decay_on=["key", "value"], decay_toward_start_on=["key"]).check_optimization()
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            OptimizationArguments(projection_learning_rate_factor=factor).check_optimization()
    assert OptimizationArguments().optimization_settings() == {}
    chosen = OptimizationArguments(no_decay_on=["key"], projection_learning_rate_factor=2.0)
    assert chosen.optimization_settings() == {"no_decay_on": ["key"], "projection_learning_rate_factor": 2.0}
