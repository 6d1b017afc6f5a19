import json

import pytest

from recipes.images.image_arguments import ImageArguments, parse_arguments
from recipes.images.imagenet_recipes import PRESETS, RECIPES, deviations


@pytest.fixture
def parse(tmp_path):
    return lambda *flags: parse_arguments(["--output_dir", str(tmp_path / "run"), *flags], "test")


@pytest.fixture
def refusal(parse, capsys):
    def message(*flags):
        with pytest.raises(SystemExit) as caught:
            parse(*flags)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--idx_dir a --dataset_name b", "--idx_dir, --dataset_name: one of them says which images"),
        ("--train_dir a", "--train_dir and --validation_dir belong together"),
        ("--timm_model a --config_name b", "--config_name, --timm_model: one of them says which model"),
        ("--timm_model a --hidden_size 8", "--hidden_size: of the small ViT only"),
        ("--train_split train2", "--train_split: for a dataset only; also give --dataset_name"),
        ("--timm_model_args {}", "also give --timm_model"),
        ("--timm_model a --timm_model_args img_size=8", "is not a JSON object"),
        ("--mixup 0.8 --per_device_train_batch_size 3", "must be even"),
        ("--label_smoothing 1.5", "--label_smoothing 1.5 must be at least 0 and at most 1"),
        ("--min_learning_rate 0.1", "--min_learning_rate 0.1 must be at least 0 and at most 0.001"),
        ("--random_resized_crop 0", "--random_resized_crop 0.0 must be above 0"),
        ("--model_ema_decay 1", "--model_ema_decay 1.0 must be above 0"),
        ("--hidden_size 30", "must be a multiple of --num_attention_heads 4"),
        ("--match_norm_of 3", "--match_norm_of '3': give svd"),
        ("--match_norm_of svd --initialization_scale 2", "pass only one of the two"),
        ("--match_norm_of svd --spectral_conditioning", "leave out --spectral_conditioning"),
        ("--eval_only", "name it with --model_name_or_path"),
        ("--resume_from_checkpoint --overwrite_output_dir", "give one"),
        ("--report_to nobody", "--report_to nobody: unknown"),
        ("--learning_rate nan", "--learning_rate nan"),
    ],
)
def test_what_cannot_be_is_refused(refusal, flags, message):
    assert message in refusal(*flags.split())


def test_steps_follow_from_passes_and_images():
    arguments = ImageArguments(num_train_epochs=3.0, warmup_epochs=0.5)
    assert arguments.steps_of(100, 32) == 9
    assert arguments.warmup_of(100, 32) == 50 / 32
    assert ImageArguments(max_steps=2).warmup_of(100, 10) == 2


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_preset_on_one_gpu_is_the_published_recipe(parse, name):
    arguments, _ = parse("--preset", name)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    lines = deviations(name, vars(arguments), batch, [])
    assert all(line.startswith(("mixed precision bf16", "mixup and CutMix")) for line in lines)
    arguments, _ = parse("--preset", name, "--learning_rate", "0.5")
    assert f"learning_rate: 0.5 (published: {RECIPES[name]['learning_rate']})" in deviations(
        name, vars(arguments), batch, []
    )
    assert f"global_batch_size: 8 (published: {batch})" in deviations(name, vars(arguments), 8, [])


def test_flags_replace_what_a_preset_says(parse):
    arguments, _ = parse("--preset", "swin-base", "--idx_dir", "a", "--config_name", "b")
    assert (arguments.dataset_name, arguments.timm_model, arguments.drop_path_rate) == (None, None, None)
    assert arguments.max_grad_norm == PRESETS["swin-base"]["max_grad_norm"] == 5.0


def test_a_saved_model_is_measured_on_its_runs_images(parse, tmp_path):
    recorded = {"idx_dir": "there", "max_validation_samples": 7, "learning_rate": 3.0}
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": recorded}))
    arguments, _ = parse("--eval_only", "--model_name_or_path", str(tmp_path))
    assert (arguments.idx_dir, arguments.max_validation_samples, arguments.learning_rate) == ("there", 7, 1e-3)
    arguments, _ = parse("--eval_only", "--model_name_or_path", str(tmp_path), "--dataset_name", "other")
    assert (arguments.idx_dir, arguments.dataset_name) == (None, "other")
