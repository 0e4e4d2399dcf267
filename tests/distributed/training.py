"""The small training runs that tests compare between numbers of processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import minifisher
from minifisher.statistics import likelihood

SAMPLES = 16


class Network(nn.Module):
    """A convolution, a norm, equal layers that are stacked, and a layer that takes part only later."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.equal = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(images).flatten(1))
        for layer in self.equal:
            hidden = torch.tanh(layer(hidden))
        return self.last(hidden)


def draw_by_sample(logits: Tensor, generator: object = None) -> Tensor:
    """Stands in for drawn labels: a sample's label depends on the sample alone, not on its batch."""
    thresholds = (logits.detach()[:, :1] * 1e3).frac().abs()
    return (logits.detach().softmax(-1).cumsum(-1) < thresholds).sum(-1).clamp_max(4)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch that all ranks share."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(SAMPLES, 1, 4, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (SAMPLES,), generator=generator)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return images.chunk(ranks)[rank], labels.chunk(ranks)[rank]


def make(method: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = Network().double()
    return network, minifisher.METHODS[method](network, **options)


@patch.dict(likelihood._LABELS, categorical=draw_by_sample)
def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        images, labels = batch(step)

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            outputs = model(images)
            optimizer.observe(outputs)
            loss = functional.cross_entropy(outputs, labels)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def replicated(network: nn.Module) -> nn.Module:
    return DistributedDataParallel(network) if dist.is_initialized() else network


def trained(method: str, options: dict[str, Any], steps: int = 20) -> dict[str, Tensor]:
    network, optimizer = make(method, options)
    train(replicated(network), optimizer, range(steps))
    return weights(network)
