"""The runs that a design consists of, and their folders."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.compare.sweeps.design import PlannedRun, Setting, Sweep, SweepError, Tuning, Variant

SCRIPT = Path("scripts/train.py")
SCALE = Tuning("scale", (1.0, 2.5), ("--initialization_scale", "{value}"))
SWEEP = Sweep(
    "example",
    "An example",
    SCRIPT,
    settings=(Setting("A", ("--model", '{"width": 8}')), Setting("B")),
    variants=(Variant("stock"), Variant("tuned", ("--initialization_scale", "{scale}"))),
    seeds=(0, 1),
    common=("--steps", "5"),
    tunings=(SCALE,),
    tuning_seeds=(7,),
)


def test_the_runs_of_an_arm():
    runs = SWEEP.runs(SWEEP.settings[0], SWEEP.variants[1], {"scale": 2.5})
    flags = ("--steps", "5", "--model", '{"width": 8}', "--initialization_scale", "2.5")
    assert runs == [PlannedRun(SCRIPT, "A", flags, 0), PlannedRun(SCRIPT, "A", flags, 1)]


def test_the_runs_of_a_tuning_have_its_own_seeds_and_data():
    sweep = replace(SWEEP, tuning_flags=("--held_out", "0.5"))
    runs = sweep.tuning_runs(sweep.settings[1], SCALE, {})
    assert runs == {
        value: [PlannedRun(SCRIPT, "B", ("--steps", "5", "--held_out", "0.5", "--initialization_scale", text), 7)]
        for value, text in ((1.0, "1"), (2.5, "2.5"))
    }


def test_a_tuning_takes_what_those_before_it_chose():
    rate = Tuning("rate", (0.1,), ("--scale", "{scale}", "--rate", "{value}", "--model", '{"width": 8}'))
    (runs,) = SWEEP.tuning_runs(SWEEP.settings[1], rate, {"scale": 2.5}).values()
    assert runs[0].flags[2:] == ("--scale", "2.5", "--rate", "0.1", "--model", '{"width": 8}')


def test_a_run_is_the_same_in_every_sweep():
    other = replace(
        SWEEP, name="other", variants=(Variant("scaled", ("--initialization_scale", "2.5")),), seeds=(1, 2)
    )
    ours = SWEEP.runs(SWEEP.settings[0], SWEEP.variants[1], {"scale": 2.5})
    theirs = other.runs(other.settings[0], other.variants[0], {})
    root = Path("runs")
    assert ours[1].directory(root) == theirs[0].directory(root)
    folders = {run.directory(root) for run in [*ours, *theirs, *SWEEP.runs(SWEEP.settings[1], SWEEP.variants[0], {})]}
    assert len(folders) == 5  # seeds 0, 1, 2 of one model, 0 and 1 of the other
    assert replace(ours[0], script=Path("elsewhere/pretrain.py")).directory(root) != ours[0].directory(root)


def test_the_command_line_of_a_run(tmp_path):
    run = PlannedRun(SCRIPT, "ViT, small!", ("--steps", "5"), 3)
    folder = run.directory(tmp_path)
    assert folder.parent.name.startswith("vit-small-")
    expected = ["--steps", "5", "--seed", "3", "--output_dir", str(folder), "--resume_from_checkpoint", "True"]
    assert run.arguments(tmp_path) == [*expected, "--disable_tqdm", "True"]
    expected[-2] = "--overwrite_output_dir"
    assert run.arguments(tmp_path, anew=True) == [*expected, "--disable_tqdm", "True"]


def test_what_no_design_can_be():
    with pytest.raises(SweepError, match="'tuned' needs the value 'scale'"):
        SWEEP.runs(SWEEP.settings[0], SWEEP.variants[1], {})
    with pytest.raises(SweepError, match="variants stock of example stand twice"):
        replace(SWEEP, variants=(Variant("stock"), Variant("stock", ("--x",))))
    with pytest.raises(SweepError, match="settings A of example stand twice"):
        replace(SWEEP, settings=(Setting("A"), Setting("A")))
    with pytest.raises(SweepError, match="seeds 1 tune and report"):
        replace(SWEEP, tuning_seeds=(1, 2))
    with pytest.raises(SweepError, match="compares with nobody, which is none"):
        replace(SWEEP, variants=(Variant("stock"), Variant("other", control="nobody")))
    with pytest.raises(SweepError, match="compares with nobody, which is none"):
        replace(SWEEP, second_references=("nobody",))
    with pytest.raises(SweepError, match="seeds 3 of example stand twice"):
        replace(SWEEP, seeds=(3, 4, 3))
    with pytest.raises(SweepError, match="has no run"):
        replace(SWEEP, seeds=())
