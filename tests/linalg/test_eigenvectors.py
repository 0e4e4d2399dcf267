from __future__ import annotations

import torch

from minifisher.linalg.eigenvectors import eigenvectors, power_iteration


def random_moment(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def assert_orthogonal(basis: torch.Tensor) -> None:
    torch.testing.assert_close(
        basis.mT @ basis, torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis)
    )


def test_eigenvectors_diagonalise_and_come_with_the_largest_eigenvalue_first():
    matrices = torch.stack((random_moment(6, 9), random_moment(6, 2)))
    basis = eigenvectors(matrices)
    rotated = basis.mT @ matrices @ basis
    values = rotated.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(rotated, torch.diag_embed(values), rtol=1e-9, atol=1e-9)
    assert (values.diff(dim=-1) <= 1e-9).all()
    assert torch.equal(eigenvectors(matrices[..., :1, :1]), torch.ones(2, 1, 1, dtype=torch.float64))


def test_power_iteration_does_not_change_eigenvectors():
    matrix = random_moment(6, 9)
    basis = eigenvectors(matrix)
    turned, order = power_iteration(matrix, basis)
    assert order.tolist() == list(range(6))
    torch.testing.assert_close((turned.T @ basis).abs(), torch.eye(6, dtype=torch.float64))


def test_power_iteration_sorts_the_columns():
    matrix = random_moment(6, 9)
    shuffled = torch.tensor([3, 0, 5, 1, 2, 4])
    basis = eigenvectors(matrix)
    turned, order = power_iteration(matrix, basis[:, shuffled])
    assert torch.equal(shuffled[order], torch.arange(6))
    torch.testing.assert_close((turned.T @ basis).abs(), torch.eye(6, dtype=torch.float64))


def test_power_iteration_converges_and_stays_orthogonal():
    matrix = torch.stack((random_moment(5, 8, seed=1), random_moment(5, 1, seed=2)))
    basis = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    for _ in range(300):
        basis, _ = power_iteration(matrix, basis)
    assert_orthogonal(basis)
    rotated = basis.mT @ matrix @ basis
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-8


def test_power_iteration_of_a_zero_matrix_gives_an_orthogonal_basis():
    turned, _ = power_iteration(torch.zeros(4, 4), torch.eye(4))
    assert_orthogonal(turned)


def two_iterations(seed: int, rounding: float) -> torch.Tensor:
    """Eigenvectors of a matrix of rank 3, after two iterations with one of rank 5: SOAP starts like this."""
    matrices = [random_moment(9, 3, seed=1), random_moment(9, 3, seed=1) + random_moment(9, 2, seed=2)]
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        noise = rounding * matrix.abs().max() * torch.randn(9, 9, generator=generator, dtype=torch.float64)
        matrix += noise + noise.T
    basis, _ = power_iteration(matrices[1], eigenvectors(matrices[0]))
    return power_iteration(matrices[1], basis)[0]


def test_rounding_errors_do_not_change_the_basis_where_the_rank_is_low():
    basis = two_iterations(0, rounding=0.0)
    assert_orthogonal(basis)
    for seed in range(3):
        overlap = (basis.T @ two_iterations(seed, rounding=1e-16)).abs()
        torch.testing.assert_close(overlap.amax(0), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(overlap.sum(0), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-8)


def test_for_full_rank_it_is_the_published_iteration():
    matrix = random_moment(6, 9)
    basis = torch.linalg.qr(random_moment(6, 6, seed=3)).Q
    turned, order = power_iteration(matrix, basis)
    assert torch.equal(turned, torch.linalg.qr((matrix @ basis)[:, order]).Q)


def test_after_a_failed_eigendecomposition_iterations_converge_to_the_eigenvectors(monkeypatch):
    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    matrices = torch.stack((random_moment(5, 8, seed=1), random_moment(5, 8, seed=2)))
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    basis = eigenvectors(matrices)
    assert_orthogonal(basis)
    for _ in range(500):
        basis, _ = power_iteration(matrices, basis)
    rotated = basis.mT @ matrices @ basis
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6


def test_a_nan_without_an_error_in_float32_is_computed_again_in_float64(monkeypatch):
    """Seen with MKL: one block of a batch of 28, of rank one, came back as NaN without an error."""
    eigh = torch.linalg.eigh

    def silent(matrix: torch.Tensor) -> object:
        values, vectors = eigh(matrix)
        return values, torch.full_like(vectors, torch.nan) if matrix.dtype == torch.float32 else vectors

    matrix = random_moment(5, 8)
    monkeypatch.setattr(torch.linalg, "eigh", silent)
    basis = eigenvectors(matrix.float())
    assert basis.dtype == torch.float32
    rotated = basis.T.double() @ matrix @ basis.double()
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4


def test_old_columns_take_the_places_of_lost_ones_in_the_new_order():
    matrix, basis = torch.diag(torch.tensor([0.0, 0.0, 1.0])), torch.eye(3)
    moved, order = power_iteration(matrix.unsqueeze(0), basis.unsqueeze(0))
    assert order.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(moved[0].abs(), basis[:, [2, 0, 1]])
