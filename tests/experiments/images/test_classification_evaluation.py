from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from recipes.images.augmentation import evaluation_transform, normalization
from recipes.images.classification_evaluation import evaluate_images
from recipes.images.image_batches import ValidationImages
from recipes.images.image_sources import ArrayImages, ImageSplit


class Brightness(nn.Module):
    """Classifies by fixed weights on the mean of an image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-3.0, 0.5, 3.0]))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values.mean((1, 2, 3))[:, None] * self.weight)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_accuracy_and_loss_are_those_worked_out_with_numpy(batch_size):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 4, 4)).astype(np.uint8)
    labels = np.random.default_rng(1).integers(0, 3, 23)
    split = ImageSplit(ArrayImages(pixels, "test"), labels, "abc")
    images = ValidationImages(split, "L", evaluation_transform(4, *normalization(1)))
    model = Brightness().train()
    result = evaluate_images(model, images, batch_size=batch_size)

    logits = ((pixels / 255).mean((1, 2)) - 0.5)[:, None] / 0.5 * np.array([-3.0, 0.5, 3.0])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert result.accuracy == (logits.argmax(1) == labels).mean()
    assert result.loss == pytest.approx(-np.log(probabilities[np.arange(23), labels]).mean(), rel=1e-6)
    assert result.images == 23
    assert model.training
