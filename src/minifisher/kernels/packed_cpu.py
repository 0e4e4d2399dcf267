"""The functions of `minifisher.kernels.packed` on the CPU, computed in vector registers; needs numba.

The rows of all layers are in one dimension: packed triangles are [rows, tiles, entries, blocks], in float32
or as bfloat16 viewed as uint16, and weights [rows, length] in float32. The rows are divided among threads,
and no sum goes beyond one row: the result does not depend on the number of threads.

A tile with fewer blocks than a vector has elements is copied to one with `LANES` blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.elementwise_cpu import update_moments
from minifisher.kernels.jit import compiled, inlined
from minifisher.kernels.simd import LANES, fill, load, maximum, store
from minifisher.kernels.threads import run_parallel
from minifisher.linalg.damping import LEAST_SCALE
from minifisher.linalg.dense import smallest_relative_pivot

if TYPE_CHECKING:
    from torch import Tensor

_ENTRIES_PER_THREAD = 65_536  # with fewer entries of triangles, waking a thread costs more than it gains
_LEAST_SCALE = np.float32(LEAST_SCALE)
_SMALLEST_RELATIVE_PIVOT = np.float32(smallest_relative_pivot(torch.float32))


# ---- one tile: each vector holds the same entry of its sixteen blocks ----


@compiled
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
    triangle: Any, inverse_lengths: Any, width: int, damping: Any, mean: Any, relative: bool
) -> Any:
    """lambda of every block: `damping`, or relative as `minifisher.linalg.damping.curvature_scale` says."""
    if not relative:
        return fill(damping)
    trace, entry = fill(np.float32(0)), -1
    for i in range(width):
        entry += i + 1
        trace = trace + load(triangle, entry)
    scale = fill(np.float32(0.5)) * (trace * load(inverse_lengths, 0) + fill(mean))
    return fill(damping) * maximum(scale, fill(_LEAST_SCALE))


@compiled
def _solve_tile(triangle: Any, levels: Any, vectors: Any, factor: Any, inverses: Any, width: int) -> None:
    """x <- (F + lambda I)^-1 x by F + lambda I = L P L^T, row by row; P is diagonal, its pivots positive.

    `factor` [entries, LANES] holds the current row of L P until that row is complete, then that of L;
    `inverses` [width, LANES] is P^-1. A pivot that rounding made smaller than `smallest_relative_pivot` times
    its diagonal entry is raised to that.
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
        solved = load(vectors, i)
        for j in range(i):
            entry = load(factor, first + j)
            scaled = entry * load(inverses, j)
            diagonal = diagonal - entry * scaled
            solved = solved - scaled * load(vectors, j)
            store(factor, first + j, scaled)
        store(inverses, i, fill(np.float32(1)) / maximum(diagonal, least))
        store(vectors, i, solved)
        first += i + 1
    for i in range(width):
        store(vectors, i, load(vectors, i) * load(inverses, i))
    for i in range(width - 1, -1, -1):
        first -= i + 1
        solved = load(vectors, i)
        for j in range(i):
            store(vectors, j, load(vectors, j) - load(factor, first + j) * solved)


# ---- copies between a row of a weight and a tile ----


@compiled
def _gather(row: Any, start: int, width: int, blocks: int, vectors: Any) -> None:
    """Copy entry e of block l of a tile to vectors[e, l]; zero where the row or the tile has no entry."""
    stop = min(start + blocks * width, row.shape[0])
    tile = row[start:stop]
    if tile.shape[0] == LANES * width:
        for block in range(LANES):
            for e in range(width):
                vectors[e, block] = tile[block * width + e]
    else:
        vectors[:] = np.float32(0)
        for position in range(tile.shape[0]):
            vectors[position % width, position // width] = tile[position]


@compiled
def _scatter(vectors: Any, start: int, width: int, blocks: int, row: Any) -> float:
    """The inverse of `_gather`; returns the sum of the squares of the entries that it wrote."""
    stop = min(start + blocks * width, row.shape[0])
    tile = row[start:stop]
    if tile.shape[0] == LANES * width:
        for block in range(LANES):
            for e in range(width):
                tile[block * width + e] = vectors[e, block]
    else:
        for position in range(tile.shape[0]):
            tile[position] = vectors[position % width, position // width]
    total = np.float32(0)
    for position in range(tile.shape[0]):
        total += tile[position] * tile[position]
    return float(total)


@inlined
def _set_inverse_lengths(first: int, width: int, length: int, inverse_lengths: Any) -> None:
    """One over the number of entries without padding of every block of the tile, at most 1."""
    for block in range(LANES):
        left = length - first - block * width
        inverse_lengths[0, block] = np.float32(1) / np.float32(max(1, min(width, left)))


@inlined
def _copy_blocks(source: Any, blocks: int, target: Any) -> None:
    """Copy the first blocks of a tile [entries, blocks]."""
    for entry in range(source.shape[0]):
        for block in range(blocks):
            target[entry, block] = source[entry, block]


# ---- rows ----


@compiled
def _process_rows(
    packed: Any,
    gradient: Any,  # D, or an array without rows: then nothing is averaged
    momentum: Any,  # M, or without rows: then nothing is solved
    moment: Any,  # V, or without rows: then the first-order step is M
    direction: Any,
    squares: Any,
    first_order_squares: Any,
    means: Any,
    width: int,
    decay: Any,
    damping: Any,
    relative: bool,
    first_order: Any,
    with_first_order: bool,
    start: int,
    stop: int,
) -> float:
    """For every row: update M and V (`with_first_order`), average D, and solve for M.

    One row after another, so that D and M are still in the cache when they are read for the second time.
    """
    tiles, entries, blocks = packed.shape[1:]
    momentum_decay, moment_decay, epsilon = first_order
    vectors, inverses = np.empty((width, LANES), np.float32), np.empty((width, LANES), np.float32)
    factor, inverse_lengths = np.empty((entries, LANES), np.float32), np.empty((1, LANES), np.float32)
    full = np.zeros((entries, LANES), packed.dtype)
    for row in range(start, stop):
        if with_first_order:
            v = moment[row] if moment.shape[0] else momentum[row, :0]
            fresh = np.float32(1) - moment_decay
            d, m = gradient[row], momentum[row]
            first_order_squares[row] = update_moments(
                d, m, v, momentum_decay, moment_decay, fresh, epsilon, 0, momentum.shape[1]
            )
        total = 0.0
        for tile in range(tiles):
            triangle = packed[row, tile]
            if blocks < LANES:
                _copy_blocks(triangle, blocks, full)
                triangle = full
            first = tile * blocks * width
            if gradient.shape[0]:
                _gather(gradient[row], first, width, blocks, vectors)
                _average_tile(triangle, vectors, width, decay)
                if blocks < LANES:
                    _copy_blocks(full, blocks, packed[row, tile])
            if momentum.shape[0]:
                _set_inverse_lengths(first, width, momentum.shape[1], inverse_lengths)
                levels = _damping_levels(triangle, inverse_lengths, width, damping, means[row], relative)
                _gather(momentum[row], first, width, blocks, vectors)
                _solve_tile(triangle, levels, vectors, factor, inverses, width)
                total += _scatter(vectors, first, width, blocks, direction[row])
        squares[row] = total
    return 0.0


# ---- the same for tensors ----

_NO_FIRST_ORDER = np.float32(0), np.float32(0), np.float32(0)


def average(packed: Tensor, gradient: Tensor, *, width: int, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T, in place."""
    _run(packed, gradient, None, None, None, width, (decay, 0.0, False), _NO_FIRST_ORDER, False)


def solve(
    packed: Tensor, vectors: Tensor, means: Tensor, *, width: int, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """(F_b + lambda_b I)^-1 x_b, [rows, length], and the squared norm of each of its rows, [rows]."""
    numbers = 0.0, damping, relative
    direction, squares, _ = _run(packed, None, vectors, None, means, width, numbers, _NO_FIRST_ORDER, False)
    return direction, squares


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `minifisher.kernels.packed.fused_step`; instead of norms, the squared norms of rows, [rows]."""
    first_order = np.float32(momentum_decay), np.float32(moment_decay), np.float32(epsilon)
    numbers = decay, damping, relative
    return _run(packed, gradient, momentum, moment, means, width, numbers, first_order, True)


def _run(
    packed: Tensor,
    gradient: Tensor | None,
    momentum: Tensor | None,
    moment: Tensor | None,
    means: Tensor | None,
    width: int,
    numbers: tuple[float, float, bool],
    first_order: tuple[Any, Any, Any],
    with_first_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    direction = torch.empty(0, 0) if momentum is None else torch.empty_like(momentum)
    squares, first_order_squares = torch.empty((2, packed.shape[0]), dtype=torch.float64)
    weights = [_array(tensor) for tensor in (packed, gradient, momentum, moment, direction)]
    sums = squares.numpy(), first_order_squares.numpy(), _array(means).reshape(-1)
    decay, damping, relative = numbers
    options = width, np.float32(decay), np.float32(damping), relative, first_order, with_first_order
    rows = packed.shape[0]
    rows_per_thread = max(1, _ENTRIES_PER_THREAD // max(1, packed[0].numel()))
    run_parallel(
        lambda start, stop: _process_rows(*weights, *sums, *options, start, stop), rows, rows_per_thread
    )
    return direction, squares, first_order_squares


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return np.empty((0, 0), np.float32)
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
