"""The published MNIST autoencoder, 784-1000-500-250-30 mirrored, under each method's published configuration.

Every learning rate and damping trains for `--search` steps, the best goes on to `--epochs`: 60 or more, since
inverses that grow old from the 20th step on are what diverges. What is published stands in docs/methods.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from alternate import report
from torch import Tensor, nn

import minifisher
from minifisher_lab import batches
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.train import evaluate

PROBLEM = PROBLEMS["autoencoder-mnist"]
EVALUATED = 10_000  # fixed training images that the loss is measured on

PUBLISHED: dict[str, Any] = {
    "relative_damping": False,
    "graft": None,
    "momentum": 0.9,
    "curvature_decay": 0.9,
    "statistics_every": 1,
    "inverse_every": 20,
}
UNCUT = {"max_dim": 10**6, "merge_dims": 9}
ONCE = {"inverse_every": 10**9}  # H_a is inverted at the start alone


@dataclass(frozen=True)
class Rival:
    """A method in its published configuration, with the grid that is searched unless told otherwise."""

    build: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    dampings: tuple[float, ...]
    damping_name: str = "damping"


def _adam(network: nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), **options)


# Each grid holds the published region and a few settings beside it; several of the best lie at its edge.
RIVALS = {
    "adam": Rival(_adam, (3e-4, 1e-3, 3e-3), (1e-8,), "eps"),
    "kfac": Rival(partial(minifisher.KFAC, pi_correction=False, **PUBLISHED), (3e-2, 1e-1), (1.0, 3.0, 10.0)),
    "kbfgs": Rival(partial(minifisher.KBFGS, mu1=0.2, **{**PUBLISHED, **ONCE}), (1e-2, 3e-2), (0.3, 1.0)),
    "shampoo": Rival(partial(minifisher.Shampoo, **PUBLISHED, **UNCUT), (1e-3, 3e-3), (0.1, 1.0)),
    "tnt": Rival(partial(minifisher.TNT, **PUBLISHED, **UNCUT), (3e-5, 1e-4), (3e-2, 1e-1)),
}


class Run:
    """One network on its way, and its losses by epoch."""

    def __init__(self, rival: Rival, splits: batches.Splits) -> None:
        self.rival, self.splits = rival, splits
        self.network = PROBLEM.build(seed=0)
        self.optimizer = rival.build(self.network)
        self.epoch = len(splits.train) // PROBLEM.batch_size  # in steps
        self.steps = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []

    @property
    def alive(self) -> bool:
        """Whether the last loss was a number."""
        return self.curve[-1]["loss"] is not None

    @property
    def loss(self) -> float:
        """The last one; infinite once it was not a number."""
        return self.curve[-1]["loss"] if self.alive else math.inf

    def warm_start(self) -> None:
        """The pass through the data at the initial weights; it reads neither learning rate nor damping."""
        if isinstance(self.optimizer, minifisher.CurvatureOptimizer):
            with self._clock():
                one_pass = islice(self._batches(seed=1), self.epoch)
                self.optimizer.warm_start(self.network, one_pass, _loss, PROBLEM.likelihood)

    def set_options(self, rate: float, damping: float) -> Run:
        """The same run with these options."""
        self.optimizer.param_groups[0].update({"lr": rate, self.rival.damping_name: damping})
        self.stream = self._batches(seed=0)
        self._measure()
        return self

    def advance(self, steps: int) -> None:
        """Train up to so many steps, as long as the loss is a number; it is measured once an epoch."""
        while self.steps < steps and self.alive:
            images, _ = next(self.stream)
            with self._clock():
                loss = float(self.optimizer.step(partial(self._closure, images)))
            self.steps += 1
            if self.steps % self.epoch == 0 or self.steps == steps or not math.isfinite(loss):
                self._measure()

    def summary(self) -> dict[str, Any]:
        """Its options and how far it came."""
        group = self.optimizer.param_groups[0]
        options = {name: group[name] for name in ("lr", self.rival.damping_name)}
        return {**options, "loss": self.loss if self.alive else "diverged"}

    def _closure(self, images: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        outputs = self.network(images)
        if isinstance(self.optimizer, minifisher.CurvatureOptimizer):
            self.optimizer.observe(outputs, likelihood=PROBLEM.likelihood)
        loss = _loss(outputs, images)
        loss.backward()
        return loss.detach()

    def _measure(self) -> None:
        loss, _ = evaluate(PROBLEM, self.network, self.splits.train.slice(EVALUATED))
        epoch = round(self.steps / self.epoch, 2)
        known = round(loss, 3) if math.isfinite(loss) else None
        self.curve.append({"epoch": epoch, "loss": known, "cpu_seconds": round(self.seconds, 1)})

    def _batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end; the target is the image itself."""
        stream = batches.batches(self.splits.train, PROBLEM.batch_size, seed, PROBLEM.augmentation)
        return ((images, images) for images, _ in stream)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began


def _loss(outputs: Tensor, images: Tensor) -> Tensor:
    return PROBLEM.loss(outputs, images, images)


def search(rival: Rival, splits: batches.Splits, arguments: argparse.Namespace) -> dict[str, Any]:
    """The grid for a few steps, then its best for the rest; all of it from one start."""
    start = Run(rival, splits)
    if not arguments.cold:
        start.warm_start()
    tried = []
    best: Run | None = None
    for options in product(arguments.lr or rival.rates, arguments.damping or rival.dampings):
        run = copy.deepcopy(start).set_options(*options)
        run.advance(arguments.search)
        tried.append(run.summary())
        print(tried[-1], file=sys.stderr)
        best = run if best is None or run.loss < best.loss else best
    assert best is not None
    best.advance(arguments.epochs * best.epoch)
    return {"search_steps": arguments.search, "tried": tried, "best": best.summary(), "curve": best.curve}


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(RIVALS), metavar="METHOD", help=", ".join(RIVALS))
    parser.add_argument("--lr", type=_numbers, help="with commas; each method has a grid of its own")
    parser.add_argument("--damping", type=_numbers, help="likewise; eps of Adam")
    parser.add_argument("--search", type=int, default=60, help="steps of every setting")
    parser.add_argument("--epochs", type=int, default=10, help="of the best setting")
    parser.add_argument("--cold", action="store_true", help="without the start-up pass")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = batches.load(PROBLEM, torch.device("cpu"))
    report({name: search(RIVALS[name], splits, arguments) for name in arguments.methods})


if __name__ == "__main__":
    main()
