"""Small symmetric blocks held as packed lower triangles: averaged, damped and solved, no inverse stored.

The blocks of one row of a weight lie in tiles of up to sixteen, as [rows, tiles, entries, lanes]: the same
entry (i, j), j <= i, at i (i + 1) / 2 + j, of all blocks of a tile side by side, so that one vector register
holds it and sixteen blocks are factorised at once. Lanes behind the last block of a row stay zero.

The functions here take any leading dimensions; weights are [..., rows, length], means [..., 1]. Each has a
reference in torch, and leaves that serve where their tensors suit: loops compiled by numba on the CPU, a
kernel compiled by triton on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minifisher.kernels.choose import fits_compiled, fits_gpu
from minifisher.linalg.dense import NO_CURVATURE, pivot_share, working_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from minifisher.curvature import FirstOrderStep as FirstOrderPass
    from minifisher.linalg.blocks import BlockReading

LANES = 16
WIDEST = 49
"""The widest block that is packed, a 7x7 kernel: docs/performance.md has the measurement."""
WIDEST_ON_GPU = 16
"""The widest one whose triangle fits into the registers of a thread there."""


@dataclass(frozen=True)
class Tiling:
    """How the blocks of a weight lie in tiles."""

    reading: BlockReading

    @property
    def tiles(self) -> int:
        """Of one row."""
        return max(1, math.ceil(self.reading.blocks / LANES))

    @property
    def lanes(self) -> int:
        """Blocks of one tile: as even as they come, so that few lanes stay empty."""
        return math.ceil(self.reading.blocks / self.tiles)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[rows, tiles, entries, lanes]."""
        width = self.reading.width
        return self.reading.rows, self.tiles, width * (width + 1) // 2, self.lanes

    def vectors(self, rows: Tensor) -> Tensor:
        """A weight [..., rows, length] as [..., rows, tiles, width, lanes]."""
        width, places = self.reading.width, self.tiles * self.lanes
        padded = F.pad(rows, (0, places * width - rows.shape[-1]))
        return padded.view(*rows.shape[:-1], self.tiles, self.lanes, width).mT

    def rows(self, vectors: Tensor) -> Tensor:
        """The inverse of `vectors`."""
        return vectors.mT.flatten(-3)[..., : self.reading.length]

    def pack(self, blocks: Tensor) -> Tensor:
        """Whole symmetric blocks [..., rows, blocks, b, b] to packed triangles."""
        i, j = torch.tril_indices(self.reading.width, self.reading.width, device=blocks.device)
        triangles = blocks[..., i, j]
        padded = F.pad(triangles, (0, 0, 0, self.tiles * self.lanes - self.reading.blocks))
        return torch.unflatten(padded, -2, (self.tiles, self.lanes)).mT.contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        triangles = packed.mT.flatten(-3, -2)[..., : self.reading.blocks, :]
        return triangles[..., _entries(self.reading.width, packed.device)]

    def true_entries(self, like: Tensor) -> Tensor:
        """Of every block, at least one, [tiles, lanes]."""
        starts = torch.arange(self.tiles * self.lanes, device=like.device) * self.reading.width
        count = (self.reading.length - starts).clamp(1, self.reading.width)
        return count.view(self.tiles, self.lanes).to(like.dtype)


def _entries(width: int, device: torch.device) -> Tensor:
    """The place of entry (i, j) in the triangle, [width, width]."""
    index = torch.arange(width, device=device)
    larger, smaller = torch.maximum(index[:, None], index), torch.minimum(index[:, None], index)
    return larger * (larger + 1) // 2 + smaller


# ---- the three passes ----


def average(packed: Tensor, gradient: Tensor, tiling: Tiling, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T in place, for the gradient [..., rows, length]."""
    leaf = _leaf(packed, gradient)
    if leaf is not None:
        leaf.average(_flat(packed, 3), _flat(gradient, 1), width=tiling.reading.width, decay=decay)
        return
    vectors = tiling.vectors(gradient.to(working_dtype(packed.dtype)))
    i, j = torch.tril_indices(tiling.reading.width, tiling.reading.width, device=packed.device)
    fresh = vectors.index_select(-2, i) * vectors.index_select(-2, j)
    packed.copy_(fresh.mul_(1 - decay).add_(packed.to(fresh.dtype) * decay))


def solve(
    packed: Tensor, momentum: Tensor, means: Tensor, tiling: Tiling, damping: float, relative: bool
) -> Tensor:
    """(F_b + lambda_b I)^-1 m_b for every block, [..., rows, length].

    lambda_b is `damping`, or relative: that times the mean of the block's and the layer's mean curvature,
    the latter in `means` [..., 1].
    """
    leaf = _leaf(packed, momentum, means)
    if leaf is not None:
        numbers = {"width": tiling.reading.width, "damping": damping, "relative": relative}
        solved: Tensor = leaf.solve(_flat(packed, 3), _flat(momentum, 1), _of_rows(means, tiling), **numbers)[
            0
        ]
        return solved.view(momentum.shape)
    triangles = packed.to(working_dtype(packed.dtype))
    levels = _levels(triangles, means, tiling, damping) if relative else triangles.new_tensor(damping)
    vectors = tiling.vectors(momentum.to(triangles.dtype))
    return tiling.rows(_ldl_solve(triangles, levels, vectors)).to(momentum.dtype)


def advance(
    packed: Tensor,
    gradient: Tensor,
    means: Tensor,
    first_order: FirstOrderPass,
    tiling: Tiling,
    *,
    decay: float,
    damping: float,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first-order pass over D, M and V, `average` and `solve` in one; None where no leaf fits.

    Returns the direction [..., rows, length] and two lengths [..., 1], its own and the first-order step's.
    """
    momentum, moment = first_order.momentum, first_order.second_moment
    leaf = _leaf(packed, gradient, momentum, means, *(() if moment is None else (moment,)))
    if leaf is None:
        return None
    shape = gradient.shape
    flat = [None if t is None else _flat(t.view(shape), 1) for t in (gradient, momentum, moment)]
    direction, *squares = leaf.advance(
        _flat(packed, 3),
        flat[0],
        flat[1],
        flat[2],
        _of_rows(means, tiling),
        width=tiling.reading.width,
        decay=decay,
        damping=damping,
        relative=relative,
        mu=first_order.momentum_decay,
        moment_decay=first_order.second_moment_decay,
        epsilon=first_order.epsilon,
    )
    own, other = (s.view(*shape[:-1]).sum(-1, keepdim=True).sqrt().to(gradient.dtype) for s in squares)
    return direction.view(shape), own, other.mul_(first_order.scale)


# ---- leaves ----


def _leaf(packed: Tensor, *weights: Tensor) -> ModuleType | None:
    """The leaf whose functions take these tensors; None: the reference does."""
    # Imported only when used: numba takes most of a second, triton more.
    if fits_compiled(*weights) and fits_compiled(packed, halves=True):
        from minifisher.kernels import packed_cpu as _packed_cpu

        return _packed_cpu
    narrow = packed.shape[-2] <= WIDEST_ON_GPU * (WIDEST_ON_GPU + 1) // 2
    if narrow and fits_gpu(*weights) and fits_gpu(packed, halves=True):
        from minifisher.kernels import packed_triton as _packed_triton

        return _packed_triton
    return None


def _flat(tensor: Tensor, trailing: int) -> Tensor:
    """All rows of all layers one after another."""
    return tensor.reshape(-1, *tensor.shape[tensor.ndim - trailing :])


def _of_rows(means: Tensor, tiling: Tiling) -> Tensor:
    """The layer's mean for every row, [all rows]."""
    return means.reshape(-1, 1).expand(-1, tiling.reading.rows).flatten()


# ---- the reference ----


def _levels(triangles: Tensor, means: Tensor, tiling: Tiling, damping: float) -> Tensor:
    """lambda_b of relative damping, [..., rows, tiles, lanes]."""
    width = tiling.reading.width
    diagonal = _entries(width, triangles.device).diagonal()
    trace = triangles.index_select(-2, diagonal).sum(-2)
    scale = 0.5 * (trace / tiling.true_entries(triangles) + means.to(triangles.dtype)[..., None, None])
    return damping * scale.clamp_min(NO_CURVATURE)


def _ldl_solve(triangles: Tensor, levels: Tensor, vectors: Tensor) -> Tensor:
    """(F_b + lambda_b I)^-1 x_b by F_b + lambda_b I = L P L^T, column by column, all blocks at once.

    Triangles are [..., entries, lanes], levels [..., lanes] or [], vectors [..., width, lanes]. A pivot that
    rounding made smaller than its share of the diagonal is lifted to it.
    """
    width = vectors.shape[-2]
    rest = triangles[..., _entries(width, triangles.device), :].clone()  # [..., width, width, lanes]
    rest.diagonal(dim1=-3, dim2=-2).add_(levels.unsqueeze(-1) if levels.ndim else levels)
    least = rest.diagonal(dim1=-3, dim2=-2).mul(pivot_share(rest.dtype)).clamp_min(NO_CURVATURE)
    solved, columns, pivots = vectors.clone(), [], []
    for k in range(width):
        pivot = torch.maximum(rest[..., k, k, :], least[..., k])
        below = rest[..., k + 1 :, k, :]
        column = below / pivot.unsqueeze(-2)
        solved[..., k + 1 :, :] -= column * solved[..., k : k + 1, :]
        rest[..., k + 1 :, k + 1 :, :] -= column.unsqueeze(-2) * below.unsqueeze(-3)
        columns.append(column)
        pivots.append(pivot)
    solved /= torch.stack(pivots, dim=-2)
    for k in range(width - 2, -1, -1):
        solved[..., k, :] -= (columns[k] * solved[..., k + 1 :, :]).sum(-2)
    return solved
