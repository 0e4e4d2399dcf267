from __future__ import annotations

import pytest
import scipy.linalg
import torch

from minifisher.linalg.newton import newton_inverse_root


def positive_definite(size: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return (basis * values) @ basis.T


@pytest.mark.parametrize("root", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_roots_equal_an_independent_one(root, condition):
    matrix = positive_definite(12, condition) * 1e-7
    expected = torch.linalg.inv(
        torch.as_tensor(scipy.linalg.fractional_matrix_power(matrix.numpy(), 1 / root))
    )
    result, residual = newton_inverse_root(matrix, root)
    assert residual < 1e-13 * condition + 1e-12
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def test_the_residual_is_that_of_the_result():
    matrix = positive_definite(20, 1e6).float()
    result, residual = newton_inverse_root(matrix, 4)
    measured = (torch.linalg.matrix_power(result.double(), 4) @ matrix.double() - torch.eye(20)).abs().max()
    assert 1e-4 < measured < 0.1  # rounding in float32, condition 1e6: neither nothing nor all
    torch.testing.assert_close(residual.double(), measured, rtol=0.5, atol=0)


def test_a_batch_equals_its_matrices_alone():
    matrices = torch.stack([positive_definite(8, 10.0**k, seed=k) for k in range(6)]).view(2, 3, 8, 8)
    together, residuals = newton_inverse_root(matrices, 4)
    for i in range(2):
        for j in range(3):
            alone, residual = newton_inverse_root(matrices[i, j], 4)
            torch.testing.assert_close(together[i, j], alone, rtol=1e-9, atol=1e-9)
            assert residuals[i, j] == pytest.approx(float(residual), rel=1, abs=1e-10)


@pytest.mark.parametrize("root", [2, 4, 6])
def test_a_slow_start_in_single_precision_is_no_end(root):
    # The distance from the identity is 1 - 1e-6 at first: it rounds to 1 and does not fall for a while.
    matrix = positive_definite(50, 1e6)
    result, residual = newton_inverse_root(matrix.float(), root)
    expected = newton_inverse_root(matrix, root)[0]
    assert residual < 0.2
    assert (result - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    "matrix", [-torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, -0.5]))]
)
def test_what_has_no_root_shows_in_the_residual(matrix):
    _, residual = newton_inverse_root(matrix, 4)
    assert not residual < 0.5
