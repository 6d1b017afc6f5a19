"""Remote code: complete for every head of every architecture, and equal to the package."""

import json

import pytest
import torch
from models import ARCHITECTURES, assert_bit_equal, outputs_of
from separate_process import SeparateProcess
from transformers import AutoModel

from hf_specattn import SpectralConfig, condition, fold
from hf_specattn.checkpoints.remote_code import add_remote_code, auto_map, needs_remote_code

pytestmark = pytest.mark.integration

# svd has a stored tensor, identity none: both, in turns.
HEADS = [(tiny, name) for tiny in ARCHITECTURES.values() for name in tiny.classes]


@pytest.mark.parametrize("tiny", ARCHITECTURES.values(), ids=str)
def test_auto_map_names_every_head(tiny):
    found = auto_map(f"specattn_{tiny.model_type}")
    expected = {auto_class: f"modeling.Spec{stock}" for auto_class, stock in tiny.classes.items()}
    assert found == {**expected, "AutoConfig": f"modeling.Spec{tiny.config_class.__name__}"}


def test_stock_types_need_none(tmp_path, stock_checkpoint):
    folder = stock_checkpoint(ARCHITECTURES["bert"])
    before = sorted(path.name for path in folder.iterdir())
    assert not needs_remote_code({"model_type": "bert"})
    assert add_remote_code(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(ValueError, match="model_type='bert'"):
        auto_map("bert")


def save_with_code(model, folder):
    model.save_pretrained(folder)
    add_remote_code(folder)
    return folder


@pytest.fixture(scope="module")
def every_head(tmp_path_factory):
    """Name -> what the package computes, and what a process without it does from the checkpoint's own code."""
    folder = tmp_path_factory.mktemp("remote")
    process = SeparateProcess(folder / "process", package=False)
    expected = {}
    for index, (tiny, auto_name) in enumerate(HEADS):
        config = SpectralConfig(("identity", "svd")[index % 2], granularity=("projection", "head")[index // 2 % 2])
        model = tiny.model(auto_name)
        condition(model, config)
        name = f"{tiny}-{auto_name}"
        process.add(name, save_with_code(model, folder / name), tiny.batch(auto_name), auto_name, trust=True)
        expected[name] = type(model).__name__, outputs_of(model, tiny.batch(auto_name))
    # A checkpoint with a head, loaded by another Auto class than its own.
    bert = ARCHITECTURES["bert"]
    base = AutoModel.from_pretrained(folder / "bert-AutoModelForMaskedLM", dtype="auto")
    process.add("base", folder / "bert-AutoModelForMaskedLM", bert.batch(), "AutoModel", trust=True)
    expected["base"] = "SpecBertModel", {"last_hidden_state": outputs_of(base, bert.batch())["last_hidden_state"]}
    # Crammed BERT is no architecture of transformers, so that a folded one carries code too.
    crammed = ARCHITECTURES["crammed_bert"]
    model = crammed.model("AutoModelForMaskedLM")
    condition(model, SpectralConfig("svd"))
    save_with_code(fold(model), folder / "folded")
    process.add("folded", folder / "folded", crammed.batch(), "AutoModelForMaskedLM", trust=True)
    expected["folded"] = "CrammedBertForMaskedLM", outputs_of(model, crammed.batch())
    return expected, process.run()


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{tiny}-{auto_name}" for tiny, auto_name in HEADS] + ["base", "folded"])
def test_remote_code_equals_the_package(name, every_head):
    expected, loaded = every_head
    class_name, outputs = expected[name]
    assert loaded[name].model_class == class_name
    assert_bit_equal({key: loaded[name].outputs[key] for key in outputs}, outputs)


def test_a_model_saved_again_names_no_files_that_it_does_not_bring(tmp_path):
    tiny = ARCHITECTURES["bert"]
    model = tiny.model()
    condition(model, SpectralConfig())
    save_with_code(model, tmp_path / "with code")
    loaded = AutoModel.from_pretrained(tmp_path / "with code", dtype="auto")
    loaded.save_pretrained(tmp_path / "conditioned")
    fold(loaded).save_pretrained(tmp_path / "folded")
    for name in ("conditioned", "folded"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_entries_of_others_in_auto_map_stay(tmp_path):
    model = ARCHITECTURES["bert"].model()
    condition(model, SpectralConfig())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}))
    add_remote_code(tmp_path)
    written = json.loads(file.read_text())["auto_map"]
    assert written["AutoTokenizer"] == ["tok.Tok", None]
    assert written["AutoModelForMaskedLM"] == "modeling.SpecBertForMaskedLM"
    assert torch.equal(AutoModel.from_pretrained(tmp_path, dtype="auto").pooler.dense.bias, model.pooler.dense.bias)
