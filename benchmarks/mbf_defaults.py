"""What MBF's defaults rest on: settings trained for equal steps on the Fashion-MNIST autoencoder.

A setting is written as on the command line of `minifisher compare`: mbf:damping=0.03. The loss is that of
`--images` fixed training images after the last step.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from alternate import report

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer, evaluate

SETTINGS = (
    "mbf",
    "mbf:statistics_every=4",
    "mbf:statistics_every=1",
    "mbf:damping=0.01",
    "mbf:damping=0.03",
    "mbf:power=0.5",
    "mbf:block_size=32",
    "mbf:block_size=128",
)


def final_loss(spec: str, splits: batches.Splits, arguments: argparse.Namespace) -> float:
    """The training loss of one setting after all steps."""
    problem = PROBLEMS[arguments.problem]
    trainer = Trainer(problem, splits, choose(spec), arguments.lr, arguments.seed)
    for step in range(arguments.steps):
        trainer.step(spent=step / arguments.steps)
    loss, _ = evaluate(problem, trainer.model, splits.train.slice(arguments.images))
    return round(loss, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=SETTINGS, metavar="SETTING")
    parser.add_argument("--problem", default="autoencoder-fashion")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = batches.load(PROBLEMS[arguments.problem], torch.device("cpu"))
    losses: dict[str, Any] = {}
    for spec in arguments.settings:
        losses[spec] = final_loss(spec, splits, arguments)
        print(spec, losses[spec], file=sys.stderr)
    report({"lr": arguments.lr, "steps": arguments.steps, "losses": losses})


if __name__ == "__main__":
    main()
