from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from minifisher_lab import data
from minifisher_lab.problems import PROBLEMS

IMAGES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "curves": (1, 28, 28),
    "faces": (1, 25, 25),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
}

# The autoencoders' counts are the published ones; the others were added up by hand from the layers.
PARAMETERS = {
    "autoencoder-mnist": 2_837_314,
    "autoencoder-faces": 7_537_655,
    "autoencoder-curves": 842_340,
    # 3x3 convolutions without bias, two numbers a normed channel, the last layer
    "resnet32-cifar10": 9 * (3 * 16 + 10 * 16 * 16 + 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 64 * 64)
    + 2 * (16 + 10 * (16 + 32 + 64))
    + 650,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert PROBLEMS[name].parameters() == count


def test_vgg16_has_thirteen_convolutions_with_bias_and_the_wide_classifier() -> None:
    with torch.device("meta"):
        model = PROBLEMS["vgg16-cifar100"].architecture()
    convolutions = [layer for layer in model if isinstance(layer, torch.nn.Conv2d)]
    linear = [
        (layer.in_features, layer.out_features) for layer in model if isinstance(layer, torch.nn.Linear)
    ]
    assert len(convolutions) == 13
    assert all(layer.bias is not None for layer in convolutions)
    assert linear == [(512, 4096), (4096, 4096), (4096, 100)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_fit_the_images_and_the_loss(name: str) -> None:
    problem = PROBLEMS[name]
    shape = IMAGES[problem.data]
    model = problem.build(seed=0).eval()
    inputs = torch.rand(2, *shape)
    with torch.no_grad():
        outputs = model(inputs)
        loss = problem.loss(outputs, inputs, torch.tensor([0, 1]))
    classes = 100 if problem.data == "cifar100" else 10
    assert outputs.shape == (2, classes if problem.classifies else math.prod(shape))
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_names_a_dataset(name: str) -> None:
    assert PROBLEMS[name].data in data.NAMES


def test_the_same_seed_builds_the_same_network() -> None:
    first, again, other = (PROBLEMS["autoencoder-digits"].build(seed) for seed in (3, 3, 4))
    assert all(torch.equal(w, v) for w, v in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_pixel_losses_are_summed_over_pixels_and_averaged_over_the_batch() -> None:
    outputs, inputs = torch.randn(3, 64), torch.rand(3, 1, 8, 8)
    targets = torch.zeros(3, dtype=torch.long)
    p = torch.sigmoid(outputs)
    x = inputs.flatten(1)
    entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 3
    square = 0.5 * (outputs - x).square().sum() / 3
    assert PROBLEMS["autoencoder-mnist"].loss(outputs, inputs, targets).item() == pytest.approx(
        entropy.item()
    )
    assert PROBLEMS["autoencoder-faces"].loss(outputs, inputs, targets).item() == pytest.approx(square.item())
    assert PROBLEMS["cnn-digits"].loss(outputs, inputs, targets) == functional.cross_entropy(outputs, targets)


def test_code_and_output_of_an_autoencoder_are_linear() -> None:
    kinds = [type(layer).__name__ for layer in PROBLEMS["autoencoder-fashion"].build(seed=0)]
    half = ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds == ["Flatten", *half, *half]
