"""Orthogonal bases that follow the eigenvectors of a slowly changing matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.spd import eigenbasis


def eigenvectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of symmetric A [..., b, b] as columns, the largest eigenvalue first.

    Where the eigendecomposition fails, one power iteration from the identity instead: an orthogonal basis
    from which later iterations go on.
    """
    if matrices.shape[-1] == 1:
        return torch.ones_like(matrices)
    vectors = eigenbasis(matrices)[1].flip(-1)
    if torch.isfinite(vectors).all():
        return vectors
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(
        torch.isfinite(vectors), vectors, power_iteration(matrices, identity.expand_as(matrices))[0]
    )


def power_iteration(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the orthogonal iteration: Q' R = A Q, the columns of Q sorted by q^T A q, largest first.

    A and Q are [..., b, b]; the order in which the columns were taken, [..., b], comes with the new basis.
    (Golub, Van Loan, "Matrix Computations", Section 8.2.4.)
    """
    product = matrices @ basis
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_product = product.take_along_dim(order.unsqueeze(-2), -1)
    turned: Tensor = torch.linalg.qr(sorted_product).Q
    return turned, order
