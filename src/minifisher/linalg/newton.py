"""Inverses and inverse roots by iterations of matrix products, each with a residual that is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.dense import inverse_power

# ---- the coupled Newton iteration for inverse roots ----

_ROOT_ITERATIONS = 50  # a condition number of 1e12 takes about 45
_CONTRACTING = 0.5  # within this distance of the identity, the distance decreases in every iteration


def newton_inverse_root(matrices: Tensor, root: int) -> tuple[Tensor, Tensor]:
    """X = A^(-1/p) for symmetric positive definite A, [..., b, b], and its residual max |X^p A - I|, [...].

    With M_0 = z A, X_0 = z^(1/p) I and z = (1 + p) / (2 |A|): T = I + (I - M) / p, X <- X T, M <- T^p M, so
    that M = X^p A tends to I. (Iannazzo, "On the Newton Method for the Matrix P-th Root", 2006; Anil,
    Gupta, Koren, Regan, Singer, "Scalable Second Order Optimization for Deep Learning", 2020, arXiv
    2002.09018.) The residual is computed from A and X, because rounding errors separate M from X^p A. It is
    infinite or NaN where the iteration broke down; the caller decides which residual is acceptable.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    scale = (1 + root) / (2 * torch.linalg.matrix_norm(matrices))[..., None, None]
    product, result = scale * matrices, scale ** (1 / root) * identity
    distance = _largest_difference(product, identity)
    for _ in range(_ROOT_ITERATIONS):
        factor = identity + (identity - product) / root
        next_product = torch.linalg.matrix_power(factor, root) @ product
        next_distance = _largest_difference(next_product, identity)
        # Near the identity, a distance that no longer decreases is rounding. Every matrix stops on its own.
        improved = (next_distance < distance) | ((distance > _CONTRACTING) & next_distance.isfinite())
        if not improved.any():
            break
        result = torch.where(improved[..., None, None], result @ factor, result)
        product = torch.where(improved[..., None, None], next_product, product)
        distance = torch.where(improved, next_distance, distance)
    return result, _largest_difference(torch.linalg.matrix_power(result, root) @ matrices, identity)


def _largest_difference(matrices: Tensor, identity: Tensor) -> Tensor:
    return (matrices - identity).abs().amax((-2, -1))


# ---- the Newton-Schulz iteration for inverses ----

_INVERSE_ITERATIONS = 12  # a start near the inverse takes 2 or 3
_FARTHEST_START = 0.9  # the iteration converges from a residual below 1; close to 1 it is slow


def newton_schulz_inverse(matrices: Tensor, start: Tensor) -> Tensor:
    """A^-1 for symmetric positive definite A, from the inverse of a matrix near A: both [..., b, b].

    X <- X (2 I - A X), which squares the residual I - A X in every iteration (Schulz 1933; Ben-Israel, Cohen,
    "On Iterative Computation of Generalized Inverses and Associated Projections", 1966). Where the start is
    too far away, |I - A X| >= 0.9, the iteration starts from I / |A|. The residual of every matrix is
    measured in every iteration; a matrix whose residual stays above 100 eps b is inverted by Cholesky.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    tolerance = 100 * torch.finfo(matrices.dtype).eps * matrices.shape[-1]
    inverse, residual = _usable_start(matrices, start, identity)
    for _ in range(_INVERSE_ITERATIONS):
        if not (residual > tolerance).any():
            break
        inverse = inverse @ (2 * identity - matrices @ inverse)
        residual = _residual(matrices, inverse, identity)
    # Rounding makes the product slightly unsymmetric, and the error would grow from one start to the next.
    inverse = (inverse + inverse.mT) / 2
    failed = ~(residual <= tolerance)
    if failed.any():
        inverse[failed] = inverse_power(matrices[failed], 1.0)
    return inverse


def _usable_start(matrices: Tensor, start: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """The start, or I / |A| where that is too far from the inverse, and its residual."""
    residual = _residual(matrices, start, identity)
    far = ~(residual < _FARTHEST_START)
    cold = identity / torch.linalg.matrix_norm(matrices)[..., None, None]
    inverse = torch.where(far[..., None, None], cold, start)
    return inverse, torch.where(far, _residual(matrices, cold, identity), residual)


def _residual(matrices: Tensor, inverses: Tensor, identity: Tensor) -> Tensor:
    """The Frobenius norm of A X - I, [...]."""
    norm: Tensor = torch.linalg.matrix_norm(matrices @ inverses - identity)
    return norm
