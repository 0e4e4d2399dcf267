"""Fully connected networks for tables: a classification and a regression."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import nn

from minifisher_lab.problems.problem import Problem


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Fully connected layers widths[0]-...-widths[-1] with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


TABLES = (
    Problem(
        name="mlp-tabular",
        description="30-128-128-2, cross entropy",
        data="breast-cancer",
        architecture=partial(mlp, (30, 128, 128, 2)),
        batch_size=32,
        epochs=20,
        schedule="cosine",
    ),
    Problem(
        name="mlp-regression",
        description="10-64-64-1, half the squared error of the standardised target",
        data="diabetes",
        architecture=partial(mlp, (10, 64, 64, 1)),
        likelihood="gaussian",
        batch_size=32,
        epochs=40,
        schedule="cosine",
    ),
)
