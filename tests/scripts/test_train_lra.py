"""train_lra.py as it is used: on made ListOps and small files, stock and conditioned, stopped, resumed, on two processes."""

import json
import os
import signal
import subprocess
import sys

import lra_files
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from lra_support import registered  # noqa: F401
from safetensors.torch import load_file
from scripts_loading import REPOSITORY, load_script
from transformers import AutoConfig, AutoModelForSequenceClassification

from recipes.compare import comparison
from recipes.compare.sweeps import sweep_figures
from recipes.compare.sweeps.design import Setting, Sweep, Variant
from recipes.compare.sweeps.sweep_results import ArmResult, Results
from recipes.run import loop
from recipes.run.checkpointing import list_checkpoints

SCRIPT = REPOSITORY / "scripts" / "train_lra.py"
MODEL = ["--hidden_size", "8", "--intermediate_size", "8", "--num_landmarks", "4"]
STEPS = ["--max_steps", "6", "--warmup_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
STEPS += ["--eval_steps", "2", "--save_steps", "2", "--learning_rate", "0.01", "--per_device_eval_batch_size", "7"]
DATA = ["--max_length", "16", "--listops_min_length", "5", "--train_samples", "60", "--validation_samples", "30"]
DATA += ["--test_samples", "25"]
IDENTITY = ["--spectral_conditioning", "--lambda_", "1.0"]
DYNAMIC = ["--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "2"]
BOTH = ["--spectral_conditioning", "--attention_preconditioner", "row", "--spectral_monitor_every", "2"]
TIMING = {"examples_per_second", "seconds"}

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(script, tmp_path, cache):
    """A function: run the script in this process, on a few expressions with a tiny model; returns the folder it wrote."""

    def run(*flags, name="run", data=tuple(DATA), model=tuple(MODEL)):
        reset()
        folder = tmp_path / name
        script.main([*STEPS, *data, *model, "--cache_dir", str(cache), "--output_dir", str(folder), *flags])
        return folder

    yield run
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_same_result(one, other):
    """Weights, optimizer and every measured number; only times may differ."""
    checkpoints = [list_checkpoints(folder)[-1].name for folder in (one, other)]
    assert checkpoints[0] == checkpoints[1]
    for name in ("model.safetensors", "config.json", f"{checkpoints[0]}/training_state.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = metrics_of(one), metrics_of(other)
    for records in zip(first["history"], second["history"], strict=True):
        known, again = ({name: value for name, value in record.items() if name not in TIMING} for record in records)
        assert known == again
    assert first["validation"] == second["validation"]


@pytest.mark.parametrize(
    ("flags", "model_type"),
    [([], "lra_nystromformer"), (IDENTITY, "specattn_lra_nystromformer"), (DYNAMIC, "specattn_lra_nystromformer")],
    ids=["stock", "identity", "dynamic"],
)
def test_the_best_weights_are_saved_and_measured_on_every_test_example(
    train, script, capsys, cache, flags, model_type
):
    folder = train(*flags, "--save_total_limit", "9")
    record = metrics_of(folder)
    final, validation = record["final"], record["validation"]
    assert [entry["step"] for entry in validation] == [2, 4, 6]
    # The last step's own weights are offered, too, and are in no record if others are better.
    best = max(entry["validation_accuracy"] for entry in validation)
    assert final["validation_accuracy"] == best
    steps = [entry["step"] for entry in validation[:-1] if entry["validation_accuracy"] == best]
    assert final["best_step"] == (steps[0] if steps else 6)
    if steps:
        kept = load_file(folder / f"checkpoint-{steps[0]:06d}" / "model.safetensors")
        assert all(torch.equal(value, kept[name]) for name, value in load_file(folder / "model.safetensors").items())
    assert AutoConfig.from_pretrained(folder).model_type == model_type
    # All 25 test examples count, one by one.
    assert (final["test_accuracy"] * 25) == pytest.approx(round(final["test_accuracy"] * 25))
    reset()
    # In batches of the run's size: with the published pseudo-inverse an output depends on its batch.
    script.main(["--eval_only", "--model_name_or_path", str(folder), "--cache_dir", str(cache)])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")
    assert printed == {name: final[name] for name in names}


def test_the_record_has_the_guesses_and_the_data(train):
    metrics = metrics_of(train())
    assert set(metrics["facts"]["baselines"]) == {"majority", "root_operator", "root_literals"}
    assert [metrics["facts"][f"{name}_examples"] for name in ("train", "validation", "test")] == [60, 30, 25]
    rates = [record["learning_rate"] for record in metrics["history"]]
    assert rates == pytest.approx([0.0004, 0.01, *np.linspace(0.01, 0.0004 / 1e4, 5)[1:]])
    assert metrics["final"]["train_examples_seen"] == 48


@pytest.mark.parametrize("flags", [[], DYNAMIC, BOTH], ids=["stock", "dynamic", "both"])
def test_a_stopped_run_goes_on_to_the_same_result(train, monkeypatch, flags):
    whole = train(*flags, name="whole")
    step_of = loop.train_step

    def stop_in_between(*arguments):
        loss = step_of(*arguments)
        if arguments[-2] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(loop, "train_step", stop_in_between)
    resumed = train(*flags, name="resumed")
    assert not (resumed / "metrics.json").exists()
    monkeypatch.setattr(loop, "train_step", step_of)
    train(*flags, "--resume_from_checkpoint", name="resumed")
    assert_same_result(resumed, whole)


def test_a_run_with_other_settings_is_not_continued(train):
    train(name="run")
    with pytest.raises(SystemExit, match=r"cycle_beta1: true -> false"):
        train("--resume_from_checkpoint", "--cycle_beta1", "False", name="run")
    with pytest.raises(SystemExit, match=r"train_fingerprint"):
        train("--resume_from_checkpoint", "--data_seed", "1", name="run")


def test_the_papers_figures_are_drawn_of_monitored_runs(train):
    flags = {"stock": [], "identity": IDENTITY, "row": ["--attention_preconditioner", "row"]}
    folders = {label: train(*given, "--spectral_monitor_every", "2", name=label) for label, given in flags.items()}
    variants = tuple(Variant(label) for label in flags)
    sweep = Sweep("example", "An example", SCRIPT, (Setting("ListOps"),), variants, (0,), draws_monitor=True)
    arms = {("ListOps", label): ArmResult({0: comparison.read_run(folder)}) for label, folder in folders.items()}
    results = Results(sweep, comparison.METRICS["examples"]["accuracy"], {}, {}, arms)
    figures = sweep_figures.monitor_figures(results)
    assert list(figures) == ["listops-training", "listops-spectra", "heads"]
    records = {
        label: json.loads((folder / "spectral_monitor.json").read_text())["records"]
        for label, folder in folders.items()
    }
    assert [[record["step"] for record in each] for each in records.values()] == [[0, 2, 4, 6]] * 3
    groups = {label: [records[label]] for label in ("stock", "row")}
    lines = sweep_figures.heads_figure(results, {"ListOps": groups}).axes[0].get_lines()
    drawn = {line.get_label(): 10 ** line.get_ydata() for line in lines}
    for label, key in (("row: A", "kappa_head_output"), ("row: preconditioned", "kappa_head_output_preconditioned")):
        assert drawn[label] == pytest.approx([np.mean(record[key]) for record in records["row"]])
    lines = sweep_figures.spectra_figure({"identity": [records["identity"]]}, "").axes[-1].get_lines()
    drawn = {line.get_label(): 10 ** line.get_ydata() for line in lines}
    for name in ("query", "key", "value"):  # of W + C
        expected = [np.mean(record[f"kappa_{name}_effective"]) for record in records["identity"]]
        assert drawn[f"identity, {name}"] == pytest.approx(expected)


def test_stock_and_conditioned_runs_of_one_seed_start_from_the_same_weights(train):
    still = ["--max_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-12"]
    stock, conditioned = (
        load_file(train(*still, *flags, name=name) / "model.safetensors")
        for name, flags in (("a", []), ("b", IDENTITY))
    )
    assert stock.keys() == conditioned.keys()
    for name, value in stock.items():
        torch.testing.assert_close(conditioned[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("task", ["text", "retrieval", "image", "pathfinder"])
def test_the_other_tasks_train_on_their_files(task, train, tmp_path):
    writers = {"text": "imdb_lines", "retrieval": "citations", "image": "cifar_tables", "pathfinder": "pathfinder"}
    getattr(lra_files, writers[task])(tmp_path / "data")
    images = task in ("image", "pathfinder")
    length = [] if images else ["--max_length", "16"]
    # Real data: as many as there are.
    counts = ["--validation_samples", "2", "--test_samples", "2", "--train_samples", "2"]
    data = ["--task", task, "--data_dir", str(tmp_path / "data"), *length, *counts]
    folder = train("--per_device_train_batch_size", "2", *IDENTITY, data=data)
    metrics = metrics_of(folder)
    assert 0 <= metrics["final"]["test_accuracy"] <= 1
    config = AutoConfig.from_pretrained(folder)
    assert config.pairs == (task == "retrieval")
    assert config.max_position_embeddings == (1024 if images else 16)
    assert AutoModelForSequenceClassification.from_pretrained(folder).classifier[2].out_features == config.num_labels


def test_the_controls_the_ablations_and_softmax_train(train):
    for index, flags in enumerate(
        (
            ["--projection_init", "conditioned"],
            ["--no_layer_norm", *IDENTITY],
            ["--attention_type", "softmax", "--attention_preconditioner", "row"],
            ["--padding_in_landmarks", "False", "--batch_wide_inverse", "False", "--mean_over_padding", "False"],
        )
    ):
        folder = train(*flags, name=f"run-{index}")
        assert np.isfinite(metrics_of(folder)["final"]["test_loss"])
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_saved_model_can_be_trained_on_and_another_task_refuses_it(train, tmp_path):
    first = train(*IDENTITY, name="first")
    second = train("--model_name_or_path", str(first), name="second", model=())
    assert AutoConfig.from_pretrained(second).lambda_ == 1.0
    with pytest.raises(SystemExit, match=r"has max_position_embeddings=16, and --task listops .* needs 32"):
        train("--model_name_or_path", str(first), "--max_length", "32", name="third", model=())


def test_a_checkpoint_that_cannot_be_used_is_said_before_data_are_made(train, tmp_path, cache):
    before = sorted(path.name for path in cache.iterdir()) if cache.exists() else []
    for flags in ([], ["--eval_only"]):
        with pytest.raises(
            SystemExit, match=r"error: .*absent cannot be loaded as a model for SequenceClassification"
        ):
            train("--model_name_or_path", str(tmp_path / "absent"), "--data_seed", "77", *flags, model=())
    assert sorted(path.name for path in cache.iterdir()) == before


def test_bad_data_end_the_run_with_a_message(train, tmp_path):
    with pytest.raises(SystemExit, match=r"error: --data_dir .* holds no data of listops in a known form"):
        train("--data_dir", str(tmp_path))
    with pytest.raises(SystemExit, match=r"error: .* hard to find"):
        train("--listops_min_length", "2", "--max_length", "5", "--num_landmarks", "4", "--train_samples", "3000")


def test_runs_compare_by_the_test_accuracy(train, tmp_path):
    for seed in (0, 1):
        train("--seed", str(seed), name=f"stock-{seed}")
    runs = [comparison.read_run(tmp_path / f"stock-{seed}") for seed in (0, 1)]
    metric = comparison.find_metric(runs)
    assert [run.value(metric) for run in runs] == [
        100 * metrics_of(run.directory)["final"]["test_accuracy"] for run in runs
    ]
    curve = runs[0].curve(metric.key)
    assert [value for _, value in curve] == [entry["validation_accuracy"] for entry in runs[0].record.validation]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(train, tmp_path, cache):
    # Nothing of the published peculiarities but what does not depend on how the batch is cut.
    flags = [*IDENTITY, "--hidden_dropout_prob", "0", "--batch_wide_inverse", "False"]
    alone = train(*flags, name="alone")
    together = tmp_path / "together"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*torchrun, *STEPS, *DATA, *MODEL, *flags, "--cache_dir", str(cache), "--output_dir", str(together)]
    subprocess.run([*command, "--per_device_train_batch_size", "4"], env=environment, check=True, timeout=300)
    assert metrics_of(together)["facts"]["processes"] == 2
    for one, two in zip(metrics_of(alone)["history"], metrics_of(together)["history"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
    for one, two in zip(metrics_of(alone)["validation"], metrics_of(together)["validation"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
