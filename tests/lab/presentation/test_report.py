from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from minifisher_lab.comparison.compare import Plan
from minifisher_lab.comparison.summary import Spread
from minifisher_lab.presentation.report import spread, table, verdict
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.runs import Point, Run
from minifisher_lab.training.train import Budget


def _run(optimizer: str, losses: list[float], *, seed: int = 0) -> Run:
    points = [Point(i, i / 10, float(i), loss, loss, loss, None) for i, loss in enumerate(losses)]
    return Run("p", optimizer, 1e-3, seed, "finished", len(losses), float(len(losses)), 10, 80, points=points)


def test_the_verdict_follows_from_the_losses() -> None:
    better = [_run("mbf", [9, 4], seed=seed) for seed in (0, 1)]
    worse = [_run("adamw", [9, 5], seed=seed) for seed in (0, 1)]
    ahead = verdict("mbf", [*better, *worse])
    assert "20.0 % ahead of adamw" in ahead
    assert "2 of 2 seeds" in ahead
    swapped = [_run("mbf", [9, 5], seed=0), _run("adamw", [9, 4], seed=0)]
    assert "25.0 % behind adamw" in verdict("mbf", swapped)
    mixed = [*better, _run("adamw", [9, 5]), _run("adamw", [9, 3.9], seed=1)]
    assert "not clearly apart" in verdict("mbf", mixed)
    assert "Too little was measured" in verdict("mbf", better)


@pytest.mark.parametrize(
    ("mean", "deviation", "shown"),
    [
        (204.27, 0.314, "204.3 ± 0.3"),
        (0.13449, 0.001, "0.1345 ± 0.0010"),
        (17.0, math.nan, "17.00"),
        (math.nan, math.nan, "-"),
    ],
)
def test_a_mean_has_four_significant_digits(mean: float, deviation: float, shown: str) -> None:
    assert spread(Spread(mean, deviation)) == shown


@pytest.mark.parametrize("width", [24, 40, 50, 60, 70, 80, 120])
def test_the_table_is_complete_at_every_width(width: int) -> None:
    name = "mbf:power=0.5"
    runs = [
        _run(optimizer, [9, loss + seed / 10], seed=seed)
        for optimizer, loss in (("adamw", 5.2), (name, 5.1))
        for seed in (0, 1)
    ]
    for run in runs:
        run.test_accuracy = 91.25 + run.seed
    console = Console(width=width, file=io.StringIO())
    console.print(table(Plan(PROBLEMS["cnn-digits"], (), (0, 1), Budget(epochs=1)), runs, width))
    printed = console.file.getvalue()
    assert "…" not in printed
    for text in ("adamw", "optimizer" if width > 60 else name, "0.001", "5.150", "± 0.071", "91.8", "2.0"):
        assert text in (printed if width > 24 else " ".join(printed.split()))
    assert printed.count("1000") == 2  # milliseconds a step
    assert printed.count("8.0") == 2  # bytes per parameter
