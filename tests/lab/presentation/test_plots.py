from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.figure import Figure

import minifisher
from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.comparison.summary import rows
from minifisher_lab.presentation import labels, plots, suite_plots
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
    placed = labels.spaced([0.5, 0.51, 0.1, 0.52, 0.99, 1.0], ["one line"] * 6, gap=0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed[2] == pytest.approx(0.1)
    assert placed[[0, 1, 3]] == pytest.approx([0.46, 0.51, 0.56])
    assert placed[[4, 5]] == pytest.approx([0.95, 1.0])


def test_labels_of_several_lines_have_more_room_and_stay_on_the_plot() -> None:
    placed = labels.spaced([1.0, 1.0, 0.0], ["a", "a\nb\nc", "a\nb"], gap=0.1)
    assert placed == pytest.approx([0.7, 0.9, 0.05])
    many = ["one\ntwo"] * 20
    placed = labels.spaced([0.5] * 20, many, gap=0.1)
    line = 0.1 * labels.scale(many, 0.1)
    assert np.diff(placed) == pytest.approx(2 * line)
    assert (placed[0] - line / 2, placed[-1] + line / 2) == pytest.approx((0, 1))


LONG = "mbf:fisher=sampled:block_size=512:length_limit=2:fold_bias=True:damping=0.1"


def test_shortened_names_stay_different() -> None:
    names = [LONG, LONG.replace("512", "256"), LONG.replace("512", "25"), "mbf", "x" * 60 + "1", "x" * 60]
    short = labels.shortened(names, 20)
    assert short[:4] == ["mbf:block_size=512:…", "mbf:block_size=256:…", "mbf:block_size=25:…", "mbf"]
    for length in range(10, 80):
        some = labels.shortened(names, length)
        assert len(set(some)) == len(names)
        assert max(map(len, some)) <= length


def test_wrapping_breaks_after_colons_and_loses_nothing() -> None:
    text = labels.wrapped(f"{LONG}, 5 of 6 seeds", 24)
    assert max(map(len, text.split("\n"))) <= 24
    assert text.split("\n")[:2] == ["mbf:fisher=sampled:", "block_size=512:"]
    assert text.replace("\n", "").replace(" ", "") == f"{LONG},5of6seeds"


def _many(
    names: dict[str, float], *, seeds: int = 6, lost: dict[str, int] | None = None
) -> tuple[Plan, list[Run]]:
    """A plan with several seeds, and runs whose loss falls from 20 times this loss to it."""
    runs = [
        Run("p", name, 1e-3, seed, "diverged" if seed < (lost or {}).get(name, 0) else "finished")
        for name in names
        for seed in range(seeds)
    ]
    for run in runs:
        losses = names[run.optimizer] * np.geomspace(20, 1, 13)
        run.points += [Point(i, i, i, loss, loss, loss, None) for i, loss in enumerate(losses.tolist())]
    candidates = tuple(Candidate(choose(name), 1e-3) for name in names)
    return Plan(PROBLEMS["mlp-regression"], candidates, tuple(range(seeds)), Budget(epochs=2), 4), runs


def _figure(plan: Plan, runs: list[Run], folder: Path) -> Figure:
    """The plot against epochs, after matplotlib has laid it out."""
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        plots.plot(plan, runs, folder)
    figures[-1].draw_without_rendering()
    return figures[-1]


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_plot_says_which_seeds_are_lost(tmp_path: Path) -> None:
    plan, runs = _many({"adamw": 1.0, "sgd": 1.1, "kfac": 1.2}, lost={"sgd": 1, "kfac": 6})
    subtitle, *ends = sorted(_texts(_figure(plan, runs, tmp_path)), key=len, reverse=True)
    assert ends == ["sgd, 5 of 6 seeds", "adamw"]
    assert subtitle.endswith("\nno line, diverged in all seeds: kfac")


def test_long_names_leave_the_axes_wide_and_lie_on_the_picture(tmp_path: Path) -> None:
    names = {LONG.replace("512", str(size)): 1 + size / 10 for size in range(1, 9)}
    for some in (dict(list(names.items())[:2]), names):
        figure = _figure(*_many(some, seeds=1), tmp_path)
        assert figure.axes[0].get_position().width > 0.55
        assert len(set(_texts(figure))) == 1 + len(some)
        for text in figure.axes[0].texts:
            box = text.get_window_extent()
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_long_names_fit_on_a_plot_of_a_suite() -> None:
    names = {LONG.replace("512", str(size)): 1 + size / 10 for size in range(1, 9)}
    ranking = rows(_many(names, seeds=1)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawings = suite_plots.curves(ranking, list(names))
        suite_plots.profile_plot({name: [1.0, 2.0] for name in names}, list(names), 2)
    assert all("block_size=8:" in drawing for drawing in drawings.values())


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items()])
def test_a_subtitle_lies_below_the_title_and_on_the_picture(name: str, tmp_path: Path) -> None:
    plan, runs = _many({"adamw": 1.0, LONG: 1.2, "sgd": 1.3}, lost={LONG: 6})
    plan = replace(plan, problem=replace(PROBLEMS["mlp-regression"], description=PROBLEMS[name].description))
    figure = _figure(plan, runs, tmp_path)
    (subtitle,) = (text for text in figure.axes[0].texts if "log" in text.get_text().split())
    box, title = subtitle.get_window_extent(), figure.axes[0]._left_title.get_window_extent()
    assert box.x1 < figure.bbox.x1
    assert box.y1 < title.y0 < title.y1 < figure.bbox.y1


def test_a_line_ends_on_the_axis_or_its_label_says_that_it_does_not(tmp_path: Path) -> None:
    plan, runs = _many({"adamw": 1.0, "mbf": 1.1, "kfac": 1.2, "sgd": 40.0, "shampoo": 1e6}, seeds=1)
    figure = _figure(plan, runs, tmp_path)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 1
    assert 40 < top < 1e3
    assert {"sgd", "shampoo, above the axis"} < {text.replace("\n", " ") for text in _texts(figure)}
    drawing = suite_plots.curves(rows(runs), ["adamw", "mbf", "kfac", "sgd", "shampoo"])
    assert all(
        "above the" in drawing[f"training loss against {axis}"] for axis in ("epochs", "training seconds")
    )


def test_a_low_accuracy_ends_on_the_axis_unless_it_is_far_below() -> None:
    good = [np.array([80.0, 90.0])] * 3
    assert plots.lowered(80, 90, good) == 80
    assert 70 < plots.lowered(80, 90, [*good, np.array([10.0, 75.0])]) < 75
    assert plots.lowered(80, 90, [*good, np.array([10.0, 10.0])]) == 80


SEEN_WITHOUT_RED = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def _distance(one: str, other: str) -> float:
    """How different two colours look (Oklab, Ottosson 2020) to the reader who sees the least difference."""
    light = [np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2 for c in (one, other)]
    return min(
        float(
            np.linalg.norm(
                TO_OKLAB @ np.subtract(*(np.cbrt(TO_CONES @ np.clip(seen @ c, 0, 1)) for c in light))
            )
        )
        for seen in (np.eye(3), SEEN_WITHOUT_GREEN, SEEN_WITHOUT_RED)
    )


def test_optimizers_of_a_suite_differ_in_dashes_or_clearly_in_colour() -> None:
    assert _distance("#0072b2", "#2b8cbe") < 0.1
    dark = dict(suite_plots.COLOURS)
    looks = suite_plots.styles([str(index) for index in range(28)]).values()
    for one, other in combinations(looks, 2):
        if one["linestyle"] == other["linestyle"]:
            assert _distance(one["color"], other["color"]) > 0.1, (one, other)
            assert _distance(dark[one["color"]], dark[other["color"]]) > 0.1, (one, other)
