"""Who owns which curvature: a computation on cost numbers, the same on every rank."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def assign_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner in range(ranks) for every item: the costliest first, each to who has least so far.

    Greedy as in Graham, "Bounds on multiprocessing timing anomalies", 1969: the heaviest load is at most
    4/3 - 1/(3 ranks) times that of the best assignment. Ties go to the earlier item and the lower rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1, got {ranks}")
    for index, cost in enumerate(costs):
        if not 0 <= cost < float("inf"):
            raise ValueError(f"a cost must be finite and >= 0, got {cost} for item {index}")
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, rank = loads[0]
        owners[index] = rank
        heapq.heapreplace(loads, (load + costs[index], rank))
    return owners
