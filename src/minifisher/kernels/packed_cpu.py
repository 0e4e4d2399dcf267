"""The functions of `minifisher.kernels.packed` on the CPU, computed in vector registers; needs numba.

The rows of all layers are in one dimension: packed triangles are [rows, tiles, entries, blocks], in float32
or as bfloat16 viewed as uint16, and weights [rows, length] in float32. The rows are divided among threads,
and no sum goes beyond one row: the result does not depend on the number of threads.

A tile with fewer blocks than a vector has elements is copied to one with `LANES` blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.elementwise_cpu import CHUNK, update_chunk, update_momentum
from minifisher.kernels.jit import compiled, inlined
from minifisher.kernels.simd import LANES, fill, load, maximum, store
from minifisher.kernels.threads import run_parallel
from minifisher.linalg.damping import LEAST_SCALE
from minifisher.linalg.dense import smallest_relative_pivot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ENTRIES_PER_THREAD = 65_536  # with fewer entries of triangles, waking a thread costs more than it gains
_LEAST_SCALE = np.float32(LEAST_SCALE)
_SMALLEST_RELATIVE_PIVOT = np.float32(smallest_relative_pivot(torch.float32))


# ---- one tile: each vector holds the same entry of its sixteen blocks ----


@inlined
def _average_tile(triangle: Any, vectors: Any, width: int, decay: Any) -> None:
    """F <- decay F + (1 - decay) x x^T, in place: triangle [entries, LANES], vectors [width, LANES]."""
    old, new = fill(decay), fill(np.float32(1) - decay)
    entry = 0
    for i in range(width):
        scaled = new * load(vectors, i)
        for j in range(i + 1):
            store(triangle, entry, old * load(triangle, entry) + scaled * load(vectors, j))
            entry += 1


@inlined
def _damping_levels(
    triangle: Any, inverse_lengths: Any, tile: int, width: int, numbers: Any, mean: Any, relative: bool
) -> Any:
    """lambda of every block: `damping`, or relative as `minifisher.linalg.damping.curvature_scale` says.

    Where triangles are kept in bfloat16 (`rounding` is above 0), it is at least that times the largest
    diagonal entry, as `minifisher.linalg.damping.above_rounding` says.
    """
    damping, rounding = numbers
    levels = fill(damping)
    if relative:
        trace, entry = fill(np.float32(0)), -1
        for i in range(width):
            entry += i + 1
            trace = trace + load(triangle, entry)
        scale = fill(np.float32(0.5)) * (trace * load(inverse_lengths, tile) + fill(mean))
        levels = levels * maximum(scale, fill(_LEAST_SCALE))
    if rounding > 0:
        largest, entry = fill(np.float32(0)), -1
        for i in range(width):
            entry += i + 1
            largest = maximum(largest, load(triangle, entry))
        levels = maximum(levels, fill(rounding) * largest)
    return levels


@inlined
def _solve_tile(triangle: Any, levels: Any, vectors: Any, factor: Any, width: int) -> None:
    """x <- (F + lambda I)^-1 x by F + lambda I = L P L^T, row by row; P is diagonal, its pivots positive.

    `factor` [entries, LANES] holds the current row of L P until that row is complete, then that of L, with
    P^-1 instead of the ones on the diagonal of L. A pivot that rounding made smaller than
    `smallest_relative_pivot` times its diagonal entry is raised to that.
    """
    first = 0  # index of the first entry of row i
    for i in range(width):
        diagonal = load(triangle, first + i) + levels
        least = maximum(fill(_SMALLEST_RELATIVE_PIVOT) * diagonal, fill(_LEAST_SCALE))
        other = 0
        for j in range(i):
            entry = load(triangle, first + j)
            for k in range(j):
                entry = entry - load(factor, first + k) * load(factor, other + k)
            store(factor, first + j, entry)
            other += j + 1
        solved, other = load(vectors, i), -1
        for j in range(i):
            other += j + 1
            entry = load(factor, first + j)
            scaled = entry * load(factor, other)
            diagonal = diagonal - entry * scaled
            solved = solved - scaled * load(vectors, j)
            store(factor, first + j, scaled)
        store(factor, first + i, fill(np.float32(1)) / maximum(diagonal, least))
        store(vectors, i, solved)
        first += i + 1
    other = -1
    for i in range(width):
        other += i + 1
        store(vectors, i, load(vectors, i) * load(factor, other))
    for i in range(width - 1, -1, -1):
        first -= i + 1
        solved = load(vectors, i)
        for j in range(i):
            store(vectors, j, load(vectors, j) - load(factor, first + j) * solved)


# ---- copies between a row of a weight and a tile ----


# The inner loops run over the blocks of a tile, not over the entries of a block: they have a constant length,
# and LLVM makes vector operations of them without any checks at run time.


@inlined
def _gather(tile: Any, width: int, vectors: Any) -> None:
    """Copy entry e of block l of a tile to vectors[e, l]; zero where the row or the tile has no entry."""
    if tile.shape[0] == LANES * width:
        for e in range(width):
            for block in range(LANES):
                vectors[e, block] = tile[block * width + e]
    else:
        for e in range(width):
            for block in range(LANES):
                position = block * width + e
                vectors[e, block] = tile[position] if position < tile.shape[0] else np.float32(0)


@inlined
def _look_ahead(tile: Any, momentum_decay: Any, width: int, vectors: Any) -> None:
    """M in `vectors` <- mu M + D, for a tile of D."""
    for e in range(width):
        for block in range(LANES):
            position = block * width + e
            if position < tile.shape[0]:
                vectors[e, block] = momentum_decay * vectors[e, block] + tile[position]


@inlined
def _scatter(vectors: Any, width: int, tile: Any, momentum: Any, with_slope: bool) -> Any:
    """The inverse of `_gather`; returns the sum of the squares of the entries x that it wrote, and <M, x>.

    `with_slope` is a constant of the kernel that inlines this; without it the second sum is 0.
    """
    if tile.shape[0] == LANES * width:
        for e in range(width):
            for block in range(LANES):
                tile[block * width + e] = vectors[e, block]
    else:
        for e in range(width):
            for block in range(LANES):
                position = block * width + e
                if position < tile.shape[0]:
                    tile[position] = vectors[e, block]
    total, slope = np.float32(0), np.float32(0)
    for position in range(tile.shape[0]):
        total += tile[position] * tile[position]
        if with_slope:
            slope += tile[position] * momentum[position]
    return total, slope


@inlined
def _copy_blocks(source: Any, target: Any, blocks: int) -> None:
    """Copy the first blocks of a tile [entries, blocks]."""
    for entry in range(source.shape[0]):
        for block in range(blocks):
            target[entry, block] = source[entry, block]


# ---- rows ----


@inlined
def _first_order_row(gradient: Any, momentum: Any, moment: Any, numbers: Any, with_slope: bool) -> Any:
    """Update M and V of one row; returns the squared norm and the slope of its step, and sums of D^2 and V.

    M is [length], V [1, length], or [0, length]: then the step is M. Sums are taken in float32 over chunks,
    and in float64 over all of them.
    """
    momentum_decay, moment_decay, fresh, epsilon = numbers[3:]
    total, slope, newest, usual, length = 0.0, 0.0, 0.0, 0.0, gradient.shape[0]
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        d, m = gradient[first:last], momentum[first:last]
        if moment.shape[0]:
            v = moment[0, first:last]
            squared, product, d_squared, of_moment = update_chunk(
                d, m, v, momentum_decay, moment_decay, fresh, epsilon, with_slope
            )
            newest, usual = newest + d_squared, usual + of_moment
        else:
            squared = product = update_momentum(d, m, momentum_decay)
        total, slope = total + squared, slope + product
    return total, slope, newest, usual


@compiled
def _process_rows(
    packed: Any,
    gradient: Any,  # D, or an array without rows: then nothing is averaged
    momentum: Any,  # M, or without rows: then nothing is solved
    moment: Any,  # V, or without rows: then the first-order step is M
    direction: Any,
    squares: Any,  # [2, rows]: of the direction, and of the first-order step
    slopes: Any,  # [4, rows]: likewise their inner products with M, then the sums of D^2 and V; or None
    means: Any,
    inverse_lengths: Any,  # one over the number of entries without padding of every block, [tiles, LANES]
    scratch: Any,  # three arrays for one tile
    width: int,
    numbers: Any,
    relative: bool,
    with_first_order: bool,
    nesterov: bool,  # whether mu M + D is solved for, instead of M
    start: int,
    stop: int,
) -> float:
    """For every row: update M and V (`with_first_order`), average D, and solve for M.

    One row after another, so that D and M are still in the cache when they are read for the second time.
    """
    tiles, blocks = packed.shape[1], packed.shape[3]
    vectors, factor, full = scratch
    decay, damping, rounding, momentum_decay = numbers[:4]
    length = max(gradient.shape[1], momentum.shape[1])
    for row in range(start, stop):
        total, first_order_total, slope, first_order_slope, newest, usual = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if with_first_order:
            first_order_total, first_order_slope, newest, usual = _first_order_row(
                gradient[row], momentum[row], moment[row : row + 1], numbers, slopes is not None
            )
        for tile in range(tiles):
            triangle = packed[row, tile]
            first = tile * blocks * width
            last = min(first + blocks * width, length)
            if blocks < LANES:
                _copy_blocks(triangle, full, blocks)
                triangle = full
            if gradient.shape[0]:
                _gather(gradient[row, first:last], width, vectors)
                _average_tile(triangle, vectors, width, decay)
                if blocks < LANES:
                    _copy_blocks(full, packed[row, tile], blocks)
            if momentum.shape[0]:
                levels = _damping_levels(
                    triangle, inverse_lengths, tile, width, (damping, rounding), means[row], relative
                )
                m = momentum[row, first:last]
                _gather(m, width, vectors)
                if nesterov:
                    _look_ahead(gradient[row, first:last], momentum_decay, width, vectors)
                _solve_tile(triangle, levels, vectors, factor, width)
                squared, product = _scatter(vectors, width, direction[row, first:last], m, slopes is not None)
                total, slope = total + squared, slope + product
        squares[0, row], squares[1, row] = total, first_order_total
        if slopes is not None:
            slopes[0, row], slopes[1, row] = slope, first_order_slope
            slopes[2, row], slopes[3, row] = newest, usual
    return 0.0


# ---- the same for tensors ----


def average(packed: Tensor, gradient: Tensor, *, width: int, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T, in place."""
    _run(packed, gradient, width=width, decay=decay)


def solve(
    packed: Tensor, vectors: Tensor, means: Tensor, *, width: int, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """(F_b + lambda_b I)^-1 x_b, [rows, length], and the squared norm of each of its rows, [rows]."""
    direction, squares, _ = _run(
        packed, momentum=vectors, means=means, width=width, damping=damping, relative=relative
    )
    return direction, squares[0]


def fused_step(
    packed: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    moment: Tensor | None,
    means: Tensor,
    *,
    width: int,
    decay: float,
    damping: float,
    relative: bool,
    momentum_decay: float,
    moment_decay: float,
    epsilon: float,
    with_slopes: bool,
    nesterov: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """As `minifisher.kernels.packed.fused_step`, but sums over rows, [2 | 4 | 6, rows].

    They are those of x^2 and, `with_slopes`, of M x, for the direction and for the first-order step; then
    those of D^2 and V.
    """
    first_order = momentum_decay, moment_decay, 1 - moment_decay, epsilon
    direction, squares, slopes = _run(
        packed,
        gradient,
        momentum,
        moment,
        means,
        width=width,
        decay=decay,
        damping=damping,
        relative=relative,
        first_order=first_order,
        with_slopes=with_slopes,
        nesterov=nesterov,
    )
    if slopes is None:
        return direction, [*squares]
    of_both = (sums[step] for step in range(2) for sums in (squares, slopes))
    return direction, [*of_both, *(() if moment is None else slopes[2:])]


def _run(
    packed: Tensor,
    gradient: Tensor | None = None,
    momentum: Tensor | None = None,
    moment: Tensor | None = None,
    means: Tensor | None = None,
    *,
    width: int,
    decay: float = 0.0,
    damping: float = 0.0,
    relative: bool = False,
    first_order: tuple[float, float, float, float] | None = None,
    with_slopes: bool = False,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    direction = (
        torch.empty(0, 0, dtype=torch.float32, device="cpu")
        if momentum is None
        else torch.empty_like(momentum)
    )
    squares = torch.empty((2, packed.shape[0]), dtype=torch.float64, device="cpu")
    slopes = squares.new_empty(4, packed.shape[0]) if with_slopes else None
    arrays = [_array(tensor) for tensor in (packed, gradient, momentum, moment, direction, squares)]
    rows, tiles, entries, blocks = packed.shape
    length = max(array.shape[1] for array in arrays[1:3])
    arrays += [None if slopes is None else slopes.numpy()]
    arrays += [_array(means).reshape(-1), _inverse_lengths(tiles, blocks, width, length)]
    is_rounded = packed.dtype == torch.bfloat16 and width > 1
    rounding = torch.finfo(torch.bfloat16).eps if is_rounded else 0.0
    numbers = tuple(
        np.float32(number) for number in (decay, damping, rounding, *(first_order or (0, 0, 0, 0)))
    )
    options = width, numbers, relative, first_order is not None, nesterov

    def loop(start: int, stop: int) -> float:
        scratch = _scratch(width, entries, arrays[0])
        return float(_process_rows(*arrays, scratch, *options, start, stop))

    run_parallel(loop, rows, max(1, _ENTRIES_PER_THREAD // max(1, packed[0].numel())))
    return direction, squares, slopes


def _scratch(width: int, entries: int, packed: Any) -> tuple[Any, Any, Any]:
    """Vectors and factor of one tile, and a tile of `LANES` blocks, which are zero."""
    # By torch, which aligns to whole vectors; numpy does not, and every second load would take twice as long.
    # Here and not in the compiled loop, where two allocations take 0.4 s to compile.
    # The default device and dtype may be others.
    vectors, factor = (
        torch.empty(rows, LANES, dtype=torch.float32, device="cpu") for rows in (width, entries)
    )
    dtype = torch.uint16 if packed.dtype == np.uint16 else torch.float32
    return vectors.numpy(), factor.numpy(), torch.zeros(entries, LANES, dtype=dtype, device="cpu").numpy()


@lru_cache(maxsize=256)
def _inverse_lengths(tiles: int, blocks: int, width: int, length: int) -> Any:
    """One over the number of entries without padding of every block, at most 1, [tiles, LANES]."""
    first = (np.arange(tiles)[:, None] * blocks + np.arange(LANES)) * width
    return (1 / np.clip(length - first, 1, width)).astype(np.float32)


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return np.empty((0, 0), np.float32)
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
