"""A step over 1,000 small layers, as of a transformer, against AdamW (foreach) on the same list."""

from __future__ import annotations

import argparse

import torch
from alternate import CLOCKS, alternate, compare, report

import minifisher

SHAPES = ((96, 32), (96,), (32, 32), (32,), (128, 32), (128,), (32, 128), (32,), (32,), (32,))
RATE = 1e-6


def parameters(count: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(SHAPES[index % len(SHAPES)])) for index in range(count)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    adamw = torch.optim.AdamW(parameters(arguments.layers), lr=RATE, foreach=True)
    mbf = minifisher.MBF(parameters(arguments.layers), lr=RATE)
    period = 4  # of statistics and inverses

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(period):
            optimizer.step()

    rivals = {"adamw": lambda: steps(adamw), "mbf": lambda: steps(mbf)}
    report({"steps": compare(alternate(rivals, arguments.turns, arguments.clock), "adamw", period)})


if __name__ == "__main__":
    main()
