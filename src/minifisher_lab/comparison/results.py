"""What a study found: per problem and optimizer the trials, the runs of the best setting, and the numbers."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from scipy import stats

from minifisher_lab.comparison.search import at_edge
from minifisher_lab.comparison.suite import SuitePlan
from minifisher_lab.comparison.summary import REFERENCE, Row, Spread, best_first

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minifisher_lab.comparison.spaces import Entrant
    from minifisher_lab.comparison.study import Record, StudyFile
    from minifisher_lab.training.runs import Run

Axis = Literal["seconds", "epoch"]


@dataclass(frozen=True)
class Result:
    """One optimizer on one problem."""

    problem: str
    entrant: Entrant
    trials: tuple[Record, ...]
    seeds: tuple[Record, ...]
    row: Row
    """The runs of the seeds with their curves."""

    @property
    def setting(self) -> Mapping[str, float]:
        """The setting of the seeds' runs."""
        return self.seeds[0].setting if self.seeds else {}

    @property
    def edges(self) -> dict[str, str]:
        """Which values of the best setting are the lowest or highest tried."""
        tried = [(trial.setting, trial.loss) for trial in self.trials]
        return at_edge(self.entrant.space, tried) if tried else {}

    @property
    def errors(self) -> list[str]:
        """The exceptions of its runs."""
        return sorted({record.error for record in (*self.trials, *self.seeds) if record.error})

    @property
    def all_finished(self) -> bool:
        """Whether every seed's run ended with finite losses."""
        return bool(self.seeds) and len(self.row.counted) == len(self.seeds)


@dataclass(frozen=True)
class Findings:
    """All results of a study."""

    plan: SuitePlan
    results: tuple[Result, ...]

    def of(self, problem: str) -> list[Result]:
        """The results of a problem: fewest diverged seeds, then lowest loss; those without one are last."""
        mine = [result for result in self.results if result.problem == problem and result.seeds]
        return sorted(mine, key=lambda result: best_first(result.row))

    @property
    def records(self) -> list[Record]:
        """All finished runs."""
        return [record for result in self.results for record in (*result.trials, *result.seeds)]


def read(study: StudyFile) -> Findings:
    """The findings of a study, which may still be incomplete."""
    plan = SuitePlan.from_json(study.planned)
    pairs = [(problem, entrant) for problem in plan.epochs for entrant in plan.entrants]
    return Findings(plan, tuple(_result(study, problem, entrant) for problem, entrant in pairs))


def _result(study: StudyFile, problem: str, entrant: Entrant) -> Result:
    records = sorted(study.records(f"{problem}/{entrant.name}").values(), key=lambda r: r.unit.number)
    trials = tuple(record for record in records if record.unit.kind == "trial")
    seeds = tuple(record for record in records if record.unit.kind == "seed")
    runs = tuple(replace(record.run, points=study.points(record.unit)) for record in seeds)
    rates = tuple(sorted({trial.setting["lr"] for trial in trials}))
    rate = seeds[0].setting["lr"] if seeds else math.nan
    return Result(problem, entrant, trials, seeds, Row(entrant.name, rate, runs, rates))


def interval(spread: Spread, count: int) -> float:
    """Half the width of the 95 % interval of the mean of `count` values (Student's t); nan for one value."""
    if count < 2:
        return math.nan
    return float(stats.t.ppf(0.975, count - 1)) * spread.deviation / math.sqrt(count)


def equal_time(found: Sequence[Result]) -> float:
    """The seconds at which the optimizers of a problem are compared: the median of their mean times."""
    times = [result.row.seconds for result in found if result.row.counted]
    return statistics.median(times) if times else math.nan


def loss_within(result: Result, seconds: float) -> Spread:
    """The best training loss that was logged within so many seconds of training."""
    logged = ([p.train_loss for p in run.points if p.seconds <= seconds] for run in result.row.counted)
    return Spread.of(min(losses) for losses in logged)


def standings(findings: Findings) -> dict[str, tuple[int, int]]:
    """On how many problems an optimizer is first or level with the first: in equal epochs, in equal time.

    It is level if the 95 % intervals of the two means meet. One with a diverged seed is neither.
    """
    counts: dict[str, tuple[int, int]] = {}
    for problem in findings.plan.epochs:
        found = [result for result in findings.of(problem) if result.row.counted]
        seconds, stable = equal_time(found), [result for result in found if not result.row.diverged]
        by_epochs = _level([(result, result.row.best_loss) for result in stable])
        by_time = _level([(result, loss_within(result, seconds)) for result in stable])
        for result in found:
            name = result.entrant.name
            epochs, time = counts.get(name, (0, 0))
            counts[name] = epochs + (name in by_epochs), time + (name in by_time)
    return counts


def _level(losses: Sequence[tuple[Result, Spread]]) -> set[str]:
    def half(result: Result, spread: Spread) -> float:
        width = interval(spread, len(result.row.counted))
        return 0.0 if math.isnan(width) else width

    ends = [(result.entrant.name, spread.mean, half(result, spread)) for result, spread in losses]
    best = min(((mean, width) for _, mean, width in ends), default=(math.nan, math.nan))
    return {name for name, mean, width in ends if mean - width <= sum(best)}


def time_to_target(result: Result, reference: Result, axis: Axis) -> float:
    """The mean time until a run reaches the reference's best loss on its seed; infinite if one does not."""
    targets = {run.seed: run.best_loss for run in reference.row.counted}
    runs = [run for run in result.row.runs if run.seed in targets]
    times = [_first(run, targets[run.seed], axis) for run in runs]
    return sum(times) / len(times) if times else math.inf


def _first(run: Run, loss: float, axis: Axis) -> float:
    reached = (getattr(point, axis) for point in run.points if point.train_loss <= loss)
    return float(next(reached, math.inf))


def profile(findings: Findings, axis: Axis) -> dict[str, list[float]]:
    """The performance profile: for every optimizer its time to target over the best optimizer's, by problem.

    Source: Dolan, More, "Benchmarking optimization software with performance profiles" (2002). Empty if
    the reference optimizer has no result.
    """
    ratios: dict[str, list[float]] = {}
    for problem in findings.plan.epochs:
        results = findings.of(problem)
        reference = reference_of(results)
        if reference is not None:
            times = {result.entrant.name: time_to_target(result, reference, axis) for result in results}
            best = min(times.values())
            for name, time in times.items():
                ratios.setdefault(name, []).append(time / best if best > 0 else math.inf)
    return ratios


def reference_of(results: Sequence[Result]) -> Result | None:
    """The result whose loss is the target, if there is one."""
    return next((r for r in results if r.entrant.name == REFERENCE and r.row.counted), None)
