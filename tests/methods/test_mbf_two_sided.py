"""Two-sided blocks against dense Kronecker products in float64, formed without the library's blocks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minifisher import MBF
from minifisher.methods.mbf_two_sided import TwoSidedBlocks
from minifisher.statistics.layers import Layer
from tests.helpers import NETS, Problem, dense_preconditioner, problem
from tests.methods.samples import calls, patches, places


@dataclass(frozen=True, eq=False)
class Read:
    """One layer after a step with lr=0: curvature and state."""

    layer: Layer
    curvature: TwoSidedBlocks
    state: dict[str, Tensor]

    @property
    def widths(self) -> tuple[int, int]:
        return self.curvature.outputs.width, self.curvature.inputs.width

    def preconditioner(self, damping: float) -> Tensor:
        return dense_preconditioner(self.curvature, self.state, self.layer, damping)


def read(case: Problem, **options) -> list[Read]:
    """Every layer with two-sided blocks, after one observation."""
    options = {"output_power": 1.0, "statistics_every": 1, "inverse_every": 1, **options}
    opt = MBF(case.module, lr=0.0, **options)
    outputs = case.module(case.inputs.clone())
    opt.observe(outputs)
    case.loss(outputs, case.targets).backward()
    opt.step()
    return [
        Read(
            layer,
            member.plan.curvature,
            {k: v for k, v in opt.state[layer.weight].items() if isinstance(v, Tensor)},
        )
        for layer, member in opt._enrolled.items()
        if isinstance(member.plan.curvature, TwoSidedBlocks)
    ]


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
