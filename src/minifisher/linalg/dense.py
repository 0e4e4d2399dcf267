"""Inverses, powers and eigenvectors of batches of dense symmetric positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

_MOST_ATTEMPTS = 6  # the added damping grows tenfold each time, to eps * 1e5 of the mean diagonal


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for tensors stored in half precision."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def smallest_relative_pivot(dtype: torch.dtype) -> float:
    """A pivot of a factorisation below this times its diagonal entry is nothing but rounding error."""
    return 8 * torch.finfo(dtype).eps


def add_to_diagonal(matrices: Tensor, values: Tensor | float) -> Tensor:
    """A + diag(values): matrices [..., b, b], values [..., b] or a number; a new tensor."""
    damped = matrices.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(values)
    return damped


# ---- inverses and powers ----


def inverse_power(matrices: Tensor, power: float) -> Tensor:
    """A^(-power) for symmetric positive definite A, [..., b, b]; NaN where it cannot be computed.

    A matrix in half precision is computed in float32. For power 1, a matrix that is not numerically positive
    definite gets multiples of its mean diagonal added, each ten times the last, until it is.
    """
    working = matrices.to(working_dtype(matrices.dtype))
    result = _inverse(working) if power == 1.0 else _power_by_eigenvalues(working, -power)
    return result.to(matrices.dtype)


def _inverse(matrices: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrices)
    if info.any():
        factor = _factorise_with_more_damping(matrices, factor, info > 0)
    return torch.cholesky_inverse(factor)


def inverse_without_sync(matrices: Tensor) -> Tensor:
    """A^-1, [..., b, b], NaN where A is not positive definite; the CPU does not wait for the device.

    So a CUDA graph can record it. Unlike `inverse_power` it cannot try again with more damping.
    """
    factor, info = torch.linalg.cholesky_ex(matrices)
    failed = (info > 0)[..., None, None]
    # LAPACK raises an error for a factor with a zero on its diagonal.
    factor = torch.where(
        failed, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device), factor
    )
    return torch.where(failed, torch.nan, torch.cholesky_inverse(factor))


def _factorise_with_more_damping(matrices: Tensor, factor: Tensor, failed: Tensor) -> Tensor:
    """Cholesky factors where the factorisation failed the first time; NaN where every attempt fails."""
    factor = factor.clone()
    share = torch.finfo(matrices.dtype).eps
    mean = matrices.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True)
    for _ in range(_MOST_ATTEMPTS):
        attempt, info = torch.linalg.cholesky_ex(add_to_diagonal(matrices[failed], share * mean[failed]))
        factor[failed] = torch.where((info == 0)[..., None, None], attempt, torch.nan)
        failed = failed.masked_scatter(failed, info > 0)
        if not failed.any():
            break
        share *= 10
    return factor


def _power_by_eigenvalues(matrices: Tensor, exponent: float) -> Tensor:
    values, vectors = eigendecomposition(matrices)
    floor = torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    powers = values.clamp_min(floor.clamp_min(torch.finfo(values.dtype).tiny)).pow(exponent)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


# ---- eigenvalues and eigenvectors ----


def eigendecomposition(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., b], ascending, and eigenvectors, the columns of [..., b, b]; NaN where it fails.

    The matrices are symmetric, in float32 or float64. float64 is tried where LAPACK does not converge, and
    where it returns NaN without an error, which was seen for matrices of low rank in float32.
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
