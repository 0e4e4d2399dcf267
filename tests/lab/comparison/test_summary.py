from __future__ import annotations

import math

import pytest

from minifisher_lab.comparison.summary import Spread, reference_row, rows
from minifisher_lab.presentation.report import note, spread, verdict
from minifisher_lab.training.runs import Point, Run


def _run(
    optimizer: str, losses: list[float], *, rate: float = 1e-3, seed: int = 0, status: str = "finished"
) -> Run:
    points = [Point(i, i / 10, float(i), loss, loss, loss, None) for i, loss in enumerate(losses)]
    return Run("p", optimizer, rate, seed, status, len(losses), float(len(losses)), 10, 80, points=points)


def test_the_best_rate_is_reported_and_the_best_optimizer_stands_first() -> None:
    runs = [_run("adamw", [9, 5], rate=rate, seed=0) for rate in (1e-3, 1e-2)]
    runs += [_run("adamw", [9, 3], rate=3e-3), _run("mbf", [9, 2])]
    ranking = rows(runs)
    assert [(row.optimizer, row.rate) for row in ranking] == [("mbf", 1e-3), ("adamw", 3e-3)]
    assert not ranking[1].at_edge
    assert note(ranking[1]) == "lr 0.003 is the best of 0.001, 0.003, 0.01"


def test_a_best_rate_at_the_edge_is_said() -> None:
    ranking = rows([_run("adamw", [4], rate=1e-3), _run("adamw", [3], rate=3e-3)])
    assert "a better one may lie outside" in note(ranking[0])


def test_divergence_is_never_hidden_and_never_wins() -> None:
    runs = [_run("sgd", [9, 1, math.nan], rate=1.0, status="diverged"), _run("sgd", [9, 4], rate=1.0, seed=1)]
    runs += [_run("sgd", [9, 6], rate=0.1), _run("sgd", [9, 6], rate=0.1, seed=1)]
    (row,) = rows(runs)
    assert (row.rate, row.best_loss.mean) == (0.1, 6)
    (only,) = rows(runs[:2])
    assert note(only) == "1 of 2 diverged"
    assert only.best_loss.mean == 4


def test_seconds_to_the_reference_are_paired_by_seed() -> None:
    runs = [_run("adamw", [9, 6, 5]), _run("adamw", [9, 8, 7, 6], seed=1)]
    runs += [_run("mbf", [9, 5, 4]), _run("mbf", [9, 8, 7, 7], seed=1)]
    ranking = rows(runs)
    reference = reference_row(ranking)
    assert reference is not None
    assert reference.seconds_to_reference(reference) == (2.5, 2, 2)
    mbf = next(row for row in ranking if row.optimizer == "mbf")
    assert mbf.seconds_to_reference(reference) == (1, 1, 2)


def test_interrupted_runs_count_only_where_none_finished() -> None:
    done, cut = _run("sgd", [9, 5]), _run("sgd", [9, 8], seed=1, status="interrupted")
    assert rows([done, cut])[0].best_loss.mean == 5
    assert rows([cut])[0].best_loss.mean == 8


def test_the_verdict_follows_the_figures() -> None:
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
def test_figures_are_shown_with_four_digits(mean: float, deviation: float, shown: str) -> None:
    assert spread(Spread(mean, deviation)) == shown
