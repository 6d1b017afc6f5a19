import dataclasses

import pytest
import timm
from image_files import write_folders

from recipes.images.image_arguments import ImageArguments, parse_arguments
from recipes.images.image_plan import describe_plan
from recipes.run.spectral_arguments import SpectralArguments


def test_the_plan_of_the_default():
    arguments = ImageArguments(num_hidden_layers=1)
    spectral = SpectralArguments(spectral_conditioning=True, lambda_="2.0")
    lines = describe_plan(arguments, spectral, processes=2, mixed_precision="no")
    assert "10 classes, images of 8 x 8 with 1 channel(s), 16 tokens each; spectral conditioning" in lines[0]
    steps = round(arguments.num_train_epochs * 1437 / 64)
    assert f"Steps: {steps:,} of 64 images" in lines[2]
    assert "over 1,437 images" in lines[2]
    assert not any("published" in line for line in lines)


@pytest.mark.slow
def test_the_plan_of_a_published_recipe_needs_no_data():
    arguments, spectral = parse_arguments(["--preset", "deit-base", "--show_plan", "--match_norm_of", "svd"], "test")
    lines = describe_plan(arguments, spectral, processes=1, mixed_precision="bf16")
    parameters = sum(parameter.numel() for parameter in timm.create_model("deit_base_patch16_224").parameters())
    assert f"{parameters:,} parameters, 1000 classes, images of 224 x 224 with 3 channel(s)" in lines[0]
    assert f"Steps: {round(300 * 1_281_167 / 1024):,} of 1,024 images" in lines[2]
    assert any("query, key and value weights of the norm of W + C" in line for line in lines[-3:])
    assert not any(line.startswith("  - ") and "learning_rate" in line for line in lines)


def test_an_image_folder_gets_patches_of_16_and_many_tokens_are_said(tmp_path):
    folders = [str(write_folders(tmp_path / split, 6)) for split in ("train", "validation")]
    arguments = ImageArguments(train_dir=folders[0], validation_dir=folders[1], num_hidden_layers=1)

    def plan(arguments):
        return describe_plan(arguments, SpectralArguments(), processes=1, mixed_precision="no")

    lines = plan(arguments)
    assert "images of 224 x 224 with 3 channel(s), 196 tokens each" in lines[0]
    assert not any("CAUTION" in line for line in lines)
    lines = plan(dataclasses.replace(arguments, image_size=68, patch_size=2))
    assert "1,156 tokens each" in lines[0]
    assert any("CAUTION: 1,156 tokens are many" in line for line in lines)
