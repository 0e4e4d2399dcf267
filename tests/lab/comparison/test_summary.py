from __future__ import annotations

import math

from minifisher_lab.comparison.summary import reference_row, rows
from minifisher_lab.presentation.report import note
from minifisher_lab.training.runs import Point, Run


def _run(
    optimizer: str, losses: list[float], *, rate: float = 1e-3, seed: int = 0, status: str = "finished"
) -> Run:
    points = [Point(i, i / 10, float(i), loss, loss, loss, None) for i, loss in enumerate(losses)]
    return Run("p", optimizer, rate, seed, status, len(losses), float(len(losses)), 10, 80, points=points)


def test_the_best_rate_is_reported_and_the_best_optimizer_comes_first() -> None:
    runs = [_run("adamw", [9, 5], rate=rate, seed=0) for rate in (1e-3, 1e-2)]
    runs += [_run("adamw", [9, 3], rate=3e-3), _run("mbf", [9, 2])]
    ranking = rows(runs)
    assert [(row.optimizer, row.rate) for row in ranking] == [("mbf", 1e-3), ("adamw", 3e-3)]
    assert not ranking[1].at_edge
    assert note(ranking[1]) == "lr 0.003 is the best of 0.001, 0.003, 0.01"


def test_a_best_rate_at_the_edge_is_reported() -> None:
    ranking = rows([_run("adamw", [4], rate=1e-3), _run("adamw", [3], rate=3e-3)])
    assert "a better one may lie outside" in note(ranking[0])


def test_divergence_is_always_reported_and_never_wins() -> None:
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


def test_interrupted_runs_count_only_if_none_finished() -> None:
    done, cut = _run("sgd", [9, 5]), _run("sgd", [9, 8], seed=1, status="interrupted")
    assert rows([done, cut])[0].best_loss.mean == 5
    assert rows([cut])[0].best_loss.mean == 8
