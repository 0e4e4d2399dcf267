from __future__ import annotations

import random

import pytest

from minifisher.placement import assign_owners


def loads(costs: list[float], owners: list[int], ranks: int) -> list[float]:
    totals = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        totals[owner] += cost
    return totals


def test_the_costliest_go_first_to_whoever_has_least() -> None:
    assert assign_owners([1, 7, 4, 4, 2], 2) == [1, 0, 1, 1, 0]


def test_equal_costs_go_around() -> None:
    assert assign_owners([3.0] * 5, 3) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_no_rank_has_more_than_the_bound(ranks: int, seed: int) -> None:
    costs = [random.Random(seed).expovariate(1) for _ in range(40)]
    owners = assign_owners(costs, ranks)
    assert owners == assign_owners(list(costs), ranks)
    best = max(sum(costs) / ranks, *costs)  # no assignment is better
    assert max(loads(costs, owners, ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + max(costs) / 3


def test_nothing_to_own() -> None:
    assert assign_owners([], 3) == []


@pytest.mark.parametrize("costs", [[-1.0], [float("nan")], [float("inf")]])
def test_a_cost_that_is_none(costs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a cost must be finite and >= 0, got .* for item 0"):
        assign_owners(costs, 2)


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="ranks must be >= 1, got 0"):
        assign_owners([1.0], 0)
