"""What a release says of itself in several places is the same in all."""

import os
import re

import pytest
import yaml
from scripts_loading import REPOSITORY

from hf_specattn import __version__


def load(name):
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def test_version_and_date_are_the_same_everywhere():
    citation = load("CITATION.cff")
    headings = re.findall(
        r"^## \[(.+?)\](?: - (\S+))?$", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    released = [heading for heading in headings if heading[0] != "Unreleased"]
    assert released[0] == (__version__, citation["date-released"])
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"


def test_the_workflow_runs_what_everybody_runs():
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", ["bug", "model"])
def test_issue_forms_ask_for_the_environment(name):
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "labels", "body"} == set(form)
    asked = [field["id"] for field in form["body"]]
    assert len(set(asked)) == len(asked)
    assert "environment" in asked
