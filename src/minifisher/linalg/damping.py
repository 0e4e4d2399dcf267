"""Relative damping: lambda is a fraction of the curvature that is there, by one rule for all methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SCALE = 1e-30
"""The least value of a scale that is divided by. A weight that never had a gradient has curvature zero and
direction zero; any positive scale gives the right quotient, zero, where a zero would give NaN."""


def curvature_scale(block_mean: Tensor, layer_mean: Tensor) -> Tensor:
    """The scale c = (block_mean + layer_mean) / 2, at least 1e-30, of relative damping lambda = damping * c.

    Each mean is that of the diagonal of the curvature matrix, over one block and over the whole layer. The
    two shapes are broadcast. With the layer's mean, a block without curvature, such as that of a dead unit,
    is still damped. Returns a new tensor.
    """
    return (block_mean + layer_mean).mul_(0.5).clamp_min_(LEAST_SCALE)


def above_rounding(levels: Tensor, matrices: Tensor, kept: torch.dtype) -> Tensor:
    """lambda, [...], at least eps times the largest diagonal entry where matrices are kept in less precision.

    Matrices [..., b, b] are in the dtype to compute in, and eps is that of `kept`. Rounding to half precision
    can leave a matrix indefinite. Damping by twice the largest rounding error of an entry was enough; a bound
    for all cases, the sum over a row, hides too much. A single number stays positive.
    """
    if kept == matrices.dtype or matrices.shape[-1] == 1:
        return levels
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    return torch.maximum(levels, torch.finfo(kept).eps * largest)
