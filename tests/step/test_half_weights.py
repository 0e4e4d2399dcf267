"""Weights in float16, which ends at 65,504: an update in float32 is judged in the weight's own dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import minifisher

LARGEST = torch.finfo(torch.float16).max


def half(*shape: int, fill: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, fill, dtype=torch.float16))


@pytest.mark.parametrize(
    ("method", "options", "scale"),
    [
        ("mbf", {"graft": None, "lr": 1.0}, 1e-5),
        ("mbf", {"graft": "sgd", "lr": 10.0}, 1e4),
        ("mbf", {"graft": "sgd", "lr": 10.0, "capturable": True, "output_power": 0.0}, 1e4),
        ("soap", {"damping": 1e-30, "lr": 1e4, "power": 1.0}, 1e-5),
        ("tnt", {"graft": None, "fisher": "gradient", "damping": 1e-6, "lr": 1.0}, 1e-5),
    ],
)
@pytest.mark.filterwarnings("ignore:the step of a layer was not finite")
def test_finite_gradients_leave_finite_weights(method, options, scale):
    generator = torch.Generator().manual_seed(0)
    weight, bias = half(4, 4), half(4)
    schedule = {"statistics_every": 1, "inverse_every": 1}
    opt = minifisher.METHODS[method]([weight, bias], **schedule, **options)
    for _ in range(3):
        for parameter in (weight, bias):
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).half()
        opt.step()
        assert weight.isfinite().all()
        assert bias.isfinite().all()
    stayed = opt.diagnostics()
    assert stayed["fallbacks" if options.get("capturable") else "frozen_layers"]


@pytest.mark.parametrize("alone", [False, True], ids=["stacked", "alone"])
def test_a_layer_that_would_become_infinite_stays_and_others_move(alone):
    near, far = half(3, 2, fill=-LARGEST), half(3, 2)
    others = [far] if not alone else [half(2, 2)]
    options = {"lr": 1.0, "graft": "sgd", "momentum": 0.0, "weight_decay": 0.5}
    opt = minifisher.MBF([near, *others], **options, decoupled_weight_decay=False)
    before = near.detach().clone()
    for weight in (near, *others):
        weight.grad = torch.full_like(weight, 60_000)
    near.grad = torch.full_like(near, 60_000)
    near.grad[0, 0] = -60_000  # one entry of the layer stays in range
    with pytest.warns(RuntimeWarning, match="led beyond the range of float16"):
        opt.step()
    assert torch.equal(near, before)
    assert all(bool((weight < -50_000).all()) for weight in others)
    assert opt.diagnostics()["frozen_layers"] == 1
    near.grad.fill_(-60_000)
    opt.step()
    assert near.isfinite().all()
    assert not torch.equal(near, before)


def test_updates_within_the_range_are_those_of_float32_rounded():
    weights = [half(3, 2), nn.Parameter(torch.ones(3, 2))]
    for weight in weights:
        opt = minifisher.MBF([weight], lr=0.1, weight_decay=0.5)
        for step in range(3):
            weight.grad = torch.tensor([[1.0, 2.0], [3.0, 0.5], [step, 2.0]], dtype=weight.dtype)
            opt.step()
    torch.testing.assert_close(weights[0].float(), weights[1].detach(), rtol=3e-3, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
def test_an_entry_that_is_infinite_on_purpose_holds_nothing_back(capturable):
    weight = half(2, 2)
    weight.data[0, 0] = -torch.inf
    schedule = {"statistics_every": 1, "inverse_every": 1, "output_power": 0.0}
    opt = minifisher.MBF([weight], lr=0.1, capturable=capturable, **schedule)
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert (weight.flatten()[1:] < 1).all()
    assert weight[0, 0] == -torch.inf
