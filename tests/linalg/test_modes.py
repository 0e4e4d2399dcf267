from __future__ import annotations

import itertools
import math
from functools import reduce

import pytest
import torch

from minifisher.linalg.modes import TensorReading, even_width, merged, mode_products, second_moment, unfold

READINGS = [
    TensorReading((6,), (6,)),
    TensorReading((7,), (3,)),
    TensorReading((4, 6), (4, 6)),
    TensorReading((5, 7), (2, 3)),
    TensorReading((4, 6), (4, 3)),
    TensorReading((5, 3, 4), (2, 3, 3)),
    TensorReading((1, 4, 2, 3), (1, 3, 1, 2)),
]


def blocks_by_slicing(weight: torch.Tensor, reading: TensorReading) -> list[torch.Tensor]:
    """The blocks as slices of the weight; the last ones are smaller instead of padded."""
    starts = [range(0, n, w) for n, w in zip(reading.dims, reading.widths, strict=True)]
    return [
        weight[tuple(slice(s, s + w) for s, w in zip(corner, reading.widths, strict=True))]
        for corner in itertools.product(*starts)
    ]


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_blocks_are_slices_padded_with_zeros(reading):
    weight = torch.randn(reading.dims, dtype=torch.float64)
    blocks = reading.read(weight, weight.ndim)
    assert blocks.shape == (reading.blocks, *reading.widths)
    for index, expected in enumerate(blocks_by_slicing(weight, reading)):
        inside = tuple(slice(0, n) for n in expected.shape)
        assert torch.equal(blocks[index][inside], expected)
        assert blocks[index].abs().sum() == pytest.approx(float(expected.abs().sum()))


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_writing_undoes_reading_with_leading_dimensions(reading):
    shape = torch.Size((math.prod(reading.dims), 1))
    weights = torch.randn(2, 3, *shape)
    blocks = reading.read(weights, 2)
    assert torch.equal(blocks[1, 2], reading.read(weights[1, 2], 2))
    assert torch.equal(reading.write(blocks, shape), weights)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_lengths_do_not_count_padding(reading):
    slices = blocks_by_slicing(torch.zeros(reading.dims), reading)
    for mode in range(reading.order):
        expected = torch.tensor([float(block.shape[mode]) for block in slices])
        assert torch.equal(reading.lengths(mode, expected), expected)


def kronecker(matrices: list[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.kron, matrices)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_products_along_all_modes_are_one_kronecker_product(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    matrices = [torch.randn(n, n, dtype=torch.float64) for n in shape]
    expected = kronecker(matrices) @ tensor.flatten()
    torch.testing.assert_close(mode_products(tensor, matrices).flatten(), expected)
    stacked = mode_products(torch.stack((tensor, -tensor)), [torch.stack((m, 2 * m)) for m in matrices])
    torch.testing.assert_close(stacked[1].flatten(), -(2.0 ** len(shape)) * expected)


@pytest.mark.parametrize(("shape", "mode"), [((5,), 0), ((3, 4), 1), ((2, 3, 4), 1), ((4, 1), 1)])
def test_second_moments_sum_over_all_other_modes(shape, mode):
    tensor = torch.randn(2, *shape, dtype=torch.float64)
    columns = tensor.movedim(mode + 1, 1).flatten(2) if len(shape) > 1 else tensor[:, :, None]
    expected = torch.einsum("lic,ljc->lij", columns, columns)
    torch.testing.assert_close(second_moment(tensor, mode, len(shape)), expected)
    torch.testing.assert_close(unfold(tensor, mode, len(shape)), columns)


@pytest.mark.parametrize(
    ("shape", "limit", "modes"),
    [
        ((), None, (1,)),
        ((1, 1), None, (1,)),
        ((7,), None, (7,)),
        ((8, 5), None, (8, 5)),
        ((8, 5, 3, 3), None, (8, 45)),
        ((8, 5, 2, 3, 3), None, (8, 90)),
        ((8, 1, 3, 3), None, (8, 9)),
        ((8, 5, 1, 1), None, (8, 5)),
        ((8, 5, 3, 3), 1, (8, 5, 3, 3)),
        ((8, 5, 3, 3), 9, (8, 5, 9)),
        ((8, 5, 3, 3), 45, (8, 45)),
        ((8, 5, 3, 3), 360, (360,)),
        ((8, 1, 5, 1), 2, (8, 5)),
        ((2, 3, 3, 3), 20, (6, 9)),
    ],
)
def test_merged_dimensions(shape, limit, modes):
    assert merged(shape, limit) == modes


@pytest.mark.parametrize(
    ("shape", "modes"),
    [((8, 5, 3, 3), (8, 5, 9)), ((8, 1, 3, 3), (8, 9)), ((8, 5, 1, 1), (8, 5)), ((7,), (7,)), ((1,), (1,))],
)
def test_only_the_kernel_is_merged_after_two_kept_dimensions(shape, modes):
    assert merged(shape, None, kept=2) == modes


@pytest.mark.parametrize(
    ("length", "widest", "width"), [(10, 16, 10), (784, 256, 196), (785, 256, 197), (9, 1, 1)]
)
def test_cuts_are_even(length, widest, width):
    assert even_width(length, widest) == width
