"""The Levenberg-Marquardt rule, on quadratics where the predicted change of the loss is the actual one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import minifisher
from minifisher.curvature import Curvature, Plan
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient
from minifisher.step import adaptive_damping as adaptive
from tests.helpers import one_thread

OMEGA = (19 / 20) ** 5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@dataclass(frozen=True)
class Constant(Curvature):
    """P = H^-1 for a Hessian matrix that is known from the start."""

    needs = BatchGradient
    inverse: tuple[tuple[float, ...], ...]

    def init(self, layer):
        return {}

    def observe(self, state, statistics, decay):
        pass

    def precondition(self, state, direction, damping):
        inverse = torch.tensor(self.inverse, dtype=direction.dtype)
        return (direction.flatten(-2) @ inverse).reshape(direction.shape)


class Newton(CurvatureOptimizer):
    """Direction H^-1 M."""

    damping: float = option(default=0.5)
    graft: None = option(default=None)
    adaptive_damping: bool = option(default=True)

    def __init__(self, params, inverse, lr=0.1, **options):
        self.inverse = inverse
        super().__init__(params, lr, **options)

    def plan(self, layer, options):
        return Plan(Constant(self.inverse), "", "", 1, 1, 1, 1)


class Quadratic:
    """f = sum of w^T H w / 2 - b^T w over two weights [2, 3] that the engine stacks."""

    def __init__(self, maximize=False, stiffness=1.0):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
        self.hessian = root @ root.T + torch.eye(6, dtype=torch.float64)
        self.weights = [
            nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator)) for _ in range(2)
        ]
        self.slope = torch.randn(6, dtype=torch.float64, generator=generator)
        self.sign, self.stiffness = -1.0 if maximize else 1.0, stiffness

    @property
    def inverse(self):
        return tuple(map(tuple, torch.linalg.inv(self.hessian).tolist()))

    def loss(self) -> Tensor:
        vectors = [weight.flatten() for weight in self.weights]
        quadratic = sum(0.5 * self.stiffness * v @ self.hessian @ v - self.slope @ v for v in vectors)
        return self.sign * quadratic

    def closure(self, optimizer, losses=None):
        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if losses is not None:
                losses.append(loss.item())
            return loss

        return closure


@pytest.fixture
def factors(monkeypatch):
    """What the rule was given: (before, after, predicted) of every adaptation."""
    given = []

    def spy(before, after, predicted, maximize):
        given.append((float(before.detach()), float(after.detach()), predicted))
        return adaptive.damping_factor(before, after, predicted, maximize)

    monkeypatch.setattr("minifisher.step.together.damping_factor", spy)
    return given


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "rule",
    [{"graft": None}, {"graft": "adam"}, {"graft": "sgd"}, {"graft": "adam", "length": "descent"}],
    ids=str,
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("coupled", [0.0, 0.1])
def test_on_a_quadratic_the_ratio_is_exactly_one(factors, rule, momentum, coupled, maximize):
    problem = Quadratic(maximize)
    options = {"momentum": momentum, "weight_decay": coupled, "decoupled_weight_decay": False, **rule}
    optimizer = Newton(problem.weights, problem.inverse, lr=0.01, maximize=maximize, **options)
    for _ in range(11):
        optimizer.step(problem.closure(optimizer))
    assert len(factors) == 3
    for before, after, predicted in factors:
        assert (after - before) / predicted == pytest.approx(1.0, rel=1e-8)


def test_decoupled_decay_is_predicted_up_to_its_own_square(factors):
    problem = Quadratic()
    optimizer = Newton(problem.weights, problem.inverse, lr=0.1, weight_decay=0.5)
    decays = [-0.1 * 0.5 * weight.detach().flatten() for weight in problem.weights]
    optimizer.step(problem.closure(optimizer))
    ((before, after, predicted),) = factors
    square = sum(0.5 * float(decay @ problem.hessian @ decay) for decay in decays)
    assert after - before == pytest.approx(predicted + square, rel=1e-10)
    assert square > 1e-3 * abs(predicted)


@pytest.mark.parametrize(
    ("stiffness", "lr", "expected"), [(1.0, 0.5, OMEGA), (4.0, 0.5, 1 / OMEGA), (2.0, 0.5, 1.0)]
)
def test_damping_falls_where_the_model_holds_and_rises_where_it_does_not(stiffness, lr, expected):
    problem = Quadratic(stiffness=stiffness)
    optimizer = Newton(problem.weights, problem.inverse, lr=lr, momentum=0.0)
    for weight in problem.weights:  # where D = -b, whatever the stiffness
        weight.data.zero_()
    optimizer.step(problem.closure(optimizer))
    # f falls by (lr - stiffness lr^2 / 2) of what the model says lr - lr^2 / 2 of.
    ratio = (lr - stiffness * lr**2 / 2) / (lr - lr**2 / 2)
    assert (ratio > 0.75, ratio < 0.25) == (expected < 1, expected > 1)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.5 * expected)


def test_the_damping_lives_in_the_group_and_travels_with_the_state_dict():
    problem = Quadratic()
    optimizer = Newton(problem.weights, problem.inverse, momentum=0.0)
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.zeros(2, 3).double())], "adaptive_damping": False}
    )
    for _ in range(6):
        optimizer.step(problem.closure(optimizer))
    adapted, fixed = (group["damping"] for group in optimizer.state_dict()["param_groups"])
    assert adapted == pytest.approx(0.5 * OMEGA**2)
    assert fixed == 0.5
    again = Newton(Quadratic().weights, problem.inverse, momentum=0.0)
    again.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3).double())]})
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["damping"] == adapted


def test_the_closure_is_evaluated_twice_every_fifth_step_only():
    problem = Quadratic()
    optimizer = Newton(problem.weights, problem.inverse)
    losses = []
    for _ in range(10):
        optimizer.step(problem.closure(optimizer, losses))
    assert len(losses) == 12


def test_the_rule_on_its_own():
    factor = adaptive.damping_factor
    assert factor(2.0, 1.0, -1.0, False) == OMEGA
    assert factor(2.0, 1.9, -1.0, False) == 1 / OMEGA
    assert factor(2.0, 1.5, -1.0, False) == 1.0
    assert factor(2.0, 2.5, 1.0, False) == 1.0  # the model sees no progress in the step
    assert factor(2.0, 3.0, 1.0, True) == OMEGA
    assert factor(2.0, float("nan"), -1.0, False) == 1 / OMEGA
    assert factor(2.0, float("inf"), 1.0, False) == 1 / OMEGA
    assert factor(2.0, 2.0, -1e-8, False) == 1.0  # lost in float32
    assert factor(torch.tensor(2.0).double(), 2.0, -1e-8, False) == 1 / OMEGA
    assert adaptive.within_bounds(1e-9) == 1e-8


def test_without_a_closure_or_a_loss_the_error_names_the_cure():
    problem = Quadratic()
    optimizer = Newton(problem.weights, problem.inverse)
    problem.loss().backward()
    with pytest.raises(TypeError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="the closure must return one, got None"):
        optimizer.step(lambda: problem.loss().backward())


@pytest.mark.parametrize("method", sorted(minifisher.METHODS))
def test_it_works_on_every_method(method, factors):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(20, 4), torch.randint(3, (20,))
    optimizer = minifisher.METHODS[method](module, lr=1e-2, adaptive_damping=True)
    start = optimizer.param_groups[0]["damping"]

    def closure():
        optimizer.zero_grad()
        outputs = module(inputs)
        optimizer.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert len(factors) == 2
    assert optimizer.param_groups[0]["damping"] != start


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("soap", {}),
        ("shampoo", {"graft": None}),
        ("kfac", {"graft": None, "fisher": "empirical"}),
        ("kfac", {"graft": None, "fisher": "empirical", "kl_clip": 1e-6}),
        ("tnt", {"graft": None, "fisher": "empirical"}),
    ],
)
def test_the_prediction_is_that_of_the_dense_damped_model(monkeypatch, method, options):
    """q(u) = D^T u + u^T P^-1 u / 2 of every method, the matrix P found column by column."""
    pairs = []

    def spy(update):
        stack, shape = update.stack, update.gradient.shape
        columns = torch.eye(update.gradient.numel(), dtype=update.gradient.dtype)
        curvature, damping = stack.curvature, stack.options["damping"]
        dense = torch.stack(
            [curvature.precondition(stack.state, c.view(shape), damping).flatten() for c in columns]
        )
        step = (-stack.options["lr"] * update.scale * update.length * update.direction).flatten()
        model = update.gradient.flatten() @ step + 0.5 * step @ torch.linalg.solve(dense, step)
        pairs.append((adaptive.predicted_change(update), model))
        return pairs[-1][0]

    monkeypatch.setattr("minifisher.step.recipe.predicted_change", spy)
    torch.manual_seed(0)
    layer, inputs, targets = nn.Linear(4, 3, bias=False).double(), torch.randn(64, 4), torch.randn(64, 3)
    optimizer = minifisher.METHODS[method](layer, lr=0.3, adaptive_damping=True, **options)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (layer(inputs.double()) - targets).square().sum(1).mean()
        loss.backward()
        return loss

    for _ in range(16):
        optimizer.step(closure)
    assert len(pairs) == 4
    torch.testing.assert_close(*map(torch.stack, zip(*pairs, strict=True)))
