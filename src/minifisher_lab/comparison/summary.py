"""Summarise the runs of one problem: each optimizer's best learning rate, and means over seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from minifisher_lab.training.runs import Run

REFERENCE = "adamw"
"""The optimizer that the others are compared with: how many seconds they need to reach its best loss."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with the sample standard deviation, which is nan for a single seed."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Mean and deviation of the values; nan where there are too few."""
        numbers = list(values)
        mean = statistics.fmean(numbers) if numbers else math.nan
        return cls(mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan)


@dataclass(frozen=True)
class Row:
    """One optimizer at one learning rate, over the seeds."""

    optimizer: str
    rate: float
    runs: tuple[Run, ...]
    tried: tuple[float, ...]
    """All learning rates that were tried with this optimizer."""

    @property
    def counted(self) -> tuple[Run, ...]:
        """The finished runs or, if none has finished, the interrupted ones."""
        finished = tuple(run for run in self.runs if run.status == "finished")
        return finished or tuple(run for run in self.runs if run.status == "interrupted" and run.points)

    @property
    def diverged(self) -> int:
        """How many runs ended in a loss that is not finite."""
        return sum(run.status == "diverged" for run in self.runs)

    @property
    def best_loss(self) -> Spread:
        """The best loss on the fixed training slice."""
        return Spread.of(run.best_loss for run in self.counted)

    @property
    def accuracy(self) -> Spread:
        """The accuracy on the whole test set at the end, in per cent."""
        return self._spread(lambda run: run.test_accuracy)

    @property
    def seconds(self) -> float:
        """Mean training seconds."""
        return Spread.of(run.seconds for run in self.counted).mean

    @property
    def step_time(self) -> float:
        """The mean seconds of a training step over all counted runs."""
        steps = sum(run.steps for run in self.counted)
        return sum(run.seconds for run in self.counted) / steps if steps else math.nan

    @property
    def state_per_parameter(self) -> float:
        """Optimizer state in bytes per parameter."""
        return Spread.of(run.state_bytes / run.parameters for run in self.counted if run.state_bytes).mean

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest tried, so that a better one may lie outside."""
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))

    def seconds_to_reference(self, reference: Row) -> tuple[float, int, int]:
        """The mean seconds until a run reaches the reference's best loss on the same seed.

        Also the number of runs that reach it, and the number of seeds that both have.
        """
        targets = {run.seed: run.best_loss for run in reference.counted}
        times = [run.seconds_to(targets[run.seed]) for run in self.counted if run.seed in targets]
        reached = [time for time in times if time is not None]
        return Spread.of(reached).mean, len(reached), len(times)

    def _spread(self, of: Callable[[Run], float | None]) -> Spread:
        return Spread.of(value for value in map(of, self.counted) if value is not None)


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row per optimizer, with its best learning rate, best row first.

    The best row has the fewest diverged runs and, among those, the lowest mean loss.
    """
    every = all_rows(runs)
    names = dict.fromkeys(row.optimizer for row in every)
    best = [min((row for row in every if row.optimizer == name), key=best_first) for name in names]
    return sorted(best, key=best_first)


def all_rows(runs: Sequence[Run]) -> list[Row]:
    """One row for every optimizer and learning rate, in the order of the first runs."""
    keys = dict.fromkeys((run.optimizer, run.rate) for run in runs)
    tried = {name: tuple(sorted(rate for other, rate in keys if other == name)) for name, _ in keys}
    return [
        Row(name, rate, tuple(run for run in runs if (run.optimizer, run.rate) == (name, rate)), tried[name])
        for name, rate in keys
    ]


def reference_row(table: Sequence[Row]) -> Row | None:
    """The row of the reference optimizer, if it took part and has a result."""
    return next((row for row in table if row.optimizer == REFERENCE and row.counted), None)


def best_first(row: Row) -> tuple[int, float]:
    """The key that sorts rows: fewest diverged runs, then the lowest mean loss; rows without one are last."""
    mean = row.best_loss.mean
    return row.diverged if row.counted else len(row.runs) + 1, math.inf if math.isnan(mean) else mean
