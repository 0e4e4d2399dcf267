"""Nesterov's momentum: the direction of mu M + D is mu times that of M plus that of D, for every method.

P is linear and the same in three runs that part in their last step alone: one preconditions mu M + D, one M,
and one has no momentum any more, so that it preconditions D.
"""

from __future__ import annotations

import pytest
import torch

import minifisher
from tests.step.test_equal_descent import STEPS, last_step

MU = 0.8


def steps_of(method, last, **options):
    own_length = {"graft": None, "length": None, "momentum": MU, "nesterov": False, **options}
    return last_step(method, last, **own_length)[1]


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("method", minifisher.METHODS)
def test_the_direction_is_that_of_mu_m_plus_d(method, fold_bias):
    ahead, of_sum, of_gradient = (
        steps_of(method, last, fold_bias=fold_bias) for last in ({"nesterov": True}, {}, {"momentum": 0.0})
    )
    factors = MU, 1.0
    if method == "soap":  # the means of as many gradients, instead of the sums
        share = [(1 - MU) / (1 - MU**count) for count in (STEPS, STEPS + 1)]
        factors = MU * share[1] / share[0], share[1]
    found = [
        (one, factors[0] * two + factors[1] * three)
        for one, two, three in zip(ahead, of_sum, of_gradient, strict=True)
        if not torch.equal(one, two)  # a layer without curvature steps by M
    ]
    assert len(found) >= 5
    for one, expected in found:
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_without_momentum_it_changes_nothing(method):
    with_it, without = (steps_of(method, {}, momentum=0.0, nesterov=flag) for flag in (True, False))
    assert all(map(torch.equal, with_it, without))
