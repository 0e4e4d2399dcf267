from __future__ import annotations

import pytest
import torch
from torch import nn

import minifisher


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mbf", {"output_power": 0.0}),
        ("mbf", {"share": "row"}),
        ("tnt", {"per_sample": True}),
        ("shampoo", {}),
        ("kfac", {"eigenvalue_correction": True}),
    ],
)
def test_averages_that_one_record_made_infinite_begin_anew(method, options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = minifisher.METHODS[method](module, lr=1e-3, fisher="empirical", jitter=False, **options)

    def train(steps):
        for step in steps:
            inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (module(inputs) - inputs[:, :1]).square().mean().backward()
            optimizer.step()

    train(range(20))
    for name, value in optimizer.state[module[0].weight].items():
        if name.startswith(("fisher", "factor", "eigenvalues")):
            value.fill_(torch.inf)  # as the squares of one record can make them
    with pytest.warns(RuntimeWarning, match="overflowed: they begin anew"):
        train(range(20, 62))
    fallbacks = optimizer.diagnostics()["fallbacks"]
    train(range(62, 102))
    assert optimizer.diagnostics()["renewed_curvatures"] > 0
    assert optimizer.diagnostics()["fallbacks"] == fallbacks
    values = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    assert all(bool(value.isfinite().all()) for value in values)


@pytest.mark.filterwarnings("ignore:the averages of a layer's curvature overflowed")
def test_averages_that_begin_anew_are_observed_at_the_very_next_gradient():
    weight = nn.Parameter(torch.ones(3, 4))
    opt = minifisher.MBF([weight], output_power=0.0, statistics_every=10, inverse_every=10, jitter=False)

    def step(seed):
        weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        opt.step()
        return opt.state[weight]

    for seed in range(12):
        step(seed)
    for name in ("fisher", "inverse"):
        opt.state[weight][name].fill_(torch.inf)
    assert step(12)["observations"] == 0
    assert not opt.state[weight]["fisher"].any()
    gradient_blocks = step(13)["fisher"].clone()
    assert opt.state[weight]["observations"] == 1
    fresh = weight.grad.mT @ weight.grad / 3  # the first of a new average: nothing of the old one is left
    torch.testing.assert_close(gradient_blocks.squeeze(), fresh)
