"""Packed triangles on a GPU: one pass over a weight and its curvature, in registers; needs triton.

Arrays are those of `minifisher.kernels.packed`, all layers' rows one after another: packed triangles
[rows, tiles, entries, lanes] in float32 or bfloat16, weights [rows, length] in float32. A thread has one
block, whose whole triangle stands in its registers; threads side by side read lanes side by side. The kernel
sums up squares of one tile and torch those of a row, without atomics: the result is always the same.

Triangles are [entries, entries, tiles, lanes] tensors and their entries chosen by masks. As the layout gives
a thread all entries of its block, masks are known when the kernel is compiled and cost nothing: what is left
is the straight-line arithmetic of one triangle. Unrolled loads and stores of single entries would give the
same code, but the compiler's time for them grows with the cube of their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from minifisher.linalg.dense import NO_CURVATURE, pivot_share

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 128  # of a program

_FLOOR = tl.constexpr(NO_CURVATURE)
_SHARE = tl.constexpr(pivot_share(torch.float32))


# ---- one block a thread: vectors [entries, tiles, lanes], every entry in a register of its own ----


@triton.jit
def _split(vectors: tl.tensor) -> tl.tuple:
    """[tiles, lanes, entries], a power of two of them, to as many [tiles, lanes]."""
    tiles: tl.constexpr = vectors.shape[0]
    lanes: tl.constexpr = vectors.shape[1]
    entries: tl.constexpr = vectors.shape[2]
    if entries == 1:
        return (tl.reshape(vectors, (tiles, lanes)),)
    else:
        halves = tl.reshape(vectors, (tiles, lanes, 2, entries // 2))
        first, second = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        return _split(first) + _split(second)


@triton.jit
def _gathered(vector: tl.tensor, index: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """The same vector, its entries brought from the threads that loaded them to the block's own."""
    entries = _split(tl.permute(vector, (1, 2, 0)))
    gathered = tl.zeros_like(vector)
    for k in tl.static_range(width):
        gathered = tl.where(index == k, tl.expand_dims(entries[k], 0), gathered)
    return gathered


@triton.jit
def _entry(vector: tl.tensor, index: tl.tensor, which: tl.constexpr) -> tl.tensor:
    """Entry `which`, as [1, tiles, lanes]: it costs nothing, adding -0 being no operation at all."""
    return tl.sum(tl.where(index == which, vector, -0.0), 0, keep_dims=True)


@triton.jit
def _averaged(triangle: tl.tensor, vector: tl.tensor, decay: tl.tensor) -> tl.tensor:
    """F <- decay F + (1 - decay) x x^T."""
    return decay * triangle + (1.0 - decay) * vector[:, None] * vector[None, :]


@triton.jit
def _scale(triangle: tl.tensor, i: tl.tensor, j: tl.tensor, entries: tl.tensor, mean: tl.tensor) -> tl.tensor:
    """What damping is relative to: the mean of the curvature of the block, of `entries`, and of the layer."""
    trace = tl.sum(_diagonal(triangle, i, j), 0, keep_dims=True)
    return tl.maximum(0.5 * (trace / tl.maximum(entries, 1).to(tl.float32) + mean), _FLOOR)


@triton.jit
def _diagonal(triangle: tl.tensor, i: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Entries (i, i), [entries, tiles, lanes]."""
    return tl.sum(tl.where(i == j, triangle, -0.0), 1)


@triton.jit
def _solve(
    triangle: tl.tensor, level: tl.tensor, vector: tl.tensor, i: tl.tensor, j: tl.tensor, width: tl.constexpr
) -> tl.tensor:
    """(F + lambda I)^-1 x by F + lambda I = L P L^T, column by column; P is diagonal, its pivots positive.

    A pivot that rounding made smaller than its share of the diagonal is lifted to it.
    """
    index = tl.arange(0, vector.shape[0])[:, None, None]
    least = tl.maximum((_diagonal(triangle, i, j) + level) * _SHARE, _FLOOR)
    solved, inverse = vector, vector
    for k in tl.static_range(width):
        column = tl.sum(tl.where(j == k, triangle, -0.0), 1)
        inverse_pivot = 1.0 / tl.maximum(_entry(column, index, k) + level, _entry(least, index, k))
        below = (index > k) & (index < width)
        lower = tl.where(below, column * inverse_pivot, 0.0)
        rest = triangle - lower[:, None] * column[None, :]
        rest = tl.where((j > k) & (j <= i) & (i < width), rest, triangle)
        triangle = tl.where(j == k, lower[:, None], rest)  # L takes the place of F
        solved = tl.where(below, solved - _entry(solved, index, k) * lower, solved)
        inverse = tl.where(index == k, inverse_pivot, inverse)
    solved *= inverse
    for k in tl.static_range(width - 2, -1, -1):
        lower = tl.sum(tl.where((j == k) & (i > k) & (i < width), triangle * solved[:, None], -0.0), 1)
        solved = tl.where(index == k, solved - tl.sum(lower, 0, keep_dims=True), solved)
    return solved


# ---- tiles ----


@triton.jit
def _first_order_pass(
    d: tl.tensor,
    momentum: tl.tensor,
    moment: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    mu: tl.tensor,
    moment_decay: tl.tensor,
    epsilon: tl.tensor,
) -> tl.tensor:
    """M <- mu M + D, V <- beta V + (1 - beta) D^2; M, and the sum over every tile of the squared step."""
    m = mu * tl.load(momentum + offsets, mask=mask, other=0.0) + d
    step = m
    if moment is not None:
        v = moment_decay * tl.load(moment + offsets, mask=mask, other=0.0) + (1.0 - moment_decay) * d * d
        step = tl.where(mask, m / (tl.sqrt(v) + epsilon), 0.0)
        tl.store(moment + offsets, v, mask=mask)
    tl.store(momentum + offsets, m, mask=mask)
    return m, _of_tiles(step)


@triton.jit
def _of_tiles(step: tl.tensor) -> tl.tensor:
    """The sum of squares of every tile, [tiles]."""
    return tl.sum(tl.sum(step * step, 0), 1)


# Of pointers that are known to be aligned a thread would load four lanes at once, and a quarter of a block.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def _kernel(
    packed: tl.tensor,
    gradient: tl.tensor,  # D, or None: nothing to average
    momentum: tl.tensor,  # M, or None: nothing to solve for
    moment: tl.tensor,  # V, or None
    means: tl.tensor,
    direction: tl.tensor,
    squares: tl.tensor,
    first_order_squares: tl.tensor,  # or None: no first-order pass
    count: tl.tensor,  # tiles in all
    tiles: tl.tensor,  # of a row
    length: tl.tensor,
    decay: tl.tensor,
    damping: tl.tensor,
    mu: tl.tensor,
    moment_decay: tl.tensor,
    epsilon: tl.tensor,
    relative: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a program, lanes and entries of a vector, as powers of two
    LANES: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """Of the tiles of a program: what `advance`, `average` and `solve` say, by the tensors that are there."""
    size: tl.constexpr = width * (width + 1) // 2 * lanes
    index, lane = tl.arange(0, ENTRIES)[:, None, None], tl.arange(0, LANES)[None, None, :]
    first, place = tl.program_id(0) * TILES, tl.arange(0, TILES)
    tile, first_row = first + place, first // tiles
    row, real = tile // tiles, tile < count
    here = real[None, :, None] & (lane < lanes)
    start = ((tile % tiles)[None, :, None] * lanes + lane) * width  # of the block in its row
    mask = here & (index < width) & (start + index < length)
    # Only where a program starts may lie behind 2^31 entries.
    offsets = first_row.to(tl.int64) * length + (((row - first_row) * length)[None, :, None] + start + index)
    i, j = index[:, None], index[None, :]
    entry, stored = (i * (i + 1) // 2 + j) * lanes, here[:, None] & (i < width) & (j <= i)
    triangles = packed + first.to(tl.int64) * size + ((place[None, :, None] * size + lane)[:, None] + entry)
    if gradient is not None:
        d = tl.load(gradient + offsets, mask=mask, other=0.0)
    if first_order_squares is not None:
        m, total = _first_order_pass(d, momentum, moment, offsets, mask, mu, moment_decay, epsilon)
        tl.store(first_order_squares + tile, total, mask=real)
    elif momentum is not None:
        m = tl.load(momentum + offsets, mask=mask, other=0.0)
    triangle = tl.load(triangles, mask=stored, other=0.0).to(tl.float32)
    if gradient is not None:
        rounded = _averaged(triangle, _gathered(d, index, width), decay).to(packed.dtype.element_ty)
        tl.store(triangles, rounded, mask=stored)
        triangle = rounded.to(tl.float32)
    if momentum is not None:
        level = damping
        if relative:
            mean = tl.load(means + row, mask=real, other=0.0)[None, :, None]
            level = damping * _scale(triangle, i, j, tl.minimum(length - start, width), mean)
        solution = tl.where(mask, _solve(triangle, level, _gathered(m, index, width), i, j, width), 0.0)
        # Stored by the threads that have it: to store it side by side, offsets and mask of the loads would be
        # kept till here, in 60 registers. Summed up in another order they are not the compiler's `offsets`.
        own = index + start + first_row.to(tl.int64) * length + ((row - first_row) * length)[None, :, None]
        tl.store(direction + tl.max_contiguous(own, (1, 1, 1)), solution, mask=mask)
        tl.store(squares + tile, _of_tiles(solution), mask=real)


# ---- tensors ----


def average(packed: Tensor, gradient: Tensor, *, width: int, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T."""
    _launch(packed, gradient, width=width, decay=decay)


def solve(
    packed: Tensor, momentum: Tensor, means: Tensor, *, width: int, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """(F_b + lambda_b I)^-1 m_b, and the squared norm of every row of it."""
    direction, squares = torch.empty_like(momentum), _empty(packed)
    _launch(
        packed,
        momentum=momentum,
        means=means,
        direction=direction,
        squares=squares,
        width=width,
        damping=damping,
        relative=relative,
    )
    return direction, _of_rows(squares)


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
    direction, squares, first_order_squares = torch.empty_like(momentum), _empty(packed), _empty(packed)
    _launch(
        packed,
        gradient,
        momentum,
        moment,
        means,
        direction,
        squares,
        first_order_squares,
        width=width,
        decay=decay,
        damping=damping,
        relative=relative,
        mu=mu,
        moment_decay=moment_decay,
        epsilon=epsilon,
    )
    return direction, _of_rows(squares), _of_rows(first_order_squares)


def _empty(packed: Tensor) -> Tensor:
    return torch.empty(packed.shape[:2], dtype=torch.float32, device=packed.device)


def _of_rows(squares: Tensor) -> Tensor:
    return squares.sum(1, dtype=torch.float64)


def shapes(width: int, lanes: int) -> dict[str, int]:
    """What the kernel is compiled for; a thread has a block up to sixteen wide, eight share a wider one."""
    places, entries = triton.next_power_of_2(lanes), triton.next_power_of_2(width)
    blocks = _THREADS if entries <= 16 else _THREADS // 8
    return {
        "width": width,
        "lanes": lanes,
        "TILES": max(1, blocks // places),
        "LANES": places,
        "ENTRIES": entries,
    }


def options(width: int) -> dict[str, int]:
    """How it is compiled; with 128 registers a thread four programs share a multiprocessor instead of two."""
    return {"num_warps": _THREADS // 32} | ({"maxnreg": 128} if width <= 9 else {})


def _launch(
    packed: Tensor,
    gradient: Tensor | None = None,
    momentum: Tensor | None = None,
    moment: Tensor | None = None,
    means: Tensor | None = None,
    direction: Tensor | None = None,
    squares: Tensor | None = None,
    first_order_squares: Tensor | None = None,
    *,
    width: int,
    decay: float = 0.0,
    damping: float = 0.0,
    relative: bool = False,
    mu: float = 0.0,
    moment_decay: float = 0.0,
    epsilon: float = 0.0,
) -> None:
    weight = gradient if momentum is None else momentum
    assert weight is not None
    rows, tiles, _, lanes = packed.shape
    constants = shapes(width, lanes)
    _kernel[triton.cdiv(rows * tiles, constants["TILES"]),](
        packed,
        gradient,
        momentum,
        moment,
        means,
        direction,
        squares,
        first_order_squares,
        rows * tiles,
        tiles,
        weight.shape[1],
        decay,
        damping,
        mu,
        moment_decay,
        epsilon,
        relative,
        **constants,
        **options(width),
    )
