"""Long runs at a constant rate, with and without the lower limit after a sudden growth of the gradient.

Without it the limit of a step of equal descent is always `length_limit`: `USUAL_GROWTH` is infinite. For
every seed it prints the final loss of training over 5,000 samples, the mean loss of every tenth of the run,
and the highest loss of a batch after the first quarter.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from alternate import report

from minifisher.step import first_order, update
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer, evaluate


def run(arguments: argparse.Namespace, seed: int, growth: float) -> dict[str, Any]:
    """One run; `growth` is what the gradient may grow by before the limit falls."""
    first_order.USUAL_GROWTH = update.USUAL_GROWTH = growth
    problem, steps = PROBLEMS[arguments.problem], arguments.steps
    data = batches.load(problem, torch.device("cpu"))
    trainer = Trainer(problem, data, choose(arguments.optimizer), arguments.lr, seed)
    losses = [float(trainer.step(spent=step / steps)) for step in range(steps)]
    part = data.train.slice(5000) if len(data.train) > 5000 else data.train
    tenth = max(1, steps // 10)
    return {
        "final": evaluate(problem, trainer.model, part)[0],
        "test": evaluate(problem, trainer.model, data.test)[0],
        "highest_after_a_quarter": max(losses[steps // 4 :]),
        "tenths": [statistics.fmean(losses[at : at + tenth]) for at in range(0, steps, tenth)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", nargs="?", default="autoencoder-fashion", choices=PROBLEMS)
    parser.add_argument("--optimizer", default="mbf")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limits = {"with": first_order.USUAL_GROWTH, "without": math.inf}
    results = {
        name: [run(arguments, seed, growth) for seed in arguments.seeds] for name, growth in limits.items()
    }
    report({"problem": arguments.problem, "optimizer": arguments.optimizer, "lr": arguments.lr, **results})


if __name__ == "__main__":
    main()
