"""What a run changes, in words: everything that its flags ask for, and nothing else."""

import pytest

from recipes.images.image_arguments import parse_arguments
from recipes.run.model_changes import ABLATIONS, model_changes


def changes(*flags):
    return model_changes(*parse_arguments([*flags, "--output_dir", "no_such_folder"], "description"))


def test_a_stock_run_changes_nothing():
    assert changes() == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--spectral_conditioning", "--lambda_", "2"], "spectral conditioning: identity(lambda_=2.0), init additive"),
        (
            ["--spectral_conditioning"],
            "spectral conditioning: identity(lambda_=10.0) or below (auto: found on the first samples), init additive",
        ),
        (["--attention_preconditioner", "row"], "preconditioner row(unit, detached)"),
        (["--initialization_scale", "3"], "query, key and value weights times 3"),
        (["--no_layer_norm"], ABLATIONS["no_layer_norm"]),
        (["--no_attention_residual"], ABLATIONS["no_attention_residual"]),
        (["--no_decay_on", "query", "key"], "no_decay_on: query key"),
        (["--decay_toward_start_on", "value"], "decay_toward_start_on: value"),
        (["--projection_learning_rate_factor", "3"], "projection_learning_rate_factor: 3.0"),
    ],
)
def test_each_change_is_one_line(flags, words):
    assert changes(*flags) == [words]
