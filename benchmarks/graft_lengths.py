"""One step length a weight against one a row (`graft="adam"`, `"adam-rows"`), in equal epochs: prints JSON.

Best losses are those of the laboratory: the lowest on a fixed slice of 2,000 training samples. Means over
seeds with their standard deviations; needs the extra `lab` and the data sets of the problems.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train

GRAFTS = ("adam", "adam-rows")


def one(problem: str, splits: batches.Splits, graft: str, rate: float, seed: int, epochs: float) -> Run:
    choice = choose(f"mbf:graft={graft}")
    run = Run(problem, choice.name, rate, seed)
    trainer = Trainer(PROBLEMS[problem], splits, choice, rate, seed)
    train(run, trainer, splits, Budget(epochs=epochs), points=10)
    return run


def spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "deviation": round(deviation, 4)}


def summary(runs: list[Run]) -> dict[str, object]:
    accuracies = [run.test_accuracy for run in runs if run.test_accuracy is not None]
    return {
        "best_loss": spread([run.best_loss for run in runs]),
        **({"test_accuracy": spread(accuracies)} if accuracies else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="+", choices=PROBLEMS)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0)
    arguments = parser.parse_args()
    for problem in arguments.problems:
        splits = batches.load(PROBLEMS[problem], torch.device("cpu"))
        for rate in arguments.rates:
            for graft in GRAFTS:
                runs = [
                    one(problem, splits, graft, rate, seed, arguments.epochs)
                    for seed in range(arguments.seeds)
                ]
                line = {"problem": problem, "epochs": arguments.epochs, "lr": rate, "graft": graft}
                print(json.dumps({**line, **summary(runs)}), flush=True)


if __name__ == "__main__":
    main()
