from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher.methods.choices import curvature_dtype, gradient_or_samples
from minifisher.statistics.layers import layer_of, layers_of
from minifisher.statistics.records import BatchGradient, LayerSamples


@pytest.mark.parametrize(
    ("weight", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_curvature_has_the_dtype_asked_for_or_that_of_the_weight_but_at_least_float32(
    weight, asked, expected
):
    layer = layer_of("weight", torch.zeros(2, 3, dtype=weight))
    assert curvature_dtype(layer, {"curvature_dtype": asked}) == expected


def test_samples_are_read_if_they_are_asked_for_and_can_be_captured():
    linear, bare = layers_of(nn.Linear(3, 2))[0], layer_of("weight", torch.zeros(2, 3))
    assert gradient_or_samples(linear, {"fisher": "empirical"}) is LayerSamples
    assert gradient_or_samples(bare, {"fisher": "empirical"}) is BatchGradient
    assert gradient_or_samples(linear, {"fisher": "gradient"}) is BatchGradient
