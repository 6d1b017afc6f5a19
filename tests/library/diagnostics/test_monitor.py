"""SpectralMonitor under the Trainer and in a loop: its values are those of the functions, and training stays as it was."""

import json
import math

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, assert_bit_equal
from transformers import BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.diagnostics import (
    SpectralMonitor,
    capture,
    gradient_norms,
    jacobian_indicator,
    jacobian_spectrum,
    saturation,
    spectra,
)
from hf_specattn.diagnostics.monitor import MONITOR_FILE

TINY = ARCHITECTURES["bert"]
BATCH = TINY.batch(dtype=torch.float32)


def bert():
    torch.manual_seed(0)
    model = BertForMaskedLM(TINY.config())
    condition(model, SpectralConfig(lambda_=0.5))
    return model


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_values_are_those_of_the_functions(tmp_path):
    model = bert()
    monitor = SpectralMonitor(
        2, batch=BATCH | {"labels": BATCH["input_ids"]}, jacobian_heads=2, queries=4, file=tmp_path / "monitor.json"
    )
    values = monitor.first_values(model)
    rows = spectra(model)
    for name in ("query", "key", "value"):
        chosen = [row for row in rows if row.projection == name]
        for suffix, spectrum in (("", "raw"), ("_effective", "effective")):
            heads = [getattr(row, spectrum) for row in chosen]
            assert values[f"spectral/kappa_{name}{suffix}"] == pytest.approx(
                mean(mean(item.head_kappa) for item in heads)
            )
            assert values[f"spectral/sigma_min_{name}{suffix}"] == pytest.approx(
                mean(mean(item.head_sigma_min) for item in heads)
            )
    found = capture(model, BATCH)
    heads = [item.head(place, queries=4) for item in found for place in (0, 3)]
    assert values["spectral/kappa_jacobian"] == pytest.approx(mean(jacobian_spectrum(head).kappa for head in heads))
    assert values["spectral/indicator"] == pytest.approx(mean(jacobian_indicator(head).product for head in heads))
    states = saturation(model, BATCH)
    assert values["spectral/entropy"] == pytest.approx(mean(row.entropy.mean().item() for row in states))
    assert values["spectral/uniform_entropy"] == pytest.approx(mean(row.uniform_entropy for row in states))
    assert values["spectral/saturated_share"] == 0
    written = json.loads((tmp_path / "monitor.json").read_text())["records"]
    assert written == monitor.records
    assert written[0]["kappa_query"][1] == pytest.approx(list(rows[3].raw.head_kappa))
    assert (written[0]["layers"], written[0]["jacobian_heads"]) == ([0, 1], [[0, 3], [0, 3]])


def test_gradients_of_a_step_and_layers_that_are_chosen():
    model = bert()
    monitor = SpectralMonitor(2, batch=BATCH, layers=[-1], jacobian_heads=0)
    monitor.first_values(model)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert [monitor.is_due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    monitor.observe_gradients(model, 1)
    assert "spectral/grad_norm_query" not in monitor.measure(model, 1)
    monitor.observe_gradients(model, 2)
    values = monitor.measure(model, 2)
    expected = gradient_norms(model, layers=[-1])[0].norms
    for name in ("query", "key", "value"):
        assert values[f"spectral/grad_norm_{name}"] == pytest.approx(expected[name].mean().item())
    assert not [name for name in values if "jacobian" in name]


class TokenTensors(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = torch.arange(5, 13) + index % 7
        return {"input_ids": tokens, "labels": tokens}


def random_collator(samples):
    """Draws random numbers, as the masking of language models does."""
    batch = torch.utils.data.default_collate(samples)
    hidden = torch.rand(batch["input_ids"].shape) < 0.2
    return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 4)}


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def train(folder, monitor=None, attach=False, steps=5):
    model, recorder = bert(), Recorder()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        seed=3,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TokenTensors(),
        data_collator=random_collator,
        callbacks=[recorder, *([monitor] if monitor is not None and not attach else [])],
    )
    if attach:
        monitor.attach(trainer)
    trainer.train()
    return model, recorder, trainer


@pytest.mark.parametrize("attach", [True, False])
def test_trainer_trains_to_the_same_bits_and_logs(attach, tmp_path, capsys):
    plain, _, _ = train(tmp_path / "plain")
    monitor = SpectralMonitor(2, queries=3)
    model, recorder, trainer = train(tmp_path / "seen", monitor, attach)
    assert_bit_equal(model.state_dict(), plain.state_dict())
    assert [record["step"] for record in monitor.records] == [0, 2, 4]
    assert "grad_norm_query" not in monitor.records[0]
    assert all("grad_norm_query" in record for record in monitor.records[1:])
    assert json.loads((tmp_path / "seen" / MONITOR_FILE).read_text())["records"] == monitor.records
    history = [entry["step"] for entry in trainer.state.log_history if "spectral/kappa_query" in entry]
    assert history == [0, 2, 4]
    tracked = [step for step, logs in recorder.logs if "spectral/kappa_query" in logs]
    assert tracked == ([0, 2, 4] if attach else [])
    line = capsys.readouterr().out
    assert f"Spectral monitor: 3 measurements took {monitor.seconds:.2f} s" in line
    assert 0 < sum(record["seconds"] for record in monitor.records) < monitor.seconds


def test_resumes_its_record(tmp_path):
    file = tmp_path / "monitor.json"
    first = SpectralMonitor(2, batch=BATCH, jacobian_heads=0, file=file)
    model = bert()
    first.first_values(model)
    for step in (2, 4):
        first.measure(model, step)
    second = SpectralMonitor(2, batch=BATCH, jacobian_heads=0, file=file)
    assert second.first_values(model, step=3) == {}
    second.measure(model, 4)
    assert [record["step"] for record in json.loads(file.read_text())["records"]] == [0, 2, 4]


def test_warns_before_the_first_step(warning_log):
    model = BertForMaskedLM(TINY.config())
    condition(model, SpectralConfig(lambda_=30.0))
    SpectralMonitor(2, batch={"input_ids": torch.arange(12)[None]}, jacobian_heads=0).first_values(model)
    (message,) = warning_log.messages
    assert "is saturated" in message
    assert "lambda_=" in message


def test_infinite_condition_numbers_are_null_in_the_file(tmp_path):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.weight.zero_()
    monitor = SpectralMonitor(2, batch=BATCH, jacobian_heads=0, file=tmp_path / "monitor.json")
    values = monitor.first_values(model)
    assert monitor.records[0]["kappa_value"][0] == [None] * 4
    assert math.isfinite(values["spectral/kappa_value"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 is not allowed; give an integer >= 1"),
        ({"jacobian_heads": -1}, "jacobian_heads=-1"),
        ({"queries": 2.5}, "queries=2.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SpectralMonitor(**settings)


def test_without_data_to_look_at():
    with pytest.raises(ValueError, match=r"needs batch=\{"):
        SpectralMonitor().first_values(bert())

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    loader = torch.utils.data.DataLoader(Stream())
    state = type("State", (), {"is_world_process_zero": True, "global_step": 0})()
    with pytest.raises(ValueError, match="without drawing from its stream; pass"):
        SpectralMonitor().on_train_begin(None, state, None, model=bert(), train_dataloader=loader)


@pytest.mark.parametrize("axis", ["row", None])
def test_the_condition_number_of_what_the_heads_give(axis):
    """By NumPy from what enters the output projection, text by text, without padding."""
    torch.manual_seed(0)
    model = TINY.model()
    if axis is not None:
        precondition(model, PreconditionerConfig(axis, scale="rms"))
    batch = TINY.batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 7:] = 0
    monitor = SpectralMonitor(batch=batch, jacobian_heads=0, layers=[0, 1])
    monitor.first_values(model)
    record, entering = monitor.records[0], {}
    for layer, block in enumerate(model.encoder.layer):
        block.attention.output.dense.register_forward_pre_hook(
            lambda module, args, layer=layer: entering.__setitem__(layer, args[0].numpy())
        )
    with torch.no_grad():
        model.eval()(**batch)
    heads = TINY.heads_of("query")
    for layer in (0, 1):
        logs, scaled = [], []
        for text, length in ((0, None), (1, 7)):
            for head in np.split(entering[layer][text, :length], heads, axis=-1):
                logs.append(np.log(np.linalg.cond(head)))
                rows = head / np.linalg.norm(head, axis=-1, keepdims=True)
                scaled.append(np.log(np.linalg.cond(rows)))
        by_text = np.array(logs).reshape(2, heads)
        assert record["kappa_head_output"][layer] == pytest.approx(np.exp(by_text.mean(0)), rel=1e-6)
        if axis is not None:
            by_text = np.array(scaled).reshape(2, heads)
            found = record["kappa_head_output_preconditioned"][layer]
            assert found == pytest.approx(np.exp(by_text.mean(0)), rel=1e-6)
    assert ("kappa_head_output_preconditioned" in record) == (axis is not None)
