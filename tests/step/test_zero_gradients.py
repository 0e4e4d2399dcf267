from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import minifisher
from minifisher.step.update import Update
from tests.helpers import closure_of


class TwoHeads(nn.Module):
    """Two equal heads in turn; every parameter takes part in the loss, with the factor zero."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, inputs, head):
        return self.heads[head](torch.relu(self.body(inputs)))


def train(module, optimizer, heads, start=0):
    for step, head in enumerate(heads, start):
        torch.manual_seed(step)
        inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))

        def closure(inputs=inputs, targets=targets, head=head):
            optimizer.zero_grad()
            outputs = module(inputs, head)
            optimizer.observe(outputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            (loss + 0.0 * sum(p.sum() for p in module.parameters())).backward()
            return loss.detach()

        optimizer.step(closure)


def observations(optimizer, module):
    return [optimizer.state[head.weight]["observations"] for head in module.heads]


def make(method, **options):
    torch.manual_seed(0)
    module = TwoHeads()
    return module, minifisher.METHODS[method](module, lr=1e-3, **options)


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_a_head_is_observed_at_its_first_gradient_and_nothing_falls_back(method):
    module, optimizer = make(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, [0])
        assert observations(optimizer, module) == [1, 0]
        train(module, optimizer, [1], start=1)
        assert observations(optimizer, module)[1] == 1
        train(module, optimizer, [0, 1] * 10, start=2)
    assert optimizer.diagnostics()["fallbacks"] == 0


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_units_without_a_gradient_stay_and_nothing_falls_back(method, monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        module[1].bias[2] = -100.0  # its unit is never active
    monkeypatch.setattr(Update, "_fall_back", lambda *_: pytest.fail("all layers were looked through"))
    before, optimizer = copy.deepcopy(module), minifisher.METHODS[method](module, lr=1e-2)
    for _ in range(6):
        words, targets = torch.randint(5, (16,)), torch.randint(3, (16,))  # of nine words
        optimizer.step(closure_of(module, optimizer, words, targets))
    pairs = zip(module.parameters(), before.parameters(), strict=True)
    words, weights, biases, *_ = [(now != then).view(len(then), -1).any(1).tolist() for now, then in pairs]
    assert words == [True] * 5 + [False] * 4
    assert weights == biases == [unit != 2 for unit in range(8)]


def test_what_was_missed_is_observed_at_the_next_gradient_and_inverted_at_once():
    module, optimizer = make("mbf", statistics_every=8, jitter=False, output_power=0.0)
    train(module, optimizer, [1] + [0] * 8)
    state = optimizer.state[module.heads[1].weight]
    fisher, inverse = state["fisher"].clone(), state["inverse"].clone()
    assert (state["step"], state["observations"], state["missed"]) == (9, 1, 1)
    train(module, optimizer, [0, 0], start=9)
    assert torch.equal(optimizer.state[module.heads[1].weight]["fisher"], fisher)
    train(module, optimizer, [1], start=11)
    state = optimizer.state[module.heads[1].weight]
    assert (state["observations"], state["missed"]) == (2, 0)
    assert not torch.equal(state["fisher"], fisher)
    assert not torch.equal(state["inverse"], inverse)


def test_in_samples_the_very_next_step_looks_again_and_then_the_schedule():
    module, optimizer = make("kfac", fisher="empirical", statistics_every=6, jitter=False)
    armed, capture = [], optimizer._captures.by_estimator["empirical"]
    for step in range(18):
        armed.append(capture.armed)
        train(module, optimizer, [0], start=step)
    due = [step for step, is_armed in enumerate(armed) if is_armed]
    # The other head never has a gradient: after the first T1 steps it costs one more look in T1 steps.
    assert due == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13]


@pytest.mark.parametrize("method", ["mbf", "kfac", "shampoo"])
def test_a_resumed_run_remembers_what_was_missed(method):
    heads = [0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    whole, optimizer = make(method)
    train(whole, optimizer, heads)
    half, optimizer = make(method)
    train(half, optimizer, heads[:9])
    file = io.BytesIO()
    torch.save((half.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    resumed, optimizer = make(method)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    train(resumed, optimizer, heads[9:], start=9)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_that_was_saved_before_goes_on():
    module, optimizer = make("mbf")
    train(module, optimizer, [0, 1])
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry.pop("missed", None)
    _, fresh = make("mbf")
    fresh.load_state_dict(saved)
    assert {entry.get("missed") for entry in fresh.state.values()} == {0}


def test_a_batch_without_gradient_does_not_count_in_a_warm_start():
    module, optimizer = make("mbf")
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(2)]

    def model(inputs):
        used = module(inputs, 0)
        return used + 0.0 * module(inputs, 1) * sum(p.sum() for p in module.parameters())

    optimizer.warm_start(model, batches, nn.functional.cross_entropy)
    assert observations(optimizer, module)[1] == 0
    assert observations(optimizer, module)[0] > 1


def test_what_was_missed_is_looked_for_until_it_was_seen_and_no_longer():
    weight = nn.Parameter(torch.ones(3, 4))
    opt = minifisher.MBF([weight], statistics_every=10, jitter=False)
    for gradient in (0.0, 0.0, 1.0, 1.0, 1.0):
        weight.grad = torch.full((3, 4), gradient)
        opt.step()
    assert (opt.state[weight]["observations"], opt.state[weight]["missed"]) == (1, 0)
