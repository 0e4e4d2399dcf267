"""Fair comparison: every optimizer gets the same initial weights, batches and budget, seed by seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minifisher_lab.comparison.summary import rows
from minifisher_lab.training.checkpoint import Checkpoint
from minifisher_lab.training.optimizers import choose, next_rate
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice
    from minifisher_lab.training.runs import RunFolder


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
    checkpoint_every: int | None = None
    """The steps between two checkpoints; None: one at every logged point, deleted when the run has ended."""
    follow: bool = False
    """Whether an optimizer whose best rate is the lowest or highest of several gets the next one, too."""

    @classmethod
    def restored(cls, problem: Problem, record: dict[str, Any]) -> Plan:
        """The plan that `as_json` wrote."""
        entrants = (Candidate(choose(entry["name"]), entry["rate"]) for entry in record["optimizers"])
        seeds, budget = tuple(record["seeds"]), Budget(**record["budget"])
        points, every, follow = record["points"], record["checkpoint_every"], record.get("follow", False)
        return cls(problem, tuple(entrants), seeds, budget, points, every, follow)

    def as_json(self) -> dict[str, Any]:
        """Everything that decides what is measured."""
        return {
            "problem": self.problem.name,
            "optimizers": [{"name": choice.name, "rate": rate} for choice, rate in self.candidates],
            "seeds": list(self.seeds),
            "budget": asdict(self.budget),
            "points": self.points,
            "checkpoint_every": self.checkpoint_every,
            **({"follow": True} if self.follow else {}),  # older run folders have no such entry
        }

    def order(self) -> Iterator[tuple[int, Candidate]]:
        """The runs in order: seed by seed, each seed starting with the next candidate.

        If the machine becomes slower or faster over time, all candidates are affected alike.
        """
        for index, seed in enumerate(self.seeds):
            turn = index % len(self.candidates)
            for candidate in self.candidates[turn:] + self.candidates[:turn]:
                yield seed, candidate

    def completed(self, runs: Sequence[Run]) -> bool:
        """Whether every run of the plan ended by itself, not by Ctrl-C, and no rate is left to be tried."""
        planned = len(self.seeds) * len(self.candidates)
        return len(runs) >= planned and runs[-1].status != "interrupted" and not _outward(self, runs)


def compare(plan: Plan, splits: Splits, folder: RunFolder, watcher: Watcher) -> list[Run]:
    """Carry out every run of the plan. Ctrl-C ends the comparison and keeps what was measured.

    In a resumed folder, runs that have ended are read, and the one that was cut short goes on.
    """
    folder.begin(plan.as_json(), splits.train.inputs.device)
    runs: list[Run] = []
    try:
        _carry_out_all(plan, splits, folder, watcher, runs)
        while wider := _outward(plan, runs):
            _carry_out_all(replace(plan, candidates=wider), splits, folder, watcher, runs)
    except KeyboardInterrupt:
        for run in runs:
            if run.status == "running":
                run.status = "interrupted"
                watcher.ended(run)
    return runs


def _carry_out_all(plan: Plan, splits: Splits, folder: RunFolder, watcher: Watcher, runs: list[Run]) -> None:
    entries = [(candidate, _entry(plan, folder, candidate, seed)) for seed, candidate in plan.order()]
    for choice in {c.choice.name: c.choice for c, run in entries if not run.ended}.values():
        watcher.warming(choice.name)
        warm_up(plan.problem, splits, choice)
    for candidate, run in entries:
        runs.append(run)
        watcher.started(run)
        if not run.ended:
            _carry_out(plan, splits, folder, watcher, candidate, run)
        watcher.ended(run)


FARTHEST = 3
"""How many rates beyond its grid an optimizer may get on one side."""


def _outward(plan: Plan, runs: Sequence[Run]) -> tuple[Candidate, ...]:
    """The next rate of every optimizer whose best one is the lowest or highest tried."""
    if not plan.follow:
        return ()
    choices = {candidate.choice.name: candidate.choice for candidate in plan.candidates}
    edges = [row for row in rows(runs) if row.at_edge and row.counted]
    found = ((choices[row.optimizer], next_rate(row.rate, up=row.rate == max(row.tried))) for row in edges)
    return tuple(
        Candidate(choice, rate)
        for choice, rate in found
        if len(choice.grid) > 1 and _steps_beyond(choice.grid, rate) <= FARTHEST
    )


def _steps_beyond(grid: tuple[float, ...], rate: float) -> int:
    """How many steps of about a factor sqrt(10) lie between the rate and the grid."""
    beyond = max(math.log10(rate / grid[-1]), math.log10(grid[0] / rate))
    return round(2 * beyond)


def _entry(plan: Plan, folder: RunFolder, candidate: Candidate, seed: int) -> Run:
    """The run as it was recorded, or a new one."""
    run = Run(plan.problem.name, candidate.choice.name, candidate.rate, seed)
    if folder.recorded(run) and plan.checkpoint_every is None:
        Checkpoint(folder, run).remove()  # it is still there if the command was killed just before
    return run


def _carry_out(
    plan: Plan, splits: Splits, folder: RunFolder, watcher: Watcher, candidate: Candidate, run: Run
) -> None:
    def watch(spent: float, loss: float) -> None:
        watcher.moved(run, spent, loss)

    checkpoint = Checkpoint(folder, run, plan.checkpoint_every)
    trainer = Trainer(plan.problem, splits, candidate.choice, candidate.rate, run.seed)
    log, points = folder.log, plan.points
    train(run, trainer, splits, plan.budget, points=points, log=log, watch=watch, checkpoint=checkpoint)
    folder.record(run)
    if plan.checkpoint_every is None:
        checkpoint.remove()
