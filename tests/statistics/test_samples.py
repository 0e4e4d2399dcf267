"""Recorded samples: whether they are finite, and how many positions they have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher.statistics.layers import layers_of
from minifisher.statistics.samples import Call, CapturedSamples


def samples_of(*calls, scale=1.0):
    module = nn.Linear(2, 3, bias=False)
    (layer,) = layers_of(module)
    recorded = tuple(Call(module, inputs, gradients) for inputs, gradients in calls)
    return CapturedSamples(layer, recorded[0].inputs.shape[0], (recorded,), scale, 2**20)


@pytest.mark.parametrize(
    ("inputs", "gradients", "scale", "finite"),
    [
        (1e18, 1e18, 1.0, True),
        (1e25, 1.0, 1.0, False),  # its square is infinite, and the curvature averages squares
        (1.0, 1e25, 1.0, False),
        (1.0, 1e18, 1e6, False),  # the gradient of the sample is a million times that of the mean
        (1.0, torch.nan, 1.0, False),
        (torch.inf, 1.0, 1.0, False),
    ],
)
def test_samples_are_finite_where_their_squares_are(inputs, gradients, scale, finite):
    call = torch.full((1, 2), inputs), torch.full((1, 3), gradients)
    assert samples_of(call, scale=scale).is_finite() == finite


def test_the_positions_of_all_calls_of_a_forward_pass_count():
    calls = [(torch.ones(4, length, 2), torch.ones(4, length, 3)) for length in (5, 7)]
    assert samples_of(*calls).positions == 12
