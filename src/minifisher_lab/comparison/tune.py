"""Search one optimizer's learning rate, and its damping if it has one, on one problem with optuna."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna

from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice
    from minifisher_lab.training.runs import Point, RunFolder
    from minifisher_lab.training.train import Budget

ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What to search: one optimizer on one problem, with a number of trials of the same budget."""

    problem: Problem
    choice: Choice
    budget: Budget
    trials: int
    seed: int = 0
    points: int = 20

    def suggest(self, trial: optuna.Trial) -> tuple[float, dict[str, float]]:
        """A learning rate within a factor 30 of the default, and the other options, on logarithmic scales."""
        rate = trial.suggest_float("lr", self.choice.rate / 30, self.choice.rate * 30, log=True)
        options = {
            name: trial.suggest_float(name, low, high, log=True)
            for name, (low, high) in self.choice.ranges.items()
        }
        return rate, options

    def run(
        self,
        splits: Splits,
        folder: RunFolder,
        ended: Callable[[optuna.trial.FrozenTrial], None],
        watch: Callable[[float, float], None],
    ) -> optuna.Study:
        """Minimise the best training loss and write trials.json.

        The search prunes hopeless trials. Ctrl-C ends it and keeps the trials that have ended.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warm_up(self.problem, splits, self.choice)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.points // 4),
        )
        # The default learning rate is the first trial, so that the search never ends worse than it began.
        study.enqueue_trial({"lr": self.choice.rate})
        with suppress(KeyboardInterrupt):
            study.optimize(
                partial(_objective, self, splits, folder, watch),
                n_trials=self.trials,
                callbacks=[lambda _, trial: ended(trial)],
            )
        folder.write("trials.json", as_json(self, study))
        return study

    def completed(self, study: optuna.Study) -> bool:
        """Whether every trial finished or was pruned, so that Ctrl-C did not end the search."""
        return len(study.get_trials(deepcopy=False, states=ENDED)) == self.trials

    def finished(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """The trials that were not pruned, best first."""
        trials = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        return sorted(trials, key=lambda trial: float(trial.value or 0.0))


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
