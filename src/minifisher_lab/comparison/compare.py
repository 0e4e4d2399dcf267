"""Fair comparison: every optimizer gets the same initial weights, batches and budget, seed by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice
    from minifisher_lab.training.runs import Point, RunFolder
    from minifisher_lab.training.train import Budget


class Candidate(NamedTuple):
    """An optimizer with one learning rate."""

    choice: Choice
    rate: float


class Watcher(Protocol):
    """Receives the progress of a comparison."""

    def warming(self, optimizer: str) -> None:
        """An optimizer takes its warm-up steps, which are not timed."""

    def started(self, run: Run) -> None:
        """A run begins."""

    def moved(self, run: Run, spent: float, loss: float) -> None:
        """A run has spent that fraction of its budget."""

    def ended(self, run: Run) -> None:
        """A run has ended; its status says how."""


@dataclass(frozen=True)
class Plan:
    """What to compare on one problem."""

    problem: Problem
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    budget: Budget
    points: int = 50

    def order(self) -> Iterator[tuple[int, Candidate]]:
        """The runs in order: seed by seed, each seed starting with the next candidate.

        If the machine becomes slower or faster over time, all candidates are affected alike.
        """
        for index, seed in enumerate(self.seeds):
            turn = index % len(self.candidates)
            for candidate in self.candidates[turn:] + self.candidates[:turn]:
                yield seed, candidate

    def completed(self, runs: Sequence[Run]) -> bool:
        """Whether every run of the plan ended by itself, not by Ctrl-C."""
        return len(runs) == len(self.seeds) * len(self.candidates) and runs[-1].status != "interrupted"


def compare(plan: Plan, splits: Splits, folder: RunFolder, watcher: Watcher) -> list[Run]:
    """Carry out every run of the plan. Ctrl-C ends the comparison and keeps what was measured."""
    runs: list[Run] = []
    try:
        for choice in {candidate.choice.name: candidate.choice for candidate in plan.candidates}.values():
            watcher.warming(choice.name)
            warm_up(plan.problem, splits, choice)
        for seed, candidate in plan.order():
            _one(plan, splits, folder, watcher, runs, candidate, seed)
    except KeyboardInterrupt:
        for run in runs:
            if run.status == "running":
                run.status = "interrupted"
                watcher.ended(run)
    return runs


def _one(
    plan: Plan,
    splits: Splits,
    folder: RunFolder,
    watcher: Watcher,
    runs: list[Run],
    candidate: Candidate,
    seed: int,
) -> None:
    run = Run(plan.problem.name, candidate.choice.name, candidate.rate, seed)
    runs.append(run)
    watcher.started(run)

    def watch(spent: float, loss: float) -> None:
        watcher.moved(run, spent, loss)

    def log(run: Run, point: Point) -> None:
        folder.log(run, point)

    trainer = Trainer(plan.problem, splits, candidate.choice, candidate.rate, seed)
    train(run, trainer, splits, plan.budget, points=plan.points, log=log, watch=watch)
    watcher.ended(run)
