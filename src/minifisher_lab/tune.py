"""Optuna's search for one optimizer's learning rate, and damping where it has one, on one problem."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from rich.table import Table

from minifisher_lab.display import TrialBars
from minifisher_lab.runs import Run
from minifisher_lab.train import Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from minifisher_lab.batches import Splits
    from minifisher_lab.optimizers import Choice
    from minifisher_lab.problems import Problem
    from minifisher_lab.runs import Point, RunFolder
    from minifisher_lab.train import Budget

ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What is searched: one optimizer on one problem, so many trials of one budget each."""

    problem: Problem
    choice: Choice
    budget: Budget
    trials: int
    seed: int = 0
    points: int = 20

    def suggest(self, trial: optuna.Trial) -> tuple[float, dict[str, float]]:
        """A learning rate within 30 of the default, and the choice's other ranges, on logarithmic scales."""
        rate = trial.suggest_float("lr", self.choice.rate / 30, self.choice.rate * 30, log=True)
        options = {
            name: trial.suggest_float(name, low, high, log=True)
            for name, (low, high) in self.choice.ranges.items()
        }
        return rate, options

    def completed(self, study: optuna.Study) -> bool:
        """Whether all trials ended or were cut short by the search itself: no Ctrl-C."""
        return len(study.get_trials(deepcopy=False, states=ENDED)) == self.trials


def search(
    plan: Search,
    splits: Splits,
    folder: RunFolder,
    ended: Callable[[optuna.trial.FrozenTrial], None],
    watch: Callable[[float, float], None],
) -> optuna.Study:
    """Minimise the best training loss; hopeless trials are cut short, Ctrl-C keeps the finished ones."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warm_up(plan.problem, splits, plan.choice)
    # The defaults come first, so that the search never ends worse than where it began.
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=plan.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=plan.points // 4),
    )
    study.enqueue_trial({"lr": plan.choice.rate})
    with suppress(KeyboardInterrupt):  # what was measured is in the study
        study.optimize(
            partial(_objective, plan, splits, folder, watch),
            n_trials=plan.trials,
            callbacks=[lambda _, trial: ended(trial)],
        )
    folder.write("trials.json", as_json(plan, study))
    return study


def _objective(
    plan: Search,
    splits: Splits,
    folder: RunFolder,
    watch: Callable[[float, float], None],
    trial: optuna.Trial,
) -> float:
    rate, options = plan.suggest(trial)
    choice = replace(plan.choice, build=partial(plan.choice.build, **options))
    run = Run(plan.problem.name, f"trial{trial.number}-{choice.name}", rate, plan.seed)

    def log(run: Run, point: Point) -> None:
        folder.log(run, point)
        trial.report(run.best_loss, len(run.points))
        if trial.should_prune():
            raise optuna.TrialPruned

    trainer = Trainer(plan.problem, splits, choice, rate, plan.seed)
    train(run, trainer, splits, plan.budget, points=plan.points, log=log, watch=watch)
    trial.set_user_attr("status", run.status)
    if run.status == "diverged":
        raise optuna.TrialPruned
    return run.best_loss


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that ran to their end, best first."""
    trials = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    return sorted(trials, key=lambda trial: float(trial.value or 0.0))


def as_json(plan: Search, study: optuna.Study) -> dict[str, Any]:
    """Every trial with its arguments, outcome and loss."""
    return {
        "problem": plan.problem.name,
        "optimizer": plan.choice.name,
        "budget": str(plan.budget),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "status": trial.user_attrs.get("status"),
                "best_loss": trial.value,
                **trial.params,
            }
            for trial in study.trials
        ],
    }


def run(plan: Search, splits: Splits, folder: RunFolder, console: Console) -> optuna.Study:
    """Search under progress bars; print the best settings and where all of them are."""
    with TrialBars(console, plan.trials) as bars:
        study = search(plan, splits, folder, bars.ended, bars.moved)
    best = finished(study)
    if not best:
        console.print("No trial ran to its end.")
        return study
    console.print(_table(plan, best[:5]))
    arguments = ", ".join(f"{name}={value:.3g}" for name, value in best[0].params.items())
    console.print(
        f"Best: {plan.choice.name} with {arguments}. All trials: {folder.path / 'trials.json'}",
        highlight=False,
    )
    return study


def _table(plan: Search, best: list[optuna.trial.FrozenTrial]) -> Table:
    title = f"{plan.choice.name} on {plan.problem.name}, {plan.budget} a trial"
    table = Table("trial", title=title, title_justify="left", title_style="bold")
    for name in ("best loss", *best[0].params):
        table.add_column(name, justify="right")
    for trial in best:
        table.add_row(
            str(trial.number), f"{trial.value:.5g}", *(f"{value:.3g}" for value in trial.params.values())
        )
    return table
