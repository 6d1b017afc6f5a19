"""The sweeps on object detection: every run's flags are the script's, and small models have what the sweep changes."""

import pytest
import torch
from accelerate import Accelerator
from detection_files import unregister
from scripts_loading import REPOSITORY

from recipes.compare.comparison import ComparisonError, Run, find_metric
from recipes.compare.sweeps.detection_sweeps import DETECTION_SWEEPS, detection_operations, parse_detection_arguments
from recipes.compare.sweeps.execution import planned_runs
from recipes.compare.sweeps.sweep_presets import SCALES
from recipes.detection.detector import features_of
from recipes.detection.detector_building import build_detector
from recipes.run.run_metrics import RunMetrics

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture(autouse=True)
def detectors_known_here_alone():
    yield
    unregister()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", DETECTION_SWEEPS)
def test_the_script_takes_every_run(name, scale, tmp_path):
    sweep = DETECTION_SWEEPS[name](scale, SCRIPTS)
    assert len({len(row) for row in sweep.published[1]}) == 1
    planned = planned_runs(sweep, {tuning.name: tuning.values[0] for tuning in sweep.tunings})
    for _, run in {(of.label, *run.flags): (of, run) for of, run in planned}.values():
        arguments, spectral = parse_detection_arguments(run.arguments(tmp_path), "a run")
        assert arguments.seed == run.seed
        assert spectral.spectral_conditioning == ("--spectral_conditioning" in run.flags)
        assert (arguments.coco_dir is None) == (scale == "small")


@pytest.mark.parametrize("name", DETECTION_SWEEPS)
def test_each_small_variant_is_another_model_of_the_same_start(name, tmp_path):
    sweep = DETECTION_SWEEPS[name]("small", SCRIPTS)
    images, samples = torch.rand(1, 3, 64, 64), {"images": [torch.rand(3, 64, 64)]}
    features = {}
    for _, run in planned_runs(sweep, {"scale": 3.0}):
        if run.seed != sweep.seeds[0] or run.flags in features:
            continue
        arguments, spectral = parse_detection_arguments(run.arguments(tmp_path), "a run")
        torch.manual_seed(0)
        detector = build_detector(arguments, spectral, ["one"], samples, Accelerator(cpu=True)).eval()
        with torch.no_grad():
            features[run.flags] = torch.cat([each.flatten() for each in features_of(detector.body, images)])
    assert len(features) == len(sweep.variants)
    values = list(features.values())
    for index, one in enumerate(values):
        assert all((one - other).abs().max() > 1e-4 for other in values[:index])


def test_operations_grow_with_steps_and_pixels(tmp_path):
    def operations(*flags):
        return detection_operations(parse_detection_arguments([*flags, "--show_plan"], "a run")[0])

    once = operations("--max_steps", "10")
    assert once > 1e9
    assert operations("--max_steps", "20") == pytest.approx(2 * once)
    # The heads see as many regions of images of any size; all before them grows with the pixels.
    sides = [
        operations("--max_steps", "10", "--min_size", str(side), "--max_size", str(side)) for side in (128, 256, 512)
    ]
    assert sides[0] == once
    assert sides[2] - sides[1] == pytest.approx(4 * (sides[1] - sides[0]))


def test_detection_is_judged_by_average_precision(tmp_path):
    final = {"step": 1, "validation_loss": 2.0, "validation_box_ap": 0.41, "validation_mask_ap": 0.4}
    run = Run(tmp_path, 0, "stock", {}, RunMetrics(arguments={}, facts={"images_per_step": 4}, final=final))
    assert run.value(find_metric([run])) == pytest.approx(41)
    assert run.value(find_metric([run], "mask_ap")) == pytest.approx(40)
    with pytest.raises(ComparisonError, match="--metric accuracy: these runs record box_ap, mask_ap, loss"):
        find_metric([run], "accuracy")
