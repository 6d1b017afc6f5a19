"""What is decided before accelerate shards a model; that sharded runs train alike is tested with the script."""

import logging

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from models import ARCHITECTURES, each_architecture
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_specattn import SpectralConfig, condition
from recipes.run.sharding import configure_sharding, layer_classes

LAYERS = {
    "bert": ["BertLayer"],
    "roberta": ["RobertaLayer"],
    "vit": ["ViTLayer"],
    "crammed_bert": ["CrammedBertLayer"],
    "gpt2": ["GPT2Block"],
    "llama": ["LlamaDecoderLayer"],
}


@pytest.fixture(autouse=True)
def fresh_accelerator_state(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_TRANSFORMER_CLS_TO_WRAP"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator_of():
    """A function: an accelerator whose state is as `accelerate` leaves it with several processes of a kind."""

    def build(kind: DistributedType, plugin: FullyShardedDataParallelPlugin | None = None) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        accelerator.state.distributed_type = kind
        if plugin is not None:
            accelerator.state.fsdp_plugin = plugin
        return accelerator

    return build


# --- the units of sharding -------------------------------------------------------------------------------------------


@each_architecture
def test_layers_are_the_units_stock_and_conditioned(tiny):
    for auto_name in tiny.classes:
        model = tiny.model(auto_name)
        assert layer_classes(model) == LAYERS[tiny.model_type]
        condition(model, SpectralConfig())
        assert layer_classes(model) == LAYERS[tiny.model_type]


def test_the_units_hold_every_projection_and_none_holds_the_embeddings():
    """Every architecture of the table is known here, and what is conditioned is sharded layer by layer."""
    for tiny in ARCHITECTURES.values():
        model = tiny.model()
        units = [
            (name, module) for name, module in model.named_modules() if type(module).__name__ in layer_classes(model)
        ]
        for weight, _, _ in tiny.projections(model):
            assert sum(weight.startswith(f"{name}.") for name, _ in units) == 1
        embeddings = model.get_input_embeddings()
        assert not any(embeddings is module for _, unit in units for module in unit.modules())


def test_stock_bert_of_transformers_is_sharded_by_its_layers():
    settings = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=2, **settings))
    # What accelerate would take holds the tied weight.
    assert set(model._no_split_modules) == {"BertLayer", "BertEmbeddings"}
    assert layer_classes(model) == ["BertLayer"]


def test_a_model_that_names_no_modules_has_no_units():
    model = ARCHITECTURES["bert"].model()
    model._no_split_modules = None
    assert layer_classes(model) == []
    model._no_split_modules = ["NoSuchLayer"]
    assert layer_classes(model) == []


# --- configuration ---------------------------------------------------------------------------------------------------


def test_nothing_is_done_without_fsdp(accelerator_of):
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        accelerator = accelerator_of(kind)
        before = dict(vars(accelerator.state))
        assert configure_sharding(accelerator, nn.Linear(1, 1)) is False  # it does not even look at the model
        assert vars(accelerator.state) == before
        assert accelerator.distributed_type == kind


def test_fsdp2_shards_by_the_layers(accelerator_of, caplog):
    accelerator = accelerator_of(DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=2))
    with caplog.at_level(logging.INFO, "recipes"):
        assert configure_sharding(accelerator, ARCHITECTURES["crammed_bert"].model("AutoModelForMaskedLM")) is True
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["CrammedBertLayer"]
    assert [record.getMessage() for record in caplog.records] == ["FSDP2 shards by CrammedBertLayer."]


def test_units_that_the_configuration_names_are_kept(accelerator_of):
    names = ["BertIntermediate", "BertOutput"]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=names)
    accelerator = accelerator_of(DistributedType.FSDP, plugin)
    assert configure_sharding(accelerator, ARCHITECTURES["bert"].model()) is True
    assert plugin.transformer_cls_names_to_wrap == names


def test_fsdp1_is_refused(accelerator_of):
    accelerator = accelerator_of(DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=1))
    with pytest.raises(ValueError, match=r"FSDP of version 1 flattens the weights.*fsdp_version: 2.*FSDP_VERSION=2"):
        configure_sharding(accelerator, ARCHITECTURES["bert"].model())


def test_cpu_processes_that_ask_for_fsdp2_get_it(accelerator_of, monkeypatch):
    accelerator = accelerator_of(DistributedType.MULTI_CPU)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert configure_sharding(accelerator, ARCHITECTURES["bert"].model()) is True
    assert accelerator.is_fsdp2
    assert accelerator.distributed_type == DistributedType.FSDP
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["BertLayer"]


def test_cpu_processes_that_ask_for_fsdp1_are_refused(accelerator_of, monkeypatch):
    accelerator = accelerator_of(DistributedType.MULTI_CPU)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(ValueError, match="FSDP of version 1 flattens"):
        configure_sharding(accelerator, ARCHITECTURES["bert"].model())


def test_one_cpu_process_is_not_sharded(accelerator_of, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator = accelerator_of(DistributedType.NO)
    assert configure_sharding(accelerator, ARCHITECTURES["bert"].model()) is False
    assert accelerator.distributed_type == DistributedType.NO
