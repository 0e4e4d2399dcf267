"""The second evaluation of the closure: what it computes, and what it restores."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import minifisher
from minifisher.statistics.second_pass import SecondPass
from tests.helpers import one_thread

METHODS = ("kbfgs", "kbfgsl")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def closure_of(module, optimizer, inputs, record=None, set_to_none=True):
    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        outputs = module(inputs)
        loss = outputs.square().mean()
        loss.backward()
        if record is not None:
            gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            record.append((loss.item(), outputs.detach().clone(), gradients))
        return loss

    return closure


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_buffers_and_random_numbers_after_the_step_are_those_of_the_first_pass(method, set_to_none):
    module, reference = network(), network()
    inputs = torch.randn(8, 1, 6, 6)
    optimizer = minifisher.METHODS[method](module, lr=0.1)
    record = []
    torch.manual_seed(1)
    reference(inputs)
    numbers = torch.rand(3)
    torch.manual_seed(1)
    loss = optimizer.step(closure_of(module, optimizer, inputs, record, set_to_none))
    assert torch.equal(torch.rand(3), numbers)
    assert len(record) == 2
    assert loss.item() == record[0][0] != record[1][0]
    for parameter, expected, other in zip(module.parameters(), record[0][2], record[1][2], strict=True):
        assert torch.equal(parameter.grad, expected)
        assert not torch.equal(expected, other)
    for buffer, expected in zip(module.buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, expected)


def test_random_numbers_drawn_between_the_passes_are_not_drawn_again():
    layer = nn.Linear(2, 2)
    passes = SecondPass(lambda: torch.rand(2), list(layer.parameters()), [layer], [])
    first = passes.first()
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(passes.second(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_passes_have_the_same_dropout_masks():
    module = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))
    optimizer = minifisher.KBFGS(module, lr=1e-3)
    record = []
    optimizer.step(closure_of(module, optimizer, torch.randn(6, 4), record))
    assert torch.equal(record[0][1] == 0, record[1][1] == 0)


def test_a_gradient_that_is_a_view_of_a_reused_buffer_is_restored():
    module = nn.Linear(3, 2, bias=False)
    bucket = torch.zeros(6)
    optimizer = minifisher.KBFGS(module, lr=0.1)
    inputs = torch.randn(5, 3)
    first = []

    def closure():
        module.weight.grad = None
        loss = module(inputs).square().mean()
        loss.backward()
        first.append(module.weight.grad)
        module.weight.grad = bucket.view(2, 3).copy_(first[-1])
        return loss

    optimizer.step(closure)
    assert module.weight.grad.data_ptr() == bucket.data_ptr()
    assert torch.equal(module.weight.grad, first[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_a_closure_says_what_to_do(method):
    module = nn.Linear(3, 2)
    optimizer = minifisher.METHODS[method](module)
    module(torch.randn(5, 3)).sum().backward()
    before = module.weight.clone()
    with pytest.raises(TypeError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_lr_zero_makes_the_state_without_a_closure(method):
    module = nn.Linear(3, 2)
    optimizer = minifisher.METHODS[method](module, lr=0.0, statistics_every=1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert "input_moment" in optimizer.state[module.weight]
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step(closure_of(module, optimizer, torch.randn(5, 3)))
    assert optimizer.diagnostics()["weights"]["weight"]["observations"] == 1


def test_the_second_pass_is_run_only_when_statistics_are_due():
    module = nn.Linear(3, 2)
    optimizer = minifisher.KBFGS(module, statistics_every=3)
    record = []
    for _ in range(6):
        optimizer.step(closure_of(module, optimizer, torch.randn(5, 3), record))
    assert len(record) == 8
    assert minifisher.MBF(module).step(closure_of(module, optimizer, torch.randn(5, 3), record)) is not None
    assert len(record) == 9


def test_a_skipped_step_has_no_second_pass():
    module = nn.Linear(3, 2)
    optimizer = minifisher.KBFGS(module)
    record = []
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(closure_of(module, optimizer, torch.full((5, 3), torch.nan), record))
    assert len(record) == 1
    assert optimizer.skipped_steps == 1


def test_observe_in_the_second_pass_is_ignored():
    module = nn.Linear(3, 2)
    optimizer = minifisher.KFAC(module, fisher="sampled", adaptive_damping=True)
    inputs = torch.randn(5, 3)

    def closure():
        optimizer.zero_grad()
        outputs = module(inputs)
        optimizer.observe(outputs, "gaussian")
        loss = 0.5 * outputs.square().sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[0]["label_draws"] == 1
    assert optimizer.diagnostics()["weights"]["weight"]["observations"] == 1


def test_after_an_error_in_the_second_pass_gradients_and_hooks_are_restored():
    module = nn.Linear(3, 2)
    optimizer = minifisher.KBFGS(module)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("the user's own")
        return closure_of(module, optimizer, torch.randn(5, 3))()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert module.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
