import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minifisher import MBF
from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import layers_of
from minifisher.statistics.likelihood import fisher_losses
from tests.helpers import dense_exact_fisher, problem


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("name", ["linear", "linear on tokens", "conv2d", "conv2d groups", "twice", "tied"])
def test_the_mean_over_all_losses_is_the_exact_fisher(name, likelihood):
    case = problem(name, count=3)
    if likelihood == "categorical" and case.module(case.inputs.clone()).shape[-1] == 1:
        pytest.skip("one class")
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


class TwoHeads(torch.nn.Module):
    """Its trunk is called twice; the first head sees the first call alone."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(3, 3)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(3, 2)])

    def forward(self, inputs):
        first = self.trunk(inputs).tanh()
        return self.heads[0](first), self.heads[1](self.trunk(first).tanh())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_the_fisher_matrices_of_two_heads_add_up(backend, order):
    module, likelihoods = TwoHeads().double(), ("categorical", "gaussian")
    inputs = torch.randn(5, 3, dtype=torch.float64)
    layers = layers_of(module)
    capture = Capture([layer for layer in layers if layer.reads_samples], 2**20, model_labels=True)
    capture.arm()
    run = module if backend is None else torch.compile(module, backend=backend)
    outputs = run(inputs)
    for head in order:
        capture.differentiate(*fisher_losses(outputs[head], likelihoods[head]))
    for layer, samples in capture.collect().items():
        gradients = torch.cat(list(samples.gradients())).flatten(1)
        expected = sum(
            dense_exact_fisher(layer, lambda x, head=head: module(x)[head], likelihoods[head], inputs)
            for head in order
            if layer.modules[0] in (module.trunk, module.heads[head])
        )
        torch.testing.assert_close(gradients.T @ gradients / samples.count, expected)


class Checkpointed(torch.nn.Module):
    """Its first two layers are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
        )

    def forward(self, inputs):
        first, second, last = self.layers
        return last(checkpoint(lambda x: second(first(x).tanh()).tanh(), inputs, use_reentrant=False))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_layers_inside_a_checkpoint_have_samples(backend):
    module = Checkpointed().double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    capture = Capture(layers_of(module), 2**20, model_labels=True)
    capture.arm()
    run = module if backend is None else torch.compile(module, backend=backend)
    outputs = run(inputs)
    capture.differentiate(*fisher_losses(outputs, "categorical"))
    outputs.logsumexp(1).sum().backward()
    collected = capture.collect()
    assert len(collected) == 3
    for layer, samples in collected.items():
        gradients = torch.cat(list(samples.gradients())).flatten(1)
        expected = dense_exact_fisher(layer, module, "categorical", inputs)
        torch.testing.assert_close(gradients.T @ gradients / samples.count, expected)


def test_observed_after_the_backward_pass_says_so():
    module = torch.nn.Linear(3, 2)
    optimizer = MBF(module, fisher="sampled")
    outputs = module(torch.randn(4, 3)).tanh()
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match=r"observe came after loss.backward\(\)"):
        optimizer.observe(outputs)


def test_three_observations_of_one_pass_weigh_alike():
    layer = torch.nn.Linear(3, 2).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    capture = Capture(layers_of(layer), memory=2**20, model_labels=True)
    capture.arm()
    outputs = layer(inputs)
    losses = [outputs[:, 0].sum(), 2 * outputs[:, 1].sum(), 3 * outputs.sum()]
    for loss in losses:
        capture.differentiate(loss)
    samples = next(iter(capture.collect().values()))
    gradients = torch.cat(list(samples.gradients())).flatten(1)
    of_outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    expected = torch.kron(of_outputs.T @ of_outputs, inputs.T @ inputs / 5)
    weights = gradients[:, :6]
    torch.testing.assert_close(weights.T @ weights / samples.count, expected)


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
