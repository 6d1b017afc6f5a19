"""The demonstration: the numbers of its table, and the whole of it in small."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from models import ARCHITECTURES, VOCABULARY, WIDTH
from PIL import Image
from scripts_loading import REPOSITORY, load_script
from transformers import AutoModelForMaskedLM

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition, fold
from hf_specattn.layers import spectral_layers

SCRIPT = REPOSITORY / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    return load_script(SCRIPT)


def tiny_model():
    return CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config(num_hidden_layers=3)).eval()


def test_median_kappas(demo):
    model = tiny_model()
    weights = [layer.attention.key.weight.detach().double().numpy() for layer in model.crammed_bert.layers]
    condition(model, SpectralConfig(lambda_=1.0))
    raw, effective = demo.median_kappas(model)["key"]
    assert raw == pytest.approx(np.median([np.linalg.cond(weight) for weight in weights]), rel=1e-6)
    corrected = [np.linalg.cond(weight + np.eye(WIDTH)) for weight in weights]
    assert effective == pytest.approx(np.median(corrected), rel=1e-4)


def test_fold_difference(demo):
    batch = {"input_ids": torch.randint(0, VOCABULARY, (2, 12))}
    assert demo.fold_difference(tiny_model(), batch) == 0.0
    model = tiny_model()
    condition(model, SpectralConfig("svd"))
    expected = model(**batch).logits
    difference = demo.fold_difference(model, batch)
    assert difference <= 1e-6
    assert type(model) is CrammedBertForMaskedLM  # it was folded
    torch.testing.assert_close(model(**batch).logits, expected)


def test_fold_difference_sees_a_wrong_fold(demo, monkeypatch):
    def fold_and_lose_the_corrections(model):
        stock_weights = {name: layer.weight.detach().clone() for name, layer in spectral_layers(model)}
        fold(model)
        for name, weight in stock_weights.items():
            model.get_submodule(name).weight.data.copy_(weight)
        return model

    monkeypatch.setattr(demo, "fold", fold_and_lose_the_corrections)
    model = tiny_model()
    condition(model, SpectralConfig(lambda_=1.0))
    assert demo.fold_difference(model, {"input_ids": torch.randint(0, VOCABULARY, (2, 12))}) > 1e-2


@pytest.mark.parametrize("settings", [{}, {"lambda_": 1.0}, {"method": "svd"}])
def test_the_start_of_a_run_is_rebuilt_from_its_seed(demo, settings):
    """`from_config` under the run's seed gives the W that the run started from."""
    set_seed(5)
    started = tiny_model()
    weights = {name: value.clone() for name, value in started.named_parameters()}
    if settings:
        condition(started, SpectralConfig(**settings))
    set_seed(5)
    rebuilt = AutoModelForMaskedLM.from_config(started.config)
    for name, value in rebuilt.named_parameters():
        assert torch.equal(value, weights[name])


TINY = [
    "--hidden_size=16",
    "--num_hidden_layers=2",
    "--num_attention_heads=2",
    "--intermediate_size=32",
    "--vocab_size=300",
]


def rows_of(text):
    """First cell -> the cells behind it."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[1:]}


@pytest.mark.slow
def test_the_whole_in_small(demo, tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--max_steps", "2", "--output_dir", str(output)])
    monkeypatch.setattr(demo, "RUNS", {run: [*flags, *TINY] for run, flags in demo.RUNS.items()})
    demo.main()
    results = json.loads((output / "conditioning.json").read_text())
    assert list(results) == list(demo.RUNS) == ["stock", "identity, lambda 1", "svd"]
    losses = rows_of((output / "comparison.md").read_text())
    assert list(losses) == list(results)  # the same names in the same order, and so the same colors
    conditioning = (output / "conditioning.md").read_text()
    assert conditioning in capsys.readouterr().out
    rows = rows_of(conditioning)
    for column, (run, result) in enumerate(results.items()):
        recorded = json.loads((output / run.split(",")[0] / "metrics.json").read_text())
        assert losses[run][1] == f"{recorded['final']['validation_loss']:.4f}"
        assert result["fold_difference"] <= 1e-5
        assert 0 < min(result["entropy"]) <= max(result["entropy"]) <= math.log(128) + 1e-6
        for projection in ("query", "key", "value"):
            raw, effective = result["kappa"]["start"][projection]
            assert raw == results["stock"]["kappa"]["start"][projection][0]  # the same W
            assert effective <= {"stock": raw, "identity, lambda 1": 3.0, "svd": 2.0 + 1e-5}[run]
            assert rows[f"kappa({projection}), start: W + C"][column] == f"{effective:.3g}"
    for name, size in (("conditioning", (1350, 690)), ("comparison", (1440, 690))):  # no curve of one validation
        with Image.open(output / f"{name}.png") as picture:
            assert picture.size == size
            assert len(set(picture.convert("RGB").resize((130, 40)).getdata())) > 20  # not blank
        assert (output / f"{name}.svg").read_text().startswith("<?xml")
    with pytest.raises(SystemExit, match="is not empty"):
        demo.main()


def conditioning_of(demo):
    """Numbers of two runs whose table can be worked out by hand."""
    flat = dict.fromkeys(("query", "key", "value"), (100.0, 100.0))
    better = {"query": (100.0, 2.0), "key": (200.0, 2.5), "value": (300.0, 3.0)}
    return {
        "stock": demo.Conditioning({"start": flat, "end": flat}, [4.0, 5.0], 0.0),
        "svd": demo.Conditioning({"start": better, "end": better}, [1.0, 2.0], 2.5e-7),
    }


def test_the_table(demo):
    text = demo.table(conditioning_of(demo), length=128)
    rows = rows_of(text)
    assert text.splitlines()[0] == "|  | stock | svd |"
    assert len(rows) == 2 * 2 * 3 + 2
    assert rows["kappa(key), end: W"] == ["100", "200"]
    assert rows["kappa(key), end: W + C"] == ["100", "2.5"]
    assert rows["attention entropy (nats; uniform is 4.85)"] == ["4.50", "1.50"]  # log 128
    assert rows["largest change of a logit by fold (relative)"] == ["0.0e+00", "2.5e-07"]


def test_the_picture_names_axes_and_shows_every_run(demo, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    demo.picture(conditioning_of(demo), length=128)
    kappas, entropies = figures[0].axes
    assert (kappas.get_yscale(), kappas.get_ylabel()) == ("log", "condition number (median over layers)")
    assert entropies.get_ylabel() == "attention entropy (nats)"
    drawn = {line.get_label(): list(line.get_ydata()) for line in (*kappas.lines, *entropies.lines)}
    assert drawn["svd: W"] == [100.0, 200.0, 300.0]
    assert drawn["svd: W + C"] == [2.0, 2.5, 3.0]
    assert drawn["stock: W"] == [100.0] * 3
    assert "stock: W + C" not in drawn  # it is W
    assert drawn["svd"] == [1.0, 2.0]
    layers = next(line.get_xdata() for line in entropies.lines if line.get_label() == "svd")
    assert list(layers) == [0, 1]  # counted from 0, as everywhere
    assert drawn["uniform"] == pytest.approx([math.log(128)] * 2)
