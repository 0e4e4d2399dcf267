"""Curvature kept in bfloat16 against float32: the same starts, batches and epochs."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from alternate import report

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.batches import Splits, load
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train

DTYPES = (torch.float32, torch.bfloat16)


def trained(
    problem: str, splits: Splits, dtype: torch.dtype, arguments: argparse.Namespace, seed: int
) -> Run:
    choice = choose(arguments.optimizer)
    run = Run(problem, f"{choice.name}, {dtype}", arguments.lr or choice.rate, seed)

    def build(*parts: Any, **options: Any) -> Any:
        return choice.build(*parts, curvature_dtype=dtype, **options)

    kept = type(choice)(choice.name, choice.description, build, run.rate, choice.grid)
    trainer = Trainer(PROBLEMS[problem], splits, kept, run.rate, seed)
    train(run, trainer, splits, Budget(epochs=arguments.epochs), points=1)
    return run


def summary(runs: list[Run]) -> dict[str, Any]:
    """Every seed's figures, and their means."""
    losses = [run.points[-1].train_loss for run in runs]
    accuracies = [run.test_accuracy for run in runs if run.test_accuracy is not None]
    return {
        "train_loss": [round(loss, 5) for loss in losses],
        "mean_train_loss": round(statistics.fmean(losses), 5),
        "test_loss": [round(run.test_loss or 0.0, 5) for run in runs],
        "test_accuracy": [round(accuracy, 2) for accuracy in accuracies],
        "state_bytes_per_parameter": round(runs[0].state_bytes / runs[0].parameters, 2),
        "status": sorted({run.status for run in runs}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--optimizer", default="mbf", help="as on minifisher's command line: mbf:power=0.5")
    parser.add_argument("--lr", type=float, help="the optimizer's default where it is not given")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = load(PROBLEMS[arguments.problem], torch.device("cpu"))
    report(
        {
            "problem": arguments.problem,
            "optimizer": arguments.optimizer,
            "epochs": arguments.epochs,
            **{
                str(dtype).removeprefix("torch."): summary(
                    [trained(arguments.problem, splits, dtype, arguments, n) for n in range(arguments.seeds)]
                )
                for dtype in DTYPES
            },
        }
    )


if __name__ == "__main__":
    main()
