"""A large layer takes its step some rows at a time, and comes to the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from benchmarks.allocations import peak
from torch import nn

import minifisher
from minifisher.methods import mbf_two_sided
from minifisher.step import rows as rows_of_stack

SMALL = 40 * 56 * 4  # entries: with 40 inputs, two blocks of 56 outputs at a time


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers count as large from a few thousand entries; returns the rows of every part that is stepped."""
    rows: list[int] = []
    cut = rows_of_stack._of_rows

    def noted(*arguments: Any) -> Any:
        part = cut(*arguments)
        rows.append(part.rows)
        return part

    monkeypatch.setattr(rows_of_stack, "_of_rows", noted)
    for module in (rows_of_stack, mbf_two_sided):
        monkeypatch.setattr(module, "LARGEST_COPY", SMALL)
    return rows


def _trained(steps: int = 9, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 331), nn.Tanh(), nn.Linear(331, 5)).to(dtype)
    optimizer = minifisher.MBF(network, lr=1e-2, **options)
    for _ in range(steps):
        inputs = torch.randn(32, 40, dtype=dtype)
        optimizer.zero_grad()
        outputs = network(inputs)
        optimizer.observe(outputs, likelihood="gaussian")
        outputs.square().mean().backward()
        optimizer.step()
    return network, optimizer


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fisher": "empirical"},
    {"length": "norm", "nesterov": False},
    {"momentum": 0.0},
    {"graft": "adam-rows", "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"maximize": True, "curvature_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_large_layer_comes_to_the_same_weights(options: dict[str, Any], request: Any) -> None:
    expected, alike = _trained(**options)
    rows = request.getfixturevalue("in_parts")
    found, optimizer = _trained(**options)
    assert rows == [112, 112, 107] * 9  # the last block has 51 rows
    # Statistics of an uneven last block are summed apart.
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert optimizer.diagnostics()["weights"].keys() == alike.diagnostics()["weights"].keys()
    for name, counts in optimizer.diagnostics()["weights"].items():
        others = alike.diagnostics()["weights"][name]
        assert (counts["step"], counts["observations"]) == (others["step"], others["observations"])


def test_in_float64_to_rounding_and_states_too(request: Any) -> None:
    expected, alike = _trained(dtype=torch.float64)
    request.getfixturevalue("in_parts")
    found, optimizer = _trained(dtype=torch.float64)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
        for name, value in alike.state[theirs].items():
            torch.testing.assert_close(optimizer.state[ours][name], value, rtol=1e-8, atol=1e-13)


def test_rows_without_a_finite_direction_take_the_first_order_step_and_the_layer_counts_once(
    in_parts: list[int],
) -> None:
    network, optimizer = _trained(statistics_every=1000, inverse_every=1000)
    weight = network[0].weight
    optimizer.state[weight]["output_inverse"][:, 2:] = torch.nan  # the blocks from row 112 on
    before = copy.deepcopy(network.state_dict())
    fallen = optimizer.diagnostics()["fallbacks"]
    network(torch.randn(32, 40)).square().mean().backward()
    with pytest.warns(RuntimeWarning, match="first-order step"):
        optimizer.step()
    assert optimizer.diagnostics()["fallbacks"] == fallen + 1
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())
    moved = (weight - before["0.weight"]).norm(dim=1)
    assert bool((moved > 0).all())


def test_averages_that_are_not_finite_begin_anew(in_parts: list[int]) -> None:
    network, optimizer = _trained(statistics_every=1000, inverse_every=1000)
    state = optimizer.state[network[0].weight]
    state["output_fisher"][:, 3] = torch.inf
    state["output_inverse"][:, 3] = torch.nan
    network(torch.randn(32, 40)).square().mean().backward()
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values() if torch.is_tensor(tensor))
    assert state["observations"] == 0
    assert state["step"] == 10


def test_a_gradient_that_is_not_finite_leaves_all_as_it_was(in_parts: list[int]) -> None:
    network, optimizer = _trained()
    network(torch.randn(32, 40)).square().mean().backward()
    weight = network[0].weight
    assert weight.grad is not None
    weight.grad[300, 3] = torch.inf
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    count = len(in_parts)
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert len(in_parts) == count
    after = network.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_step_of_a_large_layer_needs_a_part_of_its_memory(request: Any) -> None:
    def share() -> float:
        weight = nn.Parameter(torch.randn(2_001, 1_024))
        weight.grad = torch.randn_like(weight)
        optimizer = minifisher.MBF([weight], statistics_every=1, inverse_every=1)
        for _ in range(2):
            optimizer.step()
        return peak(optimizer.step) / weight.nbytes

    assert share() > 1  # the direction
    request.getfixturevalue("in_parts")
    assert share() < 0.4  # most of it for the inverses of the blocks


def test_autograd_notices_the_change(in_parts: list[int]) -> None:
    network, optimizer = _trained()
    weight = network[0].weight
    loss = (weight * weight).sum()
    network(torch.randn(32, 40)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
