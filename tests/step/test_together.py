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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_loss_of_equal_losses_is_that_loss(dtype):
    mean, of_number = together.mean_over_ranks((torch.tensor(3.1, dtype=dtype), 0.5), torch.device("cpu"))
    assert torch.equal(mean, torch.tensor(3.1, dtype=dtype))
    assert of_number == 0.5


def test_losses_are_summed_where_the_weights_are(monkeypatch):
    devices = []
    monkeypatch.setattr(
        together, "sum_over_ranks", lambda sums: devices.extend(tensor.device.type for tensor, _ in sums)
    )
    together.mean_over_ranks((torch.tensor(3.0), 0.5), torch.device("meta"))
    assert devices == ["meta", "meta"]


def test_a_closure_without_a_loss_is_refused_before_ranks_exchange_it():
    with pytest.raises(TypeError, match="the closure must return one, got None"):
        together.mean_over_ranks((None, torch.tensor(3.0)), torch.device("cpu"))


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
