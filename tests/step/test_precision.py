from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import minifisher
from minifisher.statistics import likelihood
from minifisher.statistics.layers import Layer, layer_of, layers_of
from minifisher.step.precision import all_finite, loss_scale

ESTIMATORS = ["gradient", "empirical"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.hidden = nn.Linear(12, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.silu(self.convolution(images)).flatten(1)
        return self.last(functional.silu(self.hidden(hidden)))


def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = Network().to(dtype)
    return network, minifisher.MBF(network, statistics_every=2, **options)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(step)
    return torch.randn(12, 1, 4, 4, dtype=dtype), torch.randint(4, (12,))


def labels_from_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws depend on the sample alone, so that they are the same however the batch is split."""

    def drawn(logits: Tensor, generator: object = None) -> Tensor:
        thresholds = (logits.detach()[:, :1] * 1e3).frac().abs()
        return (logits.detach().softmax(-1).cumsum(-1) < thresholds).sum(-1).clamp_max(3)

    monkeypatch.setitem(likelihood._LABELS, "categorical", drawn)


@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("fisher", [*ESTIMATORS, "sampled"])
def test_micro_batches_equal_one_batch(fisher: str, fold_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labels_from_outputs(monkeypatch)
    results = []
    for parts in (1, 2, 4, [5, 4, 3]):
        network, optimizer = make(torch.float64, fisher=fisher, fold_bias=fold_bias)
        for step in range(6):
            images, targets = batch(step, torch.float64)
            sizes = parts if isinstance(parts, list) else 12 // parts
            for some, their in zip(images.split(sizes), targets.split(sizes), strict=True):
                outputs = network(some)
                optimizer.observe(outputs)
                (functional.cross_entropy(outputs, their, reduction="sum") / 12).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in network.parameters()])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_backward_pass_that_is_thrown_away_leaves_no_trace(when: str, set_to_none: bool) -> None:
    results = []
    for thrown_away in (0, 3):
        network, optimizer = make(torch.float64, fisher="empirical")
        for step in range(4):
            for other in range(thrown_away):
                images, targets = batch(other, torch.float64)
                functional.cross_entropy(network(images), targets).backward()
                if when == "before":
                    optimizer.zero_grad(set_to_none)
            images, targets = batch(step, torch.float64)
            loss = functional.cross_entropy(network(images), targets)
            optimizer.zero_grad(set_to_none)
            loss.backward()
            optimizer.step()
        results.append([*network.parameters(), *optimizer.state_dict()["state"].values()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def scaled_step(network: nn.Module, optimizer: Any, scaler: Any, step: int, clip: bool = False) -> None:
    images, targets = batch(step)
    outputs = network(images)
    optimizer.observe(outputs)
    scaler.scale(functional.cross_entropy(outputs, targets)).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 0.05)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fisher", [*ESTIMATORS, "sampled"])
@pytest.mark.parametrize("relative_damping", [False, True])
def test_the_scale_of_the_loss_leaves_no_trace(fisher: str, clip: bool, relative_damping: bool) -> None:
    results = []
    for enabled in (False, True):
        network, optimizer = make(fisher=fisher, relative_damping=relative_damping, damping=1.0, lr=1e-2)
        # Powers of two scale without rounding; it grows every third step.
        scaler = torch.amp.GradScaler("cpu", 2.0**9, growth_interval=3, enabled=enabled)
        for step in range(10):
            scaled_step(network, optimizer, scaler, step, clip)
        results.append(copy.deepcopy(optimizer.state_dict()["state"]))
    assert not enabled or scaler.get_scale() > 2.0**9
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_a_scaler_that_is_not_torchs_has_to_tell_its_scale() -> None:
    network, optimizer = make(fisher="empirical")
    for _ in range(2):
        images, targets = batch(0)
        (functional.cross_entropy(network(images), targets) * 8).backward()
        optimizer.found_inf = torch.zeros(1)
        if optimizer.loss_scale is None:
            with pytest.raises(ValueError, match=r"set optimizer\.loss_scale to a function"):
                optimizer.step()
        optimizer.loss_scale = lambda: 8.0
    optimizer.step()


def test_only_a_grad_scaler_is_told_that_the_step_unscales() -> None:
    """Lightning asks too, and would refuse gradient clipping."""
    network, optimizer = make(fisher="empirical")
    assert optimizer._step_supports_amp_scaling is False
    assert type(optimizer)._step_supports_amp_scaling is False
    scaled_step(network, optimizer, torch.amp.GradScaler("cpu"), 0, clip=True)
    assert loss_scale(optimizer, needed=True) == 1.0  # the scaler no longer drives a step


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fisher", [*ESTIMATORS, "sampled"])
def test_a_step_that_overflowed_leaves_everything_as_it_was(fisher: str, clip: bool) -> None:
    network, optimizer = make(fisher=fisher)
    scaler = torch.amp.GradScaler("cpu", 2.0**9)
    for step in range(4):
        scaled_step(network, optimizer, scaler, step)
    before = copy.deepcopy((optimizer.state_dict()["state"], list(network.parameters())))
    images, targets = batch(4)
    outputs = network(images)
    optimizer.observe(outputs)
    scaler.scale(functional.cross_entropy(outputs, targets)).backward()
    network.last.bias.grad[0] = torch.inf
    if clip:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    torch.testing.assert_close(
        (optimizer.state_dict()["state"], list(network.parameters())), before, rtol=0, atol=0
    )
    assert optimizer.skipped_steps == 0
    assert scaler.get_scale() == 2.0**8
    # What the skipped step saw is forgotten: the next statistics are those of its own batch.
    twin_network, twin = copy.deepcopy((network, optimizer))
    scaled_step(network, optimizer, scaler, 5)
    scaled_step(twin_network, twin, torch.amp.GradScaler("cpu", 2.0**8), 5)
    torch.testing.assert_close(twin.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", [*ESTIMATORS, "sampled"])
def test_autocast_trains(fisher: str, dtype: torch.dtype) -> None:
    network, optimizer = make(fisher=fisher, lr=2e-2)
    scaler = torch.amp.GradScaler("cpu", 2.0**10)
    images, targets = batch(0)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", dtype):
            outputs = network(images)
            loss = functional.cross_entropy(outputs, targets)
        optimizer.observe(outputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    state = optimizer.state[network.hidden.weight]
    assert state["input_fisher"].dtype == torch.float32
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("size", "finite"), [(1e18, True), (1e25, False), (torch.inf, False)])
def test_a_gradient_is_finite_where_its_square_is(size: float, finite: bool) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))  # in float32 the norm itself is infinite
    weight.grad = torch.tensor([size, 0.0], dtype=torch.float64)
    assert all_finite([layer_of("weight", weight)], ()) == finite


def test_a_layer_is_zero_where_all_its_gradients_are() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    folded = layers_of(module, folds=("linear",))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module[0].weight.grad[0, 0] = 1.0  # and the bias, which is folded in, has zeros
    zero: set[Layer] = set()
    assert all_finite(folded, (), zero)
    assert zero == {folded[1]}
