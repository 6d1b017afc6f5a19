"""What tells a checkpoint from others."""

import huggingface_hub.constants
import pytest
from transformers import BertConfig

from recipes.glue.glue_models import model_fingerprint


@pytest.fixture
def commit_on_the_hub(tmp_path, monkeypatch):
    """A function: the cache of the Hub holds the configuration of "owner/model" at this commit, which is `main`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--model"

    def put(commit: str) -> None:
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")

    return put


def test_another_commit_on_the_hub_is_another_model(commit_on_the_hub):
    fingerprints = []
    for commit in ("0" * 40, "1" * 40, "0" * 40):
        commit_on_the_hub(commit)
        fingerprints.append(model_fingerprint("owner/model", BertConfig(), None))
    first, second, again = fingerprints
    assert first == again != second


def test_the_configuration_and_the_start_of_a_conditioning_count(commit_on_the_hub):
    commit_on_the_hub("0" * 40)
    made = [
        model_fingerprint("owner/model", BertConfig(), None),
        model_fingerprint("owner/model", BertConfig(), "preserve"),
        model_fingerprint("owner/model", BertConfig(hidden_size=384), None),
        model_fingerprint("owner/other", BertConfig(), None),
    ]
    assert len(set(made)) == 4
