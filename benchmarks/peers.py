"""Time to AdamW's loss, time a step and state bytes, beside public implementations, in one process.

    pip install -r benchmarks/requirements.txt && python benchmarks/peers.py --seconds 20

Every optimizer trains the same network from the same starts on the same batches for the same training
seconds (evaluation stands outside the clock), at every learning rate of a short ladder; the best final loss
counts. Runs alternate seed by seed, as `minifisher compare` does. What all are timed to is the loss that
AdamW, at its best learning rate, has at the end.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from alternate import report
from torch import nn

from minifisher_lab.comparison.compare import Candidate, Plan, compare
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.batches import load
from minifisher_lab.training.optimizers import Choice, choose
from minifisher_lab.training.runs import Point, Run, RunFolder
from minifisher_lab.training.train import Budget

OURS = ("adamw", "mbf", "kfac", "soap", "muon")
OUR_RATES = (1e-3, 3e-3)
PEERS: dict[str, tuple[str, str, dict[str, Any], tuple[float, ...]]] = {
    "pytorch-optimizer SOAP": ("pytorch_optimizer", "SOAP", {}, (1e-3, 3e-3)),
    # Its step has the gradient's length, preconditioned, and no graft: other learning rates.
    "pytorch-optimizer Shampoo": (
        "pytorch_optimizer",
        "Shampoo",
        {"momentum": 0.9, "preconditioning_compute_steps": 20},
        (1e-1, 3e-1),
    ),
    "heavyball SOAP": ("heavyball", "SOAP", {}, (1e-3, 3e-3)),
}
PACKAGES = ("pytorch-optimizer", "heavyball")


class Closed:
    """A peer's optimizer that is told the loss as ours are: by a closure, evaluated before the step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @property
    def state(self) -> dict[Any, Any]:
        """The peer's state."""
        return dict(self.optimizer.state)

    def step(self, closure: Callable[[], Any]) -> Any:
        """One evaluation of the closure, then one step."""
        loss = closure()
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The peer's checkpoint."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`."""
        self.optimizer.load_state_dict(state)


def peer(name: str, compile_mode: str | None) -> Choice:
    module, kind, options, rates = PEERS[name]
    make = getattr(importlib.import_module(module), kind)
    if module == "heavyball":
        importlib.import_module("heavyball.utils").compile_mode = compile_mode

    def build(model: nn.Module, lr: float) -> Any:
        return Closed(make(list(model.parameters()), lr=lr, **options))

    return Choice(name, f"{kind} of {module}", build, rates[0], rates, make)


class Progress:
    """Says on standard error which run began: a watcher of `compare`."""

    def warming(self, optimizer: str) -> None:
        """Say so: heavyball may compile for minutes."""
        print("warming up", optimizer, file=sys.stderr, flush=True)

    def started(self, run: Run) -> None:
        """Say so."""
        print(run.optimizer, run.rate, run.seed, file=sys.stderr, flush=True)

    def moved(self, run: Run, spent: float, loss: float) -> None:
        """Nothing."""

    def ended(self, run: Run) -> None:
        """Nothing."""


def row(runs: list[Run], target: float) -> dict[str, Any]:
    """One optimizer at the learning rate whose mean final loss is lowest."""
    by_rate = {rate: [run for run in runs if run.rate == rate] for rate in {run.rate for run in runs}}
    best = min(by_rate.values(), key=lambda same: statistics.fmean(_final(run) for run in same))
    reached = [run.seconds_to(target) for run in best]
    return {
        "lr": best[0].rate,
        "rates": sorted(by_rate),
        "final_loss": round(statistics.fmean(_final(run) for run in best), 3),
        "final_loss_of_seeds": [round(_final(run), 3) for run in best],
        "seconds_to_adamws_loss": [None if s is None else round(s, 2) for s in reached],
        "ms_a_step": round(1000 * statistics.fmean(run.seconds / run.steps for run in best), 2),
        "state_bytes_per_parameter": round(best[0].state_bytes / best[0].parameters, 2),
        "status": sorted({run.status for run in best}),
    }


def _final(run: Run) -> float:
    last: Point = run.points[-1]
    return last.train_loss if last.finite else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="autoencoder-fashion")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=int, default=2, help="learning rates of each, the largest ones")
    parser.add_argument("--points", type=int, default=50, help="evaluations along a run")
    parser.add_argument("--only", help="names with commas; all of them by default")
    parser.add_argument(
        "--heavyball-compile",
        default="none",
        help="its compile_mode; none: eager, its own choice (max-autotune-no-cudagraphs): minutes of warm-up",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.only.split(",") if arguments.only else [*OURS, *PEERS]
    mode = None if arguments.heavyball_compile == "none" else arguments.heavyball_compile
    choices = {name: peer(name, mode) if name in PEERS else choose(name) for name in names}
    candidates = [
        Candidate(choice, rate)
        for name, choice in choices.items()
        for rate in (choice.grid if name in PEERS else OUR_RATES)[-arguments.rates :]
    ]
    problem, seeds = PROBLEMS[arguments.problem], tuple(range(arguments.seeds))
    plan = Plan(problem, tuple(candidates), seeds, Budget(seconds=arguments.seconds), arguments.points)
    with tempfile.TemporaryDirectory() as folder:
        runs = compare(plan, load(problem, torch.device("cpu")), RunFolder(Path(folder)), Progress())
    own = {name: [run for run in runs if run.optimizer == choice.name] for name, choice in choices.items()}
    target = row(own["adamw"], 0.0)["final_loss"]
    report(
        {
            "problem": arguments.problem,
            "seconds": arguments.seconds,
            "heavyball_compile": arguments.heavyball_compile,
            "packages": {name: version(name) for name in PACKAGES},
            "adamws_loss": target,
            "optimizers": {name: row(own[name], target) for name in names},
        }
    )


if __name__ == "__main__":
    main()
