"""Loss against seconds and against epochs: every optimizer's mean line and spread, named at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from minifisher_lab.summary import rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from minifisher_lab.compare import Plan
    from minifisher_lab.runs import Run
    from minifisher_lab.summary import Row

    Floats = NDArray[np.float64]

Axis = Literal["seconds", "epoch"]

# Okabe and Ito's palette is told apart in every common colour blindness; a name keeps its colour.
OWN_COLOURS = {
    "mbf": "#D55E00",
    "adamw": "#0072B2",
    "sgd": "#7A7A7A",
    "kfac": "#009E73",
    "shampoo": "#CC79A7",
}
OTHER_COLOURS = ("#E69F00", "#56B4E9", "#117733", "#882255", "#000000", "#999933", "#6A3D9A", "#44AA99")
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
    """Write loss-seconds.png and loss-epochs.png; nothing where no run has two points."""
    ranking = [row for row in rows(runs) if any(len(run.points) > 1 for run in row.counted)]
    if not ranking:
        return []
    with mpl.rc_context(SETTINGS):
        return [
            _figure(plan, ranking, "seconds", "training seconds", folder / "loss-seconds.png"),
            _figure(plan, ranking, "epoch", "epochs", folder / "loss-epochs.png"),
        ]


def band(row: Row, axis: Axis) -> tuple[Floats, Floats, Floats, Floats]:
    """Positions, mean, lowest and highest training loss over the seeds, as far as all its runs reach."""
    curves = [
        np.array([(getattr(point, axis), point.train_loss) for point in run.points if point.finite])
        for run in row.counted
        if len(run.points) > 1
    ]
    positions = np.linspace(0, min(curve[-1, 0] for curve in curves), 200)
    losses = np.stack([np.interp(positions, curve[:, 0], curve[:, 1]) for curve in curves])
    return positions, losses.mean(0), losses.min(0), losses.max(0)


def _figure(plan: Plan, ranking: Sequence[Row], axis: Axis, label: str, path: Path) -> Path:
    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colours, bands = _colours(ranking), {row.optimizer: band(row, axis) for row in ranking}
    ends = []
    for row in reversed(ranking):  # the best one is drawn last, on top
        positions, mean, low, high = bands[row.optimizer]
        colour = colours[row.optimizer]
        axes.fill_between(positions, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(positions, mean, color=colour, linewidth=2.2 if row is ranking[0] else 1.7)
        ends.append((float(positions[-1]), float(mean[-1]), row.optimizer, colour))
    _frame(axes, [mean for _, mean, _, _ in bands.values()], max(end[0] for end in ends))
    _labels(axes, ends)
    axes.set_xlabel(label)
    axes.set_title(f"{plan.problem.name}: training loss", loc="left", fontsize=13, fontweight="bold", pad=24)
    seeds = f"mean and range of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    subtitle = f"{plan.problem.description}; {seeds}, {plan.budget} a run, log scale"
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9.5, color="#666666")
    figure.savefig(path, facecolor="white")
    return path


def _colours(ranking: Sequence[Row]) -> dict[str, str]:
    others = [row.optimizer for row in ranking if row.optimizer not in OWN_COLOURS]
    cycle = OTHER_COLOURS * (len(others) // len(OTHER_COLOURS) + 1)
    return OWN_COLOURS | dict(zip(sorted(others), cycle, strict=False))


def _frame(axes: Axes, means: Sequence[Floats], right: float) -> None:
    """A logarithmic loss axis that leaves out the first fall, where all lines are one."""
    bottom = min(float(mean.min()) for mean in means)
    top = float(np.median([mean[max(1, len(mean) // 25)] for mean in means]))
    axes.set_yscale("log")
    axes.set_ylim(bottom * (bottom / top) ** 0.06, top)
    axes.set_xlim(0, right)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def _labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.052) -> None:
    """Name every line at its end, at least `gap` of the height apart, with a thin lead to the end."""
    low, high = np.log(axes.get_ylim())
    heights = [(np.log(end[1]) - low) / (high - low) for end in ends]
    for index, height in spaced(heights, gap).items():
        x, y, text, colour = ends[index]
        axes.annotate(
            text,
            xy=(x, min(y, float(np.exp(high)))),
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
            },
        )


def spaced(heights: Sequence[float], gap: float) -> dict[int, float]:
    """The same heights, within 0 and 1, moved up as little as keeps them `gap` apart from the bottom up."""
    placed: dict[int, float] = {}
    floor = -gap
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        floor = placed[index] = max(min(heights[index], 1.0), floor + gap)
    return placed
