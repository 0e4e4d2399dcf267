from __future__ import annotations

import pytest
import scipy.linalg
import torch

from minifisher import MBF
from minifisher.linalg import newton
from minifisher.linalg.newton import newton_inverse_root, newton_schulz_inverse


def positive_definite(size, condition, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), size, dtype=torch.float64)
    return ((basis * values) @ basis.T).to(dtype)


# ---- inverse roots ----


@pytest.mark.parametrize("root", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_inverse_roots_equal_those_of_scipy(root, condition):
    matrix = positive_definite(12, condition) * 1e-7
    expected = torch.linalg.inv(
        torch.as_tensor(scipy.linalg.fractional_matrix_power(matrix.numpy(), 1 / root))
    )
    result, residual = newton_inverse_root(matrix, root)
    assert residual < 1e-13 * condition + 1e-12
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def test_the_residual_is_the_error_of_the_result():
    matrix = positive_definite(20, 1e6).float()
    result, residual = newton_inverse_root(matrix, 4)
    measured = (torch.linalg.matrix_power(result.double(), 4) @ matrix.double() - torch.eye(20)).abs().max()
    assert 1e-4 < measured < 0.1  # the rounding of float32 at condition 1e6 is neither negligible nor fatal
    torch.testing.assert_close(residual.double(), measured, rtol=0.5, atol=0)


def test_a_batch_equals_its_matrices_one_by_one():
    matrices = torch.stack([positive_definite(8, 10.0**k, seed=k) for k in range(6)]).view(2, 3, 8, 8)
    together, residuals = newton_inverse_root(matrices, 4)
    for i in range(2):
        for j in range(3):
            alone, residual = newton_inverse_root(matrices[i, j], 4)
            torch.testing.assert_close(together[i, j], alone, rtol=1e-9, atol=1e-9)
            assert residuals[i, j] == pytest.approx(float(residual), rel=1, abs=1e-10)


@pytest.mark.parametrize("root", [2, 4, 6])
def test_the_iteration_goes_on_while_the_distance_still_rounds_to_one(root):
    # In float32 the distance from the identity, 1 - 1e-6 at first, does not decrease for some iterations.
    matrix = positive_definite(50, 1e6)
    result, residual = newton_inverse_root(matrix.float(), root)
    expected = newton_inverse_root(matrix, root)[0]
    assert residual < 0.2
    assert (result - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    "matrix", [-torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, -0.5]))]
)
def test_the_residual_is_large_where_there_is_no_root(matrix):
    _, residual = newton_inverse_root(matrix, 4)
    assert not residual < 0.5


# ---- inverses by Newton-Schulz ----


@pytest.fixture
def cholesky_calls(monkeypatch):
    """For each call of `inverse_power`, the number of matrices that it got."""
    calls = []

    def counted(matrices, power):
        calls.append(len(matrices))
        return torch.linalg.inv(matrices)

    monkeypatch.setattr(newton, "inverse_power", counted)
    return calls


@pytest.mark.parametrize("size", [2, 9, 64])
def test_newton_schulz_from_a_near_inverse_gives_the_inverse(size, cholesky_calls):
    old = torch.stack([positive_definite(size, 30.0, seed) for seed in range(4)]).view(2, 2, size, size)
    fresh = torch.stack([positive_definite(size, 30.0, seed) for seed in range(4, 8)]).view(2, 2, size, size)
    moved = torch.lerp(old, fresh, 0.05)
    result = newton_schulz_inverse(moved, torch.linalg.inv(old))
    torch.testing.assert_close(result, torch.linalg.inv(moved), rtol=1e-9, atol=1e-10)
    assert not cholesky_calls


@pytest.mark.parametrize("start", [0.0, 1e9, -1e9, float("nan")])
def test_a_start_that_is_far_from_the_inverse_is_replaced(start, cholesky_calls):
    matrix = 1e-7 * positive_definite(12, 20.0)
    result = newton_schulz_inverse(matrix, torch.full_like(matrix, start))
    torch.testing.assert_close(result, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-3)
    assert not cholesky_calls


def test_only_matrices_that_do_not_converge_are_inverted_by_cholesky(cholesky_calls):
    matrices = torch.stack([positive_definite(12, condition) for condition in (10.0, 1e9, 20.0)])
    result = newton_schulz_inverse(matrices, torch.zeros_like(matrices))
    torch.testing.assert_close(result, torch.linalg.inv(matrices), rtol=1e-6, atol=1e-6)
    assert cholesky_calls == [1]


def test_in_float32_the_inverse_is_exactly_symmetric():
    old = positive_definite(64, 100.0, dtype=torch.float32)
    moved = torch.lerp(old, positive_definite(64, 100.0, 1, torch.float32), 0.05)
    result = newton_schulz_inverse(moved, torch.linalg.inv(old))
    assert torch.equal(result, result.mT)
    expected = torch.linalg.inv(moved.double())
    assert (result - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), -torch.eye(3), torch.full((3, 3), float("nan"))])
def test_the_inverse_of_a_matrix_that_has_none_is_not_finite(matrix):
    result = newton_schulz_inverse(matrix[None], torch.zeros(1, 3, 3))
    assert not torch.isfinite(result).all()


@pytest.mark.parametrize("output_power", [0.0, 1.0, 0.5])
def test_mbf_with_newton_schulz_takes_the_steps_of_cholesky(output_power):
    weights = []
    for inverse in (None, "cholesky", "newton-schulz"):
        weight = torch.nn.Parameter(torch.zeros(20, 16, dtype=torch.float64))
        schedule = {"statistics_every": 2, "inverse_every": 4}
        opt = MBF([weight], lr=0.01, inverse=inverse, output_power=output_power, **schedule)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            weight.grad = torch.randn(20, 16, generator=generator, dtype=torch.float64)
            opt.step()
        weights.append(weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-7, atol=1e-9)


def test_mbf_refuses_an_unknown_name_of_an_inverse():
    with pytest.raises(ValueError, match="'cholesky', 'newton-schulz', None, got 'lu'"):
        MBF([torch.nn.Parameter(torch.zeros(2, 2))], inverse="lu")
