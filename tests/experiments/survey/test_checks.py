"""One survey row: what is exact, what is refused, and that the oracle notices what is wrong."""

from dataclasses import replace

import pytest

from hf_specattn import PreconditionerConfig, precondition
from recipes.survey import checks
from recipes.survey.rows import chosen_rows

# One of each place where an output projection lies, and of each layout.
EXACT = (
    "masked LM/camembert",
    "masked LM/deberta-v2",
    "masked LM/flaubert",
    "masked LM/funnel",
    "masked LM/mpnet",
    "masked LM/nystromformer",
    "image classification/hiera",
    "image classification/pvt_v2",
    "image classification/segformer",
    "causal LM/bloom",
    "causal LM/gpt_oss",
    "image classification/imagegpt",
    "causal LM/mistral",
    "causal LM/modernbert-decoder",
    "causal LM/opt",
    "causal LM/phi3",
    "causal LM/trocr",
    "timm/vit_tiny_patch16_224",
)


@pytest.mark.parametrize("name", EXACT)
def test_heads_are_normalized_as_an_oracle_without_the_table_says(name):
    stock, inputs = checks.build(chosen_rows([name])[0])
    assert checks.preconditioned(stock, inputs) == ("exact", "")


@pytest.mark.parametrize("name", EXACT)
def test_value_and_output_are_w_plus_c_without_the_table(name):
    stock, inputs = checks.build(chosen_rows([name])[0])
    traced = checks.trace_attention(stock, lambda: stock(**inputs))
    assert checks.conditioned(stock, inputs, traced, checks.VALUE_OUTPUT) == ("exact", "")


@pytest.mark.parametrize("method", ["identity", "svd"])
def test_the_oracle_notices_another_output_projection(method):
    stock, inputs = checks.build(chosen_rows(["masked LM/bert"])[0])
    traced = checks.trace_attention(stock, lambda: stock(**inputs))
    layer = "bert.encoder.layer.0"
    assert traced[0].output == f"{layer}.attention.output.dense"
    moved = [replace(traced[0], output=f"{layer}.output.dense"), *traced[1:]]
    found = checks.compare(stock, inputs, moved, method, checks.VALUE_OUTPUT)
    assert found is not None
    assert found.startswith(f"{layer}.attention.output.dense.weight is not W + C")
    lost = [replace(traced[0], output=None), *traced[1:]]
    assert "cannot say what reads the heads" in str(checks.compare(stock, inputs, lost, method, checks.VALUE_OUTPUT))


def test_a_row_says_all():
    result = checks.survey(chosen_rows(["causal LM/opt"])[0])
    assert (result.status, result.reason, result.attends) == ("exact", "", True)
    assert (result.output, result.output_reason) == ("exact", "")
    assert (result.preconditioned, result.preconditioned_reason) == ("exact", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal LM/beam", "a gate"),
        ("causal LM/bitnet", "a norm of what the heads give"),
        ("causal LM/granite_swa", "a sink"),
        ("masked LM/convbert", "a convolution"),
        ("timm/xcit_nano_12_p16_224", "attention between channels"),
        ("timm/cait_xxs24_224", "talking heads"),
    ],
)
def test_what_stands_before_the_output_projection_is_the_reason_of_a_refusal(name, reason):
    stock, inputs = checks.build(chosen_rows([name])[0])
    status, why = checks.preconditioned(stock, inputs)
    assert status == "refused"
    assert f"before its output projection there is {reason}" in why


def test_the_oracle_notices_another_preconditioner(monkeypatch):
    def wrong(model, config, probe):
        return precondition(model, PreconditionerConfig(**settings), probe)

    monkeypatch.setattr(checks, "precondition", wrong)
    stock, inputs = checks.build(chosen_rows(["masked LM/camembert"])[0])
    settings = {"scale": "rms"}
    assert checks.preconditioned(stock, inputs)[1].startswith("outputs differ by")
    settings = {"gradient": "through"}
    assert checks.preconditioned(stock, inputs)[1].startswith("gradients differ by")
