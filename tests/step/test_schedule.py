from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import minifisher
from minifisher.curvature import NoCurvature, Plan
from minifisher.step.schedule import due_step, refresh_due, spread_phases, statistics_due

PERIODS = range(2, 17)  # of batches in turn
TURN = 2**64


def due_steps(every, steps, phase=0):
    return [step for step in range(steps) if step == due_step(step // every, every, phase)]


# ---- one layer ----


@pytest.mark.parametrize("phase", [0, TURN // 3, TURN - 1])
@pytest.mark.parametrize("every", [1, 2, 3, 8, 25])
def test_one_step_of_every_period_is_due_and_the_very_first_is(every, phase):
    steps = due_steps(every, 40 * every, phase)
    assert [step // every for step in steps] == list(range(40))
    assert steps[0] == 0


def test_without_a_draw_the_first_step_of_every_period_is_due():
    assert due_steps(4, 17, None) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("every", [2, 4, 5, 8, 10])
@pytest.mark.parametrize("period", PERIODS)
def test_every_kind_of_batch_is_seen_as_often_as_it_comes(every, period):
    steps = due_steps(every, 2000 * every)
    shares = Counter(step % period for step in steps)
    # The share of a fair draw has this standard deviation.
    deviation = (period - 1) ** 0.5 / period / len(steps) ** 0.5
    assert all(abs(shares[kind] / len(steps) - 1 / period) < 4 * deviation for kind in range(period))


def test_no_kind_of_batch_waits_for_long():
    """Where the schedule is fixed some kinds of batches are never seen; a fair draw misses none for long."""
    for every in (2, 4, 8):
        for period in PERIODS:
            steps = due_steps(every, 500 * every)
            for kind in range(period):
                seen = [index for index, step in enumerate(steps) if step % period == kind]
                assert (
                    max(later - now for now, later in zip([0, *seen], [*seen, 500], strict=True))
                    < 10 * period
                )


# ---- layers together ----


def test_phases_are_spread_in_proportion_to_the_entries():
    assert spread_phases({"a": 1, "b": 2, "c": 1}) == {"a": 0, "b": TURN // 4, "c": TURN // 4 * 3}
    assert spread_phases({"empty": 0}) == {"empty": 0}


def test_equal_layers_with_even_phases_share_the_work_evenly():
    phases = spread_phases(dict.fromkeys(range(24), 1))
    work = Counter(step for phase in phases.values() for step in due_steps(8, 800, phase) if step >= 8)
    # Between two periods one part of the layers may be due at once with another part, or neither.
    assert sum(work.values()) == 24 * 99
    inside = [work[step] for step in range(8, 800)]
    assert max(inside) <= 6
    assert sum(count == 3 for count in inside) > 700


@pytest.mark.parametrize("jitter", [True, False])
def test_at_first_every_observation_is_followed_by_a_refresh(jitter):
    plan = Plan(NoCurvature(), "", "", 1, 1, 4, 12, statistics_phase=TURN // 5, inverse_phase=TURN // 2)
    refreshed = [step for step in range(200) if refresh_due(plan, step, jitter)]
    observed = [step for step in range(12) if statistics_due(plan, step, jitter)]
    later = due_steps(12, 200, TURN // 2 if jitter else None)[1:]
    assert refreshed == observed + later


def test_inverses_of_different_layers_are_spread_and_samples_are_read_together():
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 4))
    for fisher, phases in ("empirical", 1), ("gradient", 3):
        members = minifisher.MBF(module, fisher=fisher)._enrolled.values()
        plans = [member.placement.plan for member in members if member.layer.weight.ndim > 1]
        assert len({plan.inverse_phase for plan in plans}) == 3
        assert len({plan.statistics_phase for plan in plans}) == phases


# ---- all methods ----


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(module, optimizer, steps, inputs=None):
    for step in steps:
        torch.manual_seed(step)
        batch = torch.randn(8, 6) if inputs is None else inputs[step]
        targets = torch.randint(3, (8,))

        def closure(batch=batch, targets=targets):
            optimizer.zero_grad()
            outputs = module(batch)
            optimizer.observe(outputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward()
            return loss

        optimizer.step(closure)


def observations(optimizer):
    return {name: counts["observations"] for name, counts in optimizer.diagnostics()["weights"].items()}


def observed_steps(method, steps, resumed_at=None, **options):
    """The steps in which each weight of a small network was observed."""
    module = network()
    optimizer = minifisher.METHODS[method](module, lr=1e-3, **options)
    found = {name: [] for name in observations(optimizer)}
    for step in range(steps):
        if step == resumed_at:
            saved = optimizer.state_dict()
            optimizer = minifisher.METHODS[method](module, lr=1e-3, **options)
            optimizer.load_state_dict(saved)
        before = observations(optimizer)
        train(module, optimizer, [step])
        for name, count in observations(optimizer).items():
            if count > before[name]:
                found[name].append(step)
    return {name: seen for name, seen in found.items() if seen}


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_every_method_sees_every_kind_of_batches_in_turn(method):
    optimizer = minifisher.METHODS[method](network())
    every = {layer.name: layer.statistics_every for layer in optimizer.describe().layers}
    seen = observed_steps(method, 640)
    assert seen
    for name, steps in seen.items():
        assert [step // every[name] for step in steps] == list(range(-(-640 // every[name])))
        for period in PERIODS:
            shares = Counter(step % period for step in steps)
            spread = 4 * ((period - 1) / len(steps)) ** 0.5 / period
            assert all(abs(shares[kind] / len(steps) - 1 / period) < spread for kind in range(period))


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_a_resumed_run_draws_the_same_steps(method):
    assert observed_steps(method, 60, resumed_at=29) == observed_steps(method, 60)


def test_the_fixed_schedule_can_be_had_and_the_draw_switched_on_later():
    seen = observed_steps("mbf", 64, statistics_every=8, jitter=False)
    assert all(steps == list(range(0, 64, 8)) for steps in seen.values())
    module = network()
    optimizer = minifisher.MBF(module, statistics_every=8, jitter=False)
    optimizer.param_groups[0]["jitter"] = True
    train(module, optimizer, range(10))
    assert set(observations(optimizer).values()) <= {1, 2}


def ratio_of_tasks(method, **options):
    """How much longer the direction is along the inputs of one task than along those of the other."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    optimizer = minifisher.METHODS[method](module, lr=1e-3, graft="adam", **options)
    curvature = next(iter(optimizer._enrolled.values())).plan.curvature
    inputs = torch.randn(60, 8, 6, generator=torch.Generator().manual_seed(0))
    inputs[::2, :, :3] = inputs[1::2, :, 3:] = 0  # the tasks come in turn
    train(module, optimizer, range(60), inputs)
    columns = torch.eye(6).unsqueeze(1).expand(6, 5, 6).contiguous()
    state = optimizer.state[module[0].weight]
    lengths = [curvature.precondition(state, column, 1e-3).norm() for column in columns]
    return float(sum(lengths[:3]) / sum(lengths[3:]))


@pytest.mark.parametrize("method", ["mbf", "kfac", "kbfgs", "kbfgsl", "shampoo", "tnt"])
def test_two_tasks_in_turn_both_have_a_curvature(method):
    """Where it is zero the direction is divided by the damping alone, and is longer."""
    assert 1 / 2 < ratio_of_tasks(method) < 2
    assert ratio_of_tasks(method, jitter=False) > 3
