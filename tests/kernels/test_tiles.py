"""The fused direction of two-sided blocks against dense matrices in float64, and against separate verbs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from minifisher import MBF
from minifisher.curvature import FirstOrderStep
from minifisher.kernels import choose
from minifisher.methods import mbf_two_sided

pytestmark = pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="numba (extra `fast`) is not installed")

# Layers, outputs, inputs, width of a block of outputs, of inputs: whole vectors and parts of them, one tile
# and several, tiles that are cut at the edge, fewer rows than are computed together.
SHAPES = [
    (1, 64, 64, 64, 64),
    (2, 128, 192, 64, 64),
    (3, 10, 144, 10, 48),
    (1, 1, 70, 1, 35),
    (2, 9, 7, 4, 3),
    (1, 33, 65, 16, 64),
    (1, 70, 150, 35, 75),
    (1, 20, 1, 20, 1),
]


def inverses(layers: int, length: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Random blocks as `refresh` leaves them: padded rows and columns are zero off the diagonal."""
    count = math.ceil(length / width)
    blocks = torch.randn(layers, count, width, width, generator=generator)
    blocks = blocks @ blocks.mT / width + torch.eye(width)
    rest = length - (count - 1) * width
    blocks[:, -1, rest:], blocks[:, -1, :, rest:] = 0, 0
    blocks[:, -1].diagonal(dim1=-2, dim2=-1)[:, rest:] = 1
    return blocks


def dense(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """[blocks, width, width] as one matrix [length, length] in float64."""
    return torch.block_diag(*blocks.double())[:length, :length]


class Case:
    """Random momenta, gradient and inverses."""

    def __init__(self, shape, lengths: int, nesterov: bool = True, adam: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        layers, out, inputs, height, width = shape
        self.gradient, momentum, moment = (
            torch.randn(layers, out, inputs, generator=generator) for _ in range(3)
        )
        self.left = inverses(layers, out, height, generator)
        self.right = inverses(layers, inputs, width, generator)
        numbers = (0.999, 1e-3, 1.7, 0.2) if adam else ()
        squares = moment.square() if adam else None
        flags = {"lengths": lengths, "with_slopes": True, "nesterov": nesterov}
        self.first_order = FirstOrderStep(0.9, momentum, squares, *numbers, **flags)

    def direction(self):
        from minifisher.kernels.tiles_cpu import direction_of_tiles

        return direction_of_tiles(self.gradient, self.left, self.right, self.first_order)


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_direction_and_measures_are_those_of_dense_matrices(shape, nesterov, adam):
    layers, out, inputs = shape[:3]
    for lengths in (1, out):
        case = Case(shape, lengths, nesterov, adam)
        step = case.first_order
        d, before = case.gradient.double(), copy.deepcopy(step)
        direction, of_direction, of_first_order = case.direction()
        # M and V are rounded as torch rounds them.
        assert torch.equal(step.momentum, before.momentum * 0.9 + case.gradient)
        m = 0.9 * before.momentum.double() + d
        first = m
        v = d
        if adam:
            v = 0.999 * before.second_moment.double() + 0.001 * d.square()
            torch.testing.assert_close(step.second_moment.double(), v, rtol=1e-6, atol=0)
            first = step.scale * m / (v.sqrt() + step.epsilon)
        n = 0.9 * m + d if nesterov else m
        for layer in range(layers):
            expected = dense(case.left[layer], out) @ n[layer] @ dense(case.right[layer], inputs)
            torch.testing.assert_close(direction[layer].double(), expected, rtol=1e-4, atol=1e-4)
        for step_of, measured in ((direction.double(), of_direction), (first, of_first_order)):
            norms = step_of.square().reshape(layers * lengths, -1).sum(1).sqrt()
            slopes = (m * step_of).reshape(layers * lengths, -1)
            torch.testing.assert_close(measured.norm.double(), norms, rtol=1e-5, atol=0)
            errors = (measured.slope.double() - slopes.sum(1)).abs()
            assert (errors <= 1e-5 * slopes.abs().sum(1)).all()
        squares = [square.reshape(layers * lengths, -1).sum(1) for square in (d.square(), v / 0.2) if adam]
        found = [number.double() for number in of_first_order[2:] if number is not None]
        torch.testing.assert_close(found, squares, rtol=1e-5, atol=0)
        assert of_direction[2:] == (None, None)


def test_slopes_are_left_out_where_nobody_asks():
    case = Case(SHAPES[0], 1)
    case.first_order = replace(case.first_order, with_slopes=False)
    _, *measured = case.direction()
    assert [measures[1:] for measures in measured] == [(None, None, None)] * 2


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]], ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(shape, monkeypatch):
    from minifisher.kernels import tiles_cpu

    monkeypatch.setattr(tiles_cpu, "_ENTRIES_PER_THREAD", 1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        case = Case(shape, shape[1])
        direction, *measured = case.direction()
        measures = [number for of_step in measured for number in of_step if number is not None]
        results.append([direction, case.first_order.momentum, *measures])
    assert all(map(torch.equal, *results))


def test_a_tile_that_is_not_finite_does_not_reach_the_next_one():
    case = Case((2, 9, 7, 9, 4), 1)
    case.right[0, 0] = torch.nan
    direction, *_ = case.direction()
    expected = Case((2, 9, 7, 9, 4), 1).direction()[0]
    assert direction[0, :, :4].isnan().all()
    assert torch.equal(direction[0, :, 4:], expected[0, :, 4:])
    assert torch.equal(direction[1], expected[1])


# ---- in a step ----


def trained(steps: int, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.Flatten(), nn.Linear(12 * 16, 80), nn.Tanh(), nn.Linear(80, 3)
    )
    opt = MBF(module, weight_decay=0.1, **options)
    for step in range(steps):
        opt.zero_grad()
        inputs = torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        module(inputs).square().mean().backward()
        opt.step()
    return [parameter.detach() for parameter in module.parameters()]


OPTIONS = [
    {},
    {"nesterov": False, "length": "norm"},
    {"graft": "adam-rows"},
    {"graft": "sgd", "lr": 1e-4},
    {"graft": None, "length": "norm", "lr": 1e-8},
    {"decoupled_weight_decay": False},
    {"curvature_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_network_trains_alike_with_the_kernel_and_without(options, monkeypatch):
    fused = trained(6, **options)
    monkeypatch.setattr(mbf_two_sided, "suits_numba", lambda *tensors: False)
    for own, other in zip(fused, trained(6, **options), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_the_kernel_is_used_where_it_can_be(monkeypatch):
    from minifisher.kernels import tiles_cpu

    taken = []
    kernel = tiles_cpu.direction_of_tiles

    def counted(*arguments):
        taken.append(arguments[0].shape)
        return kernel(*arguments)

    monkeypatch.setattr(tiles_cpu, "direction_of_tiles", counted)
    trained(2)
    assert len(taken) == 2 * 3  # three weights
    taken.clear()
    trained(2, momentum=0.0)
    assert not taken


@pytest.mark.filterwarnings("ignore:weight got a gradient, but no call of its module")
def test_a_weight_without_statistics_so_far_takes_adams_step():
    torch.manual_seed(0)
    module = nn.Linear(40, 30, bias=False)
    twin = nn.Parameter(module.weight.detach().clone())
    opt = MBF(module, fisher="empirical", output_power=0.5)
    adam = torch.optim.Adam([twin])
    for _ in range(3):
        module.weight.grad = torch.randn_like(module.weight)  # no backward pass, so no samples
        twin.grad = module.weight.grad.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(module.weight, twin)
