"""Gradients, second moments and states for the tests of the methods that read a weight as a tensor."""

from __future__ import annotations

import torch

from minifisher import Shampoo
from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import BatchGradient
from tests.helpers import dense_preconditioner

EVERYTHING = 10**6  # max_dim: nothing is cut, and vectors get a full matrix


def moment(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    """mat_i mat_i^T, entry by entry."""
    slices = list(tensor.unbind(mode))
    return torch.stack([torch.stack([(a * b).sum() for b in slices]) for a in slices])


def random_gradients(shape: tuple[int, ...], count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def observed(shape: tuple[int, ...], gradients: list[torch.Tensor], damping: float, **options: object):
    """A layer's curvature and state after the plain mean over the gradients, refreshed."""
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    layer, optimizer = layer_of("weight", weight), Shampoo([weight], **options)
    curvature = optimizer.plan(layer, optimizer.defaults).curvature
    state = curvature.init(layer)
    for count, gradient in enumerate(gradients, start=1):
        curvature.observe(state, BatchGradient(gradient), 1 - 1 / count)
    curvature.refresh(state, damping)
    return curvature, state, layer


def dense(
    shape: tuple[int, ...], gradients: list[torch.Tensor], damping: float, **options: object
) -> torch.Tensor:
    curvature, state, layer = observed(shape, gradients, damping, **options)
    return dense_preconditioner(curvature, state, layer, damping)


def steps(
    weight: torch.Tensor, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]
) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().clone()
