import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from detection_files import SWIN, XCIT, unregister, write_coco
from scripts_loading import REPOSITORY, load_script

from hf_specattn import fold
from hf_specattn.checkpoints.evaluations_file import read_evaluations
from recipes.detection.coco_evaluation import MEASURES
from recipes.detection.detector import load_detector
from recipes.run import loop
from recipes.run.checkpointing import list_checkpoints

SCRIPT = REPOSITORY / "scripts" / "train_detection.py"

TINY = [
    *("--body", "xcit_nano_12_p8_224", "--body_args", json.dumps({**XCIT, "drop_path_rate": 0.2})),
    *("--fpn_channels", "16", "--box_head_size", "16", "--mask_layers", "16"),
]
STEPS = [
    *("--max_steps", "4", "--per_device_train_batch_size", "2", "--warmup_steps", "1"),
    *("--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2"),
]
FEW = ["--max_train_samples", "10", "--max_validation_samples", "3"]
IDENTITY = ["--spectral_conditioning", "--lambda_", "1.0"]
DYNAMIC = ["--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "2"]
TIMING = {"images_per_second", "seconds"}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    unregister()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(script, tmp_path):
    """A function: run the script in this process, on a few shapes with a tiny model; returns the folder it wrote."""

    def run(*flags, name="run", model=tuple(TINY), data=tuple(FEW)):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        folder = tmp_path / name
        script.main([*STEPS, *data, *model, "--output_dir", str(folder), *flags])
        return folder

    return run


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_same_result(one, other):
    """Weights, optimizer and every measured number; only times may differ."""
    checkpoint = list_checkpoints(one)[-1].name
    assert checkpoint == list_checkpoints(other)[-1].name
    for name in ("model.safetensors", "config.json", f"{checkpoint}/training_state.safetensors", "detections.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = metrics_of(one), metrics_of(other)
    for record, expected in zip(first["history"], second["history"], strict=True):
        assert {n: v for n, v in record.items() if n not in TIMING} == {
            n: v for n, v in expected.items() if n not in TIMING
        }
    assert first["validation"] == second["validation"]


@pytest.mark.parametrize(("flags", "kind"), [([], "Detector"), (IDENTITY, "SpecDetector")], ids=["stock", "identity"])
def test_what_is_saved_is_what_was_measured(train, script, capsys, flags, kind):
    folder = train(*flags, "--draw", "2")
    metrics = metrics_of(folder)
    final = metrics["final"]
    assert [record["step"] for record in metrics["history"]] == [1, 2, 3, 4]
    assert [record["step"] for record in metrics["validation"]] == [2, 4]
    assert (metrics["facts"]["object_classes"], metrics["facts"]["train_images"]) == (3, 10)
    assert [each.metric_value for each in read_evaluations(folder)] == [
        final[name] for name in ("validation_box_ap", "validation_mask_ap", "validation_loss")
    ]
    assert [path.name for path in sorted((folder / "predictions").iterdir())] == ["0000.png", "0001.png"]
    detector = load_detector(folder).eval()
    assert type(detector).__name__ == kind
    if flags:
        images = [torch.rand(3, 128, 128)]
        with torch.no_grad():
            expected = detector(images).detections[0]
            assert all(
                torch.equal(value, expected[name]) for name, value in fold(detector)(images).detections[0].items()
            )
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(["--eval_only", "--model_name_or_path", str(folder)])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == {name: final[name] for name in ("validation_loss", *(f"validation_{each}" for each in MEASURES))}


@pytest.mark.parametrize("flags", [[], DYNAMIC], ids=["stock", "dynamic"])
def test_a_stopped_run_goes_on_to_the_same_result(train, monkeypatch, flags):
    flags = [*flags, "--augmentation", "flip"]
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
    assert list_checkpoints(resumed)[-1].name == "checkpoint-000003"
    monkeypatch.setattr(loop, "train_step", step_of)
    train(*flags, "--resume_from_checkpoint", "--dataloader_num_workers", "1", name="resumed")
    assert_same_result(resumed, whole)
    with pytest.raises(SystemExit, match='augmentation: "flip" -> "none"'):
        train(*flags[:-1], "none", "--resume_from_checkpoint", name="resumed")


def test_a_preconditioned_and_conditioned_swin_in_half_precision(train):
    model = ["--body", "swin", "--body_args", json.dumps(SWIN), *TINY[4:]]
    flags = ["--spectral_conditioning", "--attention_preconditioner", "row", "--mixed_precision", "bf16"]
    folder = train(*flags, "--spectral_monitor_every", "2", "--eval_steps", "0", model=model)
    metrics = metrics_of(folder)
    detector = load_detector(folder)
    assert detector.config.attention_preconditioner == "row"
    assert detector.config.lambda_ == metrics["arguments"]["found_lambda"]
    assert {value.dtype for value in detector.state_dict().values() if value.is_floating_point()} == {torch.float32}
    records = json.loads((folder / "spectral_monitor.json").read_text())["records"]
    assert [record["step"] for record in records] == [0, 2, 4]


def test_training_goes_on_from_a_trained_detector(train, tmp_path):
    first = train(*IDENTITY, name="first")
    small = ["--model_name_or_path", str(first)]
    second = train("--learning_rate", "1e-9", "--batch_norm", "frozen", model=small, name="second")
    assert load_detector(second).config.spectral_config == load_detector(first).config.spectral_config
    aps = [metrics_of(folder)["final"]["validation_loss"] for folder in (first, second)]
    assert aps[0] == pytest.approx(aps[1], rel=1e-4)
    data = ["--coco_dir", str(write_coco(tmp_path / "coco"))]
    with pytest.raises(
        SystemExit, match=r"knows 3 classes \(circle, square, triangle, ...\), and the images are of 2"
    ):
        train(model=small, data=data, name="third")


def test_files_in_coco_s_layout(train, tmp_path):
    folder = train(data=["--coco_dir", str(write_coco(tmp_path / "coco")), "--augmentation", "flip"])
    facts = metrics_of(folder)["facts"]
    assert (facts["object_classes"], facts["train_images"], facts["validation_images"]) == (2, 3, 3)
    assert load_detector(folder).config.id2label == {0: "car", 1: "toothbrush"}
    assert {each["category_id"] for each in json.loads((folder / "detections.json").read_text())} <= {3, 90}


def test_bad_input_ends_the_run_with_a_message(train, tmp_path):
    coco = write_coco(tmp_path / "coco")
    data = ["--coco_dir", str(coco)]
    file = coco / "train2017" / "9.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"error: 1 of the 3 images of (?s:.*)9.jpg: image file is truncated"):
        train(data=data)
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    del content["annotations"]
    (coco / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"error: .* has no annotations"):
        train(data=data)
    with pytest.raises(SystemExit, match=r"error: --body resnet_1: neither"):
        train(model=["--body", "resnet_1"])
    with pytest.raises(SystemExit, match=r"error: No query, key or value projection"):
        train(*IDENTITY, model=["--body", "resnet10t"])
    with pytest.raises(SystemExit, match=r"error: .*cannot be preconditioned: .*attention between channels"):
        train("--attention_preconditioner", "row")
    assert not (tmp_path / "run").exists()


def test_a_plan_trains_nothing(script, tmp_path, caplog):
    with caplog.at_level("INFO", "train_detection"):
        script.main(["--show_plan", "--output_dir", str(tmp_path / "run")])
    assert "Steps: 300 of 4 images, 3 passes." in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_see_each_image_once(train, tmp_path):
    """What is sampled of an image differs between processes, so their training does; the evaluation does not."""
    alone = train(name="alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    flags = ["--model_name_or_path", str(alone), "--learning_rate", "1e-12", "--batch_norm", "frozen"]
    flags += ["--per_device_eval_batch_size", "1", "--output_dir"]
    together, single = tmp_path / "together", train(*flags[:-1], model=[], name="single")
    command = [*torchrun, *STEPS, *FEW, *flags, str(together)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert metrics_of(together)["facts"]["processes"] == 2
    for one, two in zip(metrics_of(single)["validation"], metrics_of(together)["validation"], strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    found = [json.loads((folder / "detections.json").read_text()) for folder in (single, together)]
    assert [len(each) for each in found] == [len(found[0])] * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_images_of_coco_are_learned(train, shared_data):
    folder = shared_data / "coco-permissive"
    if not folder.is_dir():
        pytest.skip("there is no coco-permissive in ../shared/data")
    data = ["--coco_dir", str(folder), "--validation_split", "train2017"]
    data += ["--max_train_samples", "8", "--max_validation_samples", "8", "--per_device_eval_batch_size", "1"]
    sizes = ["--min_size", "192", "--max_size", "192", "--augmentation", "none"]
    steps = ["--max_steps", "450", "--per_device_train_batch_size", "2", "--warmup_steps", "30"]
    steps += ["--logging_steps", "50", "--eval_steps", "0", "--save_steps", "0"]
    final = metrics_of(train(*sizes, *steps, data=data, model=[]))["final"]
    assert final["validation_box_ap"] > 0.7
    assert final["validation_mask_ap"] > 0.4
