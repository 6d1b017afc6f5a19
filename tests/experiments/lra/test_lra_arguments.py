"""The command line of train_lra.py: presets of each task, and what is refused."""

import pytest

from recipes.lra.lra_arguments import PRESETS, parse_arguments
from recipes.lra.lra_plan import describe_plan
from recipes.lra.lra_sources import CLASSES

PUBLISHED = {  # length padded, batch, warmup, steps, parameters
    "listops": (2048, 32, 1000, 5000, "209,942"),
    "text": (4096, 32, 8000, 20000, "370,702"),
    "retrieval": (4096, 32, 800, 30000, "395,278"),
    "image": (1024, 256, 175, 35000, "175,126"),
    "pathfinder": (1024, 256, 312, 62400, "174,094"),
}


def parse(*argv):
    return parse_arguments([*argv, "--show_plan"], "A test.")


@pytest.mark.parametrize("task", CLASSES)
def test_the_preset_lra_is_the_published_run(task):
    arguments, spectral = parse("--task", task, "--preset", "lra", "--data_dir", "somewhere")
    length, batch, warmup, steps, parameters = PUBLISHED[task]
    assert (arguments.padded_length, arguments.per_device_train_batch_size) == (length, batch)
    assert (arguments.warmup_steps, arguments.steps) == (warmup, steps)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-4, 0, 0)
    assert arguments.cycle_beta1
    model = arguments.new_model_config()
    assert (model.pad_token_id, model.num_landmarks, model.hidden_dropout_prob) == (0, 64, 0.1)
    assert (model.padding_in_landmarks, model.batch_wide_inverse, model.mean_over_padding) == (True, True, True)
    lines = describe_plan(arguments, spectral, processes=1, mixed_precision="fp16")
    assert f"{parameters} parameters" in lines[0]
    assert lines[-1] == "Deviations from the published settings: none."


def test_deviations_from_the_published_run_are_named():
    flags = ["--max_steps", "9000", "--zero_is_padding", "False", "--train_samples", "1000", "--num_landmarks", "128"]
    flags += [
        "--gradient_accumulation_steps",
        "2",
        "--protocol",
        "clean",
        "--spectral_conditioning",
        "--no_layer_norm",
    ]
    arguments, spectral = parse("--task", "image", "--preset", "lra", "--data_dir", "somewhere", *flags)
    lines = describe_plan(arguments, spectral, processes=2, mixed_precision="bf16")
    assert [line.strip(" -") for line in lines[lines.index("Deviations from the published settings:") + 1 :]] == [
        "num_landmarks: 128 (published: 64)",
        "protocol: clean (published: lra)",
        "max_steps: 9000 (published: 35000)",
        "zero_is_padding: False (published: True)",
        "global batch: 1024 (published: 256)",
        "mixed precision bf16 (published: fp16)",
        "train_samples: 1,000",
        "spectral conditioning: identity(lambda_=10.0) or below (auto: found on the first samples), init additive",
        "no layer norms",
    ]


@pytest.mark.parametrize("task", CLASSES)
def test_small_is_the_default_and_flags_replace_it(task):
    usual, _ = parse("--task", task, "--data_dir", "somewhere")
    small, _ = parse("--task", task, "--preset", "small", "--data_dir", "somewhere")
    assert usual == small
    for name, value in PRESETS["small"][task].items():
        assert getattr(usual, name) == value
    changed, _ = parse("--task", task, "--data_dir", "somewhere", "--learning_rate", "0.5", "--warmup_steps", "3")
    assert (changed.learning_rate, changed.warmup_steps, changed.max_steps) == (0.5, 3, usual.max_steps)


def test_a_preset_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.002\nnum_landmarks: 32\n")
    arguments, _ = parse("--preset", str(tmp_path / "mine.yaml"))
    assert (arguments.learning_rate, arguments.num_landmarks, arguments.max_steps) == (0.002, 32, 5000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "text"], "--task text needs --data_dir"),
        (["--task", "image", "--data_dir", "x", "--max_length", "512"], "--max_length 512: image reads whole images"),
        (["--num_landmarks", "24"], "--num_landmarks 24 must divide the padded length 64"),
        (["--max_steps", "20"], "--warmup_steps 150 must be at least 0 and at most 20"),
        (["--zero_is_padding", "False"], "--zero_is_padding False is of images"),
        (["--task", "pathfinder", "--listops_min_length", "3"], "--listops_min_length: not of --task pathfinder"),
        (["--model_name_or_path", "x", "--num_landmarks", "8"], "--num_landmarks: for a new model only"),
        (["--hidden_size", "63"], "--hidden_size 63 must be a multiple of --num_attention_heads 2"),
        (["--preset", "huge"], "--preset huge is neither one of lra, small"),
        (["--test_samples", "0"], "--test_samples 0 must be at least 1"),
        (["--match_norm_of", "svd", "--spectral_conditioning"], "--match_norm_of"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err


def test_any_number_of_landmarks_where_they_leave_padding_out():
    arguments, _ = parse("--num_landmarks", "24", "--padding_in_landmarks", "False")
    assert not arguments.new_model_config().padding_in_landmarks
