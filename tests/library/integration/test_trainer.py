"""The Trainer: conditioned models learn, resume, and are stopped when nobody refreshes their corrections."""

import logging

import pytest
import torch
from models import ARCHITECTURES, LAYERS, VOCABULARY, assert_bit_equal, each_method, outputs_of
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

from hf_specattn import SpectralConfig, condition
from hf_specattn.callback import SpectralCallback
from hf_specattn.layers import spectral_layers

pytestmark = pytest.mark.integration

BERT = ARCHITECTURES["bert"]
SETTINGS = {"identity": {"lambda_": 0.5}, "svd": {"spectral_method": "svd"}}


class Palindromes(torch.utils.data.Dataset):
    """Sequences that read the same backwards, with one token hidden: a masked language model can learn them."""

    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(3)
        half = torch.randint(5, VOCABULARY, (size, 4), generator=generator)
        self.tokens = torch.cat((half, half.flip(1)), dim=1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        inputs, labels = self.tokens[index].clone(), torch.full((8,), -100)
        labels[index % 8], inputs[index % 8] = inputs[index % 8].clone(), 4
        return {"input_ids": inputs, "labels": labels}


def trainer(model, folder, steps, callbacks=(), **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(**settings | changes)
    data = Palindromes()
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def conditioned(path, **settings):
    kwargs = {"spectral_conditioning": True, "dtype": torch.float32, **settings}
    return AutoModelForMaskedLM.from_pretrained(path, **kwargs)


@each_method
def test_trains_saves_and_resumes(method, stock_checkpoint, tmp_path):
    path = stock_checkpoint(BERT, "AutoModelForMaskedLM")

    model = conditioned(path, **SETTINGS[method])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(model, tmp_path / "whole", 40, save_strategy="steps", save_steps=20)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]

    # Every projection has learnt; a static correction has not moved.
    after = model.state_dict()
    for name, _ in spectral_layers(model):
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    for name in after:
        if name.endswith(".correction"):
            assert torch.equal(after[name], before[name])

    # The last checkpoint is the model.
    batch = BERT.batch(dtype=torch.float32)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "checkpoint-40")
    assert_bit_equal(loaded.state_dict(), after)
    assert_bit_equal(outputs_of(loaded, batch), outputs_of(model.eval(), batch))

    # A fresh model that resumes from the middle ends where the whole run did.
    resumed = conditioned(path, **SETTINGS[method])
    trainer(resumed, tmp_path / "resumed", 40).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"lambda_": 2.0}, {"lambda_": 9.0}, r"lambda_=2\.0.* lambda_=9\.0"),
        ({"spectral_targets": ["query"]}, {}, r"spectral_targets=\['query'\]"),
        (
            {"spectral_method": "svd"},
            {"spectral_method": "svd", "spectral_granularity": "head"},
            "spectral_granularity",
        ),
        ({"lambda_": 2.0}, None, "spectral_conditioning=True.* spectral_conditioning=None"),
        (None, {"lambda_": 2.0}, "spectral_conditioning=None.* spectral_conditioning=True"),
    ],
)
def test_going_on_with_other_settings_is_refused(before, now, named, by_name, stock_checkpoint, tmp_path):
    def make(settings):
        path = stock_checkpoint(BERT, "AutoModelForMaskedLM")
        return AutoModelForMaskedLM.from_pretrained(path) if settings is None else conditioned(path, **settings)

    trainer(make(before), tmp_path, 1, save_strategy="steps", save_steps=1).train()
    model = make(now)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"checkpoint-1 was trained with {named}"):
        trainer(model, tmp_path, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if by_name else True)
    assert_bit_equal(model.state_dict(), weights)
    trainer(make(before), tmp_path, 2).train(resume_from_checkpoint=True)


def test_going_on_with_another_refresh_interval(tmp_path):
    def make(every):
        model = BERT.model("AutoModelForMaskedLM", dtype=torch.float32)
        condition(model, SpectralConfig("svd", refresh_every=every))
        return model

    trainer(make(1), tmp_path, 1, [SpectralCallback()], save_strategy="steps", save_steps=1).train()
    trainer(make(2), tmp_path, 2, [SpectralCallback()]).train(resume_from_checkpoint=True)


def test_load_best_model_at_end(stock_checkpoint, tmp_path):
    model = conditioned(stock_checkpoint(BERT, "AutoModelForMaskedLM"), spectral_method="svd")
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    run = trainer(model, tmp_path, 6, load_best_model_at_end=True, **settings)
    run.train()
    best = AutoModelForMaskedLM.from_pretrained(run.state.best_model_checkpoint)
    assert_bit_equal(model.state_dict(), best.state_dict())


def test_refresh_every_without_callback_stops_the_training(tmp_path, warning_log):
    model = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(model, SpectralConfig("svd", refresh_every=2))
    run = trainer(model, tmp_path, 30)
    with pytest.raises(RuntimeError, match=r"refresh_every=2.*4 optimizer steps.*SpectralCallback"):
        run.train()
    assert run.state.global_step == 3


def test_refresh_every_with_callback(tmp_path, caplog):
    model = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(model, SpectralConfig("svd", refresh_every=2))
    before = {name: layer.correction.clone() for name, layer in spectral_layers(model)}
    with caplog.at_level(logging.WARNING, logger="hf_specattn"):
        trainer(model, tmp_path, 24, [SpectralCallback()]).train()
    assert not [record for record in caplog.records if "refresh" in record.getMessage()]
    assert len(before) == 3 * LAYERS
    for name, layer in spectral_layers(model):
        # The corrections are those of the weights as they stand: the last step was a multiple of the interval.
        weight = layer.weight.detach().double()
        left, singular_values, right = torch.linalg.svd(weight, full_matrices=False)
        expected = singular_values[0] * (left @ right)
        torch.testing.assert_close(layer.correction.double(), expected, rtol=1e-3, atol=1e-4)
        assert (layer.correction - before[name]).abs().max() > 0.01
    singular_values = torch.linalg.svdvals(layer.effective_weight().detach().double())
    assert singular_values[0] / singular_values[-1] <= 2 * (1 + 1e-4)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    # 12 batches are 3 steps of the optimizer: the fourth would be an error.
    model = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(model, SpectralConfig("svd", refresh_every=2))
    trainer(model, tmp_path, 3, gradient_accumulation_steps=4).train()


def test_bf16_training_keeps_float32_weights(tmp_path):
    model = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(model, SpectralConfig(lambda_=0.5))
    run = trainer(model, tmp_path, 20, bf16=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
