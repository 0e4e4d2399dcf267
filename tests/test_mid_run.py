"""What is done to an optimizer, its groups and its state between two steps."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from minifisher import KFAC, MBF, METHODS, SOAP, Shampoo
from minifisher.kernels import choose
from minifisher.methods.kfac import KroneckerFactors
from minifisher.step.update import clip_divergence
from tests.helpers import closure_of

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(16) % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(module, optimizer, steps):
    for _ in range(steps):
        optimizer.step(closure_of(module, optimizer, INPUTS, TARGETS))


# ---- parameters ----


@pytest.mark.parametrize("half", ["weight", "bias"])
@pytest.mark.parametrize("method", ["mbf", "kfac", "kbfgs"])
def test_half_of_a_folded_layer_stays_when_it_is_frozen(method, half):
    module = network()
    optimizer = METHODS[method](module, lr=0.01, fold_bias=True, weight_decay=0.1)
    train(module, optimizer, 3)
    frozen = getattr(module[0], half)
    frozen.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    train(module, optimizer, 3)
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (parameter is frozen)


def test_a_refused_group_is_not_enrolled():
    first, second = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = MBF([first], capturable=True, statistics_every=1, inverse_every=1)
    with pytest.raises(ValueError, match="capturable"):
        optimizer.add_param_group({"params": [second], "statistics_every": 2})
    first.grad = second.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(second, torch.ones(2, 3))
    assert len(optimizer.describe().layers) == len(optimizer.state_dict()["state"]) == 1


def test_a_group_added_before_training_is_observed_from_the_first_step():
    module = network()
    optimizer = MBF(module[:2], fisher="empirical")
    optimizer.add_param_group({"params": module[2]})
    train(module, optimizer, 1)
    assert all(w["observations"] == 1 for n, w in optimizer.diagnostics()["weights"].items() if "weight" in n)


def test_a_learning_rate_that_became_nan_reaches_no_weight():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer, 1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got nan"):
        train(module, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_layers_of_one_name_are_told_apart():
    optimizer = MBF([{"params": network()}, {"params": network()}])
    names = optimizer.diagnostics()["weights"].keys()
    assert len(names) == 8
    assert {"0.weight of group 0", "0.weight of group 1"} < names


# ---- state ----


@pytest.mark.parametrize("renewed", [True, False])
def test_a_state_that_was_emptied_starts_anew(renewed):
    module, fresh = network(), network()
    optimizer, other = MBF(module), MBF(fresh)
    train(module, optimizer, 3)
    if renewed:
        optimizer.state = defaultdict(dict)
    else:
        optimizer.state.clear()
    fresh.load_state_dict(module.state_dict())
    train(module, optimizer, 2)
    train(fresh, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "make", [KFAC, METHODS["tnt"], METHODS["kbfgs"], lambda m: MBF(m, fisher="empirical")]
)
def test_samples_are_read_again_after_the_state_was_emptied(make):
    module = network()
    optimizer = make(module)
    train(module, optimizer, 3)
    optimizer.state.clear()  # the hooks are off by now
    train(module, optimizer, 2)
    assert optimizer.state[module[0].weight]["observations"] == 1


@pytest.mark.parametrize("later", [0.0, 0.9])
def test_momentum_that_a_schedule_lowered_to_zero_is_saved_and_loaded(later):
    ends = []
    for resumed in (False, True):
        module = network()
        optimizer = MBF(module)
        train(module, optimizer, 2)
        optimizer.param_groups[0]["momentum"] = 0.0
        train(module, optimizer, 2)
        if resumed:
            saved, optimizer = optimizer.state_dict(), MBF(module)
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["momentum"] = later
        train(module, optimizer, 2)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*ends)


def test_a_hook_may_change_the_state_dict():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer, 1)

    def widen(_, packed):
        packed["state"] = {
            key: {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in entry.items()}
            for key, entry in packed["state"].items()
        }

    optimizer.register_state_dict_post_hook(widen)
    assert optimizer.state_dict()["state"][0]["momentum"].dtype == torch.float64


# ---- numbers ----


def test_float16_gradients_whose_norm_is_out_of_its_range_are_finite_all_the_same():
    weight = nn.Parameter(torch.zeros(256, 256, dtype=torch.float16))
    optimizer = MBF([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 300.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert weight.abs().min() > 0


@pytest.mark.parametrize("make", [SOAP, Shampoo, METHODS["kbfgsl"], KFAC])
def test_a_step_under_autocast_computes_in_full_precision(make):
    ends = []
    for under_autocast in (False, True):
        module = network()
        optimizer = make(module, lr=0.01)
        torch.manual_seed(0)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
                optimizer.step(
                    torch.autocast("cpu", enabled=False)(closure_of(module, optimizer, INPUTS, TARGETS))
                )
        ends.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*ends)


# ---- a warm start ----


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_a_batch_that_is_not_finite_is_left_out_of_a_warm_start(fisher):
    bad = INPUTS.clone()
    bad[3, 2] = math.inf
    states = []
    for batches in ([INPUTS, -INPUTS], [bad, INPUTS, bad, -INPUTS]):
        module = network()
        optimizer = MBF(module, fisher=fisher)
        loader = [(inputs, TARGETS) for inputs in batches]
        if len(batches) > 2:
            with pytest.warns(RuntimeWarning, match="NaN or infinite"):
                optimizer.warm_start(module, loader, functional.cross_entropy)
        else:
            optimizer.warm_start(module, loader, functional.cross_entropy)
        states.append(optimizer.state[module[0].weight])
        assert optimizer.skipped_steps == len(batches) - 2
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("method", ["kfac", "kbfgs"])
def test_norms_step_after_a_warm_start_as_without_one(method):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = METHODS[method](module, lr=0.01)
    optimizer.warm_start(module, [(INPUTS, TARGETS)] * 2, functional.cross_entropy)
    before = module[1].weight.detach().clone()
    train(module, optimizer, 1)
    torch.testing.assert_close((module[1].weight - before).norm(), torch.tensor(0.01 * 8**0.5))
    momentum = optimizer.state[module[1].weight]["momentum"]
    torch.testing.assert_close(momentum, module[1].weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["soap", "mbf", "tnt"])
def test_a_warm_start_averages_for_each_layer_the_batches_that_reach_it(method):
    heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
    optimizer, alone = METHODS[method](heads, lr=0.01), METHODS[method](heads[1], lr=0.01)
    batches = [((index % 2, (1 + index) * INPUTS), TARGETS) for index in range(5)]
    optimizer.warm_start(lambda pair: heads[pair[0]](pair[1]), batches, functional.cross_entropy)
    weights = optimizer.diagnostics()["weights"]
    assert weights["0.weight"]["observations"] == weights["1.weight"]["observations"] > 5
    if method != "tnt":  # which draws labels
        own = [(inputs, targets) for (index, inputs), targets in batches if index == 1]
        alone.warm_start(heads[1], own, functional.cross_entropy)
        torch.testing.assert_close(optimizer.state[heads[1].weight], alone.state[heads[1].weight])
    before = heads[1].weight.detach().clone()
    outputs = heads[1](INPUTS)
    optimizer.observe(outputs)
    functional.cross_entropy(outputs, TARGETS).backward()
    optimizer.step()
    assert (heads[1].weight - before).abs().max() < 0.1


@pytest.mark.parametrize("batches", [[], [(INPUTS * math.inf, TARGETS)]])
@pytest.mark.filterwarnings("ignore:a gradient was NaN")
def test_a_warm_start_without_a_batch_is_refused_and_changes_nothing(batches):
    module = network()
    optimizer = MBF(module)
    train(module, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="no batch to average: the loader is empty or used up"):
        optimizer.warm_start(module, iter(batches), functional.cross_entropy)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_a_warm_start_whose_first_batch_raises_changes_nothing():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="batch_size"):
        optimizer.warm_start(module, [(INPUTS, TARGETS[:2])], functional.cross_entropy)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_a_warm_start_after_an_option_was_changed_reads_every_batch():
    module = network()
    optimizer = KFAC(module, fisher="empirical", statistics_every=4)
    train(module, optimizer, 2)
    optimizer.param_groups[0]["curvature_decay"] = 0.8
    optimizer.warm_start(module, [(INPUTS, TARGETS)], functional.cross_entropy)
    weights = optimizer.diagnostics()["weights"].values()
    assert all(weight["observations"] > 5 for weight in weights if "observations" in weight)


def test_the_step_after_a_warm_start_in_mid_run_uses_its_averages():
    module = network()
    optimizer = KFAC(module, fisher="empirical", statistics_every=50, inverse_every=50)
    train(module, optimizer, 3)
    state = optimizer.state[module[0].weight]
    batches = [(INPUTS, TARGETS), (-INPUTS, TARGETS)]
    optimizer.warm_start(module, batches, functional.cross_entropy)
    fresh = KFAC(module, fisher="empirical")
    fresh.warm_start(module, batches, functional.cross_entropy)
    for factor in ("input_factor", "gradient_factor"):  # nothing of the steps before is left
        torch.testing.assert_close(state[factor], fresh.state[module[0].weight][factor])
    before = state["input_inverse"].clone()
    train(module, optimizer, 1)
    assert not torch.equal(optimizer.state[module[0].weight]["input_inverse"], before)


# ---- an installation that cannot be written to ----


@pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="needs numba")
def test_loops_are_compiled_where_nothing_can_be_cached(monkeypatch):
    from minifisher.kernels import jit

    compile_ = jit.numba.njit

    def without_folder(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(jit.numba, "njit", without_folder)
    assert jit.compiled(lambda number: number + 1)(1) == 2


# ---- the schedule ----


@pytest.mark.parametrize(("every", "inverse_every"), [(5, 10), (4, 20), (1000, 1000)])
def test_inverses_are_made_when_they_are_due_and_never_between(monkeypatch, every, inverse_every):
    module = network()
    optimizer = KFAC(module, statistics_every=every, inverse_every=inverse_every, jitter=False)
    refreshed, refresh = [], KroneckerFactors.refresh
    first_shape = module[0].weight.flatten(1).shape[0], module[0].weight.flatten(1).shape[1] + 1

    def spy(curvature, state, damping):
        if curvature.block_shape == first_shape:
            refreshed.append(optimizer.state[module[0].weight]["step"])
        refresh(curvature, state, damping)

    monkeypatch.setattr(KroneckerFactors, "refresh", spy)
    train(module, optimizer, 41)
    started = [step for step in range(41) if step % every == 0 and step < inverse_every]
    assert refreshed == sorted({*started, *range(0, 41, inverse_every)})


# ---- clipping ----


def test_a_negative_divergence_makes_no_room_for_others_and_no_nan():
    def scale(*divergences):
        updates = [
            SimpleNamespace(divergence=partial(torch.tensor, d), stack=SimpleNamespace(observations=1))
            for d in divergences
        ]
        clip_divergence(updates, 0.25)
        return float(updates[0].scale)

    assert scale(1.0) == scale(1.0, -0.9) == 0.5
    assert scale(-1.0) == scale(0.0) == 1.0
    assert scale(math.nan, 1.0) < 1e-15
    assert scale(math.inf) < 1e-15
