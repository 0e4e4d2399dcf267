"""Small symmetric blocks stored as packed lower triangles, which are averaged, damped and solved.

No inverse is stored: every step factorises the blocks anew. The blocks of one row of a weight are grouped in
tiles of up to sixteen, stored as [rows, tiles, entries, blocks]: entry (i, j), j <= i, of the triangles has
index i (i + 1) / 2 + j, and the same entry of all blocks of a tile is contiguous, so that one vector register
holds it and sixteen blocks are factorised at once. A last tile with fewer blocks is filled with zeros.

All functions take any leading dimensions; weights are [..., rows, length], means [..., 1]. Each has a
reference in torch. Compiled kernels with the same results up to rounding take over where the tensors suit
them: `packed_cpu` (numba) on the CPU and `packed_triton` on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minifisher.curvature import Measures
from minifisher.kernels.choose import suits_numba, suits_triton
from minifisher.linalg.damping import LEAST_SCALE, curvature_scale
from minifisher.linalg.dense import smallest_relative_pivot, working_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from minifisher.linalg.blocks import BlockReading

MOST_BLOCKS_OF_A_TILE = 16
WIDEST = 49
"""The widest block that is stored packed, that of a 7x7 convolution: docs/performance.md has measurements."""
WIDEST_ON_GPU = 16
"""The widest block whose triangle fits into the registers of one GPU thread."""


@dataclass(frozen=True)
class Tiling:
    """How the blocks of a weight are grouped in tiles."""

    reading: BlockReading

    @property
    def tiles(self) -> int:
        """The number of tiles of one row."""
        return max(1, math.ceil(self.reading.blocks / MOST_BLOCKS_OF_A_TILE))

    @property
    def blocks_per_tile(self) -> int:
        """The number of blocks of one tile: spread evenly, so that the last tile has little filling."""
        return math.ceil(self.reading.blocks / self.tiles)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the packed triangles, [rows, tiles, entries, blocks]."""
        width = self.reading.width
        return self.reading.rows, self.tiles, width * (width + 1) // 2, self.blocks_per_tile

    def vectors(self, rows: Tensor) -> Tensor:
        """A weight [..., rows, length] as [..., rows, tiles, width, blocks]."""
        width, blocks = self.reading.width, self.tiles * self.blocks_per_tile
        padded = F.pad(rows, (0, blocks * width - rows.shape[-1]))
        return padded.view(*rows.shape[:-1], self.tiles, self.blocks_per_tile, width).mT

    def rows(self, vectors: Tensor) -> Tensor:
        """The inverse of `vectors`: [..., rows, tiles, width, blocks] to [..., rows, length]."""
        return vectors.mT.flatten(-3)[..., : self.reading.length]

    def pack(self, blocks: Tensor) -> Tensor:
        """Dense symmetric blocks [..., rows, blocks, b, b] to packed triangles."""
        i, j = torch.tril_indices(self.reading.width, self.reading.width, device=blocks.device)
        triangles = blocks[..., i, j]
        padded = F.pad(triangles, (0, 0, 0, self.tiles * self.blocks_per_tile - self.reading.blocks))
        return torch.unflatten(padded, -2, (self.tiles, self.blocks_per_tile)).mT.contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`: packed triangles to dense blocks [..., rows, blocks, b, b]."""
        triangles = packed.mT.flatten(-3, -2)[..., : self.reading.blocks, :]
        return triangles[..., _entry_indices(self.reading.width, packed.device)]

    def block_lengths(self, like: Tensor) -> Tensor:
        """The number of entries of every block without padding, at least 1, [tiles, blocks]."""
        starts = torch.arange(self.tiles * self.blocks_per_tile, device=like.device) * self.reading.width
        count = (self.reading.length - starts).clamp(1, self.reading.width)
        return count.view(self.tiles, self.blocks_per_tile).to(like.dtype)


def _entry_indices(width: int, device: torch.device) -> Tensor:
    """The index in the packed triangle of entry (i, j), [width, width]."""
    index = torch.arange(width, device=device)
    larger, smaller = torch.maximum(index[:, None], index), torch.minimum(index[:, None], index)
    return larger * (larger + 1) // 2 + smaller


# ---- average, solve, and both in one pass with the first-order update ----


def average(packed: Tensor, gradient: Tensor, tiling: Tiling, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T in place, for the gradient [..., rows, length]."""
    kernel = _kernel(packed, gradient)
    if kernel is not None:
        kernel.average(_flatten(packed, 3), _flatten(gradient, 1), width=tiling.reading.width, decay=decay)
        return
    vectors = tiling.vectors(gradient.to(working_dtype(packed.dtype)))
    i, j = torch.tril_indices(tiling.reading.width, tiling.reading.width, device=packed.device)
    fresh = vectors.index_select(-2, i) * vectors.index_select(-2, j)
    packed.copy_(fresh.mul_(1 - decay).add_(packed.to(fresh.dtype) * decay))


def solve(
    packed: Tensor, vectors: Tensor, means: Tensor, tiling: Tiling, damping: float, relative: bool
) -> Tensor:
    """(F_b + lambda_b I)^-1 x_b for every block of the vectors [..., rows, length]; the same shape.

    lambda_b is `damping`, or with `relative` damping times `minifisher.linalg.damping.curvature_scale` of the
    block's mean curvature and the layer's, which is given in `means` [..., 1]. In bfloat16 it is at least eps
    times the largest diagonal entry, see `minifisher.linalg.damping.above_rounding`.
    """
    kernel = _kernel(packed, vectors, means)
    if kernel is not None:
        solved: Tensor = kernel.solve(
            _flatten(packed, 3),
            _flatten(vectors, 1),
            _repeat_for_rows(means, tiling),
            width=tiling.reading.width,
            damping=damping,
            relative=relative,
        )[0]
        return solved.view(vectors.shape)
    triangles = packed.to(working_dtype(packed.dtype))
    levels = _damping_levels(triangles, means, tiling, damping) if relative else triangles.new_tensor(damping)
    levels = _above_rounding(levels, triangles, tiling.reading.width, packed.dtype)
    solution = _solve_by_ldl(triangles, levels, tiling.vectors(vectors.to(triangles.dtype)))
    return tiling.rows(solution).to(vectors.dtype)


def fused_step(
    packed: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    moment: Tensor | None,
    means: Tensor,
    tiling: Tiling,
    *,
    decay: float,
    damping: float,
    relative: bool,
    momentum_decay: float,
    moment_decay: float,
    epsilon: float,
    lengths: int,
    with_slopes: bool,
    nesterov: bool,
) -> tuple[Tensor, Measures, Measures] | None:
    """Update M and V, `average` the gradient D and `solve` for N, in one pass over memory, in place.

    M <- mu M + D, V <- beta V + (1 - beta) D^2 with mu `momentum_decay` and beta `moment_decay`. Returns the
    direction (F_b + lambda_b I)^-1 n_b, [..., rows, length], where N is M, or mu M + D with `nesterov`; and
    what is measured of it and of the first-order step M / (sqrt(V) + epsilon), or M where `moment` is None,
    each over an equal part of the rows: norms [..., lengths], and `with_slopes` inner products with M, and
    the sums of D^2 and of V.
    Returns None, and changes nothing, where no compiled kernel takes these tensors: there is no reference.
    """
    kernel = _kernel(packed, gradient, momentum, means, *(() if moment is None else (moment,)))
    if kernel is None:
        return None
    shape = gradient.shape
    direction, sums = kernel.fused_step(
        _flatten(packed, 3),
        _flatten(gradient, 1),
        _flatten(momentum.view(shape), 1),
        None if moment is None else _flatten(moment.view(shape), 1),
        _repeat_for_rows(means, tiling),
        width=tiling.reading.width,
        decay=decay,
        damping=damping,
        relative=relative,
        momentum_decay=momentum_decay,
        moment_decay=moment_decay,
        epsilon=epsilon,
        with_slopes=with_slopes,
        nesterov=nesterov,
    )

    def of_layers(sums: Tensor) -> Tensor:
        return sums.view(*shape[:-2], lengths, shape[-2] // max(1, lengths)).sum(-1)

    def measures(square: Tensor, *others: Tensor) -> Measures:
        numbers = of_layers(square).sqrt(), *map(of_layers, others)
        return Measures(*(number.to(gradient.dtype) for number in numbers))

    of_direction = 2 if with_slopes else 1
    return direction.view(shape), measures(*sums[:of_direction]), measures(*sums[of_direction:])


# ---- the choice of a compiled kernel ----


def _kernel(packed: Tensor, *weights: Tensor) -> ModuleType | None:
    """The module whose compiled kernels take these tensors; None where only the reference does."""
    # Imported only when used: importing numba takes most of a second, triton more.
    if suits_numba(*weights) and suits_numba(packed, bfloat16=True):
        from minifisher.kernels import packed_cpu

        return packed_cpu
    narrow = packed.shape[-2] <= WIDEST_ON_GPU * (WIDEST_ON_GPU + 1) // 2
    if narrow and suits_triton(*weights) and suits_triton(packed, bfloat16=True):
        from minifisher.kernels import packed_triton

        return packed_triton
    return None


def _flatten(tensor: Tensor, trailing: int) -> Tensor:
    """All dimensions but the last `trailing` ones flattened: the rows of all layers in one dimension."""
    return tensor.reshape(-1, *tensor.shape[tensor.ndim - trailing :])


def _repeat_for_rows(means: Tensor, tiling: Tiling) -> Tensor:
    """The means of the layers [..., 1], each repeated for all rows of its layer, [all rows]."""
    return means.reshape(-1, 1).expand(-1, tiling.reading.rows).flatten()


# ---- the reference ----


def _damping_levels(triangles: Tensor, means: Tensor, tiling: Tiling, damping: float) -> Tensor:
    """lambda_b of relative damping, [..., rows, tiles, blocks]."""
    width = tiling.reading.width
    diagonal = _entry_indices(width, triangles.device).diagonal()
    trace = triangles.index_select(-2, diagonal).sum(-2)
    block_mean = trace / tiling.block_lengths(triangles)
    return damping * curvature_scale(block_mean, means.to(triangles.dtype)[..., None, None])


def _above_rounding(levels: Tensor, triangles: Tensor, width: int, kept: torch.dtype) -> Tensor:
    """As `minifisher.linalg.damping.above_rounding`, of packed triangles [..., entries, blocks]."""
    if kept == triangles.dtype or width == 1:
        return levels
    diagonal = _entry_indices(width, triangles.device).diagonal()
    return torch.maximum(levels, torch.finfo(kept).eps * triangles.index_select(-2, diagonal).amax(-2))


def _solve_by_ldl(triangles: Tensor, levels: Tensor, vectors: Tensor) -> Tensor:
    """(F_b + lambda_b I)^-1 x_b by F_b + lambda_b I = L P L^T, column by column, all blocks at once.

    Triangles are [..., entries, blocks], levels [..., blocks] or [], vectors [..., width, blocks]. A pivot
    that rounding made smaller than `smallest_relative_pivot` times its diagonal entry is raised to that.
    """
    # All blocks lie in the last dimension: every operation then runs along contiguous numbers.
    moved = vectors.movedim(-2, 0)  # [width, ..., blocks]
    width = len(moved)
    solved = moved.reshape(width, -1).clone()
    entries = triangles.movedim(-2, 0).reshape(triangles.shape[-2], -1)
    rest = entries[_entry_indices(width, triangles.device)]  # [width, width, all blocks]
    diagonal = rest.diagonal().mT  # [width, all blocks]
    diagonal += levels.flatten()
    least = diagonal.mul(smallest_relative_pivot(rest.dtype)).clamp_min(LEAST_SCALE)
    columns, pivots = [], []
    for k in range(width):
        pivot = torch.maximum(rest[k, k], least[k])
        below = rest[k + 1 :, k]
        column = below / pivot
        solved[k + 1 :].addcmul_(column, solved[k : k + 1], value=-1)
        rest[k + 1 :, k + 1 :].addcmul_(column[:, None], below[None], value=-1)
        columns.append(column)
        pivots.append(pivot)
    solved /= torch.stack(pivots)
    for k in range(width - 2, -1, -1):
        solved[k] -= (columns[k] * solved[k + 1 :]).sum(0)
    return solved.view(moved.shape).movedim(0, -2)
