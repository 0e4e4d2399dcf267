from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minifisher.curvature import Measures
from minifisher.kernels import choose
from minifisher.step import first_order as first_order_step

needs_numba = pytest.mark.skipif(not choose.NUMBA_INSTALLED, reason="numba (extra `fast`) is not installed")


def states(shape: tuple[int, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    state = {"momentum": torch.randn(shape), "second_moment": torch.rand(shape).square()}
    return torch.randn(shape), state


@needs_numba
@pytest.mark.parametrize("shape", [(1, 7, 5), (1, 300, 700), (3, 8, 5), (70, 2000)])
def test_compiled_adam_equals_torch_in_float64(shape, monkeypatch):
    gradient, state = states(shape)
    expected = {name: tensor.double() for name, tensor in state.items()}
    adam = first_order_step.GRAFTS["adam"]
    reference = adam.update(expected, gradient.double(), shape[0], 3, 0.9, with_slope=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert choose.suits_numba(gradient, *state.values())
    measures = adam.update(state, gradient, shape[0], 3, 0.9, with_slope=True)
    torch.testing.assert_close(measures.map(Tensor.double), reference, rtol=2e-6, atol=0)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


@needs_numba
@pytest.mark.parametrize("with_slope", [False, True])
def test_norm_and_slope_are_those_of_the_step(with_slope):
    gradient, state = states((2, 6, 7))
    adam = first_order_step.GRAFTS["adam"]
    norm, slope, newest, usual = adam.update(state, gradient, 2, 5, 0.9, with_slope)
    step = adam.step(state, state["momentum"], 5, 0.9)
    torch.testing.assert_close(norm, step.flatten(1).norm(dim=1))
    expected = (state["momentum"] * step).sum((1, 2)) if with_slope else None
    torch.testing.assert_close(slope, expected)
    for square, tensor in ((newest, gradient.square()), (usual, state["second_moment"] / (1 - 0.999**5))):
        torch.testing.assert_close(square, tensor.sum((1, 2)) if with_slope else None)


@needs_numba
def test_the_compiled_length_is_that_of_torch_to_the_last_bit():
    from minifisher.kernels import elementwise_cpu

    edges = torch.tensor([0.0, -1.5, 1.0, 3.0, 1e30, 1e-30, torch.inf, torch.nan])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 1000, generator=generator)
    numbers = torch.cat((torch.cartesian_prod(*[edges] * 4).T, drawn), 1)
    sizes = torch.cat((edges.abs(), torch.tensor([8.0, 30.0, 900.0])))
    squares = sizes[torch.randint(len(sizes), (2, numbers.shape[1]), generator=generator)]

    def compiled(columns):
        of_step, of_first_order = columns[:2], columns[2:]
        measures = Measures(*of_step), Measures(*of_first_order)
        return elementwise_cpu.descent_length(*measures, 4.0, first_order_step.USUAL_GROWTH)

    for columns in (numbers, torch.cat((numbers, squares))):
        measures = Measures(*columns[:2]), Measures(*columns[2:])
        expected = first_order_step.graft_length(*measures, True, 4.0)
        length, is_finite = compiled(columns)
        torch.testing.assert_close(length, expected, rtol=0, atol=0, equal_nan=True)
        assert not is_finite
        usable = torch.isfinite(measures[0].norm + expected)
        assert compiled(columns[:, usable])[1]
        for position in (~usable).nonzero()[:, 0].tolist():
            mixed = torch.cat((usable.nonzero()[:3, 0], torch.tensor([position])))
            assert not compiled(columns[:, mixed])[1]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, dtype=torch.float64), torch.zeros(4, 4)[:, ::2], torch.zeros(2, device="meta")],
    ids=["float64", "strided", "meta"],
)
def test_numba_kernels_refuse_other_dtypes_layouts_and_devices(tensor):
    assert not choose.suits_numba(torch.zeros(3), tensor)


ENTRIES = [choose.LEAST_ENTRIES - 1, choose.LEAST_ENTRIES, 3 * choose.LEAST_ENTRIES + 5]


@pytest.mark.parametrize("entries", ENTRIES)
def test_the_mean_square_is_computed_for_each_layer(entries):
    gradient = torch.randn(entries, generator=torch.Generator().manual_seed(0))
    expected = gradient.double().square().mean()
    torch.testing.assert_close(choose.mean_square(gradient, 1).double(), expected.view(1), rtol=3e-6, atol=0)
    two = torch.stack((gradient, 2 * gradient))
    torch.testing.assert_close(
        choose.mean_square(two, 2).double(), expected * torch.tensor([1.0, 4.0]).double(), rtol=3e-6, atol=0
    )


@pytest.mark.parametrize("lengths", [1, 5])
@pytest.mark.parametrize("entries", [choose.LEAST_ENTRIES + 4, 3 * choose.LEAST_ENTRIES + 22])
@needs_numba
def test_a_scaled_direction_is_subtracted_in_one_pass_which_autograd_notices(entries, lengths):
    weight = torch.randn(entries, requires_grad=True)
    direction, factors = torch.randn(entries), torch.rand(lengths)
    expected = weight.detach() * (1 - 1e-3)
    expected.addcmul_((direction.view(lengths, -1) * factors[:, None]).view(-1), torch.ones(()), value=-0.1)
    loss = weight.square().sum()
    with torch.no_grad():
        assert choose.subtract_scaled(weight, direction, factors, 0.1, 1 - 1e-3)
    assert torch.equal(weight.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_small_weight_is_left_to_torch():
    weight = torch.zeros(choose.LEAST_ENTRIES - 1)
    assert not choose.subtract_scaled(weight, torch.ones_like(weight), torch.ones(1), 0.1)
    assert not weight.any()
