"""The labels at the ends of a plot's lines: short enough, different from each other, and apart."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LINES = 20
"""About as many lines of text fit beside a plot."""


def labels(names: Sequence[str], remarks: Sequence[str], width: int) -> list[str]:
    """Each name followed by its remark, in lines of at most `width` characters.

    A name that is too long for its share of the plot's height is shortened; no two of them become alike.
    """
    share = width * max(1, LINES // max(1, len(names)))
    length = max(10, share - max(map(len, remarks), default=0))
    short = shortened(names, length)
    return [wrapped(name + remark, width) for name, remark in zip(short, remarks, strict=True)]


def shortened(names: Sequence[str], length: int) -> list[str]:
    """The names with at most `length` characters each; different names stay different."""
    result = [name if len(name) <= length else _essence(name, names, length) for name in names]
    counts, seen = Counter(result), Counter[str]()
    for index, label in enumerate(result):
        if counts[label] > 1:
            seen[label] += 1
            mark = f" ({seen[label]})"
            result[index] = label[: length - len(mark)] + mark
    return result


def _essence(name: str, names: Sequence[str], length: int) -> str:
    """The name without the options that all variants of the method share, and cut if that is not enough."""
    method, *options = name.split(":")
    variants = [set(other.split(":")[1:]) for other in names if other.startswith(f"{method}:")]
    shared = set.intersection(*variants) if len(variants) > 1 else set()
    kept = [option for option in options if option not in shared]
    label = ":".join([method, *kept, *(["…"] if shared else [])])
    return label if len(label) <= length else label[: length - 1] + "…"


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken after colons and spaces if possible."""
    lines = [""]
    for piece in re.split(r"(?<=[: ])", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(line.strip() for line in lines)


def outside(value: float, bottom: float, top: float) -> str:
    """What a label says about a line whose end is not on the axis."""
    if bottom <= value <= top:
        return ""
    return ", above the axis" if value > top else ", below the axis"


def scale(texts: Sequence[str], gap: float) -> float:
    """By how much letters and distances must shrink, so that all texts fit into the height 1."""
    return min(1.0, 1 / max(gap, gap * (sum(map(_height, texts)) - 1)))


def _height(text: str) -> int:
    return text.count("\n") + 1


def spaced(heights: Sequence[float], texts: Sequence[str], gap: float) -> Floats:
    """Move the heights as little as possible, so that lines of text are `gap` apart and in [0, 1].

    The order is kept. This is least squares under a constraint: with s_i the sum of the distances up to
    the i-th text, h_i - s_i must not decrease with i. Isotonic regression solves it.
    """
    from sklearn.isotonic import isotonic_regression  # slow to import

    order = np.argsort(heights, kind="stable")
    sizes = scale(texts, gap) * gap * np.array([_height(text) for text in texts], float)[order]
    line = scale(texts, gap) * gap
    steps = np.concatenate(([0.0], np.cumsum((sizes[1:] + sizes[:-1]) / 2)))
    low, high = (sizes[0] - line) / 2, 1 - (sizes[-1] - line) / 2 - steps[-1]
    fitted = isotonic_regression(np.asarray(heights)[order] - steps, y_min=low, y_max=max(low, high))
    placed: Floats = np.empty(len(heights))
    placed[order] = fitted + steps
    return placed
