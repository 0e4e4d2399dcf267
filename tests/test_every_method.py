"""What holds for every method: being in `minifisher.METHODS` enrols it."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
from torch import nn

import minifisher
from minifisher.options import option
from minifisher.statistics.layers import layers_of


class TwoSidedMBF(minifisher.MBF):  # another curvature, enrolled like a method
    output_power: float = option(default=0.5)


every_method = pytest.mark.parametrize("name", [*minifisher.METHODS, "mbf two-sided"])


def method_of(name):
    return TwoSidedMBF if name == "mbf two-sided" else minifisher.METHODS[name]


class Net(nn.Module):
    """A convolution, a norm, equal layers, and an embedding beside them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.embedding = nn.Embedding(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        hidden = torch.tanh(self.image(self.norm(images))).flatten(1)
        side = (images.mean((1, 2, 3)) > 0).long()
        return self.head(torch.tanh(self.body(hidden) + self.embedding(side)))


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def batch(seed, module):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(24, 1, 3, 3, generator=generator, dtype=torch.float64)
    targets = (images.flatten(1)[:, :3]).argmax(1)
    return images.to(next(module.parameters()).dtype), targets


def step(module, opt, seed):
    """One step as any method may want it: with a closure that shows the outputs."""
    images, targets = batch(seed, module)

    def closure():
        opt.zero_grad()
        outputs = module(images)
        opt.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        return loss

    return opt.step(closure).item()


def train(module, opt, steps, start=0):
    torch.manual_seed(start)  # the labels that are drawn
    return [step(module, opt, seed) for seed in range(start, start + steps)]


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def plans(opt, module):
    """Every layer of the module under the only group's options, as the method plans and folds it."""
    (group,) = opt.param_groups
    layers = layers_of(module, opt.folds if group["fold_bias"] else ())
    return [(layer, opt.plan(layer, group)) for layer in layers]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_train_a_network(name, dtype):
    module = network(dtype)
    losses = train(module, method_of(name)(module, lr=1e-2), 60)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@every_method
def test_a_direction_is_linear_and_of_the_weights_shape(name):
    module = network()
    opt = method_of(name)(module)
    train(module, opt, 3)
    for layer, plan in plans(opt, module):
        damping = opt.param_groups[0]["damping"]
        state = {key: value for key, value in opt.state[layer.weight].items() if torch.is_tensor(value)}
        one, other = (torch.randn(layer.shape, dtype=torch.float64) for _ in range(2))

        def direction(momentum, state=state, plan=plan, damping=damping):
            return plan.curvature.precondition(state, momentum.clone(), damping)

        together = direction(2 * one - 3 * other)
        apart = 2 * direction(one) - 3 * direction(other)
        assert together.shape == layer.shape
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9 * apart.abs().max().item())


@every_method
def test_a_direction_never_climbs(name):
    module = network()
    opt = method_of(name)(module)
    train(module, opt, 6)
    for layer, plan in plans(opt, module):
        state = {key: value for key, value in opt.state[layer.weight].items() if torch.is_tensor(value)}
        gradient = torch.randn(layer.shape, dtype=torch.float64)
        direction = plan.curvature.precondition(state, gradient.clone(), opt.param_groups[0]["damping"])
        assert (direction * gradient).sum() > 0, layer.name


@every_method
def test_the_state_is_what_the_curvature_makes_and_the_description_counts_it(name):
    module = network(torch.float32)
    opt = method_of(name)(module)
    train(module, opt, 2)
    described = {layer.name: layer for layer in opt.describe().layers}
    for layer, plan in plans(opt, module):
        fresh, kept = plan.curvature.init(layer), opt.state[layer.weight]
        for key, value in fresh.items():
            assert (kept[key].shape, kept[key].dtype) == (value.shape, value.dtype), (layer.name, key)
        assert described[layer.name].state_bytes == sum(value.nbytes for value in fresh.values())


@every_method
def test_the_docstring_gives_formula_paper_shapes_cost_and_memory(name):
    text = inspect.getdoc(method_of(name))
    for wanted in (
        r"W <- W - lr",
        r"arXiv \d{4}\.\d{5}",
        r"\[(out|m|w), ",
        r"[Cc]ost.* O\(",
        r"[Mm]emory|state has",
    ):
        assert re.search(wanted, " ".join(text.split())), wanted


@every_method
def test_the_description_covers_every_parameter_once(name):
    module = network()
    description = method_of(name)(module).describe()
    assert description.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert sum(description.coverage.values()) == pytest.approx(1.0)
    assert all(layer.structure and layer.reason for layer in description.layers)
    assert method_of(name).__name__ in str(description)


@every_method
def test_a_checkpoint_resumes_bit_for_bit(name):
    make = method_of(name)
    module = network(torch.float32)
    opt = make(module, lr=1e-2)
    train(module, opt, 5)
    weights, state = copy.deepcopy((module.state_dict(), opt.state_dict()))
    train(module, opt, 8, start=5)
    twin = network(torch.float32)
    fresh = make(twin, lr=0.5)
    twin.load_state_dict(weights)
    fresh.load_state_dict(state)
    train(twin, fresh, 8, start=5)
    assert torch.equal(flat(twin), flat(module))


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(name, bad):
    module = network(torch.float32)
    opt = method_of(name)(module, lr=1e-2)
    train(module, opt, 3)
    weights, state = flat(module), copy.deepcopy(opt.state_dict()["state"])
    images, targets = batch(9, module)

    def closure():
        opt.zero_grad()
        outputs = module(images)
        opt.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        module.head.weight.grad[0, 0] = bad
        return loss

    with pytest.warns(RuntimeWarning, match="skipped"):
        opt.step(closure)
    assert opt.skipped_steps == 1
    assert torch.equal(flat(module), weights)
    for index, entry in opt.state_dict()["state"].items():
        for key, value in entry.items():
            same = (
                torch.equal(value, state[index][key])
                if torch.is_tensor(value)
                else value == state[index][key]
            )
            assert same, (index, key)
    assert all(loss < 10 for loss in train(module, opt, 3, start=3))


@every_method
def test_equal_layers_step_as_each_would_alone(name, monkeypatch):
    results = []
    for entries in (65_536, 0):  # weights above this size are never stacked
        monkeypatch.setattr("minifisher.step.layer_stack._LARGEST_STACKED", entries)
        module = network()
        train(module, method_of(name)(module, lr=1e-2), 8)
        results.append(flat(module))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


@every_method
def test_gradients_that_are_zero_move_nothing(name):
    module = network()
    opt = method_of(name)(module)
    before = flat(module)
    for _ in range(4):

        def closure():
            opt.zero_grad()
            outputs = module(batch(0, module)[0])
            opt.observe(outputs)
            (0 * outputs.sum()).backward()
            return outputs.sum().detach()

        opt.step(closure)
    torch.testing.assert_close(flat(module), before)


@every_method
def test_the_loss_comes_back_and_the_model_keeps_its_mode_and_buffers(name):
    module, twin = network(), network()
    opt = method_of(name)(module)
    images, targets = batch(0, module)
    expected = nn.functional.cross_entropy(twin(images), targets).item()
    assert step(module, opt, 0) == pytest.approx(expected)
    assert module.training
    torch.testing.assert_close(module.norm.running_mean, twin.norm.running_mean)


@every_method
def test_a_scheduler_and_decay_apply(name):
    module = network()
    opt = method_of(name)(module, lr=1e-2, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.0)
    train(module, opt, 2)
    schedule.step()
    schedule.step()
    before = flat(module)
    train(module, opt, 2, start=2)
    assert torch.equal(flat(module), before)


@every_method
def test_a_layer_without_inputs_trains_its_bias(name):
    module = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)).double()
    method = method_of(name)
    samples = "empirical" in method.estimators and method.options["fisher"].init
    fisher = {"fisher": "empirical"} if samples else {}
    opt = method_of(name)(module, lr=1e-2, **fisher)
    before = module[0].bias.detach().clone()

    def closure():
        opt.zero_grad()
        loss = module(torch.ones(4, 0, dtype=torch.float64)).square().sum(1).mean()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]
    assert (module[0].bias != before).all()
