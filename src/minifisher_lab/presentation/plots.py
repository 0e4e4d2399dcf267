"""Plots of the loss against seconds and epochs: each optimizer's mean and range over seeds, with its name."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from minifisher_lab.comparison.summary import rows
from minifisher_lab.presentation.labels import labels, outside, scale, spaced

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
WIDTH, LABEL_WIDTH = 95, 24
"""How many characters a line of the subtitle and of a label may have."""
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
    every = rows(runs)
    ranking = [row for row in every if drawn(row)]
    if not ranking:
        return []
    subtitle = _subtitle(plan, every)
    with mpl.rc_context(SETTINGS):
        return [
            _figure(plan, ranking, subtitle, "seconds", folder / "loss-seconds.png"),
            _figure(plan, ranking, subtitle, "epoch", folder / "loss-epochs.png"),
        ]


def drawn(row: Row) -> list[Run]:
    """The runs of the row that have a line."""
    return [run for run in row.counted if len(run.points) > 1]


def band(
    row: Row, axis: Axis, quantity: str = "train_loss", count: int = 200
) -> tuple[Floats, Floats, Floats, Floats]:
    """Positions up to the end of the shortest run, and there the mean, lowest and highest training loss."""
    curves = [
        np.array([(getattr(point, axis), getattr(point, quantity)) for point in run.points if point.finite])
        for run in drawn(row)
    ]
    positions = np.linspace(0, min(curve[-1, 0] for curve in curves), count)
    losses = np.stack([np.interp(positions, curve[:, 0], curve[:, 1]) for curve in curves])
    return positions, losses.mean(0), losses.min(0), losses.max(0)


def _subtitle(plan: Plan, every: Sequence[Row]) -> str:
    """What was run, and which optimizers have no line because they diverged; in lines that fit."""
    seeds = f"mean and range of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    lines = textwrap.wrap(f"{plan.problem.description}; {seeds}, {plan.budget} a run, log scale", WIDTH)
    lost = [row.optimizer for row in every if row.diverged and not row.counted]
    if lost:
        where = "diverged in all seeds" if len(plan.seeds) > 1 else "diverged"
        lines += textwrap.wrap(f"no line, {where}: {', '.join(lost)}", WIDTH)
    return "\n".join(lines)


def _figure(plan: Plan, ranking: Sequence[Row], subtitle: str, axis: Axis, path: Path) -> Path:
    panels = 2 if plan.problem.classifies else 1
    figure = Figure(figsize=(8, 4.8 * panels), dpi=160, layout="constrained")
    upper, *lower = np.ravel(figure.subplots(panels, 1, sharex=True))
    bands = _curves(upper, ranking, axis, "train_loss")
    _frame(upper, *limits(ranking, bands), max(_ends(ranking, axis)))
    _finish(upper, ranking, axis, "train_loss", len(plan.seeds))
    for axes in lower:
        accuracies = _curves(axes, ranking, axis, "test_accuracy")
        _accuracy_frame(axes, ranking, accuracies)
        _finish(axes, ranking, axis, "test_accuracy", len(plan.seeds))
    (lower or [upper])[-1].set_xlabel(LABELS[axis])
    _head(upper, f"{plan.problem.name}: training loss", subtitle)
    figure.savefig(path, facecolor="white")
    return path


def _head(axes: Axes, title: str, subtitle: str) -> None:
    """The title above the subtitle, which may have several lines."""
    pad = 10 + 14 * (subtitle.count("\n") + 1)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=pad)
    text = axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9.5, color="#666666")
    text.set_in_layout(False)  # the title keeps room for it; its width must not make the axes narrow


LABELS = {
    "seconds": "training seconds",
    "epoch": "epochs",
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


def _finish(axes: Axes, ranking: Sequence[Row], axis: Axis, quantity: str, seeds: int) -> None:
    """Label the end of every line."""
    ends = []
    for row in ranking:
        positions, mean, _, _ = band(row, axis, quantity)
        ends.append((float(positions[-1]), float(mean[-1]), _styles(ranking)[row.optimizer][0]))
    remarks = [
        _remark(row, seeds) + outside(value, *axes.get_ylim())
        for row, (_, value, _) in zip(ranking, ends, strict=True)
    ]
    _labels(axes, ends, labels([row.optimizer for row in ranking], remarks, LABEL_WIDTH))


def _ends(ranking: Sequence[Row], axis: Axis) -> list[float]:
    return [float(band(row, axis)[0][-1]) for row in ranking]


def _accuracy_frame(axes: Axes, ranking: Sequence[Row], means: Sequence[Floats]) -> None:
    """Accuracy axis from the median of the early values to the highest one."""
    points = [point.test_accuracy for row in ranking for run in row.counted for point in run.points]
    known = [accuracy for accuracy in points if accuracy is not None]
    bottom, top = float(np.quantile(known, 0.15)), max(known)
    bottom = lowered(bottom, top, means)
    axes.set_ylim(bottom, max(top + 0.04 * (top - bottom), bottom + 0.1))
    _plain(axes)


def _remark(row: Row, seeds: int) -> str:
    """What stands after the optimizer's name: its rate if several were tried, its seeds if some are lost."""
    rate = f" (lr {row.rate:g})" if len(row.tried) > 1 else ""
    count = len(drawn(row))
    return rate if count >= seeds else f"{rate}, {count} of {seeds} seeds"


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
    It is higher where a line ends above it, but an end that is far above stays outside.
    """
    points = (point for row in ranking for run in row.counted for point in run.points if point.finite)
    floor = min((point.train_loss for point in points if point.train_loss > 0), default=1.0)
    bottom = max(floor, min(float(mean.min()) for mean in means))
    top = float(np.median([mean[len(mean) // 12] for mean in means]))
    height = np.log(max(top, 1.001 * bottom) / bottom)  # a constant loss needs an axis of positive height
    rises = [float(np.log(max(mean[-1], bottom) / bottom)) for mean in means]
    return bottom, float(bottom * np.exp(_stretched(height, rises, least=np.log(2))))


def lowered(bottom: float, top: float, means: Sequence[Floats]) -> float:
    """The bottom of an accuracy axis, lower where a line ends below it, unless it ends far below."""
    depths = [top - float(mean[-1]) for mean in means]
    return top - _stretched(top - bottom, depths, least=1.0)


def _stretched(height: float, ends: Sequence[float], least: float) -> float:
    """The height of an axis that shows the ends, of which none makes it more than twice as high.

    An axis lower than `least` may grow to twice that.
    """
    near = [1.03 * end for end in ends if height < end <= 2 * max(height, least)]
    return max([height, *near])


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


def _labels(
    axes: Axes, ends: Sequence[tuple[float, float, str]], texts: Sequence[str], gap: float = 0.052
) -> None:
    """Label every line at its end, with lines of text at least `gap` of the height apart.

    A thin line connects each label with the end that it names.
    """
    bottom, top = axes.get_ylim()
    measure = np.log if axes.get_yscale() == "log" else np.asarray
    height = measure(top) - measure(bottom)
    heights = [float((measure(np.clip(y, bottom, top)) - measure(bottom)) / height) for _, y, _ in ends]
    places = spaced(heights, texts, gap)
    for (x, y, colour), text, place in zip(ends, texts, places, strict=True):
        axes.annotate(
            text,
            xy=(x, float(np.clip(y, bottom, top))),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=10 * scale(texts, gap),
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
