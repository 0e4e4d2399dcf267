"""Search one optimizer's learning rate, and its damping if it has one, on one problem with optuna."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import FloatDistribution

from minifisher_lab.training.checkpoint import Checkpoint
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice
    from minifisher_lab.training.runs import Point, RunFolder

COMPLETE, PRUNED = ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
STATES = {state.name.lower(): state for state in ENDED}
TRIALS = "trials.json"


@dataclass(frozen=True)
class Search:
    """What to search: one optimizer on one problem, with a number of trials of the same budget."""

    problem: Problem
    choice: Choice
    budget: Budget
    trials: int
    seed: int = 0
    points: int = 20

    @classmethod
    def restored(cls, problem: Problem, record: dict[str, Any]) -> Search:
        """The search that `as_json` wrote."""
        choice, budget = choose(record["optimizer"]), Budget(**record["budget"])
        return cls(problem, choice, budget, record["trials"], record["seed"], record["points"])

    def as_json(self) -> dict[str, Any]:
        """Everything that decides what is tried."""
        names = {"problem": self.problem.name, "optimizer": self.choice.name, "budget": asdict(self.budget)}
        return {**names, "trials": self.trials, "seed": self.seed, "points": self.points}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The learning rate, a factor 10 beyond its grid, and the other options, on logarithmic scales."""
        low, high = self.choice.grid[0] / 10, self.choice.grid[-1] * 10
        ranges = {"lr": (low, high), **self.choice.ranges}
        return {name: FloatDistribution(low, high, log=True) for name, (low, high) in ranges.items()}

    def run(
        self,
        splits: Splits,
        folder: RunFolder,
        ended: Callable[[FrozenTrial], None],
        watch: Callable[[float, float], None],
    ) -> optuna.Study:
        """Minimise the best training loss and write trials.json after every trial.

        The search prunes hopeless trials. Ctrl-C ends it and keeps the trials that have ended. In a resumed
        folder these are read, and the one that was cut short goes on.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.begin(self.as_json(), splits.train.inputs.device)
        study = self._study(_recorded(self, folder))
        with suppress(KeyboardInterrupt):
            for trial in study.get_trials(states=ENDED):
                ended(trial)
            if not self.completed(study):
                warm_up(self.problem, splits, self.choice)
            while not self.completed(study):
                run, trial = _carry_out(self, study, splits, folder, watch)
                folder.keep(TRIALS, as_json(self, study))
                Checkpoint(folder, run).remove()
                ended(trial)
        return study

    def _study(self, trials: Iterable[FrozenTrial]) -> optuna.Study:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.points // 4)
        study = optuna.create_study(pruner=pruner)
        study.add_trials(trials)
        if not study.trials:
            # The defaults are the first trial, so that the search never ends worse than it began.
            study.enqueue_trial(self.defaults)
        return study

    @property
    def defaults(self) -> dict[str, float]:
        """The default of everything that is searched."""
        return {"lr": self.choice.rate, **{name: self.choice.defaults[name] for name in self.choice.ranges}}

    def completed(self, study: optuna.Study) -> bool:
        """Whether every trial finished or was pruned, so that Ctrl-C did not end the search."""
        return len(study.get_trials(deepcopy=False, states=ENDED)) == self.trials

    def ranked(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials that finished, best first, then those that were cut short, longest first."""
        pruned = study.get_trials(states=[PRUNED])
        longest = sorted(pruned, key=lambda trial: -len(trial.intermediate_values))
        return [*self.finished(study), *longest]

    def finished(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials that were not pruned, best first."""
        trials = study.get_trials(states=[COMPLETE])
        return sorted(trials, key=lambda trial: float(trial.value or 0.0))


def _carry_out(
    search: Search,
    study: optuna.Study,
    splits: Splits,
    folder: RunFolder,
    watch: Callable[[float, float], None],
) -> tuple[Run, FrozenTrial]:
    """Ask for settings, train with them, and tell the study what came out."""
    # A sampler for each trial: a resumed search suggests what the uninterrupted one would have.
    number = len(study.get_trials(deepcopy=False, states=ENDED))
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + number)
    trial = study.ask(search.distributions())
    options = {name: value for name, value in trial.params.items() if name != "lr"}
    choice = replace(search.choice, build=partial(search.choice.build, **options))
    run = _run_of(search, number, trial.params["lr"])
    trainer = Trainer(search.problem, splits, choice, run.rate, search.seed)
    report = _Report(trial, folder)
    try:
        train(
            run, trainer, splits, search.budget,
            points=search.points, log=report.log, watch=watch, checkpoint=Checkpoint(folder, run),
        )  # fmt: skip
        report.missing(run)
    except optuna.TrialPruned:
        pass
    trial.set_user_attr("status", run.status)
    if run.status == "finished":
        return run, study.tell(trial, run.best_loss)
    return run, study.tell(trial, state=PRUNED)


def _run_of(search: Search, number: int, rate: float) -> Run:
    return Run(search.problem.name, f"trial{number}-{search.choice.name}", rate, search.seed)


class _Report:
    """Tells a trial the best loss at every point, also at those before a checkpoint."""

    def __init__(self, trial: optuna.Trial, folder: RunFolder) -> None:
        self.trial, self.folder, self.count = trial, folder, 0

    def log(self, run: Run, point: Point) -> None:
        self.folder.log(run, point)
        self.missing(run)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def missing(self, run: Run) -> None:
        while self.count < len(run.points):
            self.count += 1
            self.trial.report(run.best_of_first(self.count), self.count)


def _recorded(search: Search, folder: RunFolder) -> list[FrozenTrial]:
    """The trials that had ended when the command of a resumed folder stopped."""
    if not folder.resumed or not (folder.path / TRIALS).exists():
        return []
    with folder.readable(TRIALS) as content:
        records = [record for record in json.loads(content)["trials"] if record["state"] in STATES]
        trials = [_frozen(search, record) for record in records]
    for number, trial in enumerate(trials):  # still there if the command was killed just before
        Checkpoint(folder, _run_of(search, number, trial.params["lr"])).remove()
    return trials


def _frozen(search: Search, record: dict[str, Any]) -> FrozenTrial:
    distributions = search.distributions()
    losses = [math.inf if loss is None else loss for loss in record["losses"]]
    return optuna.create_trial(
        state=STATES[record["state"]],
        value=record["best_loss"],
        params={name: record[name] for name in distributions},
        distributions=distributions,
        user_attrs={"status": record["status"]},
        intermediate_values=dict(enumerate(losses, start=1)),
    )


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
                "losses": list(trial.intermediate_values.values()),
                **trial.params,
            }
            for trial in study.trials
        ],
    }
