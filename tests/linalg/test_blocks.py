from __future__ import annotations

import pytest
import torch

from minifisher.linalg.blocks import average_outer_products, sum_of_outer_products, sum_over_positions

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_outer_products_equal_a_loop_over_vectors(shared, width):
    vectors = torch.randn(5, 4, 2, width, dtype=torch.float64)  # [n, rows, k, b]
    expected = torch.zeros(4, 2, width, width, dtype=torch.float64)
    for sample in vectors:
        for row in range(4):
            for block in range(2):
                expected[row, block] += torch.outer(sample[row, block], sample[row, block])
    if shared:
        expected = expected.mean(0, keepdim=True)
    torch.testing.assert_close(sum_of_outer_products(vectors, shared), expected, **CLOSE)


def test_sums_over_positions_equal_a_loop_over_samples():
    inputs = torch.randn(5, 3, 2, 4, dtype=torch.float64)  # [n, s, k, b]
    gradients = torch.randn(5, 3, 6, dtype=torch.float64)  # [n, s, rows]
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for n in range(5):
        for block in range(2):
            rows = gradients[n].T @ inputs[n, :, block]  # [rows, b]
            expected[block] += rows.T @ rows
    torch.testing.assert_close(sum_over_positions(inputs, gradients), expected, **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_an_average_decays_and_takes_in_the_outer_products(shared, width):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 2, width, dtype=torch.float64, generator=generator)  # [rows, blocks, width]
    before = torch.randn(1 if shared else 4, 2, width, width, dtype=torch.float64, generator=generator)
    average = before.clone()
    average_outer_products(average, vectors, shared, 0.7)
    fresh = torch.einsum("rki,rkj->rkij", vectors, vectors)
    expected = 0.7 * before + 0.3 * (fresh.mean(0, keepdim=True) if shared else fresh)
    torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_a_decay_that_is_a_tensor_gives_the_same_average(shared, width):
    vectors = torch.randn(4, 2, width, dtype=torch.float64)
    average = torch.randn(1 if shared else 4, 2, width, width, dtype=torch.float64)
    other = average.clone()
    average_outer_products(average, vectors, shared, 0.7)
    average_outer_products(other, vectors, shared, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(average, other, **CLOSE)
