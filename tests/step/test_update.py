"""The step of a layer whose direction is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher import MBF

GRADIENTS = [
    torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)
]
WARNED = "the direction of a layer was not finite"


def after_one_step(**options):
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    opt = MBF([weight], lr=0.1, output_power=0.0, **options)
    weight.grad = GRADIENTS[0].clone()
    opt.step()
    return weight, opt


def adam_step():
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.1)
    for gradient in GRADIENTS:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        adam.step()
    return weight.detach() - before


@pytest.mark.parametrize(
    ("graft", "length"),
    [
        (None, "norm"),
        *((graft, length) for graft in ("adam", "adam-rows", "sgd") for length in ("norm", "descent")),
    ],
)
def test_a_layer_whose_direction_is_not_finite_takes_the_first_order_step(graft, length):
    weight, opt = after_one_step(graft=graft, length=length)
    opt.state[weight]["inverse"].fill_(torch.nan)
    before = weight.detach().clone()
    weight.grad = GRADIENTS[1].clone()
    with pytest.warns(RuntimeWarning, match=WARNED):
        opt.step()
    momentum = 0.9 * GRADIENTS[0] + GRADIENTS[1]
    expected = adam_step() if graft in ("adam", "adam-rows") else -0.1 * momentum
    torch.testing.assert_close(weight.detach() - before, expected)
    assert opt.diagnostics()["fallbacks"] == 1


@pytest.mark.parametrize("graft", ["adam", "adam-rows", "sgd"])
def test_a_gradient_that_became_zero_without_momentum_is_no_fault(graft):
    weight, opt = after_one_step(graft=graft, momentum=0.0)
    before = weight.detach().clone()
    weight.grad = torch.zeros(3, 4, dtype=torch.float64)
    opt.step()
    assert torch.equal(weight, before)
    assert opt.diagnostics()["fallbacks"] == 0


def test_only_the_layer_of_a_stack_whose_direction_is_not_finite_falls_back():
    weights = [nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(2)]
    opt = MBF(weights, lr=0.1, output_power=0.0)
    for weight in weights:
        weight.grad = GRADIENTS[0].clone()
    opt.step()
    alone, alone_opt = after_one_step()
    opt.state[weights[1]]["inverse"].fill_(torch.nan)
    before = weights[1].detach().clone()
    for weight in (*weights, alone):
        weight.grad = GRADIENTS[1].clone()
    alone_opt.step()
    with pytest.warns(RuntimeWarning, match=WARNED):
        opt.step()
    torch.testing.assert_close(weights[0], alone)
    torch.testing.assert_close(weights[1].detach() - before, adam_step())
    assert opt.diagnostics()["fallbacks"] == 1
