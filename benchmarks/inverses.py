"""Inverses of batches of damped averages, every one of which moved by one step: which way is cheapest.

A is the running mean of outer products of gradients with a decaying spectrum, damped by a tenth of its mean
diagonal, as MBF's blocks are. Before each measurement it moves by one step of decay 0.95; the warm start is
the inverse from before.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from alternate import CLOCKS, alternate, compare, report
from torch import Tensor

from minifisher.linalg.dense import add_to_diagonal, inverse_power
from minifisher.linalg.newton import newton_schulz_inverse

WIDTHS = (32, 64, 128, 256, 512)
BATCHES = (1, 8)
DECAY, DAMPING = 0.95, 0.1


def gradients(width: int, batch: int, rows: int) -> Tensor:
    """Rows whose entries have standard deviations from 1 to 1e-2, rotated: [batch, rows, width]."""
    basis = torch.linalg.qr(torch.randn(batch, width, width)).Q
    return torch.randn(batch, rows, width) * torch.logspace(0, -2, width) @ basis


def damped(average: Tensor) -> Tensor:
    return add_to_diagonal(average, DAMPING * average.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))


def matrices(width: int, batch: int) -> tuple[Tensor, Tensor]:
    """The damped average before and after one step, [batch, width, width]."""
    stream = gradients(width, batch, 8 * width)
    old = stream.mT @ stream / stream.shape[-2]
    fresh = stream[:, :width]
    new = torch.lerp(old, fresh.mT @ fresh / width, 1 - DECAY)
    return damped(old), damped(new)


def residual(matrix: Tensor, inverse: Tensor) -> float:
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(matrix.double() @ inverse.double() - identity).max())


def measure(width: int, batch: int, turns: int, clock: str) -> dict[str, Any]:
    torch.manual_seed(0)
    old, new = matrices(width, batch)
    start = inverse_power(old, 1.0)
    ways = {
        "cholesky": partial(inverse_power, new, 1.0),
        "inv": partial(torch.linalg.inv, new),
        "newton-schulz": partial(newton_schulz_inverse, new, start),
        "newton-schulz, cold": partial(newton_schulz_inverse, new, torch.zeros_like(new)),
    }
    table: dict[str, Any] = compare(alternate(ways, turns, clock), "cholesky")
    for name, way in ways.items():
        table[name]["residual"] = float(f"{residual(new, way()):.2e}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(
        {
            f"{batch} x {width}": measure(width, batch, arguments.turns, arguments.clock)
            for width in WIDTHS
            for batch in BATCHES
        }
    )


if __name__ == "__main__":
    main()
