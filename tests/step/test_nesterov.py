"""Nesterov's momentum: the direction of mu M + D is mu times that of M plus that of D, for every method.

P is linear and the same in three runs that part in their last step alone: one preconditions mu M + D, one M,
and one has no momentum any more, so that it preconditions D.
"""

from __future__ import annotations

import pytest
import torch

import minifisher
from minifisher.step.adaptive_damping import predicted_change
from minifisher.step.update import Update
from tests.step.test_equal_descent import STEPS, last_step
from tests.test_every_method import network, train

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


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_an_update_knows_what_its_direction_was_made_from(monkeypatch, nesterov, decay):
    """P = I / lambda: lambda times the direction is what was preconditioned."""
    found, set_length = [], Update.set_length

    def record(update):
        if update.stack.observations:  # else the direction is the first-order step
            found.append((update.direction * 1e9, update.preconditioned.clone()))
        set_length(update)

    monkeypatch.setattr(Update, "set_length", record)
    identity = {"damping": 1e9, "relative_damping": False, "output_power": 0.0}
    decayed = {"weight_decay": decay, "decoupled_weight_decay": False}
    module = network()
    train(module, minifisher.MBF(module, nesterov=nesterov, **identity, **decayed), STEPS)
    assert len(found) > STEPS
    for direction, preconditioned in found:
        torch.testing.assert_close(direction, preconditioned, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_predicted_change_follows_what_was_preconditioned(monkeypatch, nesterov):
    """With P = I / lambda, (G + lambda I) step = -c N: the quadratic model's change has that N."""
    found, apply = [], Update.apply

    def record(update):
        c = update.length * 1e-3
        step = -c * update.direction
        expected = (step * (update.gradient - 0.5 * c * 1e9 * update.direction)).sum()
        if update.stack.observations:
            found.append((predicted_change(update), expected))
        apply(update)

    monkeypatch.setattr(Update, "apply", record)
    identity = {"damping": 1e9, "relative_damping": False, "output_power": 0.0}
    module = network()
    train(module, minifisher.MBF(module, lr=1e-3, nesterov=nesterov, **identity), STEPS)
    assert len(found) > STEPS
    for predicted, expected in found:
        torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-12)
