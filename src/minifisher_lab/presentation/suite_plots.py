"""The plots of a suite's report as SVG, in colours that a web page can exchange for its dark theme."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minifisher_lab.presentation.labels import labels, outside, scale, spaced
from minifisher_lab.presentation.plots import band, limits, lowered, plain_ticks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from minifisher_lab.comparison.results import Axis
    from minifisher_lab.comparison.summary import Row

# (on white, on black): the hues of Okabe and Ito's palette, or nearly, with enough contrast. For colour-blind
# readers they differ in brightness, too.
COLOURS = (
    ("#d55e00", "#cc7711"),
    ("#0072b2", "#2288ff"),
    ("#119977", "#88ddbb"),
    ("#882266", "#ee44aa"),
    ("#7a4a00", "#ffbb11"),
    ("#aa77ff", "#bbaaff"),
    ("#111111", "#ffffff"),
)
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
INK, SOFT, GRID = ("#222221", "#e8e8e6"), ("#666665", "#a8a8a6"), ("#ddddde", "#3a3a3c")
THEME = {
    "ink": INK,
    "soft": SOFT,
    "grid": GRID,
    **{f"series-{i}": pair for i, pair in enumerate(COLOURS)},
}
"""The variables of the style sheet: name -> (light, dark)."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "minifisher",  # the same study gives the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK[0],
    "axes.edgecolor": SOFT[0],
    "axes.labelcolor": INK[0],
    "xtick.color": SOFT[0],
    "ytick.color": SOFT[0],
}
SIZE = (5.4, 3.7)
LABELS = {
    "seconds": "training seconds",
    "epoch": "epochs",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy, %",
}
LABEL_WIDTH, GAP = 18, 0.06  # characters in a line of a label, and its share of the height
POINTS = 60  # of a curve
CUT = 2.5
"""The axis ends at this multiple of the median run's seconds, if the slowest run is longer."""


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a line style for every optimizer; no two optimizers share both."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)][0], "linestyle": DASHES[i % len(DASHES)]}
        for i, name in enumerate(names)
    }


def curves(ranking: Sequence[Row], names: Sequence[str]) -> dict[str, str]:
    """The plots of a problem by their names: two quantities, each against seconds and epochs.

    The best row comes first. The place of an optimizer in `names` decides its colour and line style.
    """
    drawable = [row for row in ranking if any(len(run.points) > 1 for run in row.counted)]
    if not drawable:
        return {}
    accurate = drawable[0].counted[0].points[0].test_accuracy is not None
    second = "test_accuracy" if accurate else "test_loss"
    look = styles(names)
    return {
        f"{LABELS[quantity].partition(',')[0]} against {LABELS[axis]}": _curves(
            drawable, look, axis, quantity
        )
        for quantity in ("train_loss", second)
        for axis in ("seconds", "epoch")
    }


def profile_plot(ratios: Mapping[str, Sequence[float]], names: Sequence[str], problems: int) -> str:
    """The performance profiles: the share of problems solved within a factor of the best time."""
    look = styles(names)
    finite = [ratio for some in ratios.values() for ratio in some if np.isfinite(ratio)]
    right = 1.15 * max([2.0, *finite])
    figure, axes = _figure("time to target, over the best optimizer's", "share of the problems")
    ends = []
    for name, some in ratios.items():
        steps = np.sort([ratio for ratio in some if np.isfinite(ratio)])
        heights = np.arange(len(steps) + 1) / problems
        x, y = np.concatenate(([1.0], steps, [right])), np.append(heights, heights[-1])
        axes.step(x, y, where="post", linewidth=1.8, **look[name])
        ends.append((right, float(y[-1]), name))
    axes.set_xscale("log")
    axes.set_xlim(1, right)
    axes.set_ylim(-0.02, 1.04)
    plain_ticks(axes.xaxis, most=6, wide=right > 10)
    _label_ends(axes, ends, look)
    return _svg(figure)


def _curves(ranking: Sequence[Row], look: Mapping[str, Mapping[str, Any]], axis: Axis, quantity: str) -> str:
    figure, axes = _figure(LABELS[axis], LABELS[quantity])
    bands = {row.optimizer: band(row, axis, quantity, POINTS) for row in ranking}
    right = _right([float(positions[-1]) for positions, *_ in bands.values()])
    ends, means = [], []
    for row in reversed(ranking):  # the best one is drawn last, on top
        positions, mean, low, high = bands[row.optimizer]
        style = look[row.optimizer]
        axes.fill_between(positions, low, high, color=style["color"], alpha=0.1, linewidth=0)
        axes.plot(positions, mean, linewidth=1.8, **style)
        end = min(float(positions[-1]), right)
        last = float(np.interp(end, positions, mean))
        ends.append((end, last, row.optimizer))
        means.append(np.append(mean[positions < end], last))
    if quantity == "test_accuracy":
        axes.set_ylim(*_accuracy_limits(means))
    else:
        bottom, top = limits(ranking, means)
        axes.set_ylim(bottom * (bottom / top) ** 0.06, top)
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, most=6, wide=top > 10 * bottom)
    axes.set_xlim(0, right)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _label_ends(axes, ends, look)
    return _svg(figure)


def _right(ends: Sequence[float]) -> float:
    """The right end of the axis; the curve of an optimizer that is much slower than the others is cut."""
    return min(max(ends), CUT * float(np.median(ends)))


def _accuracy_limits(means: Sequence[np.ndarray]) -> tuple[float, float]:
    """From the median accuracy early in the runs to a little above the best."""
    top = max(float(mean.max()) for mean in means)
    bottom = min(float(np.median([mean[len(mean) // 12] for mean in means])), top - 1)
    bottom = lowered(bottom, top, means)
    return bottom, top + 0.04 * (top - bottom)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GRID[0], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(which="both", length=0)
    return figure, axes


def _label_ends(
    axes: Axes, ends: Sequence[tuple[float, float, str]], look: Mapping[str, Mapping[str, Any]]
) -> None:
    """Name every line at its right end, with the names apart from each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(np.clip(to_axes.transform((x, y))[1], 0, 1)) for x, y, _ in ends]
    remarks = [outside(y, *axes.get_ylim()) for _, y, _ in ends]
    texts = labels([name for *_, name in ends], remarks, LABEL_WIDTH)
    places = spaced(heights, texts, GAP)
    for (x, _, name), text, height, place in zip(ends, texts, heights, places, strict=True):
        colour = look[name]["color"]
        arrow = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.7,
            "alpha": 0.55,
            "shrinkA": 1,
            "shrinkB": 0,
        }
        axes.annotate(
            text,
            xy=(float(to_axes.transform((x, 1.0))[0]), height),
            xycoords="axes fraction",
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10.5 * scale(texts, GAP),
            arrowprops={**arrow, "relpos": (0, 0.5)},
        )


def _svg(figure: Figure) -> str:
    """The figure without a background, the XML header, and names that a page could only have once."""
    buffer = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", text)


def themed(svg: str) -> str:
    """The same plot with variables of the page's style sheet in place of its colours and its size."""
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    return re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg, count=1)
