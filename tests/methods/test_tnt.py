from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import nn

from minifisher import TNT
from minifisher.statistics.labels import next_generator
from minifisher.statistics.layers import layer_of
from minifisher.statistics.likelihood import sampled_loss
from minifisher.statistics.records import BatchGradient, LayerSamples
from tests.helpers import NETS, dense_preconditioner, joined, per_sample_gradients, problem
from tests.methods.weights_as_tensors import moment, random_gradients


def modes(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] as [out, in k_1 k_2], without the dimensions of size one."""
    return (weight.flatten(1) if weight.ndim > 1 else weight).squeeze()


class Given(LayerSamples):
    """Samples with given per-sample gradients, [N, *shape]."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.all, self.count = gradients, len(gradients)

    def chunks(self):
        for gradient in self.all:  # one position for each row; its input is a unit vector
            rows = gradient.reshape(gradient.shape[0], -1)
            yield rows[None, None], torch.eye(len(rows), dtype=rows.dtype)[None, None]

    def gradients(self):
        yield from self.all.split(100)


def curvature_of(shape: tuple[int, ...], **options: object):
    layer = layer_of("weight", torch.zeros(shape, dtype=torch.float64, requires_grad=True))
    optimizer = TNT(nn.Linear(1, 1), **options)
    samples = {**optimizer.defaults, "fisher": "sampled"}
    return optimizer.plan(layer, samples).curvature, layer


# ---- what is measured ----


def test_the_exact_estimator_needs_per_sample():
    with pytest.raises(ValueError, match="per_sample=True"):
        TNT(nn.Linear(3, 2), fisher="exact")
    TNT(nn.Linear(3, 2), fisher="exact", per_sample=True)


@pytest.mark.parametrize("name", [name for name in NETS if name != "attention"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("max_dim", [100, 2])
def test_factors_equal_brute_force_for_every_kind_of_layer(name, per_sample, max_dim):
    one = problem(name)
    optimizer = TNT(
        one.module, fisher="empirical", per_sample=per_sample, max_dim=max_dim, statistics_every=1
    )
    samples = per_sample_gradients(one.module, one.loss, one.inputs, one.targets)
    one.mean_loss().backward()
    optimizer.step()
    for layer in optimizer._enrolled:
        own = (
            samples[layer.weight]
            if layer.reads_samples and per_sample
            else samples[layer.weight].mean(0, True)
        )
        own = own.mT if layer.transposed else own
        check_factors(optimizer, layer, torch.stack([modes(gradient) for gradient in own]), max_dim)


def check_factors(optimizer: TNT, layer, own: torch.Tensor, max_dim: int) -> None:
    state, shape = optimizer.state[layer.weight], own.shape[1:]
    reading = optimizer.plan(layer, optimizer.defaults).curvature.reading
    assert reading.dims == tuple(shape)
    corners = torch.cartesian_prod(
        *[torch.arange(0, n, w) for n, w in zip(shape, reading.widths, strict=True)]
    )
    for index, corner in enumerate(corners.view(-1, len(shape)).tolist()):
        cut = tuple(slice(c, c + w) for c, w in zip(corner, reading.widths, strict=True))
        for mode in range(len(shape)):
            expected = torch.stack([moment(gradient[cut], mode) for gradient in own]).mean(0)
            size = len(expected)
            result = state[f"factor_{mode}"][index]
            torch.testing.assert_close(result[:size, :size], expected, rtol=1e-9, atol=1e-12)
            assert result.abs().sum() == pytest.approx(float(expected.abs().sum()), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "linear on tokens", "conv2d groups"])
def test_factors_are_those_of_the_mean_loss_with_sampled_labels(name):
    one = problem(name)
    optimizer = TNT(one.module, statistics_every=1, curvature_decay=0.0)
    outputs = one.module(one.inputs).flatten(1)
    generator = next_generator(dict(optimizer.param_groups[0]), 0, outputs.device)
    mean = sampled_loss(outputs, "categorical", generator) / len(outputs)
    weights = [layer.weight for layer in optimizer._enrolled if layer.reads_samples]
    expected = torch.autograd.grad(mean, weights)
    outputs = one.module(one.inputs).flatten(1)
    optimizer.observe(outputs)
    one.loss(outputs, one.targets).backward()
    optimizer.step()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(optimizer.state[weight]["factor_0"][0], moment(modes(gradient), 0))


# ---- the covariance ----


def tensor_normal(shape: tuple[int, ...], count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Samples Z x_1 L_1 ... x_K L_K and the covariances L_i L_i^T."""
    torch.manual_seed(len(shape))
    factors = [
        torch.tril(torch.randn(n, n, dtype=torch.float64)) + torch.eye(n, dtype=torch.float64) for n in shape
    ]
    noise = torch.randn(count, *shape, dtype=torch.float64)
    for factor in factors:
        noise = torch.tensordot(
            noise, factor, dims=([1], [1])
        )  # the product becomes the last mode; after K products the order is restored
    return noise, [factor @ factor.T for factor in factors]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_the_covariance_is_that_of_tensor_normal_samples(shape):
    samples, covariances = tensor_normal(shape, 40_000)
    curvature, layer = curvature_of(shape, per_sample=True, max_dim=100, merge_dims=1)
    state = curvature.init(layer)
    curvature.observe(state, Given(samples), 0.0)
    result = reduce(torch.kron, [omega[0] for omega in curvature.covariances(state)])
    second_moment = samples.flatten(1).T @ samples.flatten(1) / len(samples)
    exact = reduce(torch.kron, covariances)
    assert (result - second_moment).norm() < 0.03 * second_moment.norm()
    assert (result - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("shape", "max_dim"), [((5,), 9), ((3, 4), 9), ((2, 3, 4), 9), ((5, 7), 3)])
def test_all_modes_have_the_same_mean_eigenvalue(shape, max_dim):
    curvature, layer = curvature_of(shape, max_dim=max_dim, merge_dims=1)
    state = curvature.init(layer)
    for _ in range(3):
        curvature.observe(state, BatchGradient(torch.randn(shape, dtype=torch.float64)), 0.5)
    means = [
        omega.diagonal(dim1=-2, dim2=-1).sum(-1) / curvature.reading.lengths(mode, omega)
        for mode, omega in enumerate(curvature.covariances(state))
    ]
    sums = state["factor_0"].diagonal(dim1=-2, dim2=-1).sum(-1)
    entries = torch.stack([curvature.reading.lengths(mode, sums) for mode in range(len(shape))]).prod(0)
    for mean in means:
        torch.testing.assert_close(mean, (sums / entries) ** (1 / len(shape)))


# ---- the direction ----


@pytest.mark.parametrize(("shape", "limit", "K"), [((5,), None, 1), ((3, 4), None, 2), ((2, 3, 2, 2), 4, 3)])
@pytest.mark.parametrize("relative", [False, True])
def test_the_direction_equals_the_dense_inverse(shape, limit, K, relative):
    gradients = [torch.randn(shape, dtype=torch.float64).flatten(min(K - 1, 2)) for _ in range(4)]
    curvature, layer = curvature_of(shape, max_dim=100, relative_damping=relative, merge_dims=limit)
    state = curvature.init(layer)
    for count, gradient in enumerate(gradients, start=1):
        curvature.observe(state, BatchGradient(gradient.view(shape)), 1 - 1 / count)
    curvature.refresh(state, 0.3)
    T, n = sum(float(g.square().sum()) for g in gradients) / 4, gradients[0].numel()
    c = (T / n) ** (1 / K)
    inverses = []
    for mode in range(K):
        n_mode = gradients[0].shape[mode]
        omega = sum(moment(g, mode) for g in gradients) / 4 / (c ** (K - 1) * n / n_mode)
        lambda_ = 0.3 * c if relative else 0.3
        inverses.append(torch.linalg.inv(omega + lambda_ * torch.eye(n_mode, dtype=omega.dtype)))
    expected = reduce(torch.kron, inverses)
    result = dense_preconditioner(curvature, state, layer, 0.3)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_stacked_layers_are_preconditioned_as_single_ones():
    curvature, layer = curvature_of((5, 7), max_dim=3)
    gradients = torch.randn(2, 5, 7, dtype=torch.float64)
    stack = {name: torch.stack((value, value)) for name, value in curvature.init(layer).items()}
    curvature.observe(stack, BatchGradient(gradients), 0.0)
    curvature.refresh(stack, 0.1)
    together = curvature.precondition(stack, gradients, 0.1)
    for index in range(2):
        state = curvature.init(layer)
        curvature.observe(state, BatchGradient(gradients[index]), 0.0)
        curvature.refresh(state, 0.1)
        torch.testing.assert_close(together[index], curvature.precondition(state, gradients[index], 0.1))


def test_a_block_without_gradient_is_damped_like_its_layer():
    curvature, layer = curvature_of((4, 4), max_dim=2)
    gradient = torch.randn(4, 4, dtype=torch.float64)
    gradient[:2] = 0
    state = curvature.init(layer)
    curvature.observe(state, BatchGradient(gradient), 0.0)
    curvature.refresh(state, 0.1)
    direction = curvature.precondition(state, gradient, 0.1)
    assert torch.isfinite(direction).all()
    dead, live = state["inverse_0"][0].diagonal(), state["inverse_0"][-1].diagonal()
    assert (dead < 100 * live.max()).all()  # not damped relative to its own curvature, which is zero


# ---- what a user sees ----


def test_a_folded_bias_is_one_more_input():
    one = problem("linear")
    optimizer = TNT(one.module, fisher="empirical", fold_bias=True, max_dim=100, statistics_every=1)
    samples = per_sample_gradients(one.module, one.loss, one.inputs, one.targets)
    one.mean_loss().backward()
    optimizer.step()
    layer = next(iter(optimizer._enrolled))
    assert layer.bias is not None
    expected = moment(joined(layer, samples).mean(0), 1)
    torch.testing.assert_close(optimizer.state[layer.weight]["factor_1"][0], expected)


def test_bare_tensors_raise_an_error_that_asks_for_the_module():
    with pytest.raises(ValueError, match=r"looks inside the backward pass .* Pass the nn.Module"):
        TNT([torch.zeros(3, 4, requires_grad=True)])


def test_describe_names_weights_that_only_the_gradient_is_read_of():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    rows = {row.name: row.reason for row in TNT(module).describe().layers}
    assert "gradient" not in rows["0.weight"]
    assert "LayerNorm: only its gradient is read" in rows["1.weight"]
    assert "only its gradient is read" in rows["0.bias"]


def test_the_loss_falls_with_the_defaults():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    inputs = torch.randn(60, 1, 4, 4)
    targets = inputs.mean((1, 2, 3)).mul(4).round().clamp(-1, 1).long() + 1
    optimizer, losses = TNT(module, lr=1e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        outputs = module(inputs)
        optimizer.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert optimizer.diagnostics()["fallbacks"] == optimizer.skipped_steps == 0


def test_blocks_with_padding_are_damped_by_the_means_of_their_entries():
    """Blocks of 3 x 3 in a weight of 5 x 6: the last ones along the first mode have two rows."""
    (gradient,), damping = random_gradients((5, 6), count=1), 0.1
    direction = random_gradients((6, 5), count=1)[0].T
    weight = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    optimizer, layer = TNT([weight], fisher="gradient", max_dim=4), layer_of("weight", weight)
    curvature = optimizer.plan(layer, optimizer.defaults).curvature
    state = curvature.init(layer)
    curvature.observe(state, BatchGradient(gradient), 0.0)
    curvature.refresh(state, damping)
    found = curvature.precondition(state, direction, damping)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 3), slice(3, 6)):
            block = gradient[rows, columns]
            mean = block.square().mean()
            level = damping * ((mean + gradient.square().mean()) / 2).sqrt()
            inverses = []
            for h in (block @ block.T, block.T @ block):
                omega = h / (mean.sqrt() * block.numel() / len(h))
                inverses.append(torch.linalg.inv(omega + level * torch.eye(len(h), dtype=torch.float64)))
            expected = inverses[0] @ direction[rows, columns] @ inverses[1]
            torch.testing.assert_close(found[rows, columns], expected)


def test_power_one_half_is_the_root_of_the_inverse():
    inverses = []
    for power in (1.0, 0.5):
        weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        optimizer, layer = TNT([weight], fisher="gradient", power=power), layer_of("weight", weight)
        curvature = optimizer.plan(layer, optimizer.defaults).curvature
        state = curvature.init(layer)
        curvature.observe(state, BatchGradient(random_gradients((4, 6), count=1)[0]), 0.0)
        curvature.refresh(state, 0.1)
        inverses.append(state["inverse_0"])
    torch.testing.assert_close(inverses[1] @ inverses[1], inverses[0])
