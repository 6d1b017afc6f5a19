"""One survey row: what is exact, what is refused, and that the oracle notices what is wrong."""

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


def test_a_row_says_both():
    result = checks.survey(chosen_rows(["causal LM/opt"])[0])
    assert (result.status, result.reason, result.attends) == ("exact", "", True)
    assert (result.preconditioned, result.preconditioned_reason) == ("exact", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal LM/beam", "stands a gate"),
        ("causal LM/bitnet", "stands a norm of what the heads give"),
        ("causal LM/granite_swa", "stands a sink"),
        ("masked LM/convbert", "stands a convolution"),
        ("timm/xcit_nano_12_p16_224", "stands attention between channels"),
        ("timm/cait_xxs24_224", "stands talking heads"),
    ],
)
def test_what_stands_before_the_output_projection_is_the_reason_of_a_refusal(name, reason):
    stock, inputs = checks.build(chosen_rows([name])[0])
    status, why = checks.preconditioned(stock, inputs)
    assert status == "refused"
    assert f"before its output projection {reason}" in why


def test_the_oracle_notices_another_preconditioner(monkeypatch):
    def wrong(model, config, probe):
        return precondition(model, PreconditionerConfig(**settings), probe)

    monkeypatch.setattr(checks, "precondition", wrong)
    stock, inputs = checks.build(chosen_rows(["masked LM/camembert"])[0])
    settings = {"scale": "rms"}
    assert checks.preconditioned(stock, inputs)[1].startswith("outputs differ by")
    settings = {"gradient": "through"}
    assert checks.preconditioned(stock, inputs)[1].startswith("gradients differ by")
