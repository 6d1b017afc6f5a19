import pytest
import torch
from models import ARCHITECTURES
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_specattn import CrammedBertForMaskedLM, SpectralConfig, callback, condition
from hf_specattn.callback import SpectralCallback


def tiny_model() -> CrammedBertForMaskedLM:
    return CrammedBertForMaskedLM(ARCHITECTURES["crammed_bert"].config(num_hidden_layers=1))


def train(model, folder, *, max_steps: int, accumulation: int = 1) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 30, (64, 6), generator=generator)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[SpectralCallback()]).train()


def polar_correction(weight: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return values[0] * left @ right


def query(model: torch.nn.Module) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("query"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_corrections_follow_the_weights_every_so_many_optimizer_steps(tmp_path, accumulation):
    model = tiny_model()
    condition(model, SpectralConfig(method="svd", refresh_every=4))
    layer, initial = query(model), query(model).correction.clone()
    train(model, tmp_path, max_steps=3, accumulation=accumulation)
    assert torch.equal(layer.correction, initial)
    train(model, tmp_path, max_steps=4, accumulation=accumulation)
    assert (layer.correction - initial).norm() > 1e-3 * initial.norm()
    torch.testing.assert_close(
        layer.correction.double(), polar_correction(layer.weight.detach()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("exact", [None, True, False])
def test_how_to_recompute_is_handed_on(monkeypatch, exact):
    calls = []
    monkeypatch.setattr(callback, "refresh", lambda model, **settings: calls.append(settings))
    model = tiny_model()
    condition(model, SpectralConfig(method="svd", refresh_every=3))
    for step in range(1, 8):
        state = TrainerState(global_step=step)
        SpectralCallback(exact).on_step_end(TrainingArguments(use_cpu=True), state, TrainerControl(), model=model)
    assert calls == [{"exact": exact}] * 2


def test_static_and_stock_models_are_left_alone(tmp_path):
    static = tiny_model()
    condition(static, SpectralConfig(method="svd"))
    initial = query(static).correction.clone()
    train(static, tmp_path, max_steps=2)
    assert torch.equal(query(static).correction, initial)
    train(tiny_model(), tmp_path, max_steps=2)
