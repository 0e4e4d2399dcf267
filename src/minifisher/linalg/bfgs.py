"""BFGS: an inverse Hessian matrix H from pairs (s, y), a change and the change of the gradient it causes."""

from __future__ import annotations

import torch
from torch import Tensor


def bfgs_update(inverse: Tensor, change: Tensor, gradient_change: Tensor) -> Tensor:
    """H <- (I - r s y^T) H (I - r y s^T) + r s s^T, r = 1 / s^T y (Nocedal, Wright 2006, eq. 6.17).

    H is [..., b, b], s and y are [..., b]. The result is exactly symmetric. Where s^T y is not positive
    (see `reciprocal`) it is H.
    """
    product = times(inverse, gradient_change)
    ratio = reciprocal(change, gradient_change)
    cross = outer(change, product)
    scale = ratio * (1 + ratio * dot(gradient_change, product))
    return inverse - ratio.unsqueeze(-1) * (cross + cross.mT) + scale.unsqueeze(-1) * outer(change, change)


def double_damped(
    change: Tensor, gradient_change: Tensor, product: Tensor, mu1: float, mu2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Double damping: s and y changed so that s^T y is large enough, and which pairs [...] were changed.

    (i) where s^T y < mu1 y^T H y: s <- theta s + (1 - theta) H y, so that s^T y = mu1 y^T H y;
    (ii) where then s^T y < mu2 s^T s: y <- theta y + (1 - theta) c s, so that s^T y = mu2 s^T s.
    (Goldfarb, Ren, Bahamou 2020, Section 4.) s, y and `product`, H y, are [..., b]. As published c = 1; here
    it is larger where mu2 is above 0.9, since theta is positive and finite only for c > mu2.
    """
    s, first = _interpolate(change, product, gradient_change, mu1, 1.0)
    y, second = _interpolate(gradient_change, s, s, mu2, max(1.0, mu2 / 0.9))
    return s, y, first | second


def _interpolate(
    vector: Tensor, target: Tensor, along: Tensor, least: float, scale: float
) -> tuple[Tensor, Tensor]:
    """w = theta v + (1 - theta) c t with the largest theta <= 1 for which w^T z >= mu t^T z; where theta < 1.

    v is `vector`, t `target`, z `along`, all [..., b]; mu is `least`, c `scale`.
    """
    found, full = dot(vector, along), dot(target, along)
    too_small = found < least * full
    theta = (scale - least) * full / (scale * full - found)
    theta = torch.where(too_small, theta, 1.0)
    return theta * vector + (1 - theta) * scale * target, too_small.squeeze(-1)


def limited_memory_middle(changes: Tensor, gradient_changes: Tensor) -> Tensor:
    """The matrix C [..., 2 m, 2 m] of the compact form of H after m BFGS updates of H_0 = I.

    H = I + [S Y] C [S Y]^T with C = [[R^-T (D + Y^T Y) R^-1, -R^-T], [-R^-1, 0]], R the upper triangle of
    S^T Y and D its diagonal (Byrd, Nocedal, Schnabel 1994, eq. 3.1). `changes` and `gradient_changes`
    [..., m, b] have the columns of S and Y as rows, the oldest first; a pair of zeros has no effect.
    """
    cross = changes @ gradient_changes.mT
    diagonal = cross.diagonal(dim1=-2, dim2=-1)
    empty = (diagonal == 0).to(diagonal.dtype)
    triangle = cross.triu() + torch.diag_embed(empty)
    identity = torch.eye(cross.shape[-1], dtype=cross.dtype, device=cross.device).expand_as(cross)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    inner = torch.diag_embed(diagonal) + gradient_changes @ gradient_changes.mT
    corner = inverse.mT @ inner @ inverse
    upper = torch.cat((corner, -inverse.mT), dim=-1)
    lower = torch.cat((-inverse, torch.zeros_like(inverse)), dim=-1)
    return torch.cat((upper, lower), dim=-2)


def limited_memory_product(
    changes: Tensor, gradient_changes: Tensor, middle: Tensor, matrix: Tensor
) -> Tensor:
    """H X = X + [S Y] C [S Y]^T X for X [..., b, k], with C from `limited_memory_middle`."""
    rows = torch.cat((changes, gradient_changes), dim=-2)
    return matrix + rows.mT @ (middle @ (rows @ matrix))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A x: [..., b, b] and [..., b] to [..., b]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """x^T y: [..., b] twice to [..., 1]."""
    return (left * right).sum(-1, keepdim=True)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """x y^T: [..., b] twice to [..., b, b]."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def reciprocal(change: Tensor, gradient_change: Tensor) -> Tensor:
    """1 / s^T y, [..., 1]; 0, with which an update changes nothing, where s^T y <= eps |s| |y|."""
    product = dot(change, gradient_change)
    lengths = torch.linalg.vector_norm(change, dim=-1) * torch.linalg.vector_norm(gradient_change, dim=-1)
    positive = product > torch.finfo(product.dtype).eps * lengths.unsqueeze(-1)
    ratio: Tensor = torch.where(positive, product, 1.0).reciprocal() * positive
    return ratio


def unit(change: Tensor, gradient_change: Tensor) -> tuple[Tensor, Tensor]:
    """s / |s| and y / |s|, zeros where s is zero or not finite: products of tiny s and y would underflow.

    The BFGS update is the same for both pairs.
    """
    length = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    known = (length > 0) & torch.isfinite(length)
    scale = torch.where(known, length, 1.0).reciprocal()
    return (
        torch.where(known, change * scale, 0.0),
        torch.where(known, gradient_change * scale, 0.0),
    )
