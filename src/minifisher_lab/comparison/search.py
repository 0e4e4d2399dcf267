"""The search of one optimizer's settings: which setting is tried next, given the ones that were tried.

The search draws no random numbers, so it continues after a kill exactly as it would have without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minifisher_lab.comparison.spaces import Range

    Setting = Mapping[str, float]
    Tried = Sequence[tuple[Setting, float]]
    """Settings with their losses, in the order of the trials."""

FARTHEST = 10.0
"""The largest factor by which a trial goes beyond what was tried."""
GOLDEN = (math.sqrt(5) - 1) / 2


def propose(space: Mapping[str, Range], tried: Tried, trials: int) -> dict[str, float]:
    """The next setting of a search with that many trials.

    The first two thirds of the trials cover the ranges. Each later trial changes one value of the best
    setting: outward if that value is the outermost tried, otherwise towards its better neighbour.
    """
    covering = _covering(trials)
    if len(tried) < covering:
        return _cover(space, len(tried), covering)
    best = best_of(tried)
    edges = at_edge(space, tried)
    names = [name for name in space if name in edges] or list(space)
    name = names[(len(tried) - covering) % len(names)]
    values = _values(name, tried)
    low, high = space[name]
    step = min(FARTHEST, (high / low) ** (1 / max(1, covering - 1)))
    if name in edges:
        value = best[name] * step if edges[name] == "highest" else best[name] / step
    else:
        value = math.sqrt(best[name] * _better_neighbour(name, best[name], values, tried))
    return {**best, name: _rounded(value)}


def best_of(tried: Tried) -> dict[str, float]:
    """The setting with the lowest loss; the earlier one if two are equal."""
    return dict(min(tried, key=lambda pair: pair[1])[0])


def at_edge(space: Mapping[str, Range], tried: Tried) -> dict[str, str]:
    """Which values of the best setting are the "lowest" or "highest" that were tried."""
    best = best_of(tried)
    edges = {}
    for name in space:
        values = _values(name, tried)
        if len(values) > 1 and best[name] in (values[0], values[-1]):
            edges[name] = "lowest" if best[name] == values[0] else "highest"
    return edges


def _covering(trials: int) -> int:
    return max(min(trials, 2), round(2 * trials / 3))


def _cover(space: Mapping[str, Range], index: int, count: int) -> dict[str, float]:
    """Point `index` of `count` that cover the ranges.

    Every range has `count` equidistant levels, and each level is used once. The order of a second value's
    levels is that of the multiples of the golden ratio, so that neighbouring rates have distant dampings.
    """
    fractions = [(GOLDEN * (level + 1)) % 1 for level in range(count)]
    scattered = sorted(fractions).index(fractions[index])
    levels = dict(zip(space, (index, scattered), strict=False))
    return {name: _level(ends, levels[name], count) for name, ends in space.items()}


def _level(ends: Range, level: int, count: int) -> float:
    low, high = ends
    share = level / (count - 1) if count > 1 else 0.5
    return _rounded(low * (high / low) ** share)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _values(name: str, tried: Tried) -> list[float]:
    return sorted({setting[name] for setting, _ in tried})


def _better_neighbour(name: str, value: float, values: Sequence[float], tried: Tried) -> float:
    """The next lower or the next higher value that was tried, whichever has the lower loss."""
    position = values.index(value)
    losses = {
        other: min(loss for setting, loss in tried if setting[name] == other)
        for other in values[max(0, position - 1) : position + 2]
        if other != value
    }
    return min(losses, key=lambda other: losses[other], default=value)
