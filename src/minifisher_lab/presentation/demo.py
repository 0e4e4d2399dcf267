"""The demo: MBF with its defaults against a tuned AdamW, in equal seconds on real data."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.presentation import report
from minifisher_lab.presentation.session import run_plan
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Budget

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from minifisher_lab.training.runs import Run, RunFolder

PROBLEM = "autoencoder-digits"
ADAMW_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def plan(seconds: float) -> Plan:
    """AdamW with each of its learning rates, and MBF with its default, over three seeds."""
    adamw, mbf = choose("adamw"), choose("mbf")
    candidates = (*(Candidate(adamw, rate) for rate in ADAMW_RATES), Candidate(mbf, mbf.rate))
    return Plan(PROBLEMS[PROBLEM], candidates, SEEDS, Budget(seconds=seconds), points=30)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread. The network is small, and a busy second core then does not slow a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(comparison: Plan, folder: RunFolder, console: Console) -> list[Run]:
    """Run the demo and print its result in one sentence."""
    console.print(_introduction(comparison), highlight=False)
    splits = batches.load(comparison.problem, torch.device("cpu"))
    runs = run_plan(comparison, splits, folder, console)
    console.print(f"\n[bold]{report.verdict('mbf', runs)}[/]", highlight=False)
    return runs


def _introduction(comparison: Plan) -> str:
    problem, runs = comparison.problem, len(comparison.candidates) * len(comparison.seeds)
    return (
        f"[bold]minifisher demo[/]: an autoencoder ({problem.description}, {problem.parameters():,} "
        f"weights) on scikit-learn's 1,797 handwritten digits. MBF runs with its defaults, AdamW with "
        f"{len(ADAMW_RATES)} learning rates of which the best counts; {len(comparison.seeds)} seeds, {runs} "
        f"runs of {comparison.budget} each.\n"
    )
