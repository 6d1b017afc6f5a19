"""The command line of train_detection.py: presets, what flags replace, and what is refused before work starts."""

import pytest

from recipes.detection.detection_arguments import PRESETS, RECIPES, DetectionArguments, parse_arguments

IDENTITY = ["--spectral_conditioning", "--lambda_", "2"]


def parse(*flags):
    return parse_arguments([*flags, "--show_plan"], "a test")


def test_the_defaults_are_the_shapes():
    arguments, spectral = parse()
    assert arguments.coco_dir is None
    assert arguments.body is None
    assert arguments.steps_of(400, 4) == 300
    assert not spectral.spectral_conditioning
    assert vars(parse("--preset", "shapes")[0]) == {**vars(arguments), "preset": "shapes"}


@pytest.mark.parametrize("preset", RECIPES)
def test_a_published_recipe_is_that_batch_on_one_gpu(preset):
    arguments, _ = parse("--preset", preset)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert arguments.milestones == [27.0, 33.0]
    assert arguments.steps_of(118_287, 16) == 266_146
    assert (arguments.min_size, arguments.max_size, arguments.augmentation) == (800, 1333, "multi_scale")
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-4, 0.05, 0.0)
    assert arguments.drop_path_rate == {"swin_b": 0.3}.get(preset, 0.05)
    assert arguments.out_indices == (None if preset == "swin_b" else [3, 5, 7, 11])
    assert set(PRESETS[preset]) <= set(vars(arguments))


def test_flags_replace_what_they_contradict_in_a_preset():
    arguments, _ = parse("--preset", "xcit_s12_p16", "--classifier", "mine")
    assert (arguments.body, arguments.classifier) == (None, "mine")
    arguments, _ = parse("--preset", "xcit_s12_p16", "--body", "swin")
    assert (arguments.body, arguments.classifier, arguments.out_indices) == ("swin", None, None)
    arguments, _ = parse("--preset", "swin_b", "--max_steps", "9")
    assert (arguments.milestones, arguments.steps_of(1000, 1)) == (None, 9)


def test_the_body_is_told_its_arguments_and_stochastic_depth():
    arguments, _ = parse("--body", "swin", "--body_args", '{"embed_dim": 8}', "--drop_path_rate", "0.2")
    assert arguments.body_arguments() == {"embed_dim": 8, "drop_path_rate": 0.2}
    assert DetectionArguments().body_arguments() == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--anchor_sizes", "1", "2"], "--anchor_sizes [1, 2]: give five sizes"),
        (["--mask_layers", "0"], "--mask_layers [0]: give at least one"),
        (["--min_size", "300"], "--max_size 128 is less than --min_size 300"),
        (["--milestones", "3", "2"], "--milestones [3.0, 2.0] must rise"),
        (["--body_args", "{}"], "--body_args: for the body that --body names"),
        (["--body", "swin", "--body_args", "[1]"], "--body_args '[1]' is not a JSON object"),
        (["--warmup_factor", "2"], "--warmup_factor 2.0 must be at least 0 and at most 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0 must be at least"),
        (["--drop_path_rate", "1"], "--drop_path_rate 1.0 must be"),
        (["--torch_compile"], "--torch_compile: what a detector computes depends on what it finds"),
        (["--model_name_or_path", "x", "--body", "swin"], "--body: --model_name_or_path has a body already"),
        (["--eval_only"], "--eval_only measures a saved model"),
        (["--preset", "coco"], "--preset coco is neither one of shapes, xcit_s12_p16, xcit_s12_p8, swin_b"),
        ([*IDENTITY, "--match_norm_of", "svd"], "--match_norm_of"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
