"""The worker: measures the runs of a study, one after the other. Several processes may work on one study."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from minifisher_lab.comparison import machine
from minifisher_lab.comparison.search import best_of, propose
from minifisher_lab.comparison.study import Record, now
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from minifisher_lab.comparison.study import StudyFile, Unit
    from minifisher_lab.comparison.suite import SuitePlan
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice
    from minifisher_lab.training.runs import Point

    Log = Callable[[Run, Point], None]
    Watch = Callable[[float, float], None]

POLL = 0.5
"""Seconds between looks, when other processes hold all remaining runs."""


class Watcher(Protocol):
    """Receives the progress of a study."""

    def began(self, unit: Unit, setting: Mapping[str, float]) -> None:
        """A run begins."""

    def moved(self, spent: float, loss: float) -> None:
        """The run has spent that fraction of its epochs."""

    def ended(self, record: Record, done: int, seconds_left: float) -> None:
        """A run has ended; so many runs of the study are done."""

    def waiting(self, others: Sequence[tuple[str, str, int]]) -> None:
        """Only runs that other processes hold are left."""


class Worker:
    """Measures the runs of a study, one after the other, until none is left. Several may work at once."""

    def __init__(
        self,
        study: StudyFile,
        plan: SuitePlan,
        device: torch.device,
        *,
        take_over: bool = False,
    ) -> None:
        self.study, self.plan, self.device = study, plan, device
        self.take_over = take_over
        self.finished: dict[tuple[str, str], Mapping[str, Record]] = {}
        """By problem and optimizer; `done` reads them anew."""
        self._splits: dict[str, Splits] = {}
        self._warm: set[tuple[str, str]] = set()

    def work(self, watcher: Watcher) -> None:
        """Measure what is left. After Ctrl-C or a kill the next call continues."""
        while self.done() < self.plan.total:
            unit = self._claimed()
            if unit is None:
                watcher.waiting(self.study.others())
                time.sleep(POLL)
                continue
            try:
                record = self._measured(unit, watcher)
                self.study.finish(record, self.plan.by_name[unit.entrant].space)
            finally:
                self.study.release(unit)
            watcher.ended(record, self.done(), self.seconds_left())

    def done(self) -> int:
        """How many runs are finished, by this process and others."""
        self.finished = {
            (problem, entrant.name): self.study.records(
                f"{problem}/{entrant.name}", self.plan.runs_of(entrant)
            )
            for problem in self.plan.epochs
            for entrant in self.plan.entrants
        }
        return sum(map(len, self.finished.values()))

    def seconds_left(self) -> float:
        """The time for the remaining runs, if they take as long as finished ones like them."""
        workers = 1 + len({(host, pid) for _, host, pid in self.study.others()})
        times = {pair: [r.wall_seconds for r in records.values()] for pair, records in self.finished.items()}
        everything = [seconds for some in times.values() for seconds in some]
        left = 0.0
        for (problem, name), own in times.items():
            missing = self.plan.runs_of(self.plan.by_name[name]) - len(own)
            alike = own or [seconds for pair, some in times.items() if pair[0] == problem for seconds in some]
            left += missing * fmean(alike or everything)
        return left / workers

    def _claimed(self) -> Unit | None:
        """The first run that is not finished, whose trials are known, and that no other process has."""
        for unit in self.plan.units():
            finished = self.finished[unit.problem, unit.entrant]
            ready = all(trial.key in finished for trial in self.plan.trial_units(unit))
            if unit.key not in finished and ready and self.study.claim(unit, take_over=self.take_over):
                return unit
        return None

    def _measured(self, unit: Unit, watcher: Watcher) -> Record:
        entrant = self.plan.by_name[unit.entrant]
        choice = replace(choose(entrant.spec), name=entrant.name)
        setting = self._setting(unit, choice)
        options = {name: value for name, value in setting.items() if name != "lr"}
        choice = replace(choice, build=partial(choice.build, **options))
        seed = 0 if unit.kind == "trial" else 1 + unit.number
        run = Run(unit.problem, entrant.name, setting["lr"], seed)
        watcher.began(unit, setting)
        room = Room(self.study)
        began = now()
        error = self._trained(run, choice, room.look, watcher.moved)
        return Record(
            unit, setting, run, run.best_loss, began, now(), machine.provenance(), *room.seen, error
        )

    def _setting(self, unit: Unit, choice: Choice) -> dict[str, float]:
        entrant = self.plan.by_name[unit.entrant]
        if not entrant.space:
            return {"lr": choice.rate}
        finished = self.finished[unit.problem, unit.entrant]
        trials = [finished[trial.key] for trial in self.plan.trial_units(unit)]
        tried = [(trial.setting, trial.loss) for trial in trials]
        return best_of(tried) if unit.kind == "seed" else propose(entrant.space, tried, self.plan.trials)

    def _trained(self, run: Run, choice: Choice, log: Log, watch: Watch) -> str | None:
        """Train; the exception of an optimizer that cannot run is a result, and the study continues."""
        problem = PROBLEMS[run.problem]
        splits = self._loaded(problem.name)
        budget = Budget(epochs=self.plan.epochs[problem.name])
        try:
            if (problem.name, choice.name) not in self._warm:
                warm_up(problem, splits, choice)
                self._warm.add((problem.name, choice.name))
            trainer = Trainer(problem, splits, choice, run.rate, run.seed)
            train(run, trainer, splits, budget, points=self.plan.points, log=log, watch=watch)
        except sqlite3.Error:  # the file, not the optimizer
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _loaded(self, problem: str) -> Splits:
        if problem not in self._splits:
            self._splits = {problem: batches.load(PROBLEMS[problem], self.device)}  # one at a time in memory
        return self._splits[problem]


class Room:
    """Watches whether the machine is shared while a run is timed."""

    def __init__(self, study: StudyFile) -> None:
        self.study = study
        self.neighbours, self.load = 0, 0.0

    def look(self, run: Run, point: Point) -> None:
        """Look once; called at every logged point, while the clock stands."""
        host = machine.provenance()["host"]
        here = sum(other == host for _, other, _ in self.study.others())
        self.neighbours = max(self.neighbours, here)
        self.load = max(self.load, machine.load_average())

    @property
    def seen(self) -> tuple[int, float]:
        """The most runs of other processes, and the highest load average."""
        return self.neighbours, self.load
