from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher import KBFGS, KFAC
from minifisher.methods.kronecker import scale_of_groups


def test_the_scale_of_a_group_is_the_average_of_its_mean_and_that_of_the_layer():
    means = torch.tensor([[0.0, 2.0, 4.0], [1.0, 1.0, 1.0]])  # two layers of three groups
    expected = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(scale_of_groups(means), expected)


@pytest.mark.parametrize("method", [KFAC, KBFGS])
def test_a_layer_with_too_wide_matrices_takes_the_first_order_step(method):
    module = nn.Sequential(nn.Linear(3, 9), nn.Linear(2, 3))
    wide, narrow = method(module, max_dim=5).describe().layers
    assert (wide.structure, wide.reason) == ("first-order step", "a matrix of width 9 is above max_dim=5")
    assert narrow.structure.startswith("Kronecker")
    assert method(module, max_dim=None).describe().layers[0].structure.startswith("Kronecker")


@pytest.mark.parametrize("method", [KFAC, KBFGS])
def test_a_layer_without_samples_takes_the_first_order_step(method):
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    rows = {row.name: row for row in method(module).describe().layers}
    assert rows["1.weight"].structure == "first-order step"
    assert rows["1.weight"].reason == "LayerNorm: only its gradient is read"


@pytest.mark.parametrize("method", [KFAC, KBFGS])
def test_matrices_as_wide_as_max_dim_are_made(method):
    (layer,) = method(torch.nn.Linear(3, 3, bias=False), max_dim=3).describe().layers
    assert layer.structure.startswith("Kronecker")
