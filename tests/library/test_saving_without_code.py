"""What `save_pretrained` publishes by itself carries no code, and says so."""

import pytest
import torch
from models import ARCHITECTURES
from transformers import AutoModel, PreTrainedModel

from hf_specattn import SpectralConfig, condition


@pytest.mark.parametrize("push", [True, False])
def test_publishing_without_code_is_said(tmp_path, monkeypatch, warning_log, push):
    model = ARCHITECTURES["bert"].model("AutoModel", torch.float32)
    condition(model, SpectralConfig(lambda_=1.0))
    save = PreTrainedModel.save_pretrained

    def without_hub(self, folder, push_to_hub=False, **options):
        save(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", without_hub)
    model.save_pretrained(tmp_path, push_to_hub=push)
    assert (
        any("publishes no code" in message and "specattn push" in message for message in warning_log.messages) == push
    )
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
