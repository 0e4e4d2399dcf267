"""Plots of the loss against seconds and epochs: each optimizer's mean and range over seeds, with its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from minifisher_lab.comparison.summary import rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from minifisher_lab.comparison.compare import Plan
    from minifisher_lab.comparison.summary import Row
    from minifisher_lab.training.runs import Run

    Floats = NDArray[np.float64]

Axis = Literal["seconds", "epoch"]

# Okabe and Ito's palette, made for colour-blind readers. These optimizers have one colour in all plots.
OWN_COLOURS = {
    "mbf": "#D55E00",
    "adamw": "#0072B2",
    "sgd": "#000000",
    "kfac": "#009E73",
    "shampoo": "#CC79A7",
}
OTHER_COLOURS = ("#E69F00", "#56B4E9", "#7A7A7A", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000")
DASHES = ((0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))
"""The line styles of the other optimizers; those with a colour of their own are solid."""
INK, FAINT = "#222222", "#DDDDDD"
SETTINGS: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def plot(plan: Plan, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write loss-seconds.png and loss-epochs.png; write nothing if no run has two points.

    A classifier's plots have a second panel with the accuracy.
    """
    ranking = [row for row in rows(runs) if any(len(run.points) > 1 for run in row.counted)]
    if not ranking:
        return []
    with mpl.rc_context(SETTINGS):
        return [
            _figure(plan, ranking, "seconds", "training seconds", folder / "loss-seconds.png"),
            _figure(plan, ranking, "epoch", "epochs", folder / "loss-epochs.png"),
        ]


def band(
    row: Row, axis: Axis, quantity: str = "train_loss", count: int = 200
) -> tuple[Floats, Floats, Floats, Floats]:
    """Positions up to the end of the shortest run, and there the mean, lowest and highest training loss."""
    curves = [
        np.array([(getattr(point, axis), getattr(point, quantity)) for point in run.points if point.finite])
        for run in row.counted
        if len(run.points) > 1
    ]
    positions = np.linspace(0, min(curve[-1, 0] for curve in curves), count)
    losses = np.stack([np.interp(positions, curve[:, 0], curve[:, 1]) for curve in curves])
    return positions, losses.mean(0), losses.min(0), losses.max(0)


def _figure(plan: Plan, ranking: Sequence[Row], axis: Axis, label: str, path: Path) -> Path:
    panels = 2 if plan.problem.classifies else 1
    figure = Figure(figsize=(8, 4.8 * panels), dpi=160, layout="constrained")
    upper, *lower = np.ravel(figure.subplots(panels, 1, sharex=True))
    bands = _curves(upper, ranking, axis, "train_loss")
    _frame(upper, *limits(ranking, bands), max(_ends(ranking, axis)))
    _finish(upper, ranking, axis, "train_loss")
    for axes in lower:
        _curves(axes, ranking, axis, "test_accuracy")
        _accuracy_frame(axes, ranking)
        _finish(axes, ranking, axis, "test_accuracy")
    (lower or [upper])[-1].set_xlabel(label)
    upper.set_title(f"{plan.problem.name}: training loss", loc="left", fontsize=13, fontweight="bold", pad=24)
    seeds = f"mean and range of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    subtitle = f"{plan.problem.description}; {seeds}, {plan.budget} a run, log scale"
    upper.text(0, 1.025, subtitle, transform=upper.transAxes, fontsize=9.5, color="#666666")
    figure.savefig(path, facecolor="white")
    return path


LABELS = {
    "train_loss": "training loss (a fixed slice of the training set)",
    "test_accuracy": "accuracy on test samples, %",
}


def _curves(axes: Axes, ranking: Sequence[Row], axis: Axis, quantity: str) -> list[Floats]:
    """Draw every optimizer's mean and range; the best one comes last, on top. The means are returned."""
    styles, means = _styles(ranking), []
    for row in reversed(ranking):
        positions, mean, low, high = band(row, axis, quantity)
        colour, dashes = styles[row.optimizer]
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)
        width = 2.2 if row is ranking[0] else 1.7
        axes.plot(positions, mean, color=colour, linestyle=dashes, linewidth=width)
        means.append(mean)
    axes.set_ylabel(LABELS[quantity])
    return means


def _finish(axes: Axes, ranking: Sequence[Row], axis: Axis, quantity: str) -> None:
    """Label the end of every line."""
    ends = []
    for row in ranking:
        positions, mean, _, _ = band(row, axis, quantity)
        ends.append((float(positions[-1]), float(mean[-1]), _label(row), _styles(ranking)[row.optimizer][0]))
    _labels(axes, ends)


def _ends(ranking: Sequence[Row], axis: Axis) -> list[float]:
    return [float(band(row, axis)[0][-1]) for row in ranking]


def _accuracy_frame(axes: Axes, ranking: Sequence[Row]) -> None:
    """Accuracy axis from the median of the early values to the highest one."""
    points = [point.test_accuracy for row in ranking for run in row.counted for point in run.points]
    known = [accuracy for accuracy in points if accuracy is not None]
    bottom, top = float(np.quantile(known, 0.15)), max(known)
    axes.set_ylim(bottom, max(top + 0.04 * (top - bottom), bottom + 0.1))
    _plain(axes)


def _label(row: Row) -> str:
    return f"{row.optimizer} (lr {row.rate:g})" if len(row.tried) > 1 else row.optimizer


def _styles(ranking: Sequence[Row]) -> dict[str, tuple[str, Any]]:
    """Colour and line style of every optimizer; no two are alike in both."""
    others = sorted(row.optimizer for row in ranking if row.optimizer not in OWN_COLOURS)
    styles: dict[str, tuple[str, Any]] = {name: (colour, "-") for name, colour in OWN_COLOURS.items()}
    for index, name in enumerate(others):
        turn, colour = divmod(index, len(OTHER_COLOURS))
        styles[name] = OTHER_COLOURS[colour], DASHES[(index + turn) % len(DASHES)]
    return styles


def limits(ranking: Sequence[Row], means: Sequence[Floats]) -> tuple[float, float]:
    """The ends of the loss axis.

    The bottom is the lowest mean, but not below the lowest positive loss, because the axis is logarithmic.
    The top is the median of the means after a twelfth of the axis: the steep start looks the same for all.
    """
    points = (point for row in ranking for run in row.counted for point in run.points if point.finite)
    floor = min((point.train_loss for point in points if point.train_loss > 0), default=1.0)
    bottom = max(floor, min(float(mean.min()) for mean in means))
    top = float(np.median([mean[len(mean) // 12] for mean in means]))
    return bottom, max(top, 1.001 * bottom)  # a constant loss needs an axis of positive height


def _frame(axes: Axes, bottom: float, top: float, right: float) -> None:
    """Draw a logarithmic loss axis without a frame."""
    # Set the limits before the scale: without limits a logarithmic scale searches for positive losses.
    axes.set_ylim(bottom * (bottom / top) ** 0.06, top)
    axes.set_yscale("log")
    axes.set_xlim(0, right)
    plain_ticks(axes.yaxis, most=7, wide=top > 10 * bottom)
    _plain(axes)


def plain_ticks(axis: mpl.axis.Axis, most: int, *, wide: bool) -> None:
    """At most so many round numbers, each with its own digits; `wide`: a logarithmic axis of some decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(most, steps=[1, 2, 5, 10]))
    # A ScalarFormatter gives all numbers the same decimals: 0.0002 and 0.0005 would both be 0.000.
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain(axes: Axes) -> None:
    """Horizontal grid lines, and no frame."""
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0)


def _labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.052) -> None:
    """Label every line at its end, with labels at least `gap` of the height apart.

    A thin line connects each label with the end that it names.
    """
    bottom, top = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray
    ranges = scale(top) - scale(bottom)
    heights = [float((scale(max(loss, bottom)) - scale(bottom)) / ranges) for _, loss, _, _ in ends]
    for (x, loss, text, colour), height in zip(ends, spaced(heights, gap), strict=True):
        axes.annotate(
            text,
            xy=(x, float(np.clip(loss, bottom, top))),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.9,
                "linestyle": ":",
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def spaced(heights: Sequence[float], gap: float) -> Floats:
    """Move the heights as little as possible, so that they are `gap` apart and in [0, 1], in the same order.

    This is least squares under a constraint: with i the rank, h_i - i gap must not decrease with i. Isotonic
    regression solves it.
    """
    from sklearn.isotonic import isotonic_regression  # slow to import

    order = np.argsort(heights)
    steps = gap * np.arange(len(heights))
    placed: Floats = np.empty(len(heights))
    fitted = isotonic_regression(np.asarray(heights)[order] - steps, y_min=0.0, y_max=1.0 - steps[-1])
    placed[order] = fitted + steps
    return placed
