"""Fit a study into a number of hours: time the steps of every optimizer, then reduce the epochs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from minifisher_lab.comparison.study import StudyError
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train

if TYPE_CHECKING:
    import torch

    from minifisher_lab.comparison.spaces import Entrant
    from minifisher_lab.comparison.suite import SuitePlan
    from minifisher_lab.training.batches import Splits

TIMED_STEPS = 20  # the first steps include statistics and an inverse
LEAST = 0.01
"""The smallest share of its epochs that a run may keep."""


def fitted(plan: SuitePlan, device: torch.device) -> SuitePlan:
    """The plan with its epochs reduced so that all runs take at most `hours`; steps are timed for that."""
    if plan.hours is None:
        return plan
    training, overhead = 0.0, 0.0
    for problem in plan.epochs:
        splits = batches.load(PROBLEMS[problem], device)
        for entrant in plan.entrants:
            try:
                one_training, one_overhead = seconds_of_run(plan, problem, entrant, splits)
            except (
                Exception
            ):  # it cannot run here: its runs will fail at once, and the report names the error
                continue
            training += plan.runs_of(entrant) * one_training
            overhead += plan.runs_of(entrant) * one_overhead
    share = min(1.0, (3600 * plan.hours - overhead) / training)
    if share < LEAST:
        raise StudyError(
            f"{plan.total} runs in {plan.hours:g} h would have less than {LEAST:.0%} of their epochs: give "
            "more hours, or fewer --problems, --optimizers, --trials or --seeds"
        )
    return replace(plan, epochs={name: float(f"{share * e:.3g}") for name, e in plan.epochs.items()})


def seconds_of_run(plan: SuitePlan, problem: str, entrant: Entrant, splits: Splits) -> tuple[float, float]:
    """What a run takes: its training, and the evaluation of its points."""
    run = Run(problem, entrant.name, 0.0, seed=0)
    choice = choose(entrant.spec)
    began = time.monotonic()
    trainer = Trainer(PROBLEMS[problem], splits, choice, choice.rate, seed=0)
    train(run, trainer, splits, Budget(epochs=TIMED_STEPS / trainer.steps_per_epoch), points=1)
    evaluation = (time.monotonic() - began - run.seconds) / 3  # two points, and the whole test set
    epoch = run.seconds / run.steps * trainer.steps_per_epoch
    return epoch * plan.epochs[problem], evaluation * plan.points
