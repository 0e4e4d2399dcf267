"""The length of a step, and the first-order step that it comes from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher.curvature import Measures
from minifisher.step.first_order import (
    GRAFTS,
    graft_length,
    limits,
    masks_of_steps,
    measure,
    update_momentum,
)


def test_a_length_that_is_not_finite_is_not_used():
    direction = Measures(torch.tensor([2.0, 1e-30, torch.inf, torch.nan, 0.0]))
    first_order = Measures(torch.tensor([1.0, 1e30, 1.0, torch.inf, 1.0]))
    length = graft_length(direction, first_order, rescales=True, limit=10.0)
    usable, fallen, frozen = masks_of_steps(direction, first_order, length)
    assert usable.tolist() == [True, False, False, False, False]
    assert fallen.tolist() == [False, True, True, False, False]
    assert frozen.tolist() == [False, False, False, True, False]
    assert length[0] == 0.5


def test_momentum_is_the_sum_of_past_gradients():
    state = {"momentum": torch.tensor([2.0, -4.0])}
    assert update_momentum(state, torch.tensor([3.0, 1.0]), 0.5) is state["momentum"]
    assert state["momentum"].tolist() == [4.0, -1.0]


def test_without_a_graft_the_direction_keeps_its_length():
    direction, first_order = Measures(torch.tensor([2.0, torch.nan])), Measures(torch.ones(2))
    length = graft_length(direction, first_order, rescales=False, limit=10.0)
    usable, _, _ = masks_of_steps(direction, first_order, length)
    assert length[0] == 1
    assert usable.tolist() == [True, False]


def test_the_factor_of_equal_descent_in_every_case():
    cases = {  # |P M|, <M, P M>, |s|, <M, s>: the factor of P M
        "<M, s> / <M, P M>": (2.0, 1.0, 3.0, 6.0, 6.0),
        "shorter than s, too": (2.0, 4.0, 3.0, 1.0, 0.25),
        "the limit": (2.0, 0.1, 3.0, 6.0, 10 * 1.5),
        "the limit where the slope is zero": (2.0, 0.0, 3.0, 6.0, 10 * 1.5),
        "|s| / |P M| where P M climbs": (2.0, -1.0, 3.0, 6.0, 1.5),
        "and where s climbs": (2.0, 1.0, 3.0, -6.0, 1.5),
        "and where both are too small for the dtype": (2.0, 0.0, 3.0, 0.0, 1.5),
    }
    norm, slope, of_s, slope_of_s, expected = torch.tensor(list(cases.values())).unbind(1)
    direction, first_order = Measures(norm, slope), Measures(of_s, slope_of_s)
    length = graft_length(direction, first_order, rescales=True, limit=10.0)
    assert dict(zip(cases, length.tolist(), strict=True)) == dict(zip(cases, expected.tolist(), strict=True))
    length = graft_length(direction, first_order, rescales=False, limit=10.0)
    assert (length == 1).all()


def test_the_limit_falls_with_a_sudden_growth_of_the_gradient():
    growths = {0.0: 6.0, 1.0: 6.0, 3.0: 6.0, 4.5: 4.0, 6.0: 3.0, 18.0: 1.0, 100.0: 1.0, torch.inf: 1.0}
    newest = torch.tensor(list(growths))
    usual = torch.ones(len(growths))
    first_order = Measures(usual, usual, newest, usual)
    assert limits(first_order, 6.0).tolist() == list(growths.values())
    # Equal descent asks for ten times the length of the first-order step.
    direction = Measures(usual, usual / 10)
    assert graft_length(direction, first_order, rescales=True, limit=6.0).tolist() == list(growths.values())
    nothing = torch.zeros(1)
    assert limits(Measures(nothing, nothing, nothing, nothing), 6.0).tolist() == [6.0]


@pytest.mark.parametrize("slope", [None, 0.0])
def test_without_a_first_order_step_the_length_is_zero(slope):
    norms = torch.tensor([0.0, 2.0, torch.inf, torch.nan])
    direction, first_order = (
        Measures(norm, None if slope is None else torch.full_like(norm, slope))
        for norm in (norms, torch.zeros_like(norms))
    )
    length = graft_length(direction, first_order, rescales=True, limit=10.0)
    assert length.tolist()[:3] == [0, 0, 0]
    usable, fallen, frozen = masks_of_steps(direction, first_order, length)
    assert usable.tolist() == [True, True, False, False]
    assert not fallen.any()
    assert not frozen.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 6), (300, 700)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_norm_and_slope_are_measured_for_each_length(by_rows, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    step, momentum = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    lengths = shape[0] if by_rows else 1
    x, m = (tensor.double().view(lengths, -1) for tensor in (step, momentum))
    measures = measure(step, momentum, lengths)
    expected = Measures(x.norm(dim=1), (x * m).sum(1))
    scale = (x.norm(dim=1) * m.norm(dim=1)).max().item()
    close = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(measures.norm.double(), expected.norm, rtol=close, atol=0)
    torch.testing.assert_close(measures.slope.double(), expected.slope, rtol=0, atol=close * scale)


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
        norm, slope, newest, usual = graft.update(state, gradient, 1, count, 0.9, with_slope=True)
        step = graft.step(state, state["momentum"], count, 0.9)
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm, expected.norm().view(1), rtol=1e-4, atol=0)
        assert slope.item() == pytest.approx((state["momentum"] * expected).sum().item(), rel=1e-4)
        of_torch = adam.state[weight]["exp_avg_sq"].sum().item() / (1 - 0.999**count)
        assert usual.item() == pytest.approx(of_torch, rel=1e-4)
        assert newest.item() == pytest.approx(gradient.square().sum().item(), rel=1e-4)
        growth = graft.growth(state, gradient, 1, count)
        torch.testing.assert_close(growth, (newest, usual))
