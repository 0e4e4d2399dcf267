"""Inverses and roots of batches of dense symmetric positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from minifisher.linalg.damping import LEAST_SCALE

_ESCALATIONS = 6  # damping grows tenfold each time: a million-fold in all, then the matrix is given up

NO_CURVATURE = LEAST_SCALE  # until every method calls minifisher.linalg.damping


def pivot_share(dtype: torch.dtype) -> float:
    """The least pivot of a factorisation, as a share of the diagonal: below, it is rounding."""
    return 8 * torch.finfo(dtype).eps


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: half precision only stores."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def add_to_diagonal(matrices: Tensor, values: Tensor | float) -> Tensor:
    """A + diag(values): matrices [..., b, b], values [..., b] or a number; a new tensor."""
    damped = matrices.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(values)
    return damped


def inverse_power(matrices: Tensor, power: float) -> Tensor:
    """A^(-power) for symmetric positive definite A, [..., b, b]; NaN where a matrix is beyond repair.

    Half precision is computed in float32. A matrix that is not numerically positive definite gets a growing
    multiple of its mean diagonal added until it is.
    """
    working = matrices.to(working_dtype(matrices.dtype))
    result = _inverse(working) if power == 1.0 else _eigen_power(working, -power)
    return result.to(matrices.dtype)


def _inverse(matrices: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        factor = _escalate(matrices, factor, failed > 0)
    return torch.cholesky_inverse(factor)


def cholesky_inverse(matrices: Tensor) -> Tensor:
    """A^-1, [..., b, b], without asking the device whether it exists; NaN where it does not."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    failed = (failed > 0)[..., None, None]
    # LAPACK raises for a factor with a zero on its diagonal.
    factor = torch.where(
        failed, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device), factor
    )
    return torch.where(failed, torch.nan, torch.cholesky_inverse(factor))


def _escalate(matrices: Tensor, factor: Tensor, failed: Tensor) -> Tensor:
    """Refactorise the failed matrices with more and more damping; NaN for those that never succeed."""
    factor = factor.clone()
    share = torch.finfo(matrices.dtype).eps
    mean = matrices.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True)
    for _ in range(_ESCALATIONS):
        attempt, info = torch.linalg.cholesky_ex(add_to_diagonal(matrices[failed], share * mean[failed]))
        factor[failed] = torch.where((info == 0)[..., None, None], attempt, torch.nan)
        failed = failed.masked_scatter(failed, info > 0)
        if not failed.any():
            break
        share *= 10
    return factor


def eigenbasis(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., b] and eigenvectors, the columns of [..., b, b]; NaN for a matrix beyond repair.

    The matrices are symmetric, in float32 or float64. Where LAPACK does not converge float64 is tried, and
    where it returns NaN without a word, as it was seen to do for low rank in float32.
    """
    usable = torch.isfinite(matrices).all(-1).all(-1)
    values, vectors = _eigh(torch.where(usable[..., None, None], matrices, 0.0))
    return torch.where(usable[..., None], values, torch.nan), torch.where(
        usable[..., None, None], vectors, torch.nan
    )


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    for dtype in (matrices.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrices.to(dtype))
        except LinAlgError:
            continue
        if torch.isfinite(vectors).all():
            return values.to(matrices.dtype), vectors.to(matrices.dtype)
    return torch.full_like(matrices[..., 0], torch.nan), torch.full_like(matrices, torch.nan)


def _eigen_power(matrices: Tensor, exponent: float) -> Tensor:
    values, vectors = eigenbasis(matrices)
    floor = torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    powers = values.clamp_min(floor.clamp_min(torch.finfo(values.dtype).tiny)).pow(exponent)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT
