"""The MiniLM checkpoint through every conversion; what was written is loaded in processes of their own."""

import json

import numpy as np
import pytest
import torch
from models import identity_by_numpy, svd_by_numpy
from safetensors.torch import load_file
from separate_process import SeparateProcess
from transformers import AutoModel, AutoTokenizer

from hf_specattn import SpectralConfig, balance
from hf_specattn.checkpoints.conversion import balance_checkpoint, convert, fold_checkpoint
from hf_specattn.checkpoints.inspection import inspect_checkpoint
from hf_specattn.checkpoints.records import read_record
from hf_specattn.model_outputs import probe_batch

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SENTENCES = ["Spectral conditioning adds a correction.", "The cat sat on the mat.", "A cat is sitting on a rug."]
HEADS, HEAD_DIM, LAYERS = 12, 32, 6
PROJECTION = "encoder.layer.{}.attention.self.{}.weight"


@pytest.fixture(scope="module")
def batch(minilm_path):
    return dict(AutoTokenizer.from_pretrained(minilm_path)(SENTENCES, padding=True, return_tensors="pt"))


def pooled(outputs, batch):
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((outputs["last_hidden_state"] * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embeddings_of(model, batch):
    return pooled(model.eval()(**batch), batch)


@pytest.fixture(scope="module")
def stock(minilm_path, batch):
    return embeddings_of(AutoModel.from_pretrained(minilm_path), batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="module")
def results(minilm_path, folder):
    source = str(minilm_path)
    made = {
        "additive": convert(source, folder / "additive", SpectralConfig()),
        "preserve": convert(source, folder / "preserve", SpectralConfig(), "preserve"),
        "svd": convert(source, folder / "svd", SpectralConfig("svd"), "preserve"),
        "svd-additive": convert(source, folder / "svd-additive", SpectralConfig("svd")),
        "balanced": balance_checkpoint(source, folder / "balanced"),
    }
    made["folded"] = fold_checkpoint(str(folder / "preserve"), folder / "folded")
    return made


@pytest.fixture(scope="module")
def without_package(results, folder, batch):
    process = SeparateProcess(folder / "without", package=False)
    for name in ("folded", "balanced"):
        process.add(name, folder / name, batch)
    for name in ("additive", "preserve", "svd", "svd-additive"):
        process.add(name, folder / name, batch, trust=True)
    return process.run()


@pytest.fixture(scope="module")
def with_package(results, folder, batch):
    process = SeparateProcess(folder / "with", package=True)
    for name in ("additive", "preserve", "svd", "svd-additive"):
        process.add(name, folder / name, batch)
    return process.run()


@pytest.mark.parametrize("name", ["folded", "balanced"])
def test_plain_results_keep_the_embeddings_without_the_package(name, without_package, stock, batch):
    assert without_package[name].model_class == "BertModel"
    assert (pooled(without_package[name].outputs, batch) - stock).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["preserve", "svd"])
def test_preserved_results_keep_the_embeddings(name, without_package, with_package, stock, batch):
    for loaded in (without_package[name], with_package[name]):
        assert loaded.model_class == "SpecBertModel"
        assert (pooled(loaded.outputs, batch) - stock).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["additive", "preserve", "svd", "svd-additive"])
def test_remote_code_computes_the_same_bits(name, without_package, with_package):
    outputs, expected = without_package[name].outputs, with_package[name].outputs
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "correction"), [("additive", identity_by_numpy(10.0)), ("svd-additive", svd_by_numpy)]
)
def test_additive_equals_w_plus_c_by_numpy(name, correction, without_package, stock, batch, minilm_path):
    expected = AutoModel.from_pretrained(minilm_path)
    for parameter, weight in expected.state_dict().items():
        if parameter.endswith(("self.query.weight", "self.key.weight", "self.value.weight")):
            matrix = weight.numpy()
            matrix += correction(matrix, parameter).astype(matrix.dtype)
    found = pooled(without_package[name].outputs, batch)
    assert (found - embeddings_of(expected, batch)).abs().max() < 1e-5
    assert (found - stock).abs().max() > 0.01  # another function


def test_what_is_written(results, folder, minilm_path):
    source = set(load_file(minilm_path / "model.safetensors")) - {"embeddings.position_ids"}
    assert set(load_file(folder / "additive" / "model.safetensors")) == source
    assert set(load_file(folder / "folded" / "model.safetensors")) == source
    corrections = {
        PROJECTION.format(i, p).replace("weight", "correction")
        for i in range(LAYERS)
        for p in ("query", "key", "value")
    }
    assert set(load_file(folder / "svd" / "model.safetensors")) == source | corrections
    for name in results:
        written = {path.relative_to(folder / name).as_posix() for path in (folder / name).rglob("*") if path.is_file()}
        assert set(results[name].files) == written
        # the tokenizer and what Sentence Transformers needs
        assert written >= {
            "config.json",
            "tokenizer.json",
            "vocab.txt",
            "1_Pooling/config.json",
            "README.md",
            "specattn.json",
        }
        assert ("modeling.py" in written) == name.startswith(("additive", "preserve", "svd"))
        assert (folder / name / "vocab.txt").read_bytes() == (minilm_path / "vocab.txt").read_bytes()
    assert "auto_map" not in json.loads((folder / "folded" / "config.json").read_text())
    assert "Left behind: data_config.json." in results["additive"].notes


def test_the_report_of_the_outputs_is_right(results, stock, minilm_path, folder):
    # By another way than the command's: the probe through the two checkpoints as they lie there.
    before, after = AutoModel.from_pretrained(minilm_path), AutoModel.from_pretrained(folder / "additive")
    probe = probe_batch(before)
    with torch.no_grad():
        expected, found = before.eval()(**probe), after.eval()(**probe)
    ratios = [((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected]
    assert results["additive"].comparison.relative == pytest.approx(max(ratios), rel=1e-4)
    assert results["additive"].comparison.tolerance is None
    assert results["preserve"].comparison.relative <= results["preserve"].comparison.tolerance < 1e-5


def head_blocks(weights, layer, projection):
    return weights[PROJECTION.format(layer, projection)].double().numpy().reshape(HEADS, HEAD_DIM, -1)


def output_blocks(weights, layer):
    matrix = weights[f"encoder.layer.{layer}.attention.output.dense.weight"].double().numpy()
    return matrix.T.reshape(HEADS, HEAD_DIM, -1)


def test_balance_in_numbers(results, folder, minilm_path):
    source = load_file(minilm_path / "model.safetensors")
    stored = load_file(folder / "balanced" / "model.safetensors")
    model = AutoModel.from_pretrained(minilm_path, dtype=torch.float64)
    balance(model)
    exact = model.state_dict()
    value_kappas = []
    for layer in range(LAYERS):
        query, key = (np.linalg.cond(head_blocks(stored, layer, name)) for name in ("query", "key"))
        assert query == pytest.approx(key, rel=1e-4)
        value_kappas.extend(np.linalg.cond(head_blocks(stored, layer, "value")))
        for weights, tolerance in ((exact, 1e-12), (stored, 1e-5)):
            before, after = (
                np.einsum("hdi,hdj->hij", head_blocks(w, layer, "query"), head_blocks(w, layer, "key"))
                for w in (source, weights)
            )
            assert np.abs(after - before).max() < tolerance * np.abs(before).max()
            before, after = (
                np.einsum("hdi,hdo->hio", head_blocks(w, layer, "value"), output_blocks(w, layer))
                for w in (source, weights)
            )
            assert np.abs(after - before).max() < tolerance * np.abs(before).max()
    assert f"{np.mean(value_kappas):.3f}" == "1.000"
    rows = {row.projection for row in read_record(folder / "balanced").rows}
    assert rows == {"query", "key", "value", "output"}
    assert any("does not vanish" in note for note in results["balanced"].notes)


def test_inspect(results, folder, minilm_path):
    facts = {name: inspect_checkpoint(str(folder / name)).facts for name in ("svd", "folded")}
    assert facts["svd"]["conditioned"].startswith("svd() on query, key, value")
    assert facts["svd"]["loads without the package"] == "with trust_remote_code=True"
    assert facts["svd"]["made by"].startswith("specattn convert from model, init preserve")
    assert facts["folded"]["conditioned"] == "no"
    assert facts["folded"]["loads without the package"] == "yes"
    stock = inspect_checkpoint(str(minilm_path))
    weight = load_file(minilm_path / "model.safetensors")[PROJECTION.format(0, "query")].double().numpy()
    assert stock.rows[0].before == pytest.approx(np.linalg.cond(weight), rel=1e-6)
    assert stock.rows[0].head_before == pytest.approx(
        np.linalg.cond(weight.reshape(HEADS, HEAD_DIM, -1)).mean(), rel=1e-6
    )
    assert "kappa(W+C)" not in stock.describe()
    assert "22,713,216 parameters, float32" in stock.facts["weights"]


def test_the_card(results, folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "preserve" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "spectral-conditioning" in card.data.tags
    assert "snli" in card.data.datasets
    assert card.data.library_name == "transformers"
    for needed in ("import hf_specattn", "trust_remote_code=True", "specattn fold", "kappa.png", "kappa(value)"):
        assert needed in card.content
    assert ModelCard.load(folder / "balanced" / "README.md").data.library_name == "sentence-transformers"
    text = (folder / "balanced" / "README.md").read_text()
    assert "does not vanish" in text
    assert "kappa(output)" in text
    for name in results:  # templates filled in whole, and nothing of this machine
        text = (folder / name / "README.md").read_text()
        assert not any(mark in text for mark in ("{{", "{%", "None", str(folder)))
