"""The operations of a training run, against a count by hand."""

import pytest

from recipes.compare.sweeps.cost import gpu_hours, training_operations
from recipes.images.image_arguments import parse_arguments


def test_the_operations_of_a_small_vit():
    arguments, _ = parse_arguments(["--max_steps", "3", "--per_device_train_batch_size", "4", "--show_plan"], "a run")
    tokens, width, inner, layers, patch = 17, 64, 128, 6, 2 * 2
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    products = layers * (attention + 2 * tokens * width * inner) + 16 * patch * width + width * 10
    # Two operations for each product, three passes, 3 steps of 4 images.
    assert training_operations(arguments) == pytest.approx(2 * products * 3 * 12)


def test_hours_of_a_gpu():
    assert gpu_hours(3.6e17, 100.0) == pytest.approx(1.0)
