"""Inverses that begin at the last one: the Newton-Schulz iteration, and a measured residual."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.dense import inverse_power

_ITERATIONS = 12  # a warm start takes 2 or 3; a cold one squares the distance from the identity every time
_NEAR = 0.9  # a last inverse that is farther off than this is no start


def newton_schulz_inverse(matrices: Tensor, start: Tensor) -> Tensor:
    """A^-1 for symmetric positive definite A, from an inverse of a matrix that was near: both [..., b, b].

    X <- X (2 I - A X), so that I - A X is squared in every iteration (Schulz 1933; Ben-Israel, Cohen, "On
    Iterative Computation of Generalized Inverses and Associated Projections", 1966). Where the start is no
    start, |I - A X| >= 0.9, it is I / |A|. The residual |A X - I| is measured, in every iteration and for
    every matrix: where it ends above 100 eps b, Cholesky does the work.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    tolerance = 100 * torch.finfo(matrices.dtype).eps * matrices.shape[-1]
    inverse, distance = _start(matrices, start, identity)
    for _ in range(_ITERATIONS):
        if not (distance > tolerance).any():
            break
        inverse = inverse @ (2 * identity - matrices @ inverse)
        distance = _distance(matrices, inverse, identity)
    # A product of rounded factors is not quite symmetric, and what starts from it less so every time.
    inverse = (inverse + inverse.mT) / 2
    failed = ~(distance <= tolerance)
    if failed.any():
        inverse[failed] = inverse_power(matrices[failed], 1.0)
    return inverse


def _start(matrices: Tensor, start: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    distance = _distance(matrices, start, identity)
    far = ~(distance < _NEAR)
    cold = identity / torch.linalg.matrix_norm(matrices)[..., None, None]
    inverse = torch.where(far[..., None, None], cold, start)
    return inverse, torch.where(far, _distance(matrices, cold, identity), distance)


def _distance(matrices: Tensor, inverses: Tensor, identity: Tensor) -> Tensor:
    """The Frobenius norm of A X - I, [...]."""
    norm: Tensor = torch.linalg.matrix_norm(matrices @ inverses - identity)
    return norm
