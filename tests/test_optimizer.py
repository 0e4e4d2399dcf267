"""The loop: what people do around an optimizer, and what must not change the numbers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from minifisher import KBFGS, KFAC, MBF
from tests.helpers import problem

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(
            dtype
        )


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator).to(dtype)
    return inputs, torch.randint(3, (16,), generator=generator)


def train(module, opt, steps=5, start=0):
    """The losses of `steps` steps, each on a batch of its own."""
    losses = []
    for step in range(start, start + steps):
        inputs, targets = batch(step, next(module.parameters()).dtype)
        opt.zero_grad()
        outputs = module(inputs)
        opt.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def random_gradients(parameters, generator):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# ---- grafts ----

FIRST_ORDER = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("graft", FIRST_ORDER)
@pytest.mark.parametrize("fold_bias", [False, True])
def test_every_layer_takes_a_step_of_the_first_order_length(graft, fold_bias):
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    opt = MBF(ours, lr=0.01, graft=graft, length="norm", fold_bias=fold_bias, statistics_every=2)
    rival = FIRST_ORDER[graft](theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        random_gradients(ours.parameters(), generator)
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = own.grad.clone()
        before, rival_before = copy.deepcopy(ours), copy.deepcopy(theirs)
        opt.step()
        rival.step()
        for index in (0, 2, 4):
            moved, expected = (
                [(new[index].get_parameter(n) - old[index].get_parameter(n)).flatten() for n in names]
                for new, old in ((ours, before), (theirs, rival_before))
                for names in (("weight", "bias"),)
            )
            if fold_bias:
                moved, expected = [torch.cat(moved)], [torch.cat(expected)]
            for step, length in zip(moved, expected, strict=True):
                torch.testing.assert_close(step.norm(), length.norm(), **CLOSE)


def pairs(steps):
    """Weight and bias of every layer."""
    return zip(steps[::2], steps[1::2], strict=True)


@pytest.mark.parametrize("fold_bias", [False, True])
def test_every_row_takes_a_step_of_its_own_adam_length(fold_bias):
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    options = {"graft": "adam-rows", "length": "norm", "nesterov": False, "fold_bias": fold_bias}
    opt = MBF(ours, lr=0.01, statistics_every=2, **options)
    rival = FIRST_ORDER["adam"](theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        random_gradients(ours.parameters(), generator)
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = own.grad.clone()
        steps = []
        for module, optimizer in ((ours, opt), (theirs, rival)):
            before = copy.deepcopy(module)
            optimizer.step()
            steps.append(
                [new - old for new, old in zip(module.parameters(), before.parameters(), strict=True)]
            )
        for (moved, bias), (expected, rival_bias) in zip(*map(pairs, steps), strict=True):
            if fold_bias:
                moved, expected = (
                    torch.cat((w, b[:, None]), 1) for w, b in ((moved, bias), (expected, rival_bias))
                )
            else:  # a row of one entry: Adam's own step
                torch.testing.assert_close(bias, rival_bias, **CLOSE)
            torch.testing.assert_close(moved.norm(dim=1), expected.norm(dim=1), **CLOSE)
            assert not torch.allclose(moved, expected, rtol=1e-3)


def test_a_row_without_a_gradient_stays_and_is_not_reported(recwarn):
    weight = nn.Parameter(torch.ones(4, 3))
    opt = MBF([weight], graft="adam-rows")
    for step in range(3):
        weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        weight.grad[1] = 0
        weight.grad[2] *= 1e-30  # its square is zero
        opt.step()
    assert (weight[1] == 1).all()
    assert (weight[[0, 3]] != 1).all()
    assert torch.isfinite(weight).all()
    assert opt.diagnostics()["fallbacks"] == 0
    assert not recwarn.list


def test_an_adam_graft_on_blocks_of_one_entry_at_full_damping_is_adam_with_sgd_directions():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = MBF(
        [weight], lr=0.1, graft="adam", length="norm", momentum=0.0, damping=1e12, relative_damping=False
    )
    weight.grad = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    opt.step()
    # Adam's first step has length lr in every entry; the direction is the gradient's.
    torch.testing.assert_close(
        weight.detach(), -0.1 * 2 * weight.grad / weight.grad.norm(), rtol=1e-6, atol=1e-9
    )


# ---- stacking ----


@pytest.mark.parametrize("options", [{}, {"graft": None, "damping": 1.0}, {"fisher": "empirical"}], ids=str)
def test_equal_layers_step_as_each_would_alone(options):
    together = [nn.Linear(5, 5).double() for _ in range(4)] + [nn.Conv2d(2, 2, 2).double() for _ in range(3)]
    alone = copy.deepcopy(together)
    one = MBF(nn.ModuleList(together), lr=0.05, weight_decay=0.1, jitter=False, **options)
    many = [MBF(module, lr=0.05, weight_decay=0.1, jitter=False, **options) for module in alone]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        inputs = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        images = torch.randn(7, 2, 3, 3, generator=generator, dtype=torch.float64)
        for modules, optimizers in ((together, [one]), (alone, many)):
            for opt in optimizers:
                opt.zero_grad()
            outputs = [module(inputs).sin() for module in modules[:4]]
            outputs += [module(images).sin() for module in modules[4:]]
            sum((k + 1) * output.sum() / 7 for k, output in enumerate(outputs)).backward()
            for opt in optimizers:
                opt.step()
    torch.testing.assert_close(flat(nn.ModuleList(together)), flat(nn.ModuleList(alone)), **CLOSE)


def test_an_equal_layer_that_was_not_called_does_not_stop_the_others():
    results = []
    for idle in (False, True):
        used, unused = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
        torch.nn.init.constant_(used.weight, 0.3)
        torch.nn.init.zeros_(used.bias)
        opt = MBF(nn.ModuleList([used, unused]) if idle else used, fisher="empirical", statistics_every=1)
        for step in range(4):
            inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).double()
            used(inputs).sin().sum().div(6).backward()
            if idle:  # as zero_grad(set_to_none=False) leaves it
                unused.weight.grad, unused.bias.grad = torch.zeros(5, 5).double(), torch.zeros(5).double()
            opt.step()
            used.zero_grad()
        results.append(flat(used))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


def test_one_layer_without_any_curvature_does_not_stop_its_equals():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    lone = nn.Parameter(torch.ones(4, 4))
    options = {"damping": 0.0, "relative_damping": False, "power": 1.0, "block_size": 2, "share": "layer"}
    opt, alone = MBF(weights, **options), MBF([lone], **options)
    for step in range(4):
        gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        weights[0].grad, weights[1].grad, weights[2].grad = gradient, torch.zeros(4, 4), gradient.clone()
        lone.grad = gradient.clone()
        opt.step()
        alone.step()
    torch.testing.assert_close(weights[0], lone)
    torch.testing.assert_close(weights[2], lone)
    assert torch.equal(weights[1], torch.ones(4, 4))


# ---- groups ----

OVERRIDES = [
    {"lr": 0.5},
    {"momentum": 0.0},
    {"curvature_decay": 0.5},
    {"damping": 3.0},
    {"relative_damping": False},
    {"power": 0.5},
    {"graft": None},
    {"graft": "sgd"},
    {"graft": "adam"},
    {"length": "norm"},
    {"output_power": 0.0},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "decoupled_weight_decay": False},
    {"fisher": "empirical"},
    {"fold_bias": True},
    {"block_size": 3},
    {"share": "row"},
    {"statistics_every": 2},
    {"statistics_every": 1, "inverse_every": 3},
    {"curvature_dtype": torch.float32},
    {"maximize": True},
]


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_a_group_overrides_any_option(override):
    grouped, alone, plain = (network(dtype=torch.float64) for _ in range(3))
    # With `jitter` the schedule of a layer depends on its neighbours.
    make = partial(MBF, lr=0.01, jitter=False)
    opt = make([{"params": grouped[0]}, {"params": grouped[2], **override}, {"params": grouped[4]}])
    optimizers = [make(alone[0]), make(alone[2], **override), make(alone[4])]
    default = make(plain)
    for step in range(10):
        inputs, targets = batch(step, torch.float64)
        for module, every in ((grouped, [opt]), (alone, optimizers), (plain, [default])):
            module.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            for optimizer in every:
                optimizer.step()
    torch.testing.assert_close(flat(grouped), flat(alone), **CLOSE)
    assert not torch.allclose(flat(grouped[2]), flat(plain[2]), rtol=1e-9, atol=0)


def test_convolution_blocks_are_chosen_by_group():
    modules = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
    opt = MBF([{"params": modules[0]}, {"params": modules[1], "conv_blocks": "kernel"}])
    structures = [layer.structure for layer in opt.describe().layers if layer.parameters > 8]
    assert structures == ["two-sided blocks", "kernel blocks"]


@pytest.mark.parametrize("as_module", [False, True])
def test_a_group_added_later_joins_in(as_module):
    module = network()
    opt = MBF(module[0], fisher="empirical" if as_module else "gradient", lr=0.01)
    train(module, opt, 3)
    added = module[2] if as_module else module[2].parameters()
    opt.add_param_group({"params": added, "lr": 0.1})
    before = module[2].weight.detach().clone()
    train(module, opt, 3)
    assert (module[2].weight - before).norm() > 0.1
    assert len(opt.describe().layers) == 4
    assert opt.state[module[0].weight]["step"] == 6
    assert opt.state[module[2].weight]["step"] == 3


def test_every_way_to_hand_over_parameters_takes_the_same_steps():
    ways = [
        lambda module: module,
        lambda module: module.parameters(),
        lambda module: list(module.parameters()),
        lambda module: module.named_parameters(),
        lambda module: [{"params": module}],
        lambda module: [{"params": list(module.parameters())}],
        lambda module: [{"params": module[:2].named_parameters()}, {"params": module[2:].named_parameters()}],
        lambda module: [{"params": module[:2]}, {"params": module[2:].parameters()}],
    ]
    results = []
    for way in ways:
        module = network(dtype=torch.float64)
        train(module, MBF(way(module), lr=0.01))
        results.append(flat(module))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **CLOSE)


def test_names_reach_the_description():
    module = network()
    for params in (module, module.named_parameters()):
        assert MBF(params).describe().layers[0].name == "0.weight"
    assert "group 0" in MBF(module.parameters()).describe().layers[0].name


# ---- schedules ----


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    ],
)
def test_schedulers_drive_the_step(schedule):
    weight = nn.Parameter(torch.zeros(3, 3))
    opt = MBF([weight], lr=0.1, graft="adam", length="norm")
    scheduler = schedule(opt)
    generator = torch.Generator().manual_seed(0)
    lengths, rates = [], []
    for _ in range(6):
        before = weight.detach().clone()
        random_gradients([weight], generator)
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
        lengths.append((weight - before).norm().item())
    twin = nn.Parameter(torch.zeros(3, 3))
    adam = torch.optim.Adam([twin], lr=0.1)
    scheduler = schedule(adam)
    generator = torch.Generator().manual_seed(0)
    for length, rate in zip(lengths, rates, strict=True):
        before = twin.detach().clone()
        random_gradients([twin], generator)
        assert adam.param_groups[0]["lr"] == rate
        adam.step()
        scheduler.step()
        if "momentum" not in opt.param_groups[0] or opt.param_groups[0].get("max_momentum") is None:
            assert length == pytest.approx((twin - before).norm().item(), rel=1e-4)


def test_a_schedule_may_end_a_rounding_error_below_zero():
    weight = nn.Parameter(torch.ones(3, 3))
    opt = MBF([weight], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.3, end_factor=0.0, total_iters=6)
    for _ in range(6):
        random_gradients([weight], torch.Generator().manual_seed(0))
        opt.step()
        scheduler.step()
    assert -1e-15 < opt.param_groups[0]["lr"] < 0
    before = weight.detach().clone()
    opt.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-15)


def test_a_learning_rate_in_a_tensor_is_read_every_step():
    weight = nn.Parameter(torch.zeros(2, 2))
    rate = torch.tensor(0.1)
    opt = MBF([weight], lr=rate, momentum=0.0)
    weight.grad = torch.ones(2, 2)
    opt.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))
    rate.fill_(0.0)
    opt.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


def test_momentum_that_starts_at_zero_may_grow():
    weight = nn.Parameter(torch.zeros(2, 2))
    opt = MBF([weight], momentum=0.0)
    for momentum in (0.0, 0.5, 0.9):
        opt.param_groups[0]["momentum"] = momentum
        weight.grad = torch.ones(2, 2)
        opt.step()
    assert (weight < 0).all()
    torch.testing.assert_close(opt.state[weight]["momentum"], torch.full((2, 2), 0.9 * 1 + 1))


# ---- the step ----


def test_a_closure_is_run_once_with_gradients_on_and_its_loss_comes_back():
    module, twin = network(), network()
    opt, plain = MBF(module), MBF(twin)
    inputs, targets = batch()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), targets)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    nn.functional.cross_entropy(twin(inputs), targets).backward()
    assert plain.step() is None
    torch.testing.assert_close(
        loss.detach(), nn.functional.cross_entropy(network()(inputs), targets).detach()
    )
    assert torch.equal(flat(module), flat(twin))


def test_the_gradients_are_left_as_they_were():
    module = network()
    opt = MBF(module, fisher="sampled", weight_decay=0.1, decoupled_weight_decay=False, maximize=True)
    inputs, targets = batch()
    outputs = module(inputs)
    opt.observe(outputs)
    assert all(parameter.grad is None for parameter in module.parameters())
    nn.functional.cross_entropy(outputs, targets).backward()
    before = [parameter.grad.clone() for parameter in module.parameters()]
    opt.step()
    for parameter, gradient in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_clipped_gradients_are_the_ones_that_count():
    weight, twin = (nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    opt, plain = MBF([weight], graft="sgd"), MBF([twin], graft="sgd")
    weight.grad = 100 * torch.ones(3, 3)
    nn.utils.clip_grad_norm_([weight], 1.0)
    twin.grad = torch.full((3, 3), 1 / 3)
    opt.step()
    plain.step()
    torch.testing.assert_close(weight, twin, rtol=1e-4, atol=1e-8)


def test_maximize_takes_the_opposite_step():
    up, down = (nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    first, second = MBF([up], maximize=True), MBF([down])
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        random_gradients([up], generator)
        down.grad = up.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(up.detach(), -down.detach())


def test_parameters_without_a_gradient_wait():
    module = network()
    opt = MBF(module, lr=0.01, fisher="empirical", statistics_every=2)
    for step in range(8):
        inputs, _ = batch(step)
        idle = module[4] if step % 3 else module[0]
        opt.zero_grad()
        module(inputs).square().mean().backward()
        idle.zero_grad()
        before = flat(idle)
        opt.step()
        assert torch.equal(flat(idle), before)
    steps = {name: counts["step"] for name, counts in opt.diagnostics()["weights"].items()}
    assert steps == {
        "0.weight": 5,
        "0.bias": 5,
        "2.weight": 8,
        "2.bias": 8,
        "4.weight": 3,
        "4.bias": 3,
    }


def test_a_bias_alone_or_a_weight_alone_may_have_the_gradient_of_a_folded_layer():
    layer = nn.Linear(3, 2)
    opt = MBF(layer, lr=0.1, fold_bias=True)
    layer.bias.grad = torch.ones(2)
    opt.step()
    layer.zero_grad()
    layer.weight.grad = torch.ones(2, 3)
    opt.step()
    assert torch.isfinite(flat(layer)).all()


@pytest.mark.parametrize("fisher", ["gradient", "empirical", "sampled"])
def test_frozen_parameters_stay_and_may_thaw(fisher):
    module = network()
    module[0].requires_grad_(False)
    opt = MBF(module, lr=0.01, fisher=fisher, statistics_every=1)
    before = flat(module[0])
    train(module, opt, 3)
    assert torch.equal(flat(module[0]), before)
    module[0].requires_grad_(True)
    train(module, opt, 3)
    assert not torch.equal(flat(module[0]), before)


@pytest.mark.parametrize("method", [KFAC, KBFGS])
def test_a_frozen_layer_does_not_make_statistics_due(method):
    def closure_calls_and_draws(freezes):
        module = network()
        module[0].requires_grad_(not freezes)
        opt = method(module, lr=0.01, statistics_every=5)
        calls = []

        def closure():
            calls.append(opt.zero_grad())
            outputs = module(batch()[0])
            opt.observe(outputs)
            loss = nn.functional.cross_entropy(outputs, batch()[1])
            loss.backward()
            return loss

        for _ in range(20):
            opt.step(closure)
        return len(calls), opt.param_groups[0].get("label_draws")

    assert closure_calls_and_draws(freezes=True) == closure_calls_and_draws(freezes=False)


@pytest.mark.parametrize("method", [partial(KFAC, fisher="empirical"), KBFGS])
def test_a_layer_that_thaws_is_observed_at_once(method):
    module = network()
    module[0].requires_grad_(False)
    opt = method(module, lr=0.01, statistics_every=5)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(module(batch()[0]), batch()[1])
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    module[0].requires_grad_(True)
    opt.step(closure)
    assert opt.state[module[0].weight]["observations"] == 1


def test_gradients_that_are_zero_forever_move_nothing_and_warn_of_nothing():
    for options in ({}, {"damping": 0.0}, {"graft": None}, {"graft": None, "damping": 0.0}, {"power": 0.5}):
        module = network()
        opt = MBF(module, **options)
        before = flat(module)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                for parameter in module.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                opt.step()
        assert torch.equal(flat(module), before), options
        assert opt.diagnostics()["fallbacks"] == 0


def test_a_sampled_estimator_that_is_never_shown_the_outputs_says_so():
    module = network()
    opt = MBF(module, fisher="sampled")
    nn.functional.cross_entropy(module(batch()[0]), batch()[1]).backward()
    with pytest.raises(RuntimeError, match="observe"):
        opt.step()


class Functional(nn.Module):
    """Computes with a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.called, self.idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, inputs):
        return self.called(nn.functional.linear(inputs, self.used.weight).tanh())


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_gradient_without_samples_is_reported_once_and_an_idle_layer_is_not(fisher):
    module = Functional()
    opt = MBF(module, fisher=fisher, statistics_every=2)
    module.idle.weight.grad = torch.zeros(4, 3)
    heard = []
    for _ in range(5):
        opt.zero_grad(set_to_none=False)
        outputs = module(torch.ones(2, 3))
        opt.observe(outputs)
        outputs.square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        heard += caught
    (warning,) = heard
    assert str(warning.message).startswith("used.weight got a gradient, but no call of its module")
    assert warning.filename == __file__
    assert opt.diagnostics()["weights"]["called.weight"]["observations"] == 3


def test_a_gradient_that_autograd_did_not_add_is_reported():
    module = nn.Linear(3, 2, bias=False)
    opt = MBF(module, fisher="empirical")
    (module.weight.grad,) = torch.autograd.grad(module(torch.ones(2, 3)).square().mean(), module.weight)
    with pytest.warns(RuntimeWarning, match=r"weight got a gradient.* let loss\.backward\(\) fill \.grad"):
        opt.step()


def test_observing_is_free_where_none_is_due():
    module = network()
    opt = MBF(module, fisher="sampled", statistics_every=3, jitter=False)
    drawn = []
    for step in range(4):
        train(module, opt, 1, start=step)
        drawn.append(opt.param_groups[0]["label_draws"])
    assert drawn == [1, 1, 1, 2]


# ---- what is not finite ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fisher", ["gradient", "empirical", "sampled"])
def test_a_gradient_that_is_not_finite_touches_nothing(bad, fisher):
    module = network()
    opt = MBF(module, lr=0.01, fisher=fisher, statistics_every=1)
    train(module, opt, 3)
    weights, state = flat(module), copy.deepcopy(opt.state_dict())
    for step in range(3):
        inputs, targets = batch(step)
        opt.zero_grad()
        outputs = module(inputs)
        opt.observe(outputs)
        nn.functional.cross_entropy(outputs, targets).backward()
        module[2].bias.grad[1] = bad
        if step:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                opt.step()
        else:
            with pytest.warns(RuntimeWarning, match="skipped"):
                opt.step()
    assert opt.skipped_steps == 3
    assert torch.equal(flat(module), weights)
    assert_equal_states(opt.state_dict()["state"], state["state"])
    train(module, opt, 3)
    assert torch.isfinite(flat(module)).all()
    assert not torch.equal(flat(module), weights)


def assert_equal_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    for index, entry in ours.items():
        assert entry.keys() == theirs[index].keys()
        for name, value in entry.items():
            other = theirs[index][name]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, (index, name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_samples_that_are_not_finite_touch_nothing_even_where_the_gradient_is(fisher):
    module = network()
    opt = MBF(module, lr=0.01, fisher=fisher, statistics_every=1)
    train(module, opt, 2)
    weights, state = flat(module), copy.deepcopy(opt.state_dict())
    inputs, targets = batch()
    inputs[3] = float("nan")
    opt.zero_grad()
    outputs = module(inputs)
    opt.observe(outputs)
    nn.functional.cross_entropy(outputs, targets).backward()
    for parameter in module.parameters():
        parameter.grad.nan_to_num_()
    with pytest.warns(RuntimeWarning, match="skipped"):
        opt.step()
    assert torch.equal(flat(module), weights)
    assert_equal_states(opt.state_dict()["state"], state["state"])


@pytest.mark.parametrize("options", [{}, {"graft": "sgd"}, {"graft": None}], ids=str)
def test_where_even_the_first_order_step_is_no_number_the_layer_stays_and_is_counted(options):
    wild, tame = (nn.Parameter(torch.full((2, 2), size)) for size in (3e38, 1.0))
    opt = MBF([wild, tame], weight_decay=10.0, decoupled_weight_decay=False, **options)
    before = wild.detach().clone(), tame.detach().clone()
    for _ in range(2):
        wild.grad, tame.grad = torch.ones(2, 2), torch.ones(2, 2)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            opt.step()
        assert torch.equal(wild, before[0])
    assert torch.isfinite(tame).all()
    assert not torch.equal(tame, before[1])
    assert opt.diagnostics()["frozen_layers"] == 2
    assert not heard  # the second time
    with torch.no_grad():
        wild.fill_(1.0)  # momentum and averages have kept nothing of it
    wild.grad, tame.grad = torch.ones(2, 2), torch.ones(2, 2)
    opt.step()
    assert torch.isfinite(wild).all()
    assert not torch.equal(wild, torch.ones(2, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("options", [{}, {"damping": 0.0}, {"graft": None}, {"power": 0.5}], ids=str)
def test_gradients_of_any_size_leave_finite_weights(scale, options):
    module = network()
    opt = MBF(module, lr=1e-3, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            random_gradients(module.parameters(), generator)
            for parameter in module.parameters():
                parameter.grad.mul_(scale)
            opt.step()
    assert torch.isfinite(flat(module)).all()
    assert all(torch.isfinite(entry["fisher"]).all() for entry in opt.state.values() if "fisher" in entry)
    assert flat(module).abs().max() < 1e3 or options.get("graft", "adam") is None


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_every_floating_point_dtype_trains(dtype, fisher):
    module = network(dtype=dtype)
    opt = MBF(module, lr=1e-2, fisher=fisher)
    inputs, targets = batch(0, dtype)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs).float(), targets)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert opt.skipped_steps == 0
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert opt.state[module[0].weight]["input_fisher"].dtype == kept


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_curvature_is_kept_in_the_dtype_that_was_asked_for(dtype, kept):
    module = network(dtype=dtype)
    opt = MBF(module, lr=3e-3, curvature_dtype=kept)
    losses = train(module, opt, 10)
    assert losses[-1] < 1.2
    state = opt.state[module[0].weight]
    assert state["input_fisher"].dtype == kept
    assert module[0].weight.dtype == dtype


def test_parameters_of_several_dtypes_and_no_numbers_at_all_live_together():
    parameters = [
        nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(())),
        nn.Parameter(torch.zeros(0, 4)),
        nn.Parameter(torch.zeros(4, 0)),
        nn.Parameter(torch.zeros(0)),
    ]
    opt = MBF(parameters, lr=0.1)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        opt.step()
    assert all((parameter < -0.1).all() for parameter in parameters)
    assert len(str(opt.describe()).splitlines()) == len(parameters) + 3  # a head, a sum, and what is compiled


# ---- networks of other layers ----


class Zoo(nn.Module):
    """Layers that no capture reads, and one that it does."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.batch_norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = self.norm(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        hidden = self.recurrent(hidden)[0].mT
        return self.head(self.batch_norm(self.up(hidden)).mean(2)) * self.scale


@pytest.mark.parametrize("fisher", ["gradient", "empirical", "sampled"])
def test_layers_that_cannot_be_read_fall_back_with_a_reason(fisher):
    torch.manual_seed(0)
    module = Zoo()
    opt = MBF(module, lr=1e-2, fisher=fisher, statistics_every=2)
    tokens, targets = torch.randint(11, (12, 5)), torch.randint(3, (12,))
    losses = []
    for _ in range(30):
        opt.zero_grad()
        outputs = module(tokens)
        opt.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    described = {layer.name: layer for layer in opt.describe().layers}
    assert set(described) == {name for name, _ in module.named_parameters()}
    expected = {
        "embedding.weight": "Embedding",
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.out_proj.weight": "MultiheadAttention",
        "norm.weight": "LayerNorm",
        "recurrent.weight_ih_l0": "GRU",
        "up.weight": "ConvTranspose1d",
        "batch_norm.weight": "BatchNorm1d",
        "scale": "Zoo",
    }
    for name, module_name in expected.items():
        if fisher == "gradient":  # nothing more was asked for
            continue
        assert module_name in described[name].reason, described[name]
        assert "only its gradient is read" in described[name].reason
    assert "only its gradient" not in described["head.weight"].reason


def test_the_description_adds_up():
    module = Zoo()
    description = MBF(module).describe()
    assert description.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert sum(description.coverage.values()) == pytest.approx(1.0)
    text = str(description)
    for name, parameter in module.named_parameters():
        (line,) = [line for line in text.splitlines() if line.split()[0] == name]
        assert ("x".join(map(str, parameter.shape)) or "scalar") in line
    assert text.splitlines()[-2].startswith("MBF:")
    for structure, share in description.coverage.items():
        assert f"{structure} {share:.1%}" in text


# ---- copies ----


def resumed(module, opt, copy_of):
    """Module and optimizer after a copy of both in one go, so that they still belong together."""
    return copy_of((module, opt))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": lambda both: torch_round_trip(both),
}


def torch_round_trip(both):
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_a_copy_of_model_and_optimizer_goes_on_as_the_original(way, fisher):
    module = network()
    opt = MBF(module, lr=0.01, fisher=fisher, statistics_every=2)
    train(module, opt, 3)
    twin, twin_opt = resumed(module, opt, COPIES[way])
    weights = flat(twin)
    train(module, opt, 4, start=3)
    assert torch.equal(flat(twin), weights), "the copy shares memory with the original"
    train(twin, twin_opt, 4, start=3)
    assert torch.equal(flat(twin), flat(module))
    assert str(twin_opt.describe()) == str(opt.describe())


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_a_state_dict_resumes_and_its_options_go_on_to_count(fisher):
    module = network(dtype=torch.bfloat16)
    opt = MBF(module, lr=0.01, fisher=fisher, statistics_every=2)
    train(module, opt, 3)
    saved = copy.deepcopy((module.state_dict(), opt.state_dict()))
    twin = network(seed=5, dtype=torch.bfloat16)
    fresh = MBF(twin, lr=0.5, damping=7.0, momentum=0.2, fisher=fisher, statistics_every=2)
    twin.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert_equal_states(fresh.state_dict()["state"], saved[1]["state"])
    train(module, opt, 4, start=3)
    train(twin, fresh, 4, start=3)
    assert torch.equal(flat(twin), flat(module))
    for optimizer in (opt, fresh):
        optimizer.param_groups[0]["lr"] = 0.0
    before = flat(twin)
    train(twin, fresh, 2)
    assert torch.equal(flat(twin), before)


def test_gradient_accumulation_is_one_large_batch():
    results = []
    for parts in (1, 4):
        case = problem("linear on tokens", count=8)
        opt = MBF(case.module, lr=0.01, fisher="empirical", statistics_every=1)
        for _ in range(3):
            opt.zero_grad()
            for inputs, targets in zip(case.inputs.chunk(parts), case.targets.chunk(parts), strict=True):
                (case.loss(case.module(inputs), targets) / parts).backward()
            opt.step()
        results.append(flat(case.module))
    torch.testing.assert_close(results[0], results[1], **CLOSE)
