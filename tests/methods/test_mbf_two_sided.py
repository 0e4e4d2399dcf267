"""Two-sided blocks against dense Kronecker products in float64, formed without the library's blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minifisher import MBF
from minifisher.methods.mbf_two_sided import TwoSidedBlocks
from minifisher.statistics.layers import Layer, layer_of
from tests import helpers
from tests.helpers import (
    NETS,
    Problem,
    dense_empirical_fisher,
    dense_exact_fisher,
    problem,
    read_layers,
)
from tests.methods.samples import calls, patches, places


class Read(helpers.Read):
    """One layer after a step with lr=0."""

    @property
    def widths(self) -> tuple[int, int]:
        return self.curvature.outputs.width, self.curvature.inputs.width


def read(case: Problem, likelihood: str = "categorical", **options) -> list[Read]:
    """Every layer with two-sided blocks, after one observation."""
    options = {"output_power": 1.0, "statistics_every": 1, "inverse_every": 1, **options}
    opt = MBF(case.module, lr=0.0, **options)
    outputs = case.module(case.inputs.clone())
    opt.observe(outputs, likelihood)
    case.loss(outputs, case.targets).backward()
    opt.step()
    return read_layers(opt, TwoSidedBlocks, Read)


# ---- dense matrices ----


def of_gradient(layer: Layer) -> tuple[Tensor, Tensor]:
    """A [in, in] and G [out, out], uncut, of the gradient of the mini-batch."""
    matrix = layer.join([parameter.grad for parameter in layer.parameters]).flatten(1)
    outputs, inputs = matrix.shape
    return matrix.T @ matrix / outputs, matrix @ matrix.T / inputs


def of_samples(case: Problem, layer: Layer) -> tuple[Tensor, Tensor]:
    """The same from the inputs and output gradients of single samples: the plain second moments."""
    (leaf,) = layer.modules
    seen = calls(case)[leaf]
    a, g = patches(leaf, seen[0], layer.bias is not None), places(leaf, seen[1])
    g = g.transpose(1, 2).flatten(2)  # [n, s, out]
    inputs = torch.einsum("ngsi,ngsj->ij", a, a) / a.shape[0] / a.shape[1]
    return inputs, torch.einsum("nso,nsp->op", g, g) / g.shape[0] / g.shape[1]


def cut(matrix: Tensor, width: int) -> Tensor:
    """The diagonal blocks of so many entries, the last one perhaps smaller; zero elsewhere."""
    blocks = [matrix[i : i + width, i : i + width] for i in range(0, len(matrix), width)]
    return torch.block_diag(*blocks)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def levels(matrix: Tensor, width: int, mean: Tensor, damping: float, relative: bool) -> Tensor:
    """The diagonal matrix of lambda: relative, `damping` times the average of the block's mean and f."""
    if not relative:
        return damping * torch.eye(len(matrix), dtype=matrix.dtype)
    diagonal = matrix.diagonal()
    of_blocks = [part.mean().expand(len(part)) for part in diagonal.split(width)]
    return torch.diag(damping * (torch.cat(of_blocks) + mean) / 2)


def expected(a: Tensor, g: Tensor, mean: Tensor, each: Read, damping: float, relative: bool) -> Tensor:
    """[d, d]: A and G are uncut, both with the mean diagonal f = `mean`."""
    output_width, input_width = each.widths
    level = damping * mean if relative else damping
    a = cut(a, input_width) + levels(a, input_width, mean, damping, relative)
    g = (cut(g, output_width) + levels(g, output_width, mean, damping, relative)) / (mean + level)
    powers = each.curvature.output_power, each.curvature.power
    return torch.kron(matrix_power(g, -powers[0]), matrix_power(a, -powers[1]))


def same_scale(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and f of the Fisher matrix A (x) G: each matrix times the mean of the other's diagonal."""
    means = a.diagonal().mean(), g.diagonal().mean()
    return a * means[1], g * means[0], means[0] * means[1]


def assert_same(matrix: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(matrix, dense, rtol=1e-7, atol=1e-10 * dense.abs().max().item())


# ---- the direction ----

POWERS = [(1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, None])
@pytest.mark.parametrize("name", NETS)
def test_the_direction_of_gradient_blocks_is_the_dense_one(name, block_size, relative_damping):
    case = problem(name)
    options = {"block_size": block_size, "relative_damping": relative_damping, "damping": 0.1}
    for power, output_power in POWERS:
        layers = read(case, power=power, output_power=output_power, **options)
        assert layers
        for each in layers:
            a, g = of_gradient(each.layer)
            mean = a.diagonal().mean()
            dense = expected(a, g, mean, each, 0.1, relative_damping)
            assert_same(each.preconditioner(0.1), dense)


OF_SAMPLES = [
    "linear",
    "linear without bias",
    "linear on tokens",
    "conv2d unequal",
    "conv2d groups",
    "conv1d",
]


@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, None])
@pytest.mark.parametrize("fold_bias", [False, True])
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_the_direction_of_empirical_blocks_is_the_dense_one(name, fold_bias, block_size, relative_damping):
    case = problem(name)
    options = {
        "fisher": "empirical",
        "fold_bias": fold_bias,
        "block_size": block_size,
        "relative_damping": relative_damping,
        "damping": 0.1,
    }
    for power, output_power in POWERS:
        layers = read(case, power=power, output_power=output_power, **options)
        assert layers
        for each in layers:
            a, g, mean = same_scale(*of_samples(case, each.layer))
            dense = expected(a, g, mean, each, 0.1, relative_damping)
            assert_same(each.preconditioner(0.1), dense)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).filter(
        lambda shape: torch.Size(shape).numel() < 150
    ),
    block_size=st.one_of(st.none(), st.integers(1, 9)),
    power=st.sampled_from([0.25, 0.5, 1.0]),
    output_power=st.sampled_from([0.25, 0.5, 1.0]),
    relative_damping=st.booleans(),
)
def test_a_step_is_the_dense_formula_for_any_shape_and_cut(
    shape, block_size, power, output_power, relative_damping
):
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    generator = torch.Generator().manual_seed(sum(shape))
    weight.grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    options = {"power": power, "output_power": output_power, "relative_damping": relative_damping}
    opt = MBF([weight], lr=1.0, momentum=0.0, graft=None, damping=0.3, block_size=block_size, **options)
    opt.step()
    (member,) = opt._enrolled.values()
    each = Read(member.layer, member.plan.curvature, {})
    a, g = of_gradient(each.layer)
    dense = expected(a, g, a.diagonal().mean(), each, 0.3, relative_damping)
    torch.testing.assert_close(-weight.detach().flatten(), dense @ weight.grad.flatten())


def test_the_average_is_bias_corrected_for_both_sides():
    layer = layer_of("weight", nn.Parameter(torch.zeros(5, 3, dtype=torch.float64)))
    opt = MBF([layer.weight], lr=0.0, output_power=0.5, block_size=2, curvature_decay=0.7, statistics_every=1)
    averages, total = [0.0, 0.0], 0.0
    for _ in range(4):
        layer.weight.grad = torch.randn(5, 3, dtype=torch.float64)
        opt.step()
        averages = [0.7 * old + 0.3 * new for old, new in zip(averages, of_gradient(layer), strict=True)]
        total = 0.7 * total + 0.3
    for name, average in zip(("input_fisher", "output_fisher"), averages, strict=True):
        blocks = opt.state[layer.weight][name][0]
        assert_same(torch.block_diag(*blocks)[: len(average), : len(average)], cut(average / total, 2))


# ---- where the Kronecker product is exact ----


@pytest.mark.parametrize("name", ["linear", "linear without bias"])
def test_with_one_sample_both_estimators_have_the_dense_fisher(name):
    case = problem(name, count=1)
    for fisher in ("gradient", "empirical"):
        for each in read(case, fisher=fisher):
            a, g, mean = each.curvature._scaled(each.state)
            dense = torch.kron(g[0, 0], a[0, 0]) / mean
            twin = problem(name, count=1)  # has no hooks
            layer = next(layer_of(n, p) for n, p in twin.module.named_parameters() if n == each.layer.name)
            fisher_matrix = dense_empirical_fisher(layer, twin.module, twin.loss, twin.inputs, twin.targets)
            assert_same(dense, fisher_matrix)


@pytest.mark.parametrize("fold_bias", [False, True])
def test_the_inverse_is_exact_for_a_deep_linear_network(fold_bias):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5)).double()
    case = Problem(module, torch.randn(20, 3, dtype=torch.float64), torch.randint(5, (20,)))
    options = {"fisher": "exact", "damping": 0.0, "graft": None, "fold_bias": fold_bias}
    layers = read(case, "gaussian", **options)
    assert len(layers) == 3
    for each in layers:
        dense = dense_exact_fisher(each.layer, module, "gaussian", case.inputs)
        torch.testing.assert_close(each.preconditioner(0.0), torch.linalg.inv(dense))


def test_sampled_labels_approach_the_exact_second_moments():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = torch.randn(40, 3, dtype=torch.float64)
    states = {}
    for fisher in ("sampled", "exact"):
        opt = MBF(
            module, lr=0.0, fisher=fisher, output_power=1.0, statistics_every=1, curvature_decay=1 - 1e-9
        )
        for _ in range(300 if fisher == "sampled" else 1):
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            opt.observe(module(inputs))
            opt.step()
        states[fisher] = [opt.state[module[index].weight] for index in (0, 2)]
    for sampled, exact in zip(*states.values(), strict=True):
        torch.testing.assert_close(sampled["input_fisher"], exact["input_fisher"])
        difference = sampled["output_fisher"] - exact["output_fisher"]
        assert difference.norm() < 0.05 * exact["output_fisher"].norm()


# ---- scale and limits ----


def test_with_a_tiny_output_power_the_direction_is_that_of_one_sided_blocks():
    results = []
    for output_power in (0.0, 1e-13):
        weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
        opt = MBF([weight], lr=1.0, graft=None, block_size=3, output_power=output_power, statistics_every=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            weight.grad = torch.randn(6, 8, dtype=torch.float64, generator=generator)
            opt.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_where_all_outputs_are_alike_the_direction_is_that_of_one_sided_blocks():
    """G is a multiple of the identity: the left factor is the identity, whatever the damping."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    gradient = torch.linalg.qr(square)[0].T  # its rows are orthonormal
    for relative_damping in (False, True):
        results = []
        for output_power in (0.0, 0.5, 1.0):
            weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
            options = {"relative_damping": relative_damping, "damping": 0.1, "graft": None}
            opt = MBF([weight], lr=1.0, momentum=0.0, output_power=output_power, **options)
            weight.grad = gradient.clone()
            opt.step()
            results.append(weight.detach())
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
@pytest.mark.parametrize("name", ["linear", "conv2d groups", "linear on tokens"])
def test_with_large_damping_the_direction_is_the_momentum(name, fisher):
    case = problem(name)
    for each in read(case, fisher=fisher, relative_damping=False, damping=1e9):
        identity = torch.eye(each.layer.shape.numel(), dtype=torch.float64)
        torch.testing.assert_close(1e9 * each.preconditioner(1e9), identity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("power", "output_power"), POWERS)
def test_the_direction_has_the_unit_of_the_blocks_over_inputs(power, output_power):
    """Gradients c times as large give a direction c^(1 - 2 q) times as long."""
    lengths = []
    for scale in (1.0, 1e3):
        weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
        options = {"graft": None, "momentum": 0.0, "power": power, "output_power": output_power}
        opt = MBF([weight], lr=1.0, **options)
        weight.grad = scale * torch.randn(
            6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        opt.step()
        lengths.append(weight.detach().norm())
    torch.testing.assert_close(
        lengths[1] / lengths[0], torch.tensor(1e3 ** (1 - 2 * power), dtype=torch.float64)
    )


# ---- plans ----


def test_no_block_of_outputs_spans_two_groups():
    case = problem("conv2d groups")
    for block_size in (None, 3, 1000):
        (grouped, _) = read(case, block_size=block_size)
        assert 2 % grouped.curvature.outputs.width == 0


def test_the_description_says_the_tiles_and_what_stays_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(96, 128))
    rows = {row.name: row for row in MBF(network, output_power=0.5).describe().layers}
    assert (rows["0.weight"].structure, rows["0.weight"].reason) == (
        "two-sided blocks",
        "tiles of 16 outputs x 27 inputs",
    )
    assert rows["3.weight"].blocks == 2 + 2
    assert rows["3.weight"].block_size == 64
    assert {rows[name].structure for name in ("0.bias", "1.weight", "3.bias")} == {"diagonal"}
    kernels = MBF(network, output_power=0.5, conv_blocks="kernel").describe().layers
    assert [row.structure for row in kernels if len(row.shape) > 1] == ["kernel blocks", "two-sided blocks"]


@pytest.mark.parametrize("other", [{"share": "row"}, {"linear_blocks": "column"}])
def test_blocks_of_one_side_alone_are_refused(other):
    with pytest.raises(ValueError, match=r"output_power=0.5 makes blocks for both .* set output_power=0"):
        MBF([nn.Parameter(torch.zeros(3, 4))], output_power=0.5, **other)


@pytest.mark.parametrize("output_power", [-0.5, float("nan")])
def test_an_output_power_out_of_range_is_refused(output_power):
    with pytest.raises(ValueError, match="output_power must be finite and >= 0, or None, got"):
        MBF([nn.Parameter(torch.zeros(3, 4))], output_power=output_power)


# ---- half precision, and weights without a gradient ----


@pytest.mark.parametrize("output_power", [0.5, 1.0])
def test_curvature_in_half_precision_stays_usable_with_little_damping(output_power):
    weight = nn.Parameter(torch.zeros(64, 32))
    options = {"damping": 1e-6, "curvature_dtype": torch.bfloat16, "statistics_every": 1}
    opt = MBF([weight], lr=0.0, output_power=output_power, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scale = torch.logspace(0, -4, 64)[:, None] * torch.logspace(0, -4, 32)
        weight.grad = torch.randn(64, 32, generator=generator) * scale
        opt.step()
    assert opt.state[weight]["output_fisher"].dtype == torch.bfloat16
    assert all(torch.isfinite(opt.state[weight][name]).all() for name in ("input_inverse", "output_inverse"))
    assert opt.diagnostics()["fallbacks"] == 0


def test_half_precision_averages_give_nearly_the_direction_of_float32():
    directions = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(48, 32))
        opt = MBF([weight], lr=1.0, output_power=0.5, curvature_dtype=dtype, statistics_every=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            weight.grad = torch.randn(48, 32, generator=generator)
            opt.step()
        directions.append(weight.detach().flatten())
    assert torch.cosine_similarity(*directions, dim=0) > 0.999


@pytest.mark.parametrize("output_power", [0.5, 1.0])
def test_a_weight_that_never_had_a_gradient_has_the_identity_on_the_left(output_power):
    weight = nn.Parameter(torch.zeros(4, 3))
    opt = MBF([weight], output_power=output_power, statistics_every=1, lr=0.0)
    weight.grad = torch.zeros(4, 3)
    opt.step()
    left = opt.state[weight]["output_inverse"][0, 0]
    assert torch.isfinite(left).all()
    assert left.diagonal().max() < 100


@pytest.mark.parametrize("output_power", [0.5, 1.0])
def test_a_gradient_whose_mean_square_is_zero_has_a_finite_direction(output_power):
    weight = nn.Parameter(torch.zeros(4, 3))
    opt = MBF([weight], output_power=output_power)
    weight.grad = torch.zeros(4, 3)
    weight.grad[0, 0] = 4e-23  # its square is the smallest number of float32
    opt.step()
    assert opt.state[weight]["observations"] == 1
    assert not opt.state[weight]["input_fisher"].any()
    assert opt.diagnostics()["fallbacks"] == 0
    assert weight.isfinite().all()
