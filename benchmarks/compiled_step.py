"""MBF's step alone, statistics and inverses every time: ordinary, capturable, and compiled to one graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternate import CLOCKS, alternate, compare, report

import minifisher

SHAPES = ((256, 128), (256,), (64, 256), (64,), (64, 64), (64,))
EVERY_STEP = {"statistics_every": 1, "inverse_every": 1}


def optimizer(capturable: bool) -> minifisher.MBF:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return minifisher.MBF(parameters, lr=1e-6, capturable=capturable, **EVERY_STEP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rivals: dict[str, Callable[[], object]] = {
        "ordinary": optimizer(capturable=False).step,
        "capturable": optimizer(capturable=True).step,
        "capturable, compiled": torch.compile(optimizer(capturable=True).step),
    }
    for step in rivals.values():
        step()
    report({"step": compare(alternate(rivals, arguments.turns, arguments.clock), "ordinary")})


if __name__ == "__main__":
    main()
