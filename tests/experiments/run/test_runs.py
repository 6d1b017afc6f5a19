"""What a run does before its first step."""

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from recipes.run.checkpointing import Checkpoints, Progress
from recipes.run.runs import start_or_resume


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_from_the_start_takes_away_what_an_earlier_one_measured(resumes, tmp_path):
    measured, others = {"metrics.json", "evaluations.json"}, {"evaluations_glue-mine.json", "notes.txt"}
    for name in measured | others:
        (tmp_path / name).touch()
    checkpoints = create_autospec(Checkpoints, instance=True)
    checkpoints.resume.return_value = Progress(3)
    arguments = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=resumes)
    begun = start_or_resume(arguments, SimpleNamespace(is_main_process=True), checkpoints)
    assert begun.step == (3 if resumes else 0)
    assert {path.name for path in tmp_path.iterdir()} == (others | measured if resumes else others)
