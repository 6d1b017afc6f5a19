"""The sweeps on text: their runs parse, share what they have in common, and cost what their products say."""

from pathlib import Path

import pytest

from recipes.compare.sweeps.design import SweepError
from recipes.compare.sweeps.execution import planned_runs
from recipes.compare.sweeps.text_sweeps import SMALL_TEXT, TEXT_SWEEPS, text_operations
from recipes.text.pretrain_arguments import parse_arguments

SCRIPTS = Path(__file__).resolve().parents[4] / "scripts"


def runs_of(name):
    sweep = TEXT_SWEEPS[name]("small", SCRIPTS)
    return [run for _, run in planned_runs(sweep, {tuning.name: tuning.values[0] for tuning in sweep.tunings})]


@pytest.mark.parametrize("name", TEXT_SWEEPS)
def test_every_run_parses(name, tmp_path):
    for run in runs_of(name):
        arguments, spectral = parse_arguments(run.arguments(tmp_path), "a run")
        assert (arguments.position_scale, arguments.max_seq_length, arguments.seed) == (1.0, 32, run.seed)
        assert spectral.spectral_conditioning == ("--spectral_conditioning" in run.flags)
        assert arguments.no_attention_residual == ("--no_attention_residual" in run.flags)


def test_the_two_share_stock_and_tuned_runs(tmp_path):
    folders = [{run.directory(tmp_path) for run in runs_of(name)} for name in TEXT_SWEEPS]
    # Four scales on one seed, stock and svd on two; the tuned scale here is the first one tried.
    assert len(folders[0] & folders[1]) >= 4 + 2 + 2


@pytest.mark.parametrize("name", TEXT_SWEEPS)
def test_no_paper_has_them(name):
    with pytest.raises(SweepError, match=f"--scale paper: {name} is of no paper's table"):
        TEXT_SWEEPS[name]("paper", SCRIPTS)


def test_the_operations_are_those_of_the_products():
    arguments, _ = parse_arguments(SMALL_TEXT, "a run")
    width, wide, layers, length, vocabulary = 64, 128, 4, 32, 96
    # Query, key, value and output; the gated feed-forward, whose second product reads half; scores and weighted values.
    layer = 4 * width**2 + width * wide + width * wide // 2 + 2 * length * width
    expected = 3 * 2 * (layers * layer + width * vocabulary) * 1500 * 64 * length
    assert text_operations(arguments) == expected
    by_the_clock, _ = parse_arguments(["--max_train_hours", "1"], "a run")
    with pytest.raises(SweepError, match="by the clock"):
        text_operations(by_the_clock)
