"""Inverses and powers where a matrix is barely positive definite, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minifisher.linalg.dense import eigendecomposition, inverse_power, inverse_without_sync

EPS = torch.finfo(torch.float64).eps


def diagonal(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=dtype))


def test_a_singular_matrix_is_damped_by_the_rounding_error_of_its_own_mean_diagonal():
    matrices = torch.stack([diagonal(4.0, 0.0), diagonal(4e6, 0.0), diagonal(4.0, 2.0)])
    found = inverse_power(matrices, 1.0)
    for matrix, inverse, damping in zip(matrices, found, (2 * EPS, 2e6 * EPS, 0.0), strict=True):
        expected = (matrix.diagonal() + damping).reciprocal()
        torch.testing.assert_close(inverse.diagonal(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("negative", "power_of_ten"), [(1e-16, 0), (1e-15, 1), (1e-13, 3), (1e-11, 5)])
def test_the_damping_grows_tenfold_until_the_matrix_is_positive_definite(negative, power_of_ten):
    first = diagonal(1.0, 0.0)  # needs the first attempt only, and gets no more than that
    found = inverse_power(torch.stack([first, diagonal(1.0, -negative)]), 1.0)
    added = 0.5 * EPS * 10**power_of_ten
    assert added > negative >= added / 10
    torch.testing.assert_close(found[0, 1, 1].item(), 2 / EPS, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1, 1, 1].item(), 1 / (added - negative), rtol=1e-3, atol=0)


def test_the_damping_is_a_share_of_the_mean_size_of_the_diagonal():
    matrix = diagonal(1.0, 1.0, 1.0, 1.0, -0.004, dtype=torch.float32)
    added = torch.finfo(torch.float32).eps * 1e5 * 4.004 / 5
    found = inverse_power(matrix.unsqueeze(0), 1.0)[0, 4, 4]
    torch.testing.assert_close(found.item(), 1 / (added - 0.004), rtol=1e-4, atol=0)


@pytest.mark.parametrize("invert", [lambda matrices: inverse_power(matrices, 1.0), inverse_without_sync])
def test_a_matrix_without_an_inverse_gives_nan_and_disturbs_no_other(invert):
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usable = root @ root.T + torch.eye(3, dtype=torch.float64)
    found = invert(torch.stack([usable, diagonal(1.0, -1.0, 1.0), usable]))
    assert found[1].isnan().all()
    for inverse in (found[0], found[2]):
        torch.testing.assert_close(inverse @ usable, torch.eye(3, dtype=torch.float64))


def test_eigenvalues_below_the_rounding_error_of_the_largest_count_as_that():
    matrices = torch.stack(
        [diagonal(4.0, 0.0), diagonal(4e6, 0.0), diagonal(4.0, -1e-3), diagonal(4.0, 1e-12)]
    )
    found = inverse_power(matrices, 0.5).diagonal(dim1=-2, dim2=-1)
    smallest = torch.tensor([4 * EPS, 4e6 * EPS, 4 * EPS, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(found[:, 1], smallest.rsqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 5e-4, 0.5, 0.5], dtype=torch.float64))


def test_the_power_of_a_zero_matrix_is_finite():
    assert inverse_power(torch.zeros(1, 2, 2), 0.5).isfinite().all()


def test_the_eigendecomposition_of_nan_is_nan_and_disturbs_no_other():
    matrices = torch.stack([diagonal(1.0, 2.0), torch.full((2, 2), torch.nan, dtype=torch.float64)])
    values, vectors = eigendecomposition(matrices)
    torch.testing.assert_close(values[0], torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(vectors[0].abs(), torch.eye(2, dtype=torch.float64))
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
