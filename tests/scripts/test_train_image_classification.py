import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from image_files import write_folders, write_idx
from PIL import Image
from safetensors.torch import load_file
from scripts_loading import REPOSITORY, load_script
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_specattn import AttentionSpec, PreconditionerConfig, architectures
from hf_specattn.checkpoints.evaluations_file import read_evaluations
from recipes.compare import comparison
from recipes.run import loop
from recipes.run.checkpointing import list_checkpoints

SCRIPT = REPOSITORY / "scripts" / "train_image_classification.py"

MODEL = [
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "2",
    "--num_attention_heads",
    "2",
    "--intermediate_size",
    "32",
    "--patch_size",
    "4",
]
STEPS = [
    "--max_steps",
    "6",
    "--per_device_train_batch_size",
    "4",
    "--logging_steps",
    "1",
    "--eval_steps",
    "3",
    "--save_steps",
    "2",
]
FEW = ["--max_train_samples", "40", "--max_validation_samples", "20"]
IDENTITY = ["--spectral_conditioning", "--lambda_", "1.0"]
DYNAMIC = ["--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "2"]
# Both sources of the method, with the lambda that the run finds, and a look at them.
BOTH = [
    "--spectral_conditioning",
    "--attention_preconditioner",
    "row",
    "--preconditioner_scale",
    "match",
    "--spectral_monitor_every",
    "2",
]
# Everything that draws random numbers, and the average.
CHANCE = [
    "--random_shift",
    "1",
    "--horizontal_flip",
    "0.5",
    "--rand_augment",
    "rand-m9-mstd0.5-inc1",
    "--random_erasing",
    "0.3",
]
CHANCE += [
    "--mixup",
    "0.8",
    "--cutmix",
    "1",
    "--label_smoothing",
    "0.1",
    "--repeated_augmentation",
    "2",
    "--model_ema_decay",
    "0.8",
]
TIMM = ["--timm_model", "vit_tiny_patch16_224", "--image_size", "8", "--drop_path_rate", "0.5", "--timm_model_args"]
TIMM.append('{"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}')
TIMING = {"images_per_second", "seconds"}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(script, tmp_path):
    """A function: run the script in this process, on a few digits with a tiny model; returns the folder it wrote."""

    def run(*flags, name="run", model=tuple(MODEL), data=tuple(FEW)):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        folder = tmp_path / name
        script.main([*STEPS, *data, *model, "--output_dir", str(folder), *flags])
        return folder

    return run


@pytest.fixture
def timm_in_the_table(monkeypatch):
    spec = AttentionSpec("Attention", {"qkv": ("query", "key", "value")}, query_heads="num_heads")
    monkeypatch.setitem(architectures.ARCHITECTURES, "timm_vit", (spec,))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def without_timing(records):
    return [{name: value for name, value in record.items() if name not in TIMING} for record in records]


def assert_same_result(one, other):
    """Weights, optimizer and every measured number; only times may differ."""
    checkpoints = [list_checkpoints(folder)[-1].name for folder in (one, other)]
    assert checkpoints[0] == checkpoints[1]
    for name in ("model.safetensors", "config.json", f"{checkpoints[0]}/training_state.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = metrics_of(one), metrics_of(other)
    assert without_timing(first["history"]) == without_timing(second["history"])
    assert first["validation"] == second["validation"]


@pytest.mark.parametrize(
    ("flags", "model_type"),
    [([], "vit"), (IDENTITY, "specattn_vit"), (DYNAMIC, "specattn_vit"), (CHANCE, "vit")],
    ids=["stock", "identity", "dynamic", "average"],
)
def test_what_is_saved_has_the_logged_accuracy(train, script, capsys, flags, model_type):
    folder = train(*flags)
    final = metrics_of(folder)["final"]
    accuracy, loss = read_evaluations(folder)
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", final["validation_accuracy"])
    assert (loss.metric_type, loss.metric_value) == ("loss", final["validation_loss"])
    assert AutoConfig.from_pretrained(folder).model_type == model_type
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(["--eval_only", "--model_name_or_path", str(folder)])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == {name: final[name] for name in ("validation_accuracy", "validation_loss")}


def test_a_pipeline_classifies_with_what_was_saved(train, tmp_path):
    folders = [write_folders(tmp_path / name, 12, 8, seed) for seed, name in enumerate(("train", "validation"))]
    data = ["--train_dir", str(folders[0]), "--validation_dir", str(folders[1]), "--image_size", "8"]
    folder = train(data=data)
    classify = pipeline("image-classification", model=str(folder), top_k=1)
    images = sorted(folders[1].rglob("*.png"))
    correct = [classify(str(image))[0]["label"] == image.parent.name for image in images]
    assert np.mean(correct) == metrics_of(folder)["final"]["validation_accuracy"]


def test_the_processor_prepares_gray_images(train):
    folder = train()
    image = Image.fromarray(np.full((8, 8), 100, np.uint8))
    inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    assert AutoModelForImageClassification.from_pretrained(folder)(**inputs).logits.shape == (1, 10)


def test_the_record_is_complete(train):
    metrics = metrics_of(train("--gradient_accumulation_steps", "2"))
    assert [record["step"] for record in metrics["history"]] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in metrics["validation"]] == [3, 6]
    # Six steps of eight images: a warmup of 5 passes over 40 images would be longer than the run.
    rates = [record["learning_rate"] for record in metrics["history"]]
    assert rates == pytest.approx([1e-3 * step / 6 for step in range(6)])
    assert metrics["final"]["train_images_seen"] == 48
    assert metrics["facts"]["images_per_step"] == 8
    assert metrics["facts"]["epochs"] == 1.2


def test_accumulation_changes_nothing(train):
    one = train("--per_device_train_batch_size", "8", *CHANCE, name="one")
    two = train(*["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"], *CHANCE, name="two")
    for first, second in zip(metrics_of(one)["history"], metrics_of(two)["history"], strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "flags", [[], [*IDENTITY, *CHANCE], DYNAMIC, BOTH], ids=["stock", "identity-chance", "dynamic", "both"]
)
def test_a_stopped_run_goes_on_to_the_same_result(train, monkeypatch, flags):
    whole = train(*flags, name="whole")
    step_of = loop.train_step

    def stop_in_between(*arguments):
        loss = step_of(*arguments)
        if arguments[-2] == 3:  # the resumed run begins behind it
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(loop, "train_step", stop_in_between)
    resumed = train(*flags, name="resumed")
    assert not (resumed / "metrics.json").exists()
    assert [path.name for path in list_checkpoints(resumed)][-1] == "checkpoint-000003"
    train(*flags, "--resume_from_checkpoint", "--dataloader_num_workers", "1", name="resumed")
    assert_same_result(resumed, whole)


def test_what_a_run_with_both_sources_records(train):
    folder = train(*BOTH)
    arguments = metrics_of(folder)["arguments"]
    config = AutoConfig.from_pretrained(folder)
    assert arguments["lambda_"] == "auto"
    assert arguments["found_lambda"] == config.lambda_ <= 10
    assert config.preconditioner_config == PreconditionerConfig(scale="match")
    records = json.loads((folder / "spectral_monitor.json").read_text())["records"]
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    with pytest.raises(SystemExit, match='preconditioner_scale: "match" -> "unit"'):
        train(*BOTH[:3], "--resume_from_checkpoint", "--lambda_", str(config.lambda_), name="run")


def test_attention_that_cannot_be_looked_at_ends_a_monitored_run_with_a_message(train):
    settings = '{"img_size": 32, "embed_dim": 32, "depth": 1, "cls_attn_layers": 1, "num_heads": 2}'
    xcit = ["--timm_model", "xcit_nano_12_p8_224", "--timm_model_args", settings]
    with pytest.raises(SystemExit, match=r"error: --spectral_monitor_every: .*Leave the flag out for this model"):
        train("--spectral_monitor_every", "2", model=xcit)


def test_a_conditioned_model_of_timm_with_stochastic_depth_goes_on_too(train, timm_in_the_table):
    flags = [*IDENTITY, *CHANCE]
    whole = train(*flags, model=TIMM, name="whole")
    resumed = train(*flags, model=TIMM, name="resumed")
    latest = list_checkpoints(resumed)[-1]
    (resumed / "metrics.json").unlink()
    for path in latest.iterdir():
        path.unlink()
    latest.rmdir()
    assert "config.json" not in {path.name for path in list_checkpoints(resumed)[-1].iterdir()}
    train(*flags, "--resume_from_checkpoint", model=TIMM, name="resumed")
    assert_same_result(resumed, whole)
    assert AutoModelForImageClassification.from_pretrained(resumed).config.model_type == "timm_wrapper"


def test_a_run_with_other_settings_is_not_continued(train):
    train(name="run")
    with pytest.raises(SystemExit, match=r"mixup: 0\.0 -> 0\.5"):
        train("--resume_from_checkpoint", "--mixup", "0.5", name="run")
    with pytest.raises(SystemExit, match=r"train_fingerprint"):
        train("--resume_from_checkpoint", "--max_train_samples", "39", name="run")


def test_the_controls_and_the_ablation_train(train):
    for index, flags in enumerate(
        (
            ["--projection_init", "mimetic"],
            ["--projection_init", "orthogonal", "--match_norm_of", "identity=1.0"],
            ["--projection_init", "conditioned", *IDENTITY],
            ["--no_layer_norm", *IDENTITY],
        )
    ):
        folder = train(*flags, name=str(index))
        assert np.isfinite(metrics_of(folder)["final"]["validation_loss"])
    assert (folder / "weights_alone.safetensors").is_file()
    assert not (folder / "config.json").exists()
    assert not any("layernorm" in name for name in load_file(folder / "weights_alone.safetensors"))


def test_runs_compare_by_accuracy(train, tmp_path, capsys):
    folders = [
        str(train("--seed", str(seed), *flags, name=f"{seed}{len(flags)}"))
        for seed in (0, 1)
        for flags in ([], IDENTITY)
    ]
    compare_runs = load_script(REPOSITORY / "scripts" / "compare_runs.py")
    compare_runs.main([*folders, "--output_dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    runs = comparison.read_runs(folders)
    stock = [run.record.final["validation_accuracy"] * 100 for run in runs if run.spectral == "stock"]
    assert f"| stock | 2 | {sum(stock) / 2:.2f} |" in text
    assert "validation accuracy (%), mean" in text
    assert "6 steps, 24 training images, the same 20 validation images" in text
    compare_runs.main([*folders, "--metric", "loss"])
    losses = [run.loss for run in runs if run.spectral == "stock"]
    assert f"| stock | 2 | {sum(losses) / 2:.4f} |" in capsys.readouterr().out


def test_folders_and_idx_files(train, tmp_path):
    folders = [write_folders(tmp_path / name, 12, 9, seed) for seed, name in enumerate(("train", "validation"))]
    data = ["--train_dir", str(folders[0]), "--validation_dir", str(folders[1]), "--image_size", "8"]
    facts = metrics_of(train(data=data, name="folders"))["facts"]
    assert (facts["channels"], facts["image_size"], facts["classes"], facts["train_images"]) == (3, 8, 3, 12)
    facts = metrics_of(train(data=["--idx_dir", str(write_idx(tmp_path / "idx", size=8))], name="run"))["facts"]
    assert (facts["channels"], facts["image_size"], facts["classes"], facts["train_images"]) == (1, 8, 3, 12)


def test_bad_input_ends_the_run_with_a_message(train, tmp_path):
    folders = [write_folders(tmp_path / name, 12, 9, seed) for seed, name in enumerate(("train", "validation"))]
    data = ["--train_dir", str(folders[0]), "--validation_dir", str(folders[1]), "--image_size", "8"]
    (folders[0] / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"error: 1 of the 13 training images cannot be read(?s:.*)broken\.png"):
        train(data=data)
    folder = train("--skip_unreadable_images", data=data)
    assert metrics_of(folder)["facts"]["skipped_images"] == [str(folders[0] / "red" / "broken.png")]
    for path in (folders[1] / "red").iterdir():
        path.unlink()
    (folders[1] / "red").rmdir()
    with pytest.raises(SystemExit, match=r"error: The validation images .* class\(es\) red"):
        train("--skip_unreadable_images", data=data, name="other")
    with pytest.raises(SystemExit, match=r"error: Images of 10 x 10 cannot be cut into patches of --patch_size 4"):
        train("--image_size", "10", name="size")
    with pytest.raises(SystemExit, match=r"error: .*cannot be conditioned: No query, key or value projection"):
        train(*IDENTITY, model=["--timm_model", "resnet10t", "--image_size", "32"], name="projections")
    assert not any((tmp_path / name).exists() for name in ("other", "size", "projections"))


def test_diverging_training_says_so(train):
    with pytest.raises(SystemExit, match=r"(nan|inf) at step (?s:.*)checkpoint"):
        train("--learning_rate", "1e8", "--max_grad_norm", "0", "--warmup_epochs", "0")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(train, tmp_path):
    flags = [*CHANCE, *IDENTITY, "--per_device_eval_batch_size", "3"]
    alone = train("--per_device_train_batch_size", "8", *flags, name="alone")
    together = tmp_path / "together"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*torchrun, *STEPS, *FEW, *MODEL, *flags, "--output_dir", str(together)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert metrics_of(together)["facts"]["processes"] == 2
    for one, two in zip(metrics_of(alone)["history"], metrics_of(together)["history"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
    for one, two in zip(metrics_of(alone)["validation"], metrics_of(together)["validation"], strict=True):
        assert one["validation_loss"] == pytest.approx(two["validation_loss"], rel=1e-5)
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(together / "model.safetensors").items():
        # A bias of the keys changes no softmax: its gradient is rounding alone, and AdamW takes whole steps along it.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                tensor, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(train, tmp_path):
    flags = [*CHANCE, *IDENTITY, "--max_steps", "60", "--save_steps", "3"]
    whole = train(*flags, name="whole")
    killed = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(SCRIPT), *STEPS, *FEW, *MODEL, *flags, "--output_dir", str(killed)]
    process = subprocess.Popen(command, env=environment)
    give_up = threading.Timer(240, process.kill)
    give_up.start()
    while process.poll() is None and len(list_checkpoints(killed)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    give_up.cancel()
    assert list_checkpoints(killed)
    assert not (killed / "metrics.json").exists()
    train(*flags, "--resume_from_checkpoint", name="killed")
    assert_same_result(killed, whole)
