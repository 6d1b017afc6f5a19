"""Which adapters are right on a conditioned projection, which are refused, and what PEFT is told about our models."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from models import ARCHITECTURES, each_architecture, each_method, outputs_of, relative_difference

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold, refresh
from hf_specattn import peft as adapters
from hf_specattn.layers import spectral_layers
from hf_specattn.refreshing import steps_since_refresh

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, MontecloraConfig  # noqa: E402
from peft.tuners.lora.corda import preprocess_corda  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.utils import constants  # noqa: E402

# The oldest supported transformers has other code below PEFT, too.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"),
]

BERT = ARCHITECTURES["bert"]
QUERY = "encoder.layer.0.attention.self.query"
SETTINGS = {"identity": SpectralConfig("identity", 1.0), "svd": SpectralConfig("svd")}

# PeftType -> settings that fit a projection of 32 x 32.
METHODS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 100},
    "ADAMSS": {},
    "BEFT": {},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 50},
    "FROD": {"progressbar": False},
    "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 1},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHADOW": {},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 50},
}
# They put nothing on a projection: new tokens' embeddings, and LoRA adapters of its own that are loaded as LoRA.
WITHOUT_PROJECTIONS = {"TRAINABLE_TOKENS", "XLORA"}
REFUSED = sorted(METHODS.keys() - set(adapters.ADDITIVE_METHODS))
LORA_VARIANTS = {
    "alora_invocation_tokens": [BERT.batch()["input_ids"][0, 3].item()],
    "kasa_config": KasaConfig(),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["query"], target_modules_bd_b=["value"], nblocks=2),
    "velora_config": {},
}
UNMERGEABLE = {"LILY", "POLY", "alora_invocation_tokens"}


def conditioned(method, dtype=torch.float64, auto_name="AutoModel", tiny=BERT):
    model = tiny.model(auto_name, dtype)
    condition(model, SETTINGS[method])
    return model


def put_on(model, method, targets=("query", "value"), **settings):
    torch.manual_seed(0)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](
        target_modules=list(targets), **copy.deepcopy({**METHODS[method], **settings})
    )
    dtype = next(model.parameters()).dtype
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype).eval()


def shake(model, std=0.1):
    """Move what is trained away from its initial values, at which most adapters do nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return model


def outputs(model, method=None):
    torch.manual_seed(2)  # some methods draw numbers when they compute
    dtype = next(model.parameters()).dtype
    if (
        method == "POLY"
    ):  # its router wants to know the task, and a PeftModel without a task type does not pass that on
        return outputs_of(model.base_model, BERT.batch(dtype=dtype) | {"task_ids": torch.tensor([0, 1])})
    return outputs_of(model, BERT.batch(dtype=dtype))


def disagreements(model, base, method, tolerance):
    """Where an adapted model contradicts itself, its base or its folded copy; the base has the outputs `base`."""
    expected = outputs(model, method)
    assert relative_difference(expected, base) > 1e-4  # it does something
    found = {}

    def compare(name, adapted, reference=expected):
        difference = relative_difference(outputs(adapted, method), reference)
        if not difference < tolerance:
            found[name] = difference

    with model.disable_adapter():
        compare("disabled", model, base)
    compare("folded", fold(copy.deepcopy(model)))
    if method in UNMERGEABLE:
        return found
    merged = copy.deepcopy(model).merge_and_unload()
    compare("merged", merged)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    if method != "OSF":  # which cannot be unmerged
        model.merge_adapter()
        compare("merged in place", model)
        model.unmerge_adapter()
        compare("unmerged", model)
        compare("unloaded", model.unload(), base)
    return found


def test_every_method_of_peft_is_in_the_table():
    on_projections = {
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner)
    }
    assert METHODS.keys() == on_projections - WITHOUT_PROJECTIONS
    assert set(adapters.ADDITIVE_METHODS) <= METHODS.keys()


@each_method
@pytest.mark.parametrize("method_of_peft", adapters.ADDITIVE_METHODS)
def test_additive_methods_are_right(method, method_of_peft):
    dtype, tolerance = (torch.float64, 1e-7) if method_of_peft != "PSOFT" else (torch.float32, 1e-5)
    model = conditioned(method, dtype)
    base = outputs(model)
    model = shake(put_on(model, method_of_peft))
    assert len({module for module in model.modules() if isinstance(module, BaseTunerLayer)}) >= 4
    assert disagreements(model, base, method_of_peft, tolerance) == {}


@each_method
@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_additive_variants_of_lora_are_right(method, variant):
    causal = {"task_type": "CAUSAL_LM"} if variant == "alora_invocation_tokens" else {}
    model = conditioned(method, auto_name="AutoModelForCausalLM" if causal else "AutoModel")
    model = shake(put_on(model, "LORA", **{variant: LORA_VARIANTS[variant]}, **causal))
    with model.disable_adapter():  # KaSA cuts small singular values off W, of a stock model too
        base = outputs(model)
    assert disagreements(model, base, variant, 1e-7) == {}


@each_method
def test_arrow_is_right(method, tmp_path):
    paths = [str(tmp_path / str(number)) for number in range(2)]
    for path in paths:
        put_on(BERT.model(), "LORA", ["query"], init_lora_weights=False).save_pretrained(path)
    found = []
    for prepare in (lambda model: model, fold):
        torch.manual_seed(0)
        model = peft.create_arrow_model(prepare(conditioned(method)), paths, peft.ArrowConfig(top_k=2))
        found.append(outputs(model.double().eval()))
    assert relative_difference(found[0], outputs(conditioned(method))) > 1e-2
    assert relative_difference(*found) < 1e-10


INITIALIZATIONS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "mica", "eva", "orthogonal", "lora_ga"]


@each_method
@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_initializations_of_lora_are_right(method, init):
    model = conditioned(method, torch.float32)
    base = outputs(model)
    model = put_on(model, "LORA", init_lora_weights=init)
    if init is not False:  # which is random on purpose
        assert relative_difference(outputs(model), base) < 1e-5
    model = shake(model)
    with model.disable_adapter():  # PiSSA and its kind move a part of W into the adapter
        rest = outputs(model)
    assert disagreements(model, rest, "LORA", 1e-5) == {}


@each_method
def test_loftq_is_right(method, monkeypatch):
    def rounding(weight, num_bits, reduced_rank, num_iter):  # in the place of the quantizers, which need a GPU
        rounded = weight.mul(8).round().div(8)
        left, sigma, right = torch.linalg.svd(weight - rounded)
        rank = slice(reduced_rank)
        return rounded, sigma[rank, None] * right[rank], left[:, rank]

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounding)
    model = conditioned(method)
    base = outputs(model)
    settings = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=8)}
    assert (
        relative_difference(outputs(put_on(copy.deepcopy(model), "LORA", r=32, lora_alpha=32, **settings)), base)
        < 1e-9
    )
    model = shake(put_on(model, "LORA", **settings))
    with model.disable_adapter():
        rest = outputs(model)
    assert relative_difference(rest, base) > 1e-3
    assert disagreements(model, rest, "LORA", 1e-7) == {}


@each_method
def test_data_driven_initializations_are_right(method):
    batch = BERT.batch(dtype=torch.float32)
    model = conditioned(method, torch.float32)
    base = outputs(model)
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value"], init_lora_weights="corda", corda_config=CordaConfig()
    )
    preprocess_corda(model, config, run_model=lambda: model(input_ids=batch["input_ids"][:1]))
    model = peft.get_peft_model(model, config).eval()
    assert relative_difference(outputs(model), base) < 1e-4
    shake(model)
    with model.disable_adapter():
        rest = outputs(model)
    assert disagreements(model, rest, "LORA", 1e-5) == {}

    model = put_on(conditioned(method, torch.float32), "LORA", init_lora_weights="eva")
    peft.initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    assert relative_difference(outputs(model), base) < 1e-5
    assert disagreements(shake(model), base, "LORA", 1e-5) == {}


@each_method
def test_target_parameters_are_right(method):
    model = conditioned(method)
    base = outputs(model)
    model = shake(put_on(model, "LORA", [], target_parameters=["query.weight", "value.weight"]))
    assert disagreements(model, base, "LORA", 1e-7) == {}


# --- refusals --------------------------------------------------------------------------------------------------------

READERS = [pytest.param(name, {}, id=name) for name in REFUSED] + [
    pytest.param("LORA", {"use_dora": True}, id="DoRA"),
    pytest.param("MISS", {"init_weights": "bat"}, id="MiSS-bat"),
]


@each_method
@pytest.mark.parametrize(("method_of_peft", "settings"), READERS)
def test_methods_that_read_the_weight_are_refused_and_right_when_folded(method, method_of_peft, settings):
    model = conditioned(method, torch.float32)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"conditioned projection encoder\.layer\.0.*hf_specattn\.fold\(model\)"):
        put_on(model, method_of_peft, **settings)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert relative_difference(outputs(model), before) == 0

    fold(model)
    if method_of_peft == "SHADOW":  # replaces whole models, not projections
        return
    adapted = put_on(model, method_of_peft, **settings)
    expected = outputs(shake(adapted))
    assert relative_difference(expected, before) > 1e-4
    assert relative_difference(outputs(adapted.merge_and_unload()), expected) < 1e-5


# Of the others SHADOW replaces whole models, and GLORA refuses subclasses of Linear itself.
PUT_ON_PROJECTIONS = [reader for reader in READERS if reader.values[0] not in ("SHADOW", "GLORA")]


@each_method
@pytest.mark.parametrize(("method_of_peft", "settings"), PUT_ON_PROJECTIONS)
def test_what_is_refused_would_be_wrong(method, method_of_peft, settings, monkeypatch):
    monkeypatch.setattr(adapters, "_weight_reader", lambda config: None)
    model = conditioned(method, torch.float32)
    base = outputs(model)
    model = shake(put_on(model, method_of_peft, **settings))
    found = disagreements(model, base, method_of_peft, 1e-5)
    assert max(found.values()) > 1e-2


def test_messages_name_the_way_out():
    with pytest.raises(ValueError, match=r"use_dora=True.*Set use_dora=False"):
        put_on(conditioned("svd"), "LORA", use_dora=True)
    with pytest.raises(ValueError, match=r"PEFT's IA3.*Use a method with an additive update \(.*LORA"):
        put_on(conditioned("svd"), "IA3")
    with pytest.raises(ValueError, match=r"init_weights='bat'.*Set init_weights=True"):
        put_on(conditioned("svd"), "MISS", init_weights="bat")


def test_unknown_methods_and_variants_are_refused(monkeypatch):
    monkeypatch.setattr(adapters, "ADDITIVE_METHODS", ("ADALORA",))
    with pytest.raises(ValueError, match="PEFT's LORA is not possible"):
        put_on(conditioned("identity"), "LORA")
    monkeypatch.setattr(adapters, "ADDITIVE_METHODS", ("LORA",))
    monkeypatch.setattr(adapters, "ADDITIVE_LORA_VARIANTS", ())
    with pytest.raises(ValueError, match=r"velora_config=.*Set velora_config=None"):
        put_on(conditioned("identity"), "LORA", velora_config={})


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (["intermediate.dense"], False),
        (["intermediate.dense", "key"], True),
        (r".*layer\.1\.attention\.self\.query", True),
        (r".*layer\.1\.intermediate\.dense", False),
        ("all-linear", True),
        (None, True),
    ],
    ids=str,
)
def test_refused_only_where_a_conditioned_projection_is_meant(targets, refused):
    model = conditioned("svd")
    base = outputs(model)
    config = peft.LoraConfig(use_dora=True, target_modules=targets)
    if refused:
        with pytest.raises(ValueError, match=r"use_dora=True.*attention\.self\."):
            peft.get_peft_model(model, config)
        assert relative_difference(outputs(model), base) == 0
    else:
        model = shake(peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval())
        expected = outputs(model)
        assert relative_difference(expected, base) > 1e-3
        assert relative_difference(outputs(model.merge_and_unload()), expected) < 1e-10


def test_partly_conditioned_models_take_dora_on_the_rest():
    model = BERT.model()
    condition(model, SpectralConfig("svd", targets=("query", "key")))
    assert len(put_on(copy.deepcopy(model), "LORA", ["value"], use_dora=True).targeted_module_names) == 2
    with pytest.raises(ValueError, match=r"self\.query"):
        put_on(model, "LORA", ["value", "query"], use_dora=True)
    excluding = peft.LoraConfig(target_modules=["value", "query"], exclude_modules=["query"], use_dora=True)
    assert len(peft.get_peft_model(model, excluding).targeted_module_names) == 2


def test_refused_in_every_way_to_put_an_adapter_on(tmp_path):
    dora = {"target_modules": ["query"], "use_dora": True}
    peft.get_peft_model(BERT.model(), peft.LoraConfig(**dora)).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="use_dora=True"):
        peft.PeftModel.from_pretrained(conditioned("svd"), tmp_path)
    model = put_on(conditioned("svd"), "LORA")
    with pytest.raises(ValueError, match=rf"use_dora=True.*{QUERY.replace('.', '[.]')}:"):
        model.add_adapter("second", peft.LoraConfig(**dora))
    with pytest.raises(ValueError, match="use_dora=True"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="PEFT's OFT"):
        peft.get_peft_model(conditioned("svd"), peft.OFTConfig(target_modules=["query"]), mixed=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        conditioned("svd").add_adapter(peft.LoraConfig(**dora))
    with pytest.raises(ValueError, match="use_dora=True"):
        conditioned("svd").load_adapter(tmp_path)
    state = {f"{QUERY}.lora_A.weight": torch.zeros(8, 32)}
    with pytest.raises(ValueError, match="use_dora=True"):
        peft.inject_adapter_in_model(peft.LoraConfig(**dora), conditioned("svd"), state_dict=state)


def test_stock_models_take_everything():
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        model = BERT.model(dtype=torch.float32)
        put_on(model, "LORA", **settings)
    put_on(BERT.model(), "IA3")


# --- condition, fold and refresh on adapted models -------------------------------------------------------------------


def with_prompt(model):
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_integrated_adapter(model):
    model.add_adapter(peft.LoraConfig(target_modules=["intermediate.dense"]))
    return model


@pytest.mark.parametrize(
    ("adapted", "where"),
    [
        (lambda: put_on(BERT.model(), "LORA"), "The model"),
        (lambda: put_on(BERT.model(), "LORA").get_base_model(), r"query"),
        (lambda: put_on(BERT.model(), "IA3", ["output.dense"]).get_base_model(), r"output\.dense"),
        (lambda: with_integrated_adapter(BERT.model()), r"intermediate\.dense"),
        (lambda: with_prompt(ARCHITECTURES["gpt2"].model("AutoModelForCausalLM")), "The model"),
    ],
    ids=["PeftModel", "below PeftModel", "elsewhere in the model", "add_adapter", "prompt learning"],
)
def test_adapted_models_are_not_conditioned(adapted, where):
    model = adapted()
    with pytest.raises(ValueError, match=rf"{where}.*merge_and_unload\(\).*unload\(\)"):
        condition(model, SETTINGS["svd"])
    assert next(spectral_layers(model), None) is None


def test_merged_and_unloaded_models_are_conditioned():
    for take_off in ("merge_and_unload", "unload"):
        model = getattr(put_on(BERT.model(), "LORA"), take_off)()
        assert len(condition(model, SETTINGS["svd"])) == 6


@each_method
def test_folding_keeps_adapters_that_work_on(method):
    model = shake(put_on(conditioned(method), "LORA"))
    expected = outputs(model)
    assert fold(model) is model
    assert type(model.get_base_model()).__name__ == "BertModel"
    assert next(spectral_layers(model), None) is None
    assert relative_difference(outputs(model), expected) == 0
    model.merge_adapter()
    assert relative_difference(outputs(model), expected) < 1e-10
    assert type(model.unload()).__name__ == "BertModel"


def dynamic(**changes):
    model = BERT.model(**changes)
    condition(model, SpectralConfig("svd", refresh_every=3))
    return model


@pytest.mark.parametrize("init", [True, "pissa"])
def test_refreshing_leaves_adapted_projections_alone(init):
    model = shake(put_on(dynamic(dtype=torch.float32), "LORA", init_lora_weights=init))
    before = {name: layer.correction.clone() for name, layer in spectral_layers(model)}
    expected = outputs(model)
    refresh(model)
    assert relative_difference(outputs(model), expected) == 0
    model.merge_adapter()
    refresh(model)
    assert relative_difference(outputs(model), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_difference(outputs(model), expected) < 1e-5
    for name, layer in spectral_layers(model):
        assert torch.equal(layer.correction, before[name])

    # For good in the weights, a merged update is refreshed with them.
    merged = model.merge_and_unload()
    refresh(merged)
    for _, layer in spectral_layers(merged):
        assert torch.linalg.cond(layer.effective_weight()) <= 2 + 1e-4
    assert relative_difference(outputs(merged), expected) > 1e-3


def test_refreshing_goes_on_for_projections_that_train_whole():
    model = put_on(dynamic(), "LORA", ["query"], modules_to_save=["key"])
    trained = [
        layer
        for name, layer in spectral_layers(model)
        if layer.weight.requires_grad and name.endswith("key.modules_to_save.default")
    ]
    assert len(trained) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(3):
        outputs = model.train()(**BERT.batch())
        outputs.last_hidden_state.square().sum().backward()
        optimizer.step()
    assert steps_since_refresh(model) == 3
    before = [layer.correction.clone() for layer in trained]
    refresh(model)
    assert steps_since_refresh(model) == 0
    for layer, correction in zip(trained, before):
        assert not torch.equal(layer.correction, correction)
        assert torch.linalg.cond(layer.effective_weight()) <= 2 + 1e-9


# --- default target modules ------------------------------------------------------------------------------------------

MAPPINGS = {
    name: mapping
    for name, mapping in vars(constants).items()
    if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict)
}


@each_method
def test_adapters_by_sample(method):
    model = put_on(conditioned(method), "LORA", targets=("query",))
    shake(model)
    batch = BERT.batch()
    with torch.no_grad():
        adapted = model(**batch)[0]
        with model.disable_adapter():
            plain = model(**batch)[0]
    mixed = model(**batch, adapter_names=["default", "__base__"])[0]  # with gradients, as in training
    torch.testing.assert_close(mixed[0], adapted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=1e-12)
    assert (adapted - plain).abs().max() > 1e-3


def adapted_projections(model, **settings):
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    names = {name.rpartition(".")[2] for name in model.targeted_module_names}
    return names, len(model.targeted_module_names)


@each_architecture
def test_lora_without_target_modules(tiny):
    model = tiny.model()
    condition(model, SETTINGS["svd"])
    names, count = adapted_projections(model)
    if tiny.fused:
        assert (names, count) == ({"c_attn"}, 2)
    else:
        assert {name[0] for name in names} == {"q", "v"}
        assert count == 4
    if tiny.model_type != "vit":  # PEFT has no default for a stock one
        assert adapted_projections(tiny.model()) == (names, count)


@each_method
@each_architecture
def test_default_lora_is_right(tiny, method):
    model = tiny.model()
    condition(model, SETTINGS[method])
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False), autocast_adapter_dtype=False).double()
    expected = outputs_of(model.eval(), tiny.batch())
    folded = outputs_of(fold(copy.deepcopy(model)), tiny.batch())
    assert relative_difference(folded, expected) == 0
    assert relative_difference(outputs_of(model.merge_and_unload(), tiny.batch()), expected) < 1e-6


@pytest.mark.parametrize("name", MAPPINGS)
def test_conditioned_types_have_the_entries_of_their_stock_type(name):
    mapping = MAPPINGS[name]
    for stock_type in ARCHITECTURES:
        if stock_type in mapping:
            assert mapping[f"specattn_{stock_type}"] == mapping[stock_type]
    if mapping.get("bert") == ["query", "value"]:
        assert mapping["crammed_bert"] == mapping["specattn_crammed_bert"] == ["query", "value"]
        if "vit" not in mapping:
            # The names of either release of transformers.
            assert set(mapping["specattn_vit"]) == {"q_proj", "v_proj", "query", "value"}


def test_methods_without_entries_for_a_type_still_ask_for_target_modules():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(conditioned("svd", tiny=ARCHITECTURES["crammed_bert"]), peft.LNTuningConfig())


@each_method
def test_adaption_prompt_on_llama(method):
    tiny = ARCHITECTURES["llama"]
    found = []
    for prepare in (lambda model: model, fold):
        torch.manual_seed(0)
        model = prepare(conditioned(method, torch.float32, "AutoModelForCausalLM", tiny))
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
        model = shake(peft.get_peft_model(model, config).eval(), std=0.5)
        found.append(outputs_of(model, tiny.batch(dtype=torch.float32)))
    base = outputs_of(
        conditioned(method, torch.float32, "AutoModelForCausalLM", tiny), tiny.batch(dtype=torch.float32)
    )
    assert relative_difference(found[0], base) > 1e-3
    assert relative_difference(*found) < 1e-5


# --- registration ----------------------------------------------------------------------------------------------------


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# transformers imports PEFT where it finds it; these processes tell it that there is none.
HIDE_PEFT = """
import sys
import transformers.utils
import transformers.utils.import_utils
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_peft_available = lambda *args: False
import hf_specattn
assert "peft" not in sys.modules
"""


@pytest.mark.slow
def test_peft_is_prepared_when_it_is_imported_after_the_package():
    run_python(
        HIDE_PEFT
        + """
import importlib.util
finders = list(sys.meta_path)
hf_specattn.peft.register()  # again, for nothing
assert sys.meta_path == finders
assert importlib.util.find_spec("peft") is not None  # a look is no import
assert importlib.util.find_spec("nothing_like_it") is None
assert "peft" not in sys.modules and sys.meta_path == finders

import peft
assert len(sys.meta_path) == len(finders) - 1
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import constants
assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["specattn_bert"] == ["query", "value"]
prepared = BaseTuner.inject_adapter
assert prepared.__wrapped__
hf_specattn.peft.register()
assert BaseTuner.inject_adapter is prepared
assert peft.auto.get_default_import_allowlist().count("hf_specattn") == 1
"""
    )


@pytest.mark.slow
def test_the_package_works_without_peft():
    run_python(
        """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: (
    None if name.partition(".")[0] == "peft" else find_spec(name, path, target)
))
import transformers
import hf_specattn
try:
    import peft
except ModuleNotFoundError as error:
    assert error.name == "peft"
else:
    raise AssertionError("peft is there")
model = transformers.BertModel(transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                       intermediate_size=32, vocab_size=32))
config = hf_specattn.SpectralConfig("svd", refresh_every=2)
hf_specattn.condition(model, config)
hf_specattn.refresh(model)
hf_specattn.fold(model)
assert "peft" not in sys.modules
"""
    )


def test_blocking_peft_is_as_good_as_not_having_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    adapters.register()
    model = BERT.model()
    assert len(condition(model, SpectralConfig("svd", refresh_every=2))) == 6
    refresh(model)


# --- what the adapter's configuration names --------------------------------------------------------------------------


def saved_config(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


WARNING = "was not loaded from a conditioned checkpoint"


def test_models_conditioned_in_memory_have_no_origin(stock_checkpoint, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertModel

    path = str(stock_checkpoint(BERT, "AutoModelForMaskedLM"))
    flags = {"spectral_conditioning": True, "spectral_method": "svd"}
    model = BertModel.from_pretrained(path)
    assert model.name_or_path == path
    condition(model, SETTINGS["svd"])
    assert model.name_or_path == ""
    assert fold(model).name_or_path == ""

    masked = AutoModelForMaskedLM.from_pretrained(path, **flags)
    assert masked.name_or_path == masked.bert.name_or_path == ""
    assert AutoModelForMaskedLM.from_config(masked.config).name_or_path == ""
    assert AutoModel.from_config(AutoConfig.from_pretrained(path, **flags)).name_or_path == ""

    masked.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.name_or_path == loaded.bert.name_or_path == str(tmp_path)
    assert fold(loaded).name_or_path == ""


def test_unknown_architectures_have_no_origin_either(stock_checkpoint):
    from transformers import BertModel

    model = BertModel.from_pretrained(stock_checkpoint(BERT))
    spec = AttentionSpec("BertSelfAttention", {"query": "query"})
    condition(model, SpectralConfig("svd", targets=("query",)), architecture=spec)
    assert model.name_or_path == ""


def test_the_adapter_names_a_conditioned_checkpoint_or_none(stock_checkpoint, tmp_path, warning_log):
    from transformers import AutoModel

    flags = {"spectral_conditioning": True, "spectral_method": "svd", "spectral_init": "preserve"}
    model = AutoModel.from_pretrained(stock_checkpoint(BERT), **flags)
    model.save_pretrained(tmp_path / "base")
    for save in (put_on, lambda model, method: with_prefix(model)):
        config = saved_config(save(model, "LORA"), tmp_path / "nameless")
        assert config["base_model_name_or_path"] is None
        model = AutoModel.from_pretrained(stock_checkpoint(BERT), **flags)
    assert sum(WARNING in message for message in warning_log.messages) == 1
    with pytest.raises((OSError, ValueError)):  # and not a plain model
        peft.AutoPeftModel.from_pretrained(tmp_path / "nameless")

    warning_log.messages.clear()
    base = AutoModel.from_pretrained(tmp_path / "base")
    config = saved_config(put_on(base, "LORA"), tmp_path / "named")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    # Loading for inference, too, is nothing to warn of.
    peft.PeftModel.from_pretrained(model, tmp_path / "named")
    assert not any(WARNING in message for message in warning_log.messages)


def with_prefix(model):
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
