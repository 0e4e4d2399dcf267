"""The published MNIST autoencoder, 784-1000-500-250-30 mirrored, under each method's published configuration.

Without `--lr` and `--damping` the setting is that of the authors' own runs (docs/methods.md). Of several,
each trains for `--search` epochs and the best goes on to `--epochs`. The first epochs tell above all what
diverges: inverses grow old from the 20th step on, while gradients leave the initial plateau.
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
from typing import Any, Literal

import torch
from alternate import report
from torch import Tensor

import minifisher
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.published import PUBLISHED
from minifisher_lab.training.train import evaluate

PROBLEM = PROBLEMS["autoencoder-mnist"]
OFTEN = 5  # epochs that are measured one by one, then every so many: on all 60,000 images it costs seconds


@dataclass(frozen=True)
class Rival:
    """A method in its published configuration, with learning rate and damping of its authors' own runs."""

    build: Callable[..., torch.optim.Optimizer]
    rate: float
    damping: float
    damping_name: str = "damping"
    warm_labels: Literal["data", "model"] = "data"


def published(name: str, **changes: Any) -> Rival:
    """A row of the published settings, perhaps with other options."""
    row = PUBLISHED[name]
    build = partial(choose(name).build, lr=row.rate, **changes)
    if row.damping is None:
        return Rival(build, row.rate, row.options["eps"], "eps")
    return Rival(build, row.rate, row.damping, warm_labels=row.warm_labels or "data")


RIVALS = {name: published(name) for name, row in PUBLISHED.items() if row.problem == "autoencoder"} | {
    "adam": Rival(partial(choose("adam").build, lr=1e-4), 1e-4, 1e-4, "eps"),  # torch's
    "mbf": Rival(minifisher.MBF, 1e-3, 0.03),  # with its defaults
    "mbf-wide": Rival(partial(minifisher.MBF, block_size=256), 7e-4, 0.03),
}


class Run:
    """One network on its way, and its losses by epoch."""

    def __init__(self, rival: Rival, splits: batches.Splits, seed: int | None) -> None:
        self.rival, self.splits = rival, splits
        self.network = PROBLEM.build(seed=0)
        if seed is not None:
            torch.manual_seed(seed)
        self.optimizer = rival.build(self.network)
        self.optimizer.param_groups[0].update({"lr": rival.rate, rival.damping_name: rival.damping})
        self.stream = self._batches(seed=0)
        self.steps_an_epoch = len(splits.train) // PROBLEM.batch_size
        self.epoch = 0
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
                images = (images for images, _ in islice(self._batches(seed=1), self.steps_an_epoch))
                pairs = ((batch, batch) for batch in images)  # the target is the image itself
                self.optimizer.warm_start(
                    self.network, pairs, _loss, PROBLEM.likelihood, labels=self.rival.warm_labels
                )

    def set_options(self, rate: float, damping: float) -> Run:
        """The same run with these options."""
        self.optimizer.param_groups[0].update({"lr": rate, self.rival.damping_name: damping})
        return self

    def advance(self, epochs: int) -> None:
        """Train up to so many epochs, as long as the loss is a number."""
        if not self.curve:
            self._measure()
        while self.epoch < epochs and self.alive:
            for _ in range(self.steps_an_epoch):
                images, _ = next(self.stream)
                with self._clock():
                    self.optimizer.step(partial(self._closure, images))
            self.epoch += 1
            if self.epoch <= OFTEN or self.epoch % OFTEN == 0 or self.epoch == epochs:
                self._measure()

    def summary(self) -> dict[str, Any]:
        """Its options and how far it came."""
        group = self.optimizer.param_groups[0]
        options = {name: group[name] for name in ("lr", self.rival.damping_name)}
        return {**options, "loss": self.loss if self.alive else "diverged"}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "random": torch.get_rng_state(),
            "counts": {name: getattr(self, name) for name in ("epoch", "seconds", "curve")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run with this state stood."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["random"])
        vars(self).update(state["counts"])

    def _closure(self, images: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        outputs = self.network(images)
        if isinstance(self.optimizer, minifisher.CurvatureOptimizer):
            self.optimizer.observe(outputs, likelihood=PROBLEM.likelihood)
        loss = _loss(outputs, images)
        loss.backward()
        return loss.detach()

    def _measure(self) -> None:
        loss, _ = evaluate(PROBLEM, self.network, self.splits.train)
        known = round(loss, 3) if math.isfinite(loss) else None
        self.curve.append({"epoch": self.epoch, "loss": known, "cpu_seconds": round(self.seconds, 1)})
        print(self.curve[-1], file=sys.stderr, flush=True)

    def _batches(self, seed: int) -> batches.Batches:
        """Batches without end."""
        return batches.batches(self.splits.train, PROBLEM.batch_size, seed, PROBLEM.augmentation)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began


def _loss(outputs: Tensor, images: Tensor) -> Tensor:
    return PROBLEM.loss(outputs, images, images.flatten(1))


def search(rival: Rival, splits: batches.Splits, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every setting for a few epochs, then the best for the rest; all of it from one start."""
    start = Run(rival, splits, arguments.seed)
    if not arguments.cold:
        start.warm_start()
    tried = []
    best: Run | None = None
    for options in product(arguments.lr or [rival.rate], arguments.damping or [rival.damping]):
        run = copy.deepcopy(start).set_options(*options)
        run.advance(arguments.search)
        tried.append(run.summary())
        best = run if best is None or run.loss < best.loss else best
    assert best is not None
    best.advance(arguments.epochs)
    return {"search_epochs": arguments.search, "tried": tried, "best": best.summary(), "curve": best.curve}


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(RIVALS), metavar="METHOD", help=", ".join(RIVALS))
    parser.add_argument("--lr", type=_numbers, help="with commas; the published one otherwise")
    parser.add_argument("--damping", type=_numbers, help="likewise; eps of Adam")
    parser.add_argument("--search", type=int, default=3, help="epochs of every setting")
    parser.add_argument("--epochs", type=int, default=75, help="of the best setting")
    parser.add_argument("--cold", action="store_true", help="without the start-up pass")
    parser.add_argument("--seed", type=int, help="of the labels that are drawn; the network's otherwise")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = batches.load(PROBLEM, torch.device("cpu"))
    report({name: search(RIVALS[name], splits, arguments) for name in arguments.methods})


if __name__ == "__main__":
    main()
