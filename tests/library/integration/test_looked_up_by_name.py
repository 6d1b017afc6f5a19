"""What transformers and PEFT decide by the name of a class, the source of its module, or the path that a model came from."""

import json

import pytest
import torch
import transformers
from models import ARCHITECTURES, each_architecture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto

from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.modeling import AUTO_CLASSES, conditioned_models

pytestmark = pytest.mark.integration

CAUSAL = [name for name in ARCHITECTURES if "AutoModelForCausalLM" in conditioned_models(name)]


def rows(tiny):
    batch = tiny.batch()
    return [{"input_ids": row, "labels": row} for row in batch["input_ids"]]


def loss(model, tiny, folder, smoothing):
    arguments = TrainingArguments(
        output_dir=str(folder), label_smoothing_factor=smoothing, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return Trainer(model=model, args=arguments, eval_dataset=rows(tiny)).evaluate()["eval_loss"]


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("how", ["condition", "flag", "checkpoint"])
def test_label_smoothing_shifts_the_labels_of_causal_models(model_type, how, tmp_path):
    tiny = ARCHITECTURES[model_type]
    model = tiny.model("AutoModelForCausalLM", torch.float32)
    model.save_pretrained(tmp_path / "stock")
    if how == "condition":
        condition(model, SpectralConfig(lambda_=1.0))
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", spectral_conditioning=True, lambda_=1.0)
    if how == "checkpoint":
        model.save_pretrained(tmp_path / "conditioned")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "conditioned")
    conditioned = [loss(model, tiny, tmp_path, smoothing) for smoothing in (0.0, 0.1)]
    fold(model)
    stock = [loss(model, tiny, tmp_path, smoothing) for smoothing in (0.0, 0.1)]
    assert conditioned == pytest.approx(stock, abs=1e-5)


def test_label_smoothing_under_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    tiny = ARCHITECTURES["gpt2"]
    model = tiny.model("AutoModelForCausalLM", torch.float32)
    condition(model, SpectralConfig(lambda_=1.0))
    expected = loss(model, tiny, tmp_path, 0.1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert loss(adapted, tiny, tmp_path, 0.1) == pytest.approx(expected, abs=1e-5)


@each_architecture
def test_every_table_of_names_has_the_conditioned_classes(tiny):
    entered = 0
    for auto_name, classes in conditioned_models(tiny.model_type).items():
        table = getattr(modeling_auto, f"{AUTO_CLASSES[auto_name]}_NAMES")
        names = tuple(each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,)))
        assert table[f"specattn_{tiny.model_type}"] == (names if isinstance(classes, tuple) else names[0])
        # The tables of classes, which are made of those of names, still hold stock types only under stock configurations.
        mapping = getattr(transformers, AUTO_CLASSES[auto_name])
        assert not [
            key for key in mapping._model_mapping if key.startswith("specattn_") and key in mapping._config_mapping
        ]
        entered += 1
    assert entered


def test_a_model_card_of_the_trainer_has_the_task(tmp_path):
    tiny = ARCHITECTURES["bert"]
    model = tiny.model("AutoModelForSequenceClassification", torch.float32)
    condition(model, SpectralConfig(lambda_=1.0))
    assert any(
        type(model).__name__ in names.values() for task, names in TASK_MAPPING.items() if task == "text-classification"
    )


@each_architecture
def test_attention_implementations_can_be_set_where_stock_ones_can(tiny):
    for classes in conditioned_models(tiny.model_type).values():
        for each in classes if isinstance(classes, tuple) else (classes,):
            assert each._can_set_attn_implementation() == each.stock_class._can_set_attn_implementation()
            assert each._can_set_experts_implementation() == each.stock_class._can_set_experts_implementation()


def test_what_architectures_names_is_found_in_transformers(tmp_path):
    model = ARCHITECTURES["llama"].model("AutoModelForCausalLM")
    condition(model, SpectralConfig(lambda_=1.0))
    model.save_pretrained(tmp_path)
    (name,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert getattr(transformers, name) is type(model)


# --- PEFT: embeddings that were resized ------------------------------------------------------------------------------


EMBEDDINGS = "base_model.model.transformer.wte.weight"


def adapted_and_saved(model, folder, resize_to=None):
    peft = pytest.importorskip("peft")
    if resize_to is not None:
        model.resize_token_embeddings(resize_to)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    adapted.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("how", ["stock", "condition", "condition, resized before", "flag", "checkpoint", "folded"])
def test_resized_embeddings_are_saved_with_an_adapter(how, tmp_path):
    tiny = ARCHITECTURES["gpt2"]
    tiny.model("AutoModelForCausalLM", torch.float32).save_pretrained(tmp_path / "stock")
    size = tiny.model("AutoModelForCausalLM").config.vocab_size + 3

    def made():
        flags = {"spectral_conditioning": True, "lambda_": 1.0} if how in ("flag", "checkpoint", "folded") else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **flags)
        if how == "condition, resized before":
            model.resize_token_embeddings(size)
        if how.startswith("condition"):
            condition(model, SpectralConfig(lambda_=1.0))
        if how == "checkpoint":
            model.save_pretrained(tmp_path / "conditioned")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "conditioned")
        return fold(model) if how == "folded" else model

    model = made()
    saved = adapted_and_saved(model, tmp_path / "adapter", size)
    assert torch.equal(saved[EMBEDDINGS], model.get_input_embeddings().weight)
    if how != "condition, resized before":
        assert EMBEDDINGS not in adapted_and_saved(made(), tmp_path / "same")


def test_a_model_without_origin_is_as_any_other(tmp_path):
    model = ARCHITECTURES["gpt2"].model("AutoModelForCausalLM", torch.float32)
    condition(model, SpectralConfig(lambda_=1.0))
    assert EMBEDDINGS not in adapted_and_saved(model, tmp_path, 40)


def test_an_origin_that_is_gone_is_said(tmp_path, warning_log):
    ARCHITECTURES["gpt2"].model("AutoModelForCausalLM", torch.float32).save_pretrained(tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", spectral_conditioning=True, lambda_=1.0)
    (tmp_path / "stock" / "config.json").unlink()
    adapted_and_saved(model, tmp_path / "adapter", 40)
    assert any("save_embedding_layers=True" in message for message in warning_log.messages)
