"""LoRA on conditioned projections: the effective weight is W + C + B A."""

import copy
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    VOCABULARY,
    add_correction,
    assert_bit_equal,
    each_method,
    outputs_of,
    relative_difference,
)
from models import PROJECTIONS as ALL
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from hf_specattn import SpectralCallback, SpectralConfig, condition, fold
from hf_specattn.layers import spectral_layers

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
pytestmark = pytest.mark.integration

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "crammed_bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}
each_text_model = pytest.mark.parametrize("tiny", [ARCHITECTURES[name] for name in TARGETS], ids=str)


def adapted(tiny, method):
    """A conditioned model with LoRA adapters whose product is not zero, as at initialization, but random."""
    model = tiny.model()
    condition(model, SpectralConfig(method))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=TARGETS[tiny.model_type], fan_in_fan_out=tiny.fused, lora_dropout=0.0
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def with_adapters_by_numpy(tiny, method, model):
    """The stock model with W + C + (alpha / r) B A."""
    expected = add_correction(tiny, tiny.model(), CORRECTIONS[method])
    factors = {name: value.detach().numpy() for name, value in model.named_parameters() if "lora_" in name}
    changed = 0
    for name, weight in expected.state_dict().items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.default.weight" in factors:
            product = factors[f"{prefix}.lora_B.default.weight"] @ factors[f"{prefix}.lora_A.default.weight"]
            matrix = weight.numpy()
            matrix += 2.0 * (product.T if tiny.fused else product)
            changed += 1
    assert changed == len(factors) // 2 > 0
    return expected


@each_text_model
@each_method
def test_effective_weight(tiny, method):
    model = adapted(tiny, method)
    expected = outputs_of(with_adapters_by_numpy(tiny, method, model), tiny.batch())
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10

    # merged, unmerged, and merged for good
    model.merge_adapter()
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
    model.unmerge_adapter()
    assert relative_difference(outputs_of(model, tiny.batch()), expected) < 1e-10
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_difference(outputs_of(merged, tiny.batch()), expected) < 1e-10
    assert len(list(spectral_layers(merged))) == (2 if tiny.fused else 6)

    # and without the adapter the conditioned model is what it was
    with model.disable_adapter():
        base = outputs_of(add_correction(tiny, tiny.model(), CORRECTIONS[method]), tiny.batch())
        assert relative_difference(outputs_of(model, tiny.batch()), base) < 1e-10


@each_text_model
@each_method
def test_gradients_reach_the_adapters_alone(tiny, method):
    model = adapted(tiny, method).train()
    outputs = model(**tiny.batch())
    outputs.last_hidden_state.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0


@each_method
def test_merged_weights_hold_the_adapters(method):
    tiny = ARCHITECTURES["bert"]
    model = adapted(tiny, method)
    expected = {name: matrix for name, _, matrix in tiny.projections(with_adapters_by_numpy(tiny, method, model))}
    merged = model.merge_and_unload()
    layers = dict(spectral_layers(merged))
    assert len(layers) == 2 * len(ALL)
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.effective_weight().detach().numpy(), expected[f"{name}.weight"], atol=1e-9)


@each_method
def test_half_precision_weights_take_the_update_alone(method):
    tiny = ARCHITECTURES["bert"]
    model = tiny.model(dtype=torch.bfloat16)
    condition(model, SpectralConfig(method))  # lambda 10: W + C in bfloat16 would round most of W's diagonal away
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    expected = {
        name: (
            layer.weight.float() + model.get_submodule(name[: -len(".base_layer")]).get_delta_weight("default")
        ).detach()
        for name, layer in spectral_layers(model)
        if name.endswith(".base_layer")
    }
    merged = dict(spectral_layers(model.merge_and_unload()))
    assert len(expected) == 4
    for name, value in expected.items():
        weight = merged[name.removeprefix("base_model.model.").removesuffix(".base_layer")].weight
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), value, rtol=2**-7, atol=0)


# --- saved and loaded ------------------------------------------------------------------------------------------------


def conditioned_base(tiny, method, stock_checkpoint, folder, auto_class=AutoModelForSequenceClassification):
    """A conditioned checkpoint made from a stock one that has no classification head."""
    model = auto_class.from_pretrained(
        stock_checkpoint(tiny), spectral_conditioning=True, spectral_method=method, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return auto_class.from_pretrained(folder).eval()


def shaken(model):
    """Every trained parameter moved away from where it starts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


IN_A_NEW_PROCESS = """
import sys
import peft
import torch
from transformers import AutoModel

cases = [torch.load(path, weights_only=True) for path in sys.argv[1:]]
for case in cases:
    try:
        getattr(peft, case["auto_class"]).from_pretrained(case["adapter"])
    except ValueError as error:  # without the package nothing is rebuilt, instead of a plain model
        assert "hf_specattn" in str(error) or "specattn_" in str(error), error
    else:
        raise AssertionError("a conditioned model without the package")

import hf_specattn  # after peft
from hf_specattn.layers import spectral_layers

for case in cases:
    model = getattr(peft, case["auto_class"]).from_pretrained(case["adapter"])
    assert type(model.get_base_model()).__name__ == case["class"], type(model.get_base_model())
    assert len(list(spectral_layers(model))) == 6
    with torch.no_grad():
        outputs = model(**case["batch"])
    for name, value in case["outputs"].items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=1e-6)
print(len(cases), "rebuilt")
"""


@pytest.mark.slow
def test_auto_peft_model_rebuilds_the_conditioned_base_in_a_new_process(stock_checkpoint, tmp_path):
    cases = []
    for method in CORRECTIONS:
        for task, model_type, auto_class in (
            (None, "crammed_bert", AutoModel),
            ("SEQ_CLS", "bert", AutoModelForSequenceClassification),
        ):
            tiny, folder = ARCHITECTURES[model_type], tmp_path / f"{method}-{model_type}"
            base = conditioned_base(tiny, method, stock_checkpoint, folder / "base", auto_class)
            class_name = type(base).__name__
            model = shaken(peft.get_peft_model(base, peft.LoraConfig(task_type=task)))
            model.save_pretrained(folder / "adapter")
            batch = tiny.batch(dtype=torch.float32)
            case = {
                "adapter": str(folder / "adapter"),
                "auto_class": "AutoPeftModelForSequenceClassification" if task else "AutoPeftModel",
                "class": class_name,
                "batch": batch,
                "outputs": outputs_of(model, batch),
            }
            cases.append(str(folder / "case.pt"))
            torch.save(case, cases[-1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("4 rebuilt\n")


@each_method
@pytest.mark.parametrize("init", [True, "pissa"])
def test_adapters_reload(init, method, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["bert"]
    batch = tiny.batch(dtype=torch.float32)
    base = conditioned_base(tiny, method, stock_checkpoint, tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = shaken(peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=init)))
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs_of(model, batch)

    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert relative_difference(outputs_of(again, batch), expected) < 1e-5
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert relative_difference(outputs_of(again, batch), expected) < 1e-5

    if init is True:  # PiSSA changes the base
        unloaded = again.unload()
        assert type(unloaded).__name__ == "SpecBertForSequenceClassification"
        del before["classifier.weight"], before["classifier.bias"]
        found = unloaded.state_dict()
        assert_bit_equal({name: found[name] for name in before}, before)


@each_method
def test_projections_in_modules_to_save(method, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["bert"]
    base = conditioned_base(tiny, method, stock_checkpoint, tmp_path / "base", AutoModel)
    batch = tiny.batch(dtype=torch.float32)
    unadapted = outputs_of(base, batch)
    model = shaken(peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], modules_to_save=["key"])))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(".key.modules_to_save." in name for name in trained) == 4  # weight and bias
    expected = outputs_of(model, batch)
    with model.disable_adapter():
        assert relative_difference(outputs_of(model, batch), unadapted) == 0
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert relative_difference(outputs_of(again, batch), expected) < 1e-5
    merged = model.merge_and_unload()
    assert len(list(spectral_layers(merged))) == 6
    assert relative_difference(outputs_of(merged, batch), expected) < 1e-5
    assert relative_difference(outputs_of(fold(merged), batch), expected) < 1e-5


@each_method
def test_the_whole_head_of_crammed_bert_is_saved(method, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["crammed_bert"]
    base = AutoModel.from_pretrained(stock_checkpoint(tiny), spectral_conditioning=True, spectral_method=method)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").float()  # the head is drawn here
    model = shaken(peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in trained if "lora_" not in name} == {
        f"{layer}.modules_to_save.default.{kind}" for layer in ("dense", "classifier") for kind in ("weight", "bias")
    }
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(9)
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").float()
    batch = tiny.batch(dtype=torch.float32)
    assert relative_difference(outputs_of(again, batch), outputs_of(model, batch)) < 1e-5
    assert again.peft_config["default"].modules_to_save.count("dense") == 1


@each_method
def test_adapters_put_on_by_transformers(method, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["bert"]
    batch = tiny.batch(dtype=torch.float32)
    model = conditioned_base(tiny, method, stock_checkpoint, tmp_path / "base", AutoModel)
    model.add_adapter(peft.LoraConfig())
    shaken(model)
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "adapter")
    assert type(again).__name__ == "SpecBertModel"
    assert relative_difference(outputs_of(again, batch), expected) < 1e-5
    model.disable_adapters()
    assert relative_difference(outputs_of(model, batch), expected) > 1e-3


@each_method
def test_several_adapters(method):
    tiny = ARCHITECTURES["bert"]
    model = tiny.model()
    condition(model, SpectralConfig(method))
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    model = peft.get_peft_model(model, config, "first", autocast_adapter_dtype=False)
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    model = model.double().eval()
    found = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        found[name] = outputs_of(model, tiny.batch())
    assert relative_difference(found["first"], found["second"]) > 1e-3
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    both = outputs_of(model, tiny.batch())
    model.merge_adapter(["first", "second"])
    assert relative_difference(outputs_of(model, tiny.batch()), both) < 1e-10
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("first")
    assert relative_difference(outputs_of(model, tiny.batch()), found["first"]) < 1e-10


# --- trained ---------------------------------------------------------------------------------------------------------


class FirstTokens(torch.utils.data.Dataset):
    """Whether the first token is in the upper half of the vocabulary."""

    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(5, VOCABULARY, (size, 6), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": (self.tokens[index, 0] > VOCABULARY // 2).long()}


def trainer(model, folder, steps, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(**settings | changes)
    return Trainer(model=model, args=arguments, train_dataset=FirstTokens(), callbacks=[SpectralCallback()])


@pytest.mark.parametrize("settings", [{"lambda_": 0.5}, {"spectral_method": "svd"}, {"spectral_method": "svd",
                                      "spectral_refresh_every": 2}], ids=["identity", "svd", "dynamic"])  # fmt: skip
def test_trainer_trains_adapters_alone_and_resumes(settings, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["bert"]
    model = AutoModelForSequenceClassification.from_pretrained(
        stock_checkpoint(tiny), spectral_conditioning=True, dtype=torch.float32, **settings
    )
    model.save_pretrained(tmp_path / "base")

    def adapted():
        torch.manual_seed(5)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        return peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS"))

    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(model, tmp_path / "run", 40, save_strategy="steps", save_steps=20)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    for name, value in model.state_dict().items():
        trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(value, before[name]) is not trained, name

    checkpoint = tmp_path / "run" / "checkpoint-20"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trainer(adapted(), tmp_path / "resumed", 40)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_bit_equal(resumed.model.state_dict(), model.state_dict())

    last = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-40")
    batch = tiny.batch()
    assert relative_difference(outputs_of(last, batch), outputs_of(model.eval(), batch)) < 1e-5


# --- a pretrained model ----------------------------------------------------------------------------------------------

SENTENCES = ["The cat sat on the mat.", "Spectral conditioning adds a correction to every projection.", "Short."]


@each_method
def test_minilm_merged_folded_and_saved_is_a_plain_bert(method, minilm_path, tmp_path):
    batch = AutoTokenizer.from_pretrained(minilm_path)(SENTENCES, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm_path, spectral_conditioning=True, spectral_method=method, spectral_init="preserve", num_labels=3
    )
    stock = BertModel.from_pretrained(minilm_path)
    model = shaken(peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4)))
    expected = outputs_of(model, batch)

    merged = model.merge_and_unload()
    assert type(merged).__name__ == "SpecBertForSequenceClassification"
    assert relative_difference(outputs_of(merged, batch), expected) < 1e-4
    fold(merged).save_pretrained(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is BertForSequenceClassification
    assert relative_difference(outputs_of(plain, batch), expected) < 1e-4

    # It is the adapted MiniLM: preserve kept the function, so the weights are W + B A.
    moved = {
        name: (plain.get_parameter(f"bert.{name}") - stock.get_parameter(name)).norm()
        / stock.get_parameter(name).norm()
        for name, _ in stock.named_parameters()
        if ".self." in name and name.endswith("weight")
    }
    for name, change in moved.items():
        assert (change > 1e-2) if "key" not in name else (change < 1e-5), name


def test_the_example_in_the_documentation(minilm_path, tmp_path, monkeypatch):
    text = (pathlib.Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert example.count('"bert-base-uncased"') == 1
    monkeypatch.chdir(tmp_path)
    batch = AutoTokenizer.from_pretrained(minilm_path)(SENTENCES, padding=True, return_tensors="pt")
    variables = {"train": shaken}
    exec(example.replace('"bert-base-uncased"', repr(str(minilm_path))), variables)
    plain = BertForSequenceClassification.from_pretrained("plain")
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained("adapter")
    expected = outputs_of(adapted, batch)
    assert relative_difference(outputs_of(plain, batch), expected) < 1e-4
    with adapted.disable_adapter():
        assert relative_difference(outputs_of(adapted, batch), expected) > 1e-3
