"""A network and data of your own, compared by the command line.

minifisher compare examples/own_problem.py:make_problem --optimizers adamw,mbf --lr mbf=1e-3,1e-2
"""

import torch
from torch import nn

from minifisher_lab.problems import Problem


def make_problem():
    """One thousand points of 20 numbers in two classes."""
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, :5].sum(1) > 0).long()
    return Problem(
        name="halves",
        data=lambda: (x[:800], y[:800], x[800:], y[800:]),  # training, then test
        architecture=lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)),
        likelihood="categorical",
        batch_size=50,
        epochs=5,
    )
