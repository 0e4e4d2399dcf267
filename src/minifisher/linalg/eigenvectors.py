"""Eigenvectors of symmetric matrices, and the iteration by which they follow a slowly changing matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.dense import eigendecomposition


def eigenvectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of symmetric A [..., b, b] as columns, the largest eigenvalue first.

    Any orthonormal basis of the null space of A would do, and rounding errors would pick one. To make the
    result reproducible, the basis is that of the eigenvectors of diag(b, ..., 2, 1) restricted to the null
    space. Where the eigendecomposition fails, the result is one power iteration from the identity: an
    orthogonal basis that later iterations improve.
    """
    if matrices.shape[-1] == 1:
        return torch.ones_like(matrices)
    values, vectors = (found.flip(-1) for found in eigendecomposition(matrices))
    vectors = vectors @ _null_space_rotation(values, vectors)
    if torch.isfinite(vectors).all():
        return vectors
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(
        torch.isfinite(vectors), vectors, power_iteration(matrices, identity.expand_as(matrices))[0]
    )


def _null_space_rotation(values: Tensor, vectors: Tensor) -> Tensor:
    """The rotation [..., b, b] that gives the null space its reproducible basis; other columns stay."""
    null = values <= _rounding_level(values)
    weights = torch.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=values.device)
    restricted = (vectors.mT * weights) @ vectors
    # No eigenvalue of the restricted matrix is above b. Above 2 b, the other columns come first, unchanged.
    others = torch.diag_embed(2 * values.shape[-1] + weights)
    both = torch.where(null[..., :, None] & null[..., None, :], restricted, others)
    return eigendecomposition(both)[1].flip(-1)


def _rounding_level(sizes: Tensor) -> Tensor:
    """sqrt(eps) times the largest size, [..., 1]: half or more of the digits of smaller ones are rounding."""
    level: Tensor = torch.finfo(sizes.dtype).eps ** 0.5 * sizes.amax(-1, keepdim=True)
    return level


def power_iteration(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One orthogonal iteration Q' R = A Q, the columns of Q sorted by q^T A q, the largest first.

    A and Q are [..., b, b]. Returns Q' and the order in which the columns of Q were taken, [..., b]. Where
    A Q does not have full rank, the old columns of Q replace those of Q' that would consist of rounding
    errors. (Golub, Van Loan, "Matrix Computations", Section 8.2.4.)
    """
    product = matrices @ basis
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_basis, sorted_product = (t.take_along_dim(order.unsqueeze(-2), -1) for t in (basis, product))
    new_basis, triangle = torch.linalg.qr(sorted_product)
    lengths = triangle.diagonal(dim1=-2, dim2=-1).abs()
    lost = lengths <= _rounding_level(lengths)
    if lost.any():
        new_basis = torch.linalg.qr(torch.where(lost.unsqueeze(-2), sorted_basis, new_basis)).Q
    return new_basis, order
