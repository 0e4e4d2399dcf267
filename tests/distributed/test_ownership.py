from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import minifisher
from minifisher.distributed.ownership import assign_owners
from minifisher.distributed.placement import cost
from minifisher.statistics.layers import layers_of


def loads(costs: list[float], owners: list[int], ranks: int) -> list[float]:
    totals = [0.0] * ranks
    for one, owner in zip(costs, owners, strict=True):
        totals[owner] += one
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


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_a_cost_grows_as_the_work_does(method: str) -> None:
    """Twice the width: four times (but for what a call costs) to eight times the multiplications."""
    costs = []
    for width in (1024, 2048):
        with torch.device("meta"):
            module = nn.Linear(width, width, bias=False)
        optimizer = minifisher.METHODS[method](module)
        (layer,) = layers_of(module)
        costs.append(cost(layer, optimizer.plan(layer, optimizer.param_groups[0])))
    assert 3.7 < costs[1] / costs[0] < 8.1


def test_a_cost_needs_no_memory_and_counts_the_refresh_by_its_period() -> None:
    with torch.device("meta"):
        module = nn.Linear(1024, 1024, bias=False)
    (layer,) = layers_of(module)
    often, rarely = (minifisher.KFAC(module, inverse_every=every) for every in (1, 1000))
    first, last = (cost(layer, o.plan(layer, o.param_groups[0])) for o in (often, rarely))
    assert first > 2 * last
