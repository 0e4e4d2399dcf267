"""Means over ranks, with two ranks that bring the same numbers: the mean is what each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import LayerSamples, Secant
from minifisher.step import together


@dataclass(frozen=True)
class Samples(LayerSamples):
    inputs: Tensor
    output_gradients: Tensor

    @property
    def count(self):
        return self.inputs.shape[0]

    def chunks(self):
        yield self.inputs, self.output_gradients


def doubled(sums):
    for tensor, _ in sums:
        tensor.mul_(2)
    return True


@pytest.fixture(autouse=True)
def _two_equal_ranks(monkeypatch):
    monkeypatch.setattr(together, "world_size", lambda: 2)
    monkeypatch.setattr(together, "sum_over_ranks", doubled)


def test_the_mean_loss_of_equal_losses_is_that_loss():
    assert together.mean_over_ranks((torch.tensor(3.0), 0.5)) == [3.0, 0.5]


def test_the_mean_of_equal_secants_is_that_secant():
    layer = layer_of("weight", torch.zeros(2, 3))
    secant = Secant(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    same = Secant(secant.output_change.clone(), secant.gradient_change.clone())  # sums are in place
    (mean,) = together.mean_secants({layer: same}).values()
    assert torch.equal(mean.output_change, secant.output_change)
    assert torch.equal(mean.gradient_change, secant.gradient_change)


def test_the_shares_of_equal_mean_gradients_sum_to_that_gradient():
    layer = layer_of("weight", torch.zeros(2, 3))
    inputs, gradients = torch.randn(5, 1, 4, 3), torch.randn(5, 1, 4, 2)
    share = together._share_of_gradient(SimpleNamespace(layers=[layer]), {layer: Samples(inputs, gradients)})
    expected = torch.einsum("ngso,ngsi->oi", gradients, inputs) / 5
    torch.testing.assert_close(2 * share, expected)
