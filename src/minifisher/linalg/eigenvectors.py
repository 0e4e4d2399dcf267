"""Orthogonal bases that follow the eigenvectors of a slowly changing matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.dense import eigenbasis


def eigenvectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of symmetric A [..., b, b] as columns, the largest eigenvalue first.

    Where eigenvalues are zero, A fixes the space of their eigenvectors and no basis of it, and rounding
    errors would choose one: chosen are the eigenvectors of diag(b, ..., 2, 1) restricted to that space. Where
    the eigendecomposition fails, one power iteration from the identity instead: an orthogonal basis from
    which later iterations go on.
    """
    if matrices.shape[-1] == 1:
        return torch.ones_like(matrices)
    values, vectors = (found.flip(-1) for found in eigenbasis(matrices))
    vectors = vectors @ _turn_of_null_space(values, vectors)
    if torch.isfinite(vectors).all():
        return vectors
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(
        torch.isfinite(vectors), vectors, power_iteration(matrices, identity.expand_as(matrices))[0]
    )


def _turn_of_null_space(values: Tensor, vectors: Tensor) -> Tensor:
    """The rotation [..., b, b] of the columns without an eigenvalue among themselves; the others stay."""
    null = values <= _negligible(values)
    ramp = torch.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=values.device)
    restricted = (vectors.mT * ramp) @ vectors
    # No eigenvalue of what is restricted is above b: the others come first, each an eigenvector by itself.
    others = torch.diag_embed(2 * values.shape[-1] + ramp)
    return eigenbasis(torch.where(null[..., :, None] & null[..., None, :], restricted, others))[1].flip(-1)


def _negligible(sizes: Tensor) -> Tensor:
    """Below it half of the digits of a size [..., b] or more are rounding errors of the largest, [..., 1]."""
    level: Tensor = torch.finfo(sizes.dtype).eps ** 0.5 * sizes.amax(-1, keepdim=True)
    return level


def power_iteration(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the orthogonal iteration: Q' R = A Q, the columns of Q sorted by q^T A q, largest first.

    Where A Q has not full rank, columns of Q stand in for what it lost, so that none is made of rounding
    errors. A and Q are [..., b, b]; the order in which the columns were taken, [..., b], comes with the new
    basis. (Golub, Van Loan, "Matrix Computations", Section 8.2.4.)
    """
    product = matrices @ basis
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_basis, sorted_product = (t.take_along_dim(order.unsqueeze(-2), -1) for t in (basis, product))
    turned, lengths = torch.linalg.qr(sorted_product)
    lengths = lengths.diagonal(dim1=-2, dim2=-1).abs()
    lost = lengths <= _negligible(lengths)
    if lost.any():
        turned = torch.linalg.qr(torch.where(lost.unsqueeze(-2), sorted_basis, turned)).Q
    return turned, order
