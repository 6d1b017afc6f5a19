import builtins
import json
import math

import pytest
from huggingface_hub import EvalResult

from recipes.run.run_metrics import (
    NonFiniteLossError,
    RunMetrics,
    loss_curve,
    package_versions,
    perplexity,
    require_finite_gradient,
    require_finite_loss,
)

HISTORY = [{"step": step, "train_loss": 8.0 - step / 10} for step in (10, 20, 30)]
VALIDATION = [{"step": 30, "validation_loss": 5.5, "validation_perplexity": perplexity(5.5)}]


def png_size(image: bytes) -> tuple[int, int]:
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")


def test_metrics_json_holds_the_whole_record(tmp_path):
    metrics = RunMetrics({"seed": 3}, {"parameters": 7}, HISTORY, VALIDATION, {"seconds": 1.5})
    metrics.write(tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {
        "arguments": {"seed": 3},
        "facts": {"parameters": 7},
        "history": HISTORY,
        "validation": VALIDATION,
        "final": {"seconds": 1.5},
        "versions": package_versions(),
    }
    assert png_size((tmp_path / "loss_curve.png").read_bytes()) == (1050, 630)


@pytest.mark.parametrize(("name", "dataset"), [("org/books", "org/books"), (None, "books, 3 held out")])
def test_evaluations_for_the_model_card(name, dataset):
    metrics = RunMetrics({"dataset_name": name}, final={"validation_loss": 800.0, "validation_perplexity": None})
    measured = {"validation_perplexity": ("perplexity", "Perplexity"), "validation_loss": ("loss", "Loss (nats)")}
    common = {"dataset_type": dataset, "dataset_name": "books, 3 held out", "dataset_split": "validation"}
    loss = EvalResult("fill-mask", **common, metric_type="loss", metric_name="Loss (nats)", metric_value=800.0)
    assert metrics.evaluations("fill-mask", "books, 3 held out", measured) == [loss]  # no float holds the perplexity
    metrics.final["validation_perplexity"] = 12.5
    both = metrics.evaluations("fill-mask", "books, 3 held out", measured)
    assert [(item.metric_type, item.metric_value) for item in both] == [("perplexity", 12.5), ("loss", 800.0)]


@pytest.mark.parametrize(("history", "validation"), [(HISTORY, []), ([], VALIDATION), ([], [])])
def test_the_curve_is_drawn_from_what_there_is(history, validation):
    assert png_size(loss_curve(history, validation)) == (1050, 630)


def test_without_matplotlib_the_numbers_are_written_and_the_picture_is_announced(tmp_path, monkeypatch, warning_log):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    RunMetrics({}, history=HISTORY).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert any("matplotlib is not installed" in message for message in warning_log.messages)


def test_versions_name_what_decides_the_numbers():
    versions = package_versions()
    assert versions["torch"]
    assert {"python", "transformers", "accelerate", "tokenizers", "numpy", "hf_specattn"} <= set(versions)


def test_perplexity():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_name_the_step(loss):
    with pytest.raises(NonFiniteLossError, match=f"The training loss is {loss} at step 17; the run stops"):
        require_finite_loss(loss, 17)
    require_finite_loss(3.5, 17)
    with pytest.raises(NonFiniteLossError, match=f"The gradient's norm is {loss} at step 17; the run stops"):
        require_finite_gradient(loss, 17)
    require_finite_gradient(1e30, 17)
