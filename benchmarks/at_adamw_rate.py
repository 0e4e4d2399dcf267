"""MBF with its defaults at AdamW's own best learning rate: losses of training after equal steps.

On every problem AdamW runs at each rate and seed. Its best rate is the one with the least mean loss of
training. MBF runs at that rate alone, untuned, from the same starts and on the same batches. Neither decays
weights. `--saved FILE` keeps every run, so that the next call goes on after a stop. `--mbf` gives MBF other
options, as in mbf:nesterov=False:damping=0.1, and `--rates` tries other rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from alternate import report

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer, evaluate

STEPS = {
    "autoencoder-digits": 300,
    "autoencoder-curves-small": 300,
    "autoencoder-fashion": 300,
    "cnn-digits": 200,
    "cnn-fashion": 150,
    "gcn-cora": 200,
    "gcn-citeseer": 200,
    "gpt-shakespeare-small": 400,
    "lstm-shakespeare": 300,
    "vit-digits": 300,
    "mlp-tabular": 200,
    "mlp-regression": 250,
}
RATES = (1e-3, 3e-3, 1e-2)
SPECS = {"adamw": "adamw:weight_decay=0"}  # of a run's name, where the two differ


@cache
def splits(problem: str) -> Any:
    return batches.load(PROBLEMS[problem], torch.device("cpu"))


def run(problem: str, optimizer: str, rate: float, seed: int, share: float) -> dict[str, Any]:
    """The losses and the accuracy of one run; `share` of the steps are taken."""
    definition, data = PROBLEMS[problem], splits(problem)
    trainer = Trainer(definition, data, choose(SPECS.get(optimizer, optimizer)), rate, seed)
    steps = max(1, round(STEPS[problem] * share))
    for step in range(steps):
        trainer.step(spent=step / steps)
    part = data.train.slice(5000) if len(data.train) > 5000 else data.train
    train, _ = evaluate(definition, trainer.model, part)
    test, accuracy = evaluate(definition, trainer.model, data.test)
    key = {"problem": problem, "optimizer": optimizer, "rate": rate, "seed": seed, "share": share}
    return {**key, "train": train, "test": test, "accuracy": accuracy}


class Runs:
    """All runs so far, each taken once."""

    def __init__(self, saved: Path | None) -> None:
        self.saved = saved
        lines = saved.read_text().splitlines() if saved and saved.exists() else []
        self.known = {self._key(line): line for line in map(json.loads, lines)}

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in ("problem", "optimizer", "rate", "seed", "share"))

    def take(self, *key: Any) -> dict[str, Any]:
        """The run with this key."""
        if key not in self.known:
            self.known[key] = run(*key)
            print(json.dumps(self.known[key]), file=sys.stderr)
            if self.saved:
                with self.saved.open("a") as file:
                    file.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]


def mean(lines: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(line[name] for line in lines)


def row(
    runs: Runs, problem: str, mbf: str, rates: Sequence[float], seeds: list[int], share: float
) -> dict[str, Any]:
    """Both optimizers at AdamW's best rate."""
    adamw = {rate: [runs.take(problem, "adamw", rate, seed, share) for seed in seeds] for rate in rates}
    best = min(rates, key=lambda rate: mean(adamw[rate], "train"))
    both = {"adamw": adamw[best], "mbf": [runs.take(problem, mbf, best, seed, share) for seed in seeds]}
    table: dict[str, Any] = {"problem": problem, "steps": round(STEPS[problem] * share), "rate": best}
    for optimizer, lines in both.items():
        losses = [line["train"] for line in lines]
        table[optimizer] = {
            "train": statistics.mean(losses),
            "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "test": mean(lines, "test"),
            "accuracy": None if lines[0]["accuracy"] is None else mean(lines, "accuracy"),
        }
    table["mbf"]["train_over_adamw"] = table["mbf"]["train"] / table["adamw"]["train"]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--mbf", default="mbf", help="the optimizer beside AdamW")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps that are taken")
    parser.add_argument("--saved", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = Runs(arguments.saved)
    chosen = arguments.mbf, arguments.rates, arguments.seeds, arguments.share
    report({"rows": [row(runs, name, *chosen) for name in arguments.problems]})


if __name__ == "__main__":
    main()
