import errno
import os
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, condition
from hf_specattn.files import TEMPORARY_NAME
from recipes.run.saving import SavedElsewhereError, save_pretrained
from recipes.text.documents import Document
from recipes.text.tokenization import train_wordpiece


@pytest.fixture
def model_and_tokenizer():
    tokenizer = train_wordpiece([Document("d", "some words to save")], 60)
    model = CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config(vocab_size=len(tokenizer))).eval()
    condition(model, SpectralConfig(method="svd"))
    return model, tokenizer


def test_the_auto_classes_load_what_was_saved(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    folder = tmp_path / "new" / "folder"
    save_pretrained(model, tokenizer, folder)
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    inputs = AutoTokenizer.from_pretrained(folder)("some words", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_given_weights_are_saved_in_place_of_the_models(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    weights = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    save_pretrained(model, tokenizer, tmp_path, weights)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert all((tensor == 0.5).all() for tensor in loaded.state_dict().values())


def test_an_interrupted_save_leaves_the_earlier_model(model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    save_pretrained(model, tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    torch.nn.init.zeros_(model.decoder.weight)
    with pytest.raises(SavedElsewhereError, match=r"No space left.*could not be written anywhere else") as caught:
        save_pretrained(model, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.parent.glob("rescued-model-*"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_was_trained_is_saved_elsewhere(model_and_tokenizer, tmp_path, monkeypatch, code):
    model, tokenizer = model_and_tokenizer
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sync = os.fsync

    def refuse(handle):
        if str(tmp_path / "run") in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        SavedElsewhereError, match=rf"{os.strerror(code)}.*It is in .*rescued-model-{os.getpid()} instead"
    ):
        save_pretrained(model, tokenizer, tmp_path / "run")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "elsewhere" / f"rescued-model-{os.getpid()}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_other_errors_are_not_hidden(model_and_tokenizer, tmp_path):
    class Broken:
        def save_pretrained(self, directory):
            raise KeyError("a fault of the program")

    with pytest.raises(KeyError, match="a fault"):
        save_pretrained(model_and_tokenizer[0], Broken(), tmp_path)


def test_what_killed_processes_left_is_removed(model_and_tokenizer, tmp_path, ended_process, monkeypatch):
    left = [
        tmp_path / f".saving.tmp-{ended_process}-abcd_123",
        tmp_path / f".config.json.tmp-{ended_process}-abcd_123",
    ]
    busy = tmp_path / f".saving.tmp-{os.getppid()}-abcd_123"
    for folder in (left[0], busy):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    left[1].touch()
    rename, temporary = os.replace, set()

    def observed(source, target):
        if Path(target).parent == tmp_path:
            temporary.add(Path(source).parent.name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", observed)
    save_pretrained(*model_and_tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [busy.name]
    (name,) = temporary  # what this save would leave is found by the next
    assert TEMPORARY_NAME.fullmatch(name)[1] == str(os.getpid())
