"""The length of a step, and the first-order step that it comes from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher.curvature import Measures
from minifisher.step.first_order import GRAFTS, graft_length


def test_a_length_that_is_not_finite_is_not_used():
    direction = Measures(torch.tensor([2.0, 1e-30, torch.inf, torch.nan]))
    first_order = Measures(torch.tensor([1.0, 1e30, 1.0, torch.inf]))
    length, usable, frozen = graft_length(direction, first_order, rescales=True, limit=10.0)
    assert usable.tolist() == [True, False, False, False]
    assert frozen.tolist() == [False, False, False, True]
    assert length[0] == 0.5


def test_without_a_graft_the_direction_keeps_its_length():
    direction, first_order = Measures(torch.tensor([2.0, torch.nan])), Measures(torch.ones(2))
    length, usable, _ = graft_length(direction, first_order, rescales=False, limit=10.0)
    assert length[0] == 1
    assert usable.tolist() == [True, False]


@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_step_of_the_graft_is_that_of_torch(dtype, size):
    """Gradients near epsilon show where it is added."""
    weight = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    adam, graft = torch.optim.Adam([weight], lr=1.0), GRAFTS["adam"]
    state = {name: torch.zeros(3, 4, dtype=dtype) for name in ("momentum", "second_moment")}
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3):
        gradient = size * torch.randn(3, 4, generator=generator, dtype=dtype)
        before, weight.grad = weight.detach().clone(), gradient.clone()
        adam.step()
        expected = before - weight.detach()
        norm, slope = graft.update(state, gradient, 1, count, 0.9, with_slope=True)
        step = graft.step(state, state["momentum"], count, 0.9)
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm, expected.norm().view(1), rtol=1e-4, atol=0)
        assert slope.item() == pytest.approx((state["momentum"] * expected).sum().item(), rel=1e-4)
