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
    gradient: Tensor  # D of the last step
    squares: Tensor  # V / (1 - beta^t)

    def limit(self, graft: str, limit: float) -> float:
        """The limit of the last step, which falls where |D|^2 is more than three times what it has been."""
        growth = float(self.gradient.square().sum() / self.squares.sum())
        return limit if graft == "sgd" or not growth > 3 else max(1.0, 3 * limit / growth)


class Recorder:
    """M and V of every layer, from the gradients that a run leaves behind."""

    def __init__(self, options, graft):
        self.mu, self.graft = options["momentum"], graft
        self.sums, self.squares, self.last, self.count = {}, {}, {}, 0

    def record(self, gradients):
        self.count += 1
        for index, gradient in enumerate(gradients):
            self.last[index] = gradient
            self.sums[index] = self.mu * self.sums.get(index, 0) + gradient
            self.squares[index] = 0.999 * self.squares.get(index, 0) + 0.001 * gradient**2

    def first_order(self, index):
        if self.graft == "sgd":
            return self.sums[index]
        mean = (1 - self.mu) * self.sums[index] / (1 - self.mu**self.count)
        return mean / (self.square(index).sqrt() + 1e-8)

    def square(self, index):
        return self.squares[index] / (1 - 0.999**self.count)


def last_step(method, last=None, grows=1.0, **options):
    """The weights before the last step, how far it moved them, both a layer each, and the recorder.

    The gradient of the last step is `grows` times as long as that of the loss.
    """
    module = network()
    opt = minifisher.METHODS[method](module, **{"lr": RATE, "length": "norm", **options})
    (group,) = opt.param_groups
    layers = layers_of(module, opt.folds if group["fold_bias"] else ())
    recorder = Recorder(group, options["graft"])

    def joined(name):
        return [layer.join([getattr(p, name) for p in layer.parameters]).clone() for layer in layers]

    for step in range(STEPS):
        if step == STEPS - 1:
            group.update(last or {})
            for parameter in module.parameters():
                parameter.register_hook(lambda gradient: grows * gradient)
        before = joined("data")
        train(module, opt, 1, start=step)
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        sign = -1 if group["maximize"] else 1
        recorder.record([sign * g + decay * w for g, w in zip(joined("grad"), before, strict=True)])
    return before, [(w - old) for w, old in zip(joined("data"), before, strict=True)], recorder


def units(method, graft, limit, **options):
    _, by_norm, recorder = last_step(method, graft=graft, **options)
    _, by_descent, _ = last_step(method, {"length": "descent", "length_limit": limit}, graft=graft, **options)
    for index, (one, other) in enumerate(zip(by_norm, by_descent, strict=True)):
        steps = -one / RATE, -other / RATE
        of_gradients = recorder.last[index], recorder.square(index)
        quantities = recorder.sums[index], recorder.first_order(index), *steps, *of_gradients
        if graft == "adam-rows":
            yield from (
                Unit(*rows)
                for rows in zip(
                    *(q.flatten(1) if q.ndim > 1 else q[:, None] for q in quantities), strict=True
                )
            )
        else:
            yield Unit(*(quantity.flatten() for quantity in quantities))


def check(found, graft, limit):
    """Every unit has the length that the rule says; returns how often it was each of its cases."""
    cases = {"equal descent": 0, "at the limit": 0, "at a lower one": 0, "climbs": 0}
    for unit in found:
        highest = unit.limit(graft, limit)
        longest = highest * unit.first_order.norm()
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
            cases["at the limit" if highest == limit else "at a lower one"] += 1
            expected = longest
        torch.testing.assert_close(unit.by_descent, expected * direction, **CLOSE)
    return cases


@every_graft
@every_method
def test_a_step_promises_the_decrease_of_the_first_order_step(method, graft):
    assert check(units(method, graft, 1e9), graft, 1e9)["equal descent"] > 5


@every_graft
@every_method
def test_no_step_is_longer_than_the_limit(method, graft):
    cases = check(units(method, graft, 1.01), graft, 1.01)
    assert cases["at the limit"] > 0


@pytest.mark.parametrize("graft", ["adam", "adam-rows"])
@every_method
def test_after_a_sudden_growth_of_the_gradient_the_limit_is_lower(method, graft):
    cases = check(units(method, graft, 1.5, grows=20.0), graft, 1.5)
    assert cases["at a lower one"] > 0


VARIANTS = [
    ("mbf", {"momentum": 0.0}),
    ("mbf", {"weight_decay": 0.5, "decoupled_weight_decay": False}),
    ("mbf", {"weight_decay": 0.5, "decoupled_weight_decay": False, "momentum": 0.0}),
    ("mbf", {"fold_bias": True, "share": "row", "block_size": 3}),
    ("mbf", {"conv_blocks": "kernel", "maximize": True}),
    ("kfac", {"eigenvalue_correction": True}),
    ("kfac", {"weight_decay": 0.5, "decoupled_weight_decay": False}),
    ("soap", {"momentum": 0.0}),
    ("soap", {"weight_decay": 0.5, "decoupled_weight_decay": False}),
    ("shampoo", {"fisher": "empirical"}),
]


@every_graft
@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_so_it_does_whatever_momentum_and_decay_are(method, options, graft):
    assert check(units(method, graft, 2.0, **options), graft, 2.0)["equal descent"] > 0


def test_a_row_that_climbs_has_the_length_of_the_first_order_step():
    """KFAC mixes rows, so a row of P M may point against its row of M; the cases above check its length."""
    assert check(units("kfac", "adam-rows", 10.0), "adam-rows", 10.0)["climbs"] > 0


@every_graft
def test_of_a_multiple_of_the_momentum_the_factor_is_known(graft):
    """P = I / lambda: the step is <M, s> / <M, M> M instead of |s| / |M| M."""
    identity = {"damping": 1e9, "relative_damping": False, "output_power": 0.0, "nesterov": False}
    for unit in units("mbf", graft, 1e9, **identity):
        m, s = unit.momentum, unit.first_order
        close = {"rtol": 1e-5, "atol": 1e-10}
        torch.testing.assert_close(unit.by_norm, s.norm() / m.norm() * m, **close)
        torch.testing.assert_close(unit.by_descent, (m @ s) / (m @ m) * m, **close)


@every_graft
@every_method
def test_gradients_that_are_zero_move_nothing(method, graft, recwarn):
    module = network()
    opt = minifisher.METHODS[method](module, graft=graft, length="descent")
    before = torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])

    def closure():
        opt.zero_grad()
        outputs = module(torch.zeros(4, 1, 3, 3, dtype=torch.float64))
        opt.observe(outputs)
        loss = (outputs * 0).sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in module.parameters()]), before)
    assert opt.diagnostics()["fallbacks"] == 0
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@every_graft
@pytest.mark.parametrize("options", [{}, {"conv_blocks": "kernel", "share": "row", "block_size": 9}], ids=str)
def test_kernels_and_reference_take_the_same_steps(options, graft, monkeypatch):
    def trained():
        module = network(torch.float32)
        opt = minifisher.MBF(module, lr=RATE, length="descent", graft=graft, **options)
        train(module, opt, STEPS)
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    compiled = trained()
    for place in ("minifisher.kernels.packed", "minifisher.kernels.choose"):
        monkeypatch.setattr(f"{place}.suits_numba", lambda *tensors, **options: False)
    torch.testing.assert_close(compiled, trained(), rtol=1e-3, atol=1e-4)


def test_the_rule_changes_in_the_middle_of_a_run_and_travels_with_the_state_dict():
    module = network()
    opt = minifisher.MBF(module, length="descent", length_limit=3.0)
    train(module, opt, 2)
    saved = opt.state_dict()
    again = minifisher.MBF(network())
    again.load_state_dict(saved)
    assert (again.length, again.length_limit) == ("descent", 3.0)
    del saved["param_groups"][0]["length"], saved["param_groups"][0]["length_limit"]
    again.load_state_dict(saved)  # as of a version without the option
    assert (again.length, again.length_limit) == ("norm", 4.0)


def test_soap_has_no_first_order_step_unless_one_is_named():
    with pytest.raises(ValueError, match="and graft=None names none"):
        minifisher.SOAP(network(), length="descent")
    with pytest.raises(ValueError, match="and graft=None names none"):
        minifisher.MBF([{"params": network(), "graft": None}], length="descent")
    minifisher.SOAP([{"params": network(), "graft": "adam"}], length="descent")
