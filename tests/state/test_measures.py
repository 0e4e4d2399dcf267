from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import minifisher
from tests.helpers import closure_of

KEYS = {
    "damping_min", "damping_max", "eigenvalue_min", "eigenvalue_max", "condition_max", "cosine_mean",
    "cosine_min", "step_ratio_mean", "step_ratio_max", "skipped_steps", "fallbacks", "frozen_layers",
    "renewed_curvatures", "seconds_step", "seconds_statistics_step",
}  # fmt: skip


def trained(method: str = "mbf", steps: int = 3, **options: Any) -> tuple[nn.Module, Any, list[Tensor]]:
    """A network with two equal layers, the optimizer after some steps, and the weights before the last."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    network = nn.Sequential(*layers).double()
    optimizer = minifisher.METHODS[method](network, **{"lr": 1e-2, **options})
    before: list[Tensor] = []
    for step in range(steps):
        torch.manual_seed(step)
        inputs, targets = torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))
        before = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer.step(closure_of(network, optimizer, inputs, targets))
    return network, optimizer, before


# K-BFGS observes the change of its step after it: its state is no longer the one that made the step.
@pytest.mark.parametrize("method", sorted(minifisher.METHODS.keys() - {"kbfgs", "kbfgsl"}))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("graft", ["adam", "adam-rows", "sgd", None, "own"])
def test_cosine_and_ratio_are_those_of_the_step_that_was_taken(
    method: str, momentum: float, graft: str | None
) -> None:
    options: dict[str, Any] = {"fold_bias": False, "momentum": momentum}
    if method == "kfac":
        options["kl_clip"] = None
    if graft != "own":
        options["graft"] = graft
    if graft is None:
        options["lr"] = 1e-4  # a raw step is long
    network, optimizer, before = trained(method, **options)
    numbers = optimizer.diagnostics(flat=True)
    steps = [(old - new.detach()).flatten() for new, old in zip(network.parameters(), before, strict=True)]
    weights = [parameter.detach() for parameter in network.parameters()]
    gradients = [parameter.grad.flatten() for parameter in network.parameters()]
    cosines = [float(s @ g / (s.norm() * g.norm())) for s, g in zip(steps, gradients, strict=True)]
    # The weights are those after the step, as `diagnostics` sees them.
    ratios = [float(s.norm() / p.norm()) for s, p in zip(steps, weights, strict=True)]
    assert numbers["cosine_min"] == pytest.approx(min(cosines), rel=1e-6)
    assert numbers["cosine_mean"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    assert numbers["step_ratio_max"] == pytest.approx(max(ratios), rel=1e-6)
    assert numbers["step_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_every_method_has_the_same_keys_and_reading_changes_nothing(method: str) -> None:
    _, optimizer, _ = trained(method)
    state = {name: value.clone() for entry in optimizer.state.values() for name, value in entry.items()
             if isinstance(value, Tensor)}  # fmt: skip
    numbers = optimizer.diagnostics(flat=True)
    assert numbers.keys() == KEYS
    assert all(type(value) in (int, float) for value in numbers.values())
    assert -1 <= numbers["cosine_min"] <= numbers["cosine_mean"] <= 1
    assert numbers["eigenvalue_max"] > 0
    assert optimizer.diagnostics(flat=True) == pytest.approx(numbers, nan_ok=True)
    after = {name: value for entry in optimizer.state.values() for name, value in entry.items()
             if isinstance(value, Tensor)}  # fmt: skip
    torch.testing.assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"share": "row", "block_size": 3}, {"block_size": 4}])
def test_eigenvalues_are_those_of_the_dense_blocks(options: dict[str, Any]) -> None:
    """Blocks of 3 are packed; blocks of 4 are padded at the end of a row, which leaves 2 entries."""
    network, _, _ = trained()
    blocks: list[Tensor] = []
    width = options.get("block_size", 6)
    network.zero_grad()
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(16, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (16,), generator=generator)
    optimizer = minifisher.MBF(network, lr=0.0, fisher="empirical", output_power=0.0, **options)
    rows: dict[Tensor, list[Tensor]] = {p: [] for p in network.parameters()}
    for image, target in zip(inputs, targets, strict=True):
        loss = functional.cross_entropy(network(image[None]), target[None])
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            rows[parameter].append(gradient)
    for gradients in rows.values():
        stack = torch.stack(gradients)  # [N, out, in] or [N, out]
        if stack.ndim == 2:
            # Of a bias only the gradient of the mini-batch is read.
            blocks += [column.mean().square().view(1, 1) for column in stack.unbind(1)]
            continue
        for piece in stack.split(width, dim=2):
            of_rows = [row.mT @ row / len(row) for row in piece.unbind(1)]
            shared = [sum(of_rows) / len(of_rows)]  # type: ignore[list-item]
            blocks += of_rows if options.get("share") == "row" else shared
    functional.cross_entropy(network(inputs), targets).backward()
    optimizer.step()
    numbers = optimizer.diagnostics(flat=True)
    eigenvalues = [torch.linalg.eigvalsh(block) for block in blocks]
    assert numbers["eigenvalue_min"] == pytest.approx(
        min(float(e[0]) for e in eigenvalues), rel=1e-6, abs=1e-18
    )
    assert numbers["eigenvalue_max"] == pytest.approx(max(float(e[-1]) for e in eigenvalues), rel=1e-6)
    widest = [e for e in eigenvalues if len(e) > 1]
    assert numbers["condition_max"] == pytest.approx(max(float(e[-1] / e[0]) for e in widest), rel=1e-3)


def test_of_many_wide_matrices_some_are_read_in_part() -> None:
    layer = nn.Linear(200, 40, bias=False)
    optimizer = minifisher.MBF(layer, block_size=100, share="row")
    layer(torch.randn(300, 200)).square().mean().backward()
    optimizer.step()
    numbers = optimizer.diagnostics(flat=True)
    blocks = optimizer.state[layer.weight]["fisher"].flatten(0, 1)
    eigenvalues = torch.linalg.eigvalsh(blocks.double())
    assert float(eigenvalues.min()) - 1e-12 <= numbers["eigenvalue_min"]
    assert 0 < numbers["eigenvalue_max"] <= float(eigenvalues.max())


def test_inputs_that_are_always_zero_do_not_count() -> None:
    layer = nn.Linear(4, 8, bias=False)
    optimizer = minifisher.MBF(layer, fisher="empirical", output_power=0.0)
    inputs = torch.randn(64, 4)
    inputs[:, 2] = 0
    layer(inputs).square().sum(1).mean().backward()
    optimizer.step()
    assert optimizer.diagnostics(flat=True)["eigenvalue_min"] > 0


def test_what_is_not_known_is_nan() -> None:
    _, optimizer, _ = trained()
    optimizer.zero_grad()
    numbers = optimizer.diagnostics(flat=True)
    assert math.isnan(numbers["cosine_mean"])
    assert math.isnan(numbers["step_ratio_max"])
    assert numbers["eigenvalue_max"] > 0
    fresh = minifisher.MBF(nn.Linear(2, 2)).diagnostics(flat=True)
    assert fresh.keys() == KEYS
    assert {key for key, value in fresh.items() if not math.isnan(value)} == {
        "damping_min", "damping_max", "skipped_steps", "fallbacks", "frozen_layers",
        "renewed_curvatures",
    }  # fmt: skip


def test_the_documentation_explains_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
    assert {key for key in re.findall(r"`(\w+)`", page) if key in KEYS} == KEYS


def test_the_damping_in_force_is_that_of_the_groups() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = minifisher.MBF([{"params": one, "damping": 0.3}, {"params": other}])
    numbers = optimizer.diagnostics(flat=True)
    assert (numbers["damping_min"], numbers["damping_max"]) == (0.03, 0.3)


def test_steps_with_and_without_statistics_are_timed_apart() -> None:
    _, optimizer, _ = trained(steps=1, statistics_every=2)
    numbers = optimizer.diagnostics(flat=True)
    assert numbers["seconds_statistics_step"] > 0
    assert math.isnan(numbers["seconds_step"])
    _, optimizer, _ = trained(steps=2, statistics_every=2)
    assert optimizer.diagnostics(flat=True)["seconds_step"] > 0
