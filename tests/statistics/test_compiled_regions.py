"""Models compiled in place, as a whole or block by block: two graphs a region, with and without recording."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import minifisher
from tests.helpers import closure_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # More equal blocks than torch makes graphs of one function.
        self.blocks = nn.ModuleList(Block() for _ in range(12))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return inputs


def trained(how: str) -> tuple[Network, int]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network, counter = Network(), CompileCounter()
    optimizer = minifisher.MBF(network, lr=1e-2, fisher="empirical", statistics_every=2)
    for module in {"eager": [], "whole": [network], "blocks": network.blocks}[how]:
        module.compile(backend=counter)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 6, generator=generator), torch.randint(6, (8,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    counts = optimizer.diagnostics()["weights"]
    assert all(counts[f"blocks.{index}.first.weight"]["observations"] == 3 for index in range(12))
    return network, counter.frame_count


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_two_graphs_and_the_same_weights(how: str) -> None:
    expected, _ = trained("eager")
    network, graphs = trained(how)
    assert graphs <= 4 if how == "blocks" else graphs == 2  # a block has one more input that needs a gradient
    torch.testing.assert_close(list(network.parameters()), list(expected.parameters()))


class Whole(nn.Module):
    """Torch compiles nothing of an nn.Sequential that is compiled in place: it has no code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.network = nn.Linear(6, 6), Network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(self.embed(inputs))  # so that the input of every block needs a gradient


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("method", minifisher.METHODS)
def test_the_defaults_of_every_method_make_at_most_two_graphs_a_region(method: str, how: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, counter = Whole(), CompileCounter()
    optimizer = minifisher.METHODS[method](model, lr=1e-4, statistics_every=2)
    for module in [model] if how == "whole" else model.network.blocks:
        module.compile(backend=counter)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 6, generator=generator), torch.randint(6, (8,), generator=generator)
    for _ in range(20):
        optimizer.step(closure_of(model, optimizer, inputs, targets))
    seen = optimizer.diagnostics()["weights"]["network.blocks.0.first.weight"]
    assert 9 <= seen["observations"] <= 11  # steps with statistics, and steps without
    assert counter.frame_count <= 2
