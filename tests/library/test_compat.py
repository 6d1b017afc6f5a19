"""Each private name of transformers: what happens where a release does not have it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from models import ARCHITECTURES, outputs_of
from torch import nn
from transformers import AutoModel, BertModel

from hf_specattn import SpectralConfig, compat, condition, modeling
from hf_specattn.compat import UnsupportedTransformersError

pytestmark = pytest.mark.integration

BERT = ARCHITECTURES["bert"]
# Names without which something would be wrong -> a call that needs them.
NEEDED = {
    "conversion_mapping.get_checkpoint_conversion_mapping": lambda: compat.share_key_conversions(
        "ViTModel", "SpecViT"
    ),
    "conversion_mapping.register_checkpoint_conversion_mapping": lambda: compat.share_key_conversions(
        "ViTModel", "SpecViT"
    ),
    "modeling_utils.remove_tied_weights_from_state_dict": lambda: compat.saved_state(BERT.model(), {}),
    "core_model_loading.revert_weight_conversion": lambda: compat.saved_state(BERT.model(), {}),
    "dynamic_module_utils.get_relative_import_files": lambda: compat.relative_imports(Path(modeling.__file__)),
}
# Names without which the package does as well as it can.
OPTIONAL = (
    "utils.output_capturing._CAN_RECORD_REGISTRY",
    "pytorch_utils.Conv1D",
    "modelcard.TASK_MAPPING",
    "utils.TRANSFORMERS_DYNAMIC_MODULE_NAME",
)


def delete(monkeypatch, name):
    module, _, attribute = name.rpartition(".")
    monkeypatch.delattr(importlib.import_module(f"transformers.{module}"), attribute)


@pytest.mark.parametrize("name", NEEDED)
def test_a_needed_name_that_is_gone_is_said_with_what_it_costs(name, monkeypatch):
    delete(monkeypatch, name)
    with pytest.raises(
        UnsupportedTransformersError, match=f"transformers {transformers.__version__} has no .*{name}.*Install"
    ):
        NEEDED[name]()


def test_without_the_registry_of_outputs_a_warning_is_given(monkeypatch, warning_log):
    delete(monkeypatch, "utils.output_capturing._CAN_RECORD_REGISTRY")
    compat.logger.warning_once.cache_clear()
    compat.record_outputs_as(nn.Module, nn.Module)
    (message,) = warning_log.messages
    assert "output_attentions" in message


def test_with_the_registry_a_model_conditioned_in_memory_returns_its_attentions():
    model = BertModel(BERT.config(attn_implementation="eager")).eval()
    condition(model, SpectralConfig(lambda_=0.5))
    found = model(**BERT.batch(), output_attentions=True).attentions
    assert [tuple(each.shape) for each in found] == [(2, 4, 10, 10)] * BERT.layers
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, 4, 10))


def test_a_card_names_no_task_where_transformers_has_no_table(monkeypatch):
    assert compat.tasks_of_pipelines()["fill-mask"]["bert"] == "BertForMaskedLM"
    delete(monkeypatch, "modelcard.TASK_MAPPING")
    assert compat.tasks_of_pipelines() == {}


def test_a_release_that_marks_loaded_tensors_otherwise_cannot_load_an_svd_checkpoint(monkeypatch, tmp_path):
    AutoModel.from_config(BERT.config(spectral_conditioning=True, spectral_method="svd")).save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    monkeypatch.setattr(modeling, "was_loaded", lambda tensor: False)
    with pytest.raises(UnsupportedTransformersError, match=r"corrections of .* would be recomputed"):
        AutoModel.from_pretrained(tmp_path)


def test_missing_keys_are_expected_where_that_can_be_said():
    class Model:
        _keys_to_ignore_on_load_missing = None

    compat.expect_missing(Model(), "x")  # nothing to add to
    Model._keys_to_ignore_on_load_missing = set()
    compat.expect_missing(Model(), "x")
    assert Model._keys_to_ignore_on_load_missing == {"x"}


def run_without(names, code):
    """What `code` prints in a process in which transformers, once it has imported what it needs itself, lacks `names`."""
    before = f"""
import importlib, torch, transformers
import transformers.models.bert.modeling_bert, transformers.dynamic_module_utils, transformers.modelcard
for name in {tuple(names)!r}:
    module, _, attribute = name.rpartition(".")
    delattr(importlib.import_module("transformers." + module), attribute)
import hf_specattn
from transformers import AutoModel, BertConfig
sizes = {dict(BERT.settings)!r}
"""
    run = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
def test_the_flag_works_without_any_optional_name():
    # Without a forward pass: transformers' own needs the registry of outputs.
    code = """
torch.manual_seed(0)
model = AutoModel.from_config(BertConfig(**sizes, spectral_conditioning=True, lambda_=0.5))
print(type(model).__name__, hf_specattn.fold(model).encoder.layer[1].attention.self.key.weight.double().norm().item())
"""
    torch.manual_seed(0)
    expected = BertModel(BERT.config()).encoder.layer[1].attention.self.key.weight + 0.5 * torch.eye(32)
    name, value = run_without(OPTIONAL, code)
    assert name == "SpecBertModel"
    assert float(value) == pytest.approx(expected.double().norm().item(), rel=1e-6)


@pytest.mark.slow
def test_the_package_is_importable_without_any_needed_name():
    code = """
import hf_specattn.checkpoints.destinations, hf_specattn.checkpoints.remote_code
print(type(AutoModel.from_config(BertConfig(**sizes))).__name__)
try:
    BertConfig(spectral_conditioning=True)
except hf_specattn.compat.UnsupportedTransformersError:
    print("refused")
"""
    assert run_without(NEEDED, code) == ["BertModel", "refused"]


def test_the_attention_implementation_is_what_was_set():
    model = BertModel(BERT.config(attn_implementation="eager"))
    assert compat.attention_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert compat.attention_implementation(model.config) == "sdpa"
    assert outputs_of(model.eval(), BERT.batch())
