"""Packed triangles on the CPU: one pass over a weight and its curvature, in vector registers; needs numba.

Arrays are those of `minifisher.kernels.packed`, all layers' rows one after another: packed triangles
[rows, tiles, entries, lanes] in float32 or as the bits of bfloat16, weights [rows, length] in float32. Rows
are shared out over threads, and every sum is one of a row: the result does not depend on their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.elementwise_cpu import first_order_pass
from minifisher.kernels.jit import compiled, inlined
from minifisher.kernels.simd import LANES, fill, load, maximum, store
from minifisher.kernels.threads import in_parts
from minifisher.linalg.dense import NO_CURVATURE, pivot_share

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 65_536  # entries of packed triangles that pay for waking a thread
_FLOOR = np.float32(NO_CURVATURE)
_SHARE = np.float32(pivot_share(torch.float32))


# ---- one tile: the same entry of sixteen blocks in one register ----


@compiled
def _average(triangle: Any, vectors: Any, width: int, decay: Any) -> None:
    """F <- decay F + (1 - decay) x x^T: triangle [entries, LANES], vectors [width, LANES]."""
    kept, fresh = fill(decay), fill(np.float32(1) - decay)
    entry = 0
    for i in range(width):
        scaled = fresh * load(vectors, i)
        for j in range(i + 1):
            store(triangle, entry, kept * load(triangle, entry) + scaled * load(vectors, j))
            entry += 1


@inlined
def _levels(triangle: Any, shares: Any, width: int, damping: Any, mean: Any, relative: bool) -> Any:
    """lambda of every block: `damping`, or that times the mean of the block's and the layer's curvature."""
    if not relative:
        return fill(damping)
    trace, entry = fill(np.float32(0)), -1
    for i in range(width):
        entry += i + 1
        trace = trace + load(triangle, entry)
    scale = fill(np.float32(0.5)) * (trace * load(shares, 0) + fill(mean))
    return fill(damping) * maximum(scale, fill(_FLOOR))


@compiled
def _solve(triangle: Any, levels: Any, vectors: Any, factor: Any, inverses: Any, width: int) -> None:
    """x <- (F + lambda I)^-1 x by F + lambda I = L P L^T, row by row; P is diagonal and its pivots positive.

    L P stands in `factor` until the row is complete, then L; `inverses` is P^-1. A pivot that rounding made
    smaller than its share of the diagonal is lifted to it.
    """
    first = 0  # entry of the row
    for i in range(width):
        diagonal = load(triangle, first + i) + levels
        least = maximum(fill(_SHARE) * diagonal, fill(_FLOOR))
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


# ---- between a row of a weight and the lanes of a tile ----


@compiled
def _gather(row: Any, start: int, width: int, lanes: int, vectors: Any) -> None:
    """Entry e of block l of the tile to [e, l]; zero behind the end of the row and in lanes without block."""
    stop = min(start + lanes * width, row.shape[0])
    tile = row[start:stop]
    if tile.shape[0] == LANES * width:
        for lane in range(LANES):
            for e in range(width):
                vectors[e, lane] = tile[lane * width + e]
    else:
        vectors[:] = np.float32(0)
        for position in range(tile.shape[0]):
            vectors[position % width, position // width] = tile[position]


@compiled
def _scatter(vectors: Any, start: int, width: int, lanes: int, row: Any) -> float:
    """The inverse of `_gather`; the sum of squares of what it wrote."""
    stop = min(start + lanes * width, row.shape[0])
    tile = row[start:stop]
    if tile.shape[0] == LANES * width:
        for lane in range(LANES):
            for e in range(width):
                tile[lane * width + e] = vectors[e, lane]
    else:
        for position in range(tile.shape[0]):
            tile[position] = vectors[position % width, position // width]
    total = np.float32(0)
    for position in range(tile.shape[0]):
        total += tile[position] * tile[position]
    return float(total)


@inlined
def _shares(first: int, width: int, length: int, shares: Any) -> None:
    """One over the true entries of every block of the tile; a lane without a block has one."""
    for lane in range(LANES):
        left = length - first - lane * width
        shares[0, lane] = np.float32(1) / np.float32(max(1, min(width, left)))


@inlined
def _copy(source: Any, lanes: int, target: Any) -> None:
    """The lanes of a tile that has fewer than sixteen."""
    for entry in range(source.shape[0]):
        for lane in range(lanes):
            target[entry, lane] = source[entry, lane]


# ---- rows ----


@compiled
def _rows(
    packed: Any,
    gradient: Any,  # D, or nothing
    momentum: Any,  # M, or nothing
    moment: Any,  # V, or nothing
    direction: Any,
    squares: Any,
    first_order_squares: Any,
    means: Any,
    width: int,
    decay: Any,
    damping: Any,
    relative: bool,
    first_order: Any,
    advances: bool,
    start: int,
    stop: int,
) -> float:
    """Of every row: M and V if it `advances`, then the average of D, if any, then the solution for M, if any.

    Row by row, so that the second reading of D and M finds them in the cache.
    """
    tiles, entries, lanes = packed.shape[1:]
    mu, moment_decay, epsilon = first_order
    vectors, inverses = np.empty((width, LANES), np.float32), np.empty((width, LANES), np.float32)
    factor, shares = np.empty((entries, LANES), np.float32), np.empty((1, LANES), np.float32)
    full = np.zeros((entries, LANES), packed.dtype)
    for row in range(start, stop):
        if advances:
            v = moment[row] if moment.shape[0] else momentum[row, :0]
            fresh = np.float32(1) - moment_decay
            first_order_squares[row] = first_order_pass(
                gradient[row], momentum[row], v, mu, moment_decay, fresh, epsilon, 0, momentum.shape[1]
            )
        total = 0.0
        for tile in range(tiles):
            triangle = packed[row, tile]
            if lanes < LANES:
                _copy(triangle, lanes, full)
                triangle = full
            first = tile * lanes * width
            if gradient.shape[0]:
                _gather(gradient[row], first, width, lanes, vectors)
                _average(triangle, vectors, width, decay)
                if lanes < LANES:
                    _copy(full, lanes, packed[row, tile])
            if momentum.shape[0]:
                _shares(first, width, momentum.shape[1], shares)
                levels = _levels(triangle, shares, width, damping, means[row], relative)
                _gather(momentum[row], first, width, lanes, vectors)
                _solve(triangle, levels, vectors, factor, inverses, width)
                total += _scatter(vectors, first, width, lanes, direction[row])
        squares[row] = total
    return 0.0


# ---- tensors ----

_NO_PASS = np.float32(0), np.float32(0), np.float32(0)


def average(packed: Tensor, gradient: Tensor, *, width: int, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T."""
    _run(packed, gradient, None, None, None, width, (decay, 0.0, False), _NO_PASS, False)


def solve(
    packed: Tensor, momentum: Tensor, means: Tensor, *, width: int, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """(F_b + lambda_b I)^-1 m_b, and the squared norm of every row of it."""
    numbers = 0.0, damping, relative
    direction, squares, _ = _run(packed, None, momentum, None, means, width, numbers, _NO_PASS, False)
    return direction, squares


def advance(
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
    mu: float,
    moment_decay: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first-order pass, `average` and `solve` in one; squared norms of every row of both steps."""
    first_order = np.float32(mu), np.float32(moment_decay), np.float32(epsilon)
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
    advances: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    direction = torch.empty(0, 0) if momentum is None else torch.empty_like(momentum)
    squares, first_order_squares = torch.empty((2, packed.shape[0]), dtype=torch.float64)
    weights = [_array(tensor) for tensor in (packed, gradient, momentum, moment, direction)]
    sums = squares.numpy(), first_order_squares.numpy(), _array(means).reshape(-1)
    decay, damping, relative = numbers
    options = width, np.float32(decay), np.float32(damping), relative, first_order, advances
    rows = packed.shape[0]
    least = max(1, _LEAST // max(1, packed[0].numel()))  # rows that are worth a thread
    in_parts(lambda start, stop: _rows(*weights, *sums, *options, start, stop), rows, least)
    return direction, squares, first_order_squares


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return np.empty((0, 0), np.float32)
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
