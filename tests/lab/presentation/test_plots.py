from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.comparison.summary import rows
from minifisher_lab.presentation import plots
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Point, Run
from minifisher_lab.training.train import Budget

if TYPE_CHECKING:
    from pathlib import Path


def _lines(*losses: list[float]) -> tuple[Plan, list[Run]]:
    """A plan with one run per optimizer, and runs with these losses."""
    names = ("adamw", "sgd")[: len(losses)]
    runs = [Run("p", name, 1e-3, 0, "finished") for name in names]
    for run, line in zip(runs, losses, strict=True):
        run.points += [Point(i, i, i, loss, loss, loss, None) for i, loss in enumerate(line)]
    candidates = tuple(Candidate(choose(name), 1e-3) for name in names)
    return Plan(PROBLEMS["autoencoder-digits"], candidates, (0,), Budget(epochs=2), points=4), runs


@pytest.mark.parametrize(
    "losses", [([9, 1, 0, 0],), ([9, 1, 0, 0], [9, 5, 4, 3]), ([0, 0], [0, 0]), ([2, 2],)], ids=str
)
def test_losses_that_reach_zero_or_never_change_can_be_plotted(
    losses: tuple[list[float], ...], tmp_path: Path
) -> None:
    assert all(path.exists() for path in plots.plot(*_lines(*losses), tmp_path))


def test_the_axis_ends_at_the_lowest_positive_loss() -> None:
    ranking = rows(_lines([9, 1, 0, 0], [9, 5, 4, 3])[1])
    means = [plots.band(row, "seconds")[1] for row in ranking]
    bottom, top = plots.limits(ranking, means)
    assert bottom == 1
    assert 5 < top < 9


def test_labels_keep_their_order_and_a_minimal_distance() -> None:
    placed = plots.spaced([0.5, 0.51, 0.1, 0.52, 0.99, 1.0], gap=0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed[2] == pytest.approx(0.1)
    assert placed[[0, 1, 3]] == pytest.approx([0.46, 0.51, 0.56])
    assert placed[[4, 5]] == pytest.approx([0.95, 1.0])
