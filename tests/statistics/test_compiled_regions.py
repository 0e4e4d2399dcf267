"""Models compiled in place, as a whole or block by block: two graphs a region, with and without recording."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import minifisher


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
