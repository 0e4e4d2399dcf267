"""Equal descent: <M, step> = <M, s>, measured on the weights of two runs that part in their last step.

Both runs take the same steps with lengths of equal norm. In the last step one of them changes the rule. M and
Adam's step s are worked out here from the gradients; the direction is that of the other run.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import minifisher
from minifisher.statistics.layers import layers_of
from tests.test_every_method import network, train

STEPS, RATE = 8, 1e-2
CLOSE = {"rtol": 1e-7, "atol": 1e-12}
every_method = pytest.mark.parametrize("method", minifisher.METHODS)
every_graft = pytest.mark.parametrize("graft", ["adam", "adam-rows", "sgd"])


@dataclass
class Unit:
    """What has one length: all of a layer, or one of its rows."""

    momentum: Tensor  # M
    first_order: Tensor  # s
    by_norm: Tensor  # the step of the run that keeps lengths of equal norm, over the learning rate
    by_descent: Tensor  # of the other run


class Recorder:
    """M and V of every layer, from the gradients that a run leaves behind."""

    def __init__(self, options, graft):
        self.mu, self.graft = options["momentum"], graft
        self.sums, self.squares, self.count = {}, {}, 0

    def record(self, gradients):
        self.count += 1
        for index, gradient in enumerate(gradients):
            self.sums[index] = self.mu * self.sums.get(index, 0) + gradient
            self.squares[index] = 0.999 * self.squares.get(index, 0) + 0.001 * gradient**2

    def first_order(self, index):
        if self.graft == "sgd":
            return self.sums[index]
        mean = (1 - self.mu) * self.sums[index] / (1 - self.mu**self.count)
        square = self.squares[index] / (1 - 0.999**self.count)
        return mean / (square.sqrt() + 1e-8)


def last_step(method, last=None, **options):
    """The weights before the last step, how far it moved them, both a layer each, and the recorder."""
    module = network()
    opt = minifisher.METHODS[method](module, **{"lr": RATE, **options})
    (group,) = opt.param_groups
    layers = layers_of(module, opt.folds if group["fold_bias"] else ())
    recorder = Recorder(group, options["graft"])

    def joined(name):
        return [layer.join([getattr(p, name) for p in layer.parameters]).clone() for layer in layers]

    for step in range(STEPS):
        if step == STEPS - 1:
            group.update(last or {})
        before = joined("data")
        train(module, opt, 1, start=step)
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        recorder.record([g + decay * w for g, w in zip(joined("grad"), before, strict=True)])
    return before, [(w - old) for w, old in zip(joined("data"), before, strict=True)], recorder


def units(method, graft, limit, **options):
    _, by_norm, recorder = last_step(method, graft=graft, **options)
    _, by_descent, _ = last_step(method, {"length": "descent", "length_limit": limit}, graft=graft, **options)
    for index, (one, other) in enumerate(zip(by_norm, by_descent, strict=True)):
        quantities = recorder.sums[index], recorder.first_order(index), -one / RATE, -other / RATE
        if graft == "adam-rows":
            yield from (
                Unit(*rows)
                for rows in zip(
                    *(q.flatten(1) if q.ndim > 1 else q[:, None] for q in quantities), strict=True
                )
            )
        else:
            yield Unit(*(quantity.flatten() for quantity in quantities))


def check(found, limit):
    """Every unit has the length that the rule says; returns how often it was each of its three cases."""
    cases = {"equal descent": 0, "at the limit": 0, "climbs": 0}
    for unit in found:
        longest = limit * unit.first_order.norm()
        direction = unit.by_norm / unit.by_norm.norm()
        promised, slope = unit.momentum @ unit.first_order, unit.momentum @ direction
        if slope <= 0:
            cases["climbs"] += 1
            expected = unit.first_order.norm()
        elif promised / slope < longest:
            cases["equal descent"] += 1
            expected = promised / slope
            torch.testing.assert_close(unit.momentum @ unit.by_descent, promised, **CLOSE)
        else:
            cases["at the limit"] += 1
            expected = longest
        torch.testing.assert_close(unit.by_descent, expected * direction, **CLOSE)
    return cases


@every_graft
@every_method
def test_a_step_promises_the_decrease_of_the_first_order_step(method, graft):
    assert check(units(method, graft, 1e9), 1e9)["equal descent"] > 5


@every_graft
@every_method
def test_no_step_is_longer_than_the_limit(method, graft):
    cases = check(units(method, graft, 1.01), 1.01)
    assert cases["at the limit"] > 0
