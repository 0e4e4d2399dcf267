"""Fit a study into a number of hours: time the steps of every optimizer, then reduce trials and epochs."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minifisher_lab.comparison.study import StudyError
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from minifisher_lab.comparison.spaces import Entrant
    from minifisher_lab.comparison.suite import SuitePlan
    from minifisher_lab.training.batches import Splits

TIMED_STEPS = 20  # the first steps include statistics and an inverse
LEAST = 0.05
"""The smallest share of its epochs that a run may keep."""
LEAST_TRIALS, LEAST_POINTS = 3, 10


@dataclass(frozen=True)
class Cost:
    """What all runs of one optimizer on one problem have in common, in seconds."""

    training: float  # of a run with all its epochs
    point: float  # the evaluation of one point
    start: float = 0.0  # the pass through the data with which a published run begins


def fitted(plan: SuitePlan, device: torch.device) -> SuitePlan:
    """The plan reduced so that all runs take at most `hours`; steps are timed for that.

    If the hours are a share r of what the whole plan takes, trials and points of a curve are multiplied by
    sqrt(r), and the epochs by what is then left. All optimizers and problems are reduced alike.
    """
    if plan.hours is None:
        return plan
    costs = {
        (problem, entrant): cost
        for problem in plan.epochs
        for entrant, cost in _costs(plan, problem, device).items()
    }
    if not costs:  # no optimizer can run here
        return plan
    training, other = _seconds(plan, costs)
    share = 3600 * plan.hours / (training + other)
    if share >= 1:
        return plan
    trials, points = (round(number * share**0.5) for number in (plan.trials, plan.points))
    shorter = replace(
        plan,
        trials=max(trials, min(plan.trials, LEAST_TRIALS)),
        points=max(points, min(plan.points, LEAST_POINTS)),
    )
    training, other = _seconds(shorter, costs)
    kept = (3600 * plan.hours - other) / training
    if kept < LEAST:
        raise StudyError(
            f"{shorter.total} runs in {plan.hours:g} h would have less than {LEAST:.0%} of their epochs: "
            "give more hours, or fewer --problems, --optimizers, --trials or --seeds"
        )
    return replace(shorter, epochs={name: float(f"{kept * e:.3g}") for name, e in plan.epochs.items()})


def _seconds(plan: SuitePlan, costs: Mapping[tuple[str, str], Cost]) -> tuple[float, float]:
    """The training of all runs, and the rest: their starts and evaluations."""
    pairs = [(plan.runs_of(plan.by_name[entrant]), cost) for (_, entrant), cost in costs.items()]
    training = sum(runs * cost.training for runs, cost in pairs)
    return training, sum(runs * (cost.start + plan.points * cost.point) for runs, cost in pairs)


def _costs(plan: SuitePlan, problem: str, device: torch.device) -> dict[str, Cost]:
    splits = batches.load(PROBLEMS[problem], device)
    costs = {}
    for entrant in plan.entrants:
        # One that cannot run here fails at once in its runs, and the report names the error.
        with suppress(Exception):
            costs[entrant.name] = cost_of_run(plan, problem, entrant, splits)
    return costs


def cost_of_run(plan: SuitePlan, problem: str, entrant: Entrant, splits: Splits) -> Cost:
    """Time a few steps, after some that compile and allocate."""
    run = Run(problem, entrant.name, 0.0, seed=0)
    choice = choose(entrant.spec)
    warm_up(PROBLEMS[problem], splits, choice)
    trainer = Trainer(PROBLEMS[problem], splits, choice, choice.rate, seed=0)
    began = time.monotonic()
    trainer.warm_start()
    start = time.monotonic() - began
    train(run, trainer, splits, Budget(epochs=TIMED_STEPS / trainer.steps_per_epoch), points=1)
    point = max(0.0, time.monotonic() - began - run.seconds - 2 * start) / 3  # two points, and the test set
    epoch = run.seconds / run.steps * trainer.steps_per_epoch
    return Cost(epoch * plan.epochs[problem], point, start)
