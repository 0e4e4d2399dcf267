from __future__ import annotations

import math

import pytest

from minifisher_lab.comparison.search import at_edge, best_of, propose
from minifisher_lab.comparison.spaces import entrants

SPACES = {name: entrant.space for name, entrant in entrants().items() if entrant.space}


def _search(space, trials, loss):
    tried = []
    for _ in range(trials):
        setting = propose(space, tried, trials)
        tried.append((setting, loss(setting)))
    return tried


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("trials", [1, 2, 3, 8, 12])
def test_all_trials_differ_and_cover_the_range_to_its_ends(name, trials):
    space = SPACES[name]
    tried = _search(space, trials, lambda setting: (math.log10(setting["lr"]) + 2.1) ** 2)
    assert len({tuple(setting.values()) for setting, _ in tried}) == trials
    if trials > 2:
        for value, ends in space.items():
            covered = [setting[value] for setting, _ in tried[: round(2 * trials / 3)]]
            assert (min(covered), max(covered)) == pytest.approx(ends)


def test_the_search_comes_closer_to_the_best_rate():
    best = best_of(_search({"lr": (1e-4, 1e-1)}, 8, lambda setting: abs(math.log10(setting["lr"]) + 2.1)))
    assert abs(math.log10(best["lr"]) + 2.1) < 0.3


@pytest.mark.parametrize(("slope", "edge"), [(1, "lowest"), (-1, "highest")])
def test_an_edge_is_followed_outward_and_told(slope, edge):
    space = {"lr": (1e-4, 1e-1), "damping": (1e-3, 1e0)}
    tried = _search(
        space, 9, lambda setting: slope * math.log(setting["lr"]) + abs(setting["damping"] - 0.03)
    )
    rates = [setting["lr"] for setting, _ in tried]
    assert min(rates) < 1e-4 if edge == "lowest" else max(rates) > 1e-1
    assert at_edge(space, tried)["lr"] == edge


def test_a_diverged_trial_ends_the_way_outward():
    tried = _search({"lr": (1e-4, 1e-1)}, 6, lambda s: math.inf if s["lr"] > 0.2 else -s["lr"])
    assert at_edge({"lr": (1e-4, 1e-1)}, tried) == {}
    assert best_of(tried)["lr"] >= 0.1


def test_if_all_trials_diverge_there_is_still_a_best():
    assert best_of(_search({"lr": (1e-4, 1e-1)}, 4, lambda _: math.inf))
