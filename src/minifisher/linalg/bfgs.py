"""BFGS: what pairs (s, y) of a change and the change of the gradient tell about an inverse Hessian matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def bfgs_update(inverse: Tensor, change: Tensor, gradient_change: Tensor) -> Tensor:
    """H <- (I - r s y^T) H (I - r y s^T) + r s s^T, r = 1 / s^T y (Nocedal, Wright 2006, eq. 6.17).

    H is [..., b, b], s and y are [..., b]. Symmetric to the last bit; H as it was where s^T y is not clearly
    positive.
    """
    product = times(inverse, gradient_change)
    ratio = reciprocal(change, gradient_change)
    cross = outer(change, product)
    scale = ratio * (1 + ratio * dot(gradient_change, product))
    return inverse - ratio.unsqueeze(-1) * (cross + cross.mT) + scale.unsqueeze(-1) * outer(change, change)


def double_damped(
    change: Tensor, gradient_change: Tensor, product: Tensor, mu1: float, mu2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Powell's damping twice, and which pairs [...] it changed (Goldfarb, Ren, Bahamou 2020, Section 4).

    (i) where s^T y <= mu1 y^T H y: s <- theta s + (1 - theta) H y, so that s^T y = mu1 y^T H y;
    (ii) where then s^T y <= mu2 s^T s: y <- theta y + (1 - theta) b s, so that s^T y = mu2 s^T s.
    s, y and the product H y are [..., b]. As published b = 1; it grows where mu2 comes near to it or above.
    """
    s, first = _pull(change, product, gradient_change, mu1, 1.0)
    y, second = _pull(gradient_change, s, s, mu2, max(1.0, mu2 / 0.9))
    return s, y, first | second


def _pull(vector: Tensor, target: Tensor, along: Tensor, least: float, scale: float) -> tuple[Tensor, Tensor]:
    """Theta v + (1 - theta) b t, its product with z at least `least` t^T z; and where theta < 1."""
    have, want = dot(vector, along), dot(target, along)
    short = have < least * want
    theta = (scale - least) * want / (scale * want - have)
    theta = torch.where(short, theta, 1.0)
    return theta * vector + (1 - theta) * scale * target, short.squeeze(-1)


def limited_memory_middle(changes: Tensor, gradient_changes: Tensor) -> Tensor:
    """The matrix [..., 2 m, 2 m] in the middle of the compact form of m pairs, oldest first, on H_0 = I.

    H = I + [S Y] C [S Y]^T with C = [[R^-T (D + Y^T Y) R^-1, -R^-T], [-R^-1, 0]], R the upper triangle of
    S^T Y and D its diagonal (Byrd, Nocedal, Schnabel 1994, eq. 3.1). S and Y are the rows [..., m, b]; a pair
    of zeros counts as none.
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
    """H X = X + [S Y] C [S Y]^T X for X [..., b, k]."""
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
    """1 / s^T y, [..., 1]; 0, which makes an update none, where it is lost in rounding or not positive."""
    product = dot(change, gradient_change)
    lengths = torch.linalg.vector_norm(change, dim=-1) * torch.linalg.vector_norm(gradient_change, dim=-1)
    positive = product > torch.finfo(product.dtype).eps * lengths.unsqueeze(-1)
    ratio: Tensor = torch.where(positive, product, 1.0).reciprocal() * positive
    return ratio


def unit(change: Tensor, gradient_change: Tensor) -> tuple[Tensor, Tensor]:
    """s / |s| and y / |s|: the same pair to BFGS, far from underflow; zeros where s is zero or not finite."""
    length = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    known = (length > 0) & torch.isfinite(length)
    scale = torch.where(known, length, 1.0).reciprocal()
    return (
        torch.where(known, change * scale, 0.0),
        torch.where(known, gradient_change * scale, 0.0),
    )
