import pytest
import torch

from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import layers_of
from minifisher.statistics.likelihood import fisher_losses
from tests.helpers import dense_exact_fisher, problem


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("name", ["linear", "linear on tokens", "conv2d groups", "twice", "tied"])
def test_the_mean_over_all_losses_is_the_exact_fisher(name, likelihood):
    case = problem(name, count=3)
    layers = [layer for layer in layers_of(case.module, ("linear",)) if layer.reads_samples]
    capture = Capture(layers, memory=2**20, model_labels=True)
    capture.arm()
    capture.differentiate(*fisher_losses(case.module(case.inputs.clone()), likelihood))
    collected = capture.collect()
    assert set(collected) == set(layers)
    for layer, samples in collected.items():
        gradients = torch.cat(list(samples.gradients())).flatten(1)
        assert len(gradients) == samples.count
        expected = dense_exact_fisher(layer, case.module, likelihood, case.inputs)
        torch.testing.assert_close(gradients.T @ gradients / samples.count, expected)


def test_a_loss_that_does_not_depend_on_a_layer_counts_as_zero():
    wide = torch.nn.Linear(3, 2).double()
    narrow = torch.nn.Linear(3, 1).double()
    module = torch.nn.ModuleList([wide, narrow])
    inputs = torch.randn(4, 3, dtype=torch.float64)
    capture = Capture(layers_of(module), memory=2**20, model_labels=True)
    capture.arm()
    capture.differentiate(*fisher_losses(torch.cat([wide(inputs), narrow(inputs)], dim=1), "gaussian"))
    moments = {
        layer.weight: sum(g.square().sum(0) for g in samples.gradients()) / samples.count
        for layer, samples in capture.collect().items()
    }
    squares = inputs.square().mean(0)
    torch.testing.assert_close(moments[wide.weight], squares.expand(2, 3))
    torch.testing.assert_close(moments[narrow.weight], squares.expand(1, 3))


@pytest.mark.parametrize(
    ("likelihood", "shape", "count"),
    [("categorical", (3,), 3), ("bernoulli", (3,), 1), ("gaussian", (3,), 1), ("categorical", (2, 4, 5), 20)],
)
def test_there_is_one_loss_for_each_entry_of_a_samples_output(likelihood, shape, count):
    assert len(fisher_losses(torch.randn(shape), likelihood)) == count
