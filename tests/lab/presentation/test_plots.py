from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.figure import Figure

import minifisher
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


def test_every_number_on_an_axis_keeps_its_digits() -> None:
    axes = Figure().add_subplot()
    axes.set_ylim(1e-4, 2.0)
    axes.set_yscale("log")
    plots.plain_ticks(axes.yaxis, most=7, wide=True)
    places = [float(place) for place in axes.get_yticks()]
    labels = axes.yaxis.get_major_formatter().format_ticks(places)
    assert len(places) > 10
    assert [float(label) for label in labels] == pytest.approx(places)


SEEN_WITHOUT_GREEN = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
"""Linear RGB as a deuteranope sees it (Machado, Oliveira, Fernandes 2009)."""


def _seen(colour: str) -> np.ndarray:
    """The colour as a deuteranope sees it, with equal steps about equally visible."""
    red_green_blue = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.clip(SEEN_WITHOUT_GREEN @ red_green_blue**2.2, 0, 1) ** (1 / 2.2)


def test_lines_of_one_style_stay_apart_for_colour_blind_readers() -> None:
    names = [*minifisher.METHODS, "adamw", "adam", "adagrad", "rmsprop", "sgd", "muon"]
    ranking = rows([Run("p", name, 1e-3, 0, "finished") for name in names])
    styles = {name: style for name, style in plots._styles(ranking).items() if name in names}
    for (_, (one, dashes)), (_, (other, others)) in combinations(styles.items(), 2):
        if dashes == others:
            assert np.linalg.norm(_seen(one) - _seen(other)) > 0.12, (one, other)


def test_a_classifiers_plot_has_an_accuracy_panel_and_every_axis_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, runs = _lines([9, 1, 0.5, 0.2], [9, 5, 4, 3])
    for run in runs:
        run.points = [replace(point, test_accuracy=90 - point.test_loss) for point in run.points]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.plot(replace(plan, problem=PROBLEMS["cnn-digits"]), runs, tmp_path)
    for figure in drawn:
        upper, lower = figure.axes
        assert upper.get_ylabel().startswith("training loss")
        assert lower.get_ylabel().startswith("accuracy")
        assert lower.get_xlabel()


def test_labels_keep_their_order_and_a_minimal_distance() -> None:
    placed = plots.spaced([0.5, 0.51, 0.1, 0.52, 0.99, 1.0], gap=0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed[2] == pytest.approx(0.1)
    assert placed[[0, 1, 3]] == pytest.approx([0.46, 0.51, 0.56])
    assert placed[[4, 5]] == pytest.approx([0.95, 1.0])
