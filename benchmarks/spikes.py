"""The costliest step of a schedule against the median one: the optimizer's step alone, MBF with its defaults.

    python benchmarks/spikes.py

The weights have the shapes of a small GPT. Every turn trains a new copy for the same steps, in which the same
statistics and inverses are due; a step counts with the least time of all turns. Prints JSON.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from alternate import CLOCKS, report

import minifisher

WARM_UP = 8  # steps: in the first periods every observation is followed by a refresh
RATE = 1e-6


def shapes(layers: int, width: int) -> list[tuple[int, ...]]:
    """Embeddings of 65 characters and 256 positions, the blocks with fused q, k and v, and the last norm."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(65, width), (256, width), *(norm + attention + norm + perceptron) * layers, *norm]


def seconds_of_steps(steps: int, layers: int, width: int, clock: str) -> list[float]:
    """The seconds of each step after the first ones, on fixed gradients."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes(layers, width)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    optimizer, now = minifisher.MBF(parameters, lr=RATE), CLOCKS[clock]
    seconds = []
    for _ in range(WARM_UP + steps):
        started = now()
        optimizer.step()
        seconds.append(now() - started)
    return seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32, help="eight periods of statistics and inverses")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sizes = chosen.steps, chosen.layers, chosen.width
    turns = [seconds_of_steps(*sizes, chosen.clock) for _ in range(chosen.turns)]
    least = [1000 * min(times) for times in zip(*turns, strict=True)]
    median = statistics.median(least)
    report(
        {
            "median_ms": round(median, 2),
            "costliest_ms": round(max(least), 2),
            "ratio": round(max(least) / median, 3),
            "steps_ms": [round(step, 1) for step in least],
        }
    )


if __name__ == "__main__":
    main()
