"""The exact Fisher matrix of each layer of a small network, and how much of its inverse lies in blocks.

For a layer's weights w and the network's outputs f, F = E[J^T H J] with J = df/dw and H the Fisher matrix of
the likelihood: diag(p) - p p^T, diag(p (1 - p)) or I (Martens, "New insights and perspectives on the natural
gradient method", 2020, section 9).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call, jacrev, vmap

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.problems.autoencoders import autoencoder
from minifisher_lab.problems.cnns import five_layer
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from minifisher_lab.problems import Problem

REDUCED: Mapping[str, Callable[[], nn.Module]] = {
    "autoencoder-digits": partial(autoencoder, (64, 20, 16, 10)),
    "cnn-digits": partial(five_layer, 1, 4, 10),
}
"""The networks at a size at which the inverse of a layer's Fisher matrix can be seen."""
DAMPING = 0.01
"""Relative to the mean of the diagonal, so that the inverse exists."""
STEPS = 200  # of AdamW before the matrix is measured
SAMPLES, CHUNK = 300, 50
VISIBLE = range(90, 700)
"""Layers with so many weights are shown."""


@dataclass(frozen=True)
class Layer:
    """A layer's |F^-1| and the partitions of its weights into blocks."""

    name: str
    shape: tuple[int, ...]
    inverse: Tensor  # [weights, weights], absolute values
    partitions: dict[str, Tensor]
    """How the weights are grouped -> the group of every weight."""

    def share(self, groups: Tensor, *, diagonal: bool = True) -> float:
        """The share of the Frobenius norm that lies inside the blocks, with the diagonal or without it."""
        matrix = self.inverse if diagonal else self.inverse - self.inverse.diag().diag()
        inside = matrix[groups[:, None] == groups[None, :]]
        return float(inside.norm() / matrix.norm())


def shuffled(groups: Tensor) -> Tensor:
    """A partition into blocks of the same sizes whose weights are drawn at random."""
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]


def reduced(problem: Problem) -> Problem:
    """The problem with a small network."""
    if problem.name not in REDUCED:
        raise ValueError(f"{problem.name} has no small network: inspect one of {', '.join(REDUCED)}")
    return replace(problem, architecture=REDUCED[problem.name])


def layers(name: str) -> list[Layer]:
    """Train the small network for a few steps, then invert the Fisher matrix of every layer of fit size."""
    problem = reduced(PROBLEMS[name])
    splits = batches.load(problem, torch.device("cpu"))
    trainer = Trainer(problem, splits, choose("adamw"), 3e-3, seed=0)
    for _ in range(STEPS):
        trainer.step(spent=0.0)
    model = trainer.model.eval()
    inputs = splits.train.slice(SAMPLES).inputs
    weights = {n: w for n, w in model.named_parameters() if w.ndim > 1 and w.numel() in VISIBLE}
    return [_layer(problem, model, inputs, n, w.detach()) for n, w in weights.items()]


def _layer(problem: Problem, model: nn.Module, inputs: Tensor, name: str, weight: Tensor) -> Layer:
    matrix = fisher(problem, model, inputs, name)
    damping = DAMPING * matrix.diagonal().mean()
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).abs()
    return Layer(name, tuple(weight.shape), inverse, partitions(weight.shape))


def partitions(shape: torch.Size) -> dict[str, Tensor]:
    """Rows: all weights of one output. Columns: all of one input. Kernels: one pair of both."""
    outputs, inputs, positions = shape[0], shape[1], shape[2:].numel()
    row = torch.arange(outputs)[:, None, None].expand(outputs, inputs, positions)
    column = torch.arange(inputs)[None, :, None].expand(outputs, inputs, positions)
    named = {"rows": row, "columns": column}
    if positions > 1:
        named["kernels"] = row * inputs + column
    return {name: groups.flatten() for name, groups in named.items()}


@torch.no_grad()
def fisher(problem: Problem, model: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """F [weights, weights] of the named weight, in float64."""
    weight = model.get_parameter(name).detach()

    def output(weight: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        result: Tensor = functional_call(model, {name: weight}, (sample[None],))
        return result[0], result[0]

    total = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64)
    for some in torch.split(inputs, CHUNK):
        jacobian, outputs = vmap(jacrev(output, has_aux=True), in_dims=(None, 0))(weight, some)
        rows = jacobian.flatten(2).double()  # [samples, outputs, weights]
        curved = _hessian(problem, outputs.double()) @ rows
        total += rows.flatten(0, 1).T @ curved.flatten(0, 1)
    return total / len(inputs)


def _hessian(problem: Problem, outputs: Tensor) -> Tensor:
    """H [samples, outputs, outputs]."""
    if problem.likelihood == "categorical":
        p = outputs.softmax(1)
        return p.diag_embed() - p[:, :, None] * p[:, None, :]
    if problem.likelihood == "bernoulli":
        p = outputs.sigmoid()
        return (p * (1 - p)).diag_embed()
    return torch.ones_like(outputs).diag_embed()
