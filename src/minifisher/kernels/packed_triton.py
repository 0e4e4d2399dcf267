"""The functions of `minifisher.kernels.packed` on a GPU, computed in registers; needs triton.

The rows of all layers are in one dimension: packed triangles are [rows, tiles, entries, blocks], in float32
or bfloat16, and weights [rows, length] in float32. Each thread computes one block and holds its whole
triangle in registers; neighbouring threads read neighbouring blocks. The kernel sums squares within a tile,
torch sums them over a row. There are no atomic operations, so the result is always the same.

In the kernel a triangle is a tensor [entries, entries, tiles, blocks], and masks select its entries. Since
all entries of a block belong to one thread, the masks are known at compile time and cost nothing: the
compiled code is the straight-line arithmetic of one triangle. Loading and storing the entries one by one
would compile to the same code, but in a time that grows with the cube of their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from minifisher.linalg.damping import LEAST_SCALE
from minifisher.linalg.dense import smallest_relative_pivot

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 128  # threads of one program

_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_BFLOAT16_EPSILON = tl.constexpr(torch.finfo(torch.bfloat16).eps)
_SMALLEST_RELATIVE_PIVOT = tl.constexpr(smallest_relative_pivot(torch.float32))


# ---- one block for each thread: vectors [entries, tiles, blocks], each entry in one register ----


@triton.jit
def _split(vectors: tl.tensor) -> tl.tuple:
    """The entries of [tiles, blocks, entries] as a tuple of [tiles, blocks]; a power of two of them."""
    tiles: tl.constexpr = vectors.shape[0]
    blocks: tl.constexpr = vectors.shape[1]
    entries: tl.constexpr = vectors.shape[2]
    if entries == 1:
        return (tl.reshape(vectors, (tiles, blocks)),)
    else:
        halves = tl.reshape(vectors, (tiles, blocks, 2, entries // 2))
        first, second = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        return _split(first) + _split(second)


@triton.jit
def _to_own_thread(vector: tl.tensor, index: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """The same vector, each entry moved from the thread that loaded it to the thread of its block."""
    entries = _split(tl.permute(vector, (1, 2, 0)))
    moved = tl.zeros_like(vector)
    for k in tl.static_range(width):
        moved = tl.where(index == k, tl.expand_dims(entries[k], 0), moved)
    return moved


@triton.jit
def _entry(vector: tl.tensor, index: tl.tensor, which: tl.constexpr) -> tl.tensor:
    """Entry `which`, as [1, tiles, blocks]. The sum costs nothing: the compiler removes additions of -0."""
    return tl.sum(tl.where(index == which, vector, -0.0), 0, keep_dims=True)


@triton.jit
def _averaged(
    triangle: tl.tensor, vector: tl.tensor, decay: tl.tensor, triangles: tl.tensor, stored: tl.tensor
) -> tl.tensor:
    """F <- decay F + (1 - decay) x x^T, stored in the dtype of `triangles`, and returned as rounded."""
    averaged = decay * triangle + (1.0 - decay) * vector[:, None] * vector[None, :]
    rounded = averaged.to(triangles.dtype.element_ty)
    tl.store(triangles, rounded, mask=stored)
    return rounded.to(tl.float32)


@triton.jit
def _level(
    triangle: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    left: tl.tensor,  # entries of the row from the block on
    width: tl.constexpr,
    damping: tl.tensor,
    means: tl.tensor,
    real: tl.tensor,
    relative: tl.constexpr,
) -> tl.tensor:
    """lambda: `damping`, or relative as `minifisher.linalg.damping.curvature_scale`, of real entries."""
    if not relative:
        return damping
    mean, entries = tl.load(means, mask=real, other=0.0)[None, :, None], tl.minimum(left, width)
    trace = tl.sum(_diagonal(triangle, i, j), 0, keep_dims=True)
    return damping * tl.maximum(0.5 * (trace / tl.maximum(entries, 1).to(tl.float32) + mean), _LEAST_SCALE)


@triton.jit
def _above_rounding(
    level: tl.tensor, triangle: tl.tensor, i: tl.tensor, j: tl.tensor, triangles: tl.tensor
) -> tl.tensor:
    """As `minifisher.linalg.damping.above_rounding`, for triangles that are stored in bfloat16."""
    if triangles.dtype.element_ty == tl.bfloat16 and triangle.shape[0] > 1:
        level = tl.maximum(level, tl.max(_diagonal(triangle, i, j), 0, keep_dims=True) * _BFLOAT16_EPSILON)
    return level


@triton.jit
def _diagonal(triangle: tl.tensor, i: tl.tensor, j: tl.tensor) -> tl.tensor:
    """The entries (i, i), [entries, tiles, blocks]."""
    return tl.sum(tl.where(i == j, triangle, -0.0), 1)


@triton.jit
def _solve(
    triangle: tl.tensor, level: tl.tensor, vector: tl.tensor, i: tl.tensor, j: tl.tensor, width: tl.constexpr
) -> tl.tensor:
    """(F + lambda I)^-1 x by F + lambda I = L P L^T, column by column; P is diagonal, its pivots positive.

    A pivot that rounding made smaller than `smallest_relative_pivot` times its diagonal entry is raised to
    that.
    """
    index = tl.arange(0, vector.shape[0])[:, None, None]
    least = tl.maximum((_diagonal(triangle, i, j) + level) * _SMALLEST_RELATIVE_PIVOT, _LEAST_SCALE)
    solved, inverse = vector, vector
    for k in tl.static_range(width):
        column = tl.sum(tl.where(j == k, triangle, -0.0), 1)
        inverse_pivot = 1.0 / tl.maximum(_entry(column, index, k) + level, _entry(least, index, k))
        below = (index > k) & (index < width)
        lower = tl.where(below, column * inverse_pivot, 0.0)
        rest = triangle - lower[:, None] * column[None, :]
        rest = tl.where((j > k) & (j <= i) & (i < width), rest, triangle)
        triangle = tl.where(j == k, lower[:, None], rest)  # L overwrites F
        solved = tl.where(below, solved - _entry(solved, index, k) * lower, solved)
        inverse = tl.where(index == k, inverse_pivot, inverse)
    solved *= inverse
    for k in tl.static_range(width - 2, -1, -1):
        lower = tl.sum(tl.where((j == k) & (i > k) & (i < width), triangle * solved[:, None], -0.0), 1)
        solved = tl.where(index == k, solved - tl.sum(lower, 0, keep_dims=True), solved)
    return solved


# ---- tiles ----


@triton.jit
def _inner_product(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    """The sum of products over every tile, [tiles]."""
    return tl.sum(tl.sum(one * other, 0), 1)


@triton.jit
def _store_measures(
    step: tl.tensor,
    m: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    tile: tl.tensor,
    real: tl.tensor,
    with_slope: tl.constexpr,
) -> None:
    """Store the squared norm of every tile of a step and, `with_slope`, its product with M after `count`."""
    tl.store(sums + tile, _inner_product(step, step), mask=real)
    if with_slope:
        tl.store(sums + count + tile, _inner_product(m, step), mask=real)


@triton.jit
def _first_order_step(
    d: tl.tensor,
    momentum: tl.tensor,
    moment: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    momentum_decay: tl.tensor,
    moment_decay: tl.tensor,
    epsilon: tl.tensor,
    sums: tl.tensor,  # of the whole step, as below up to `with_slopes`
    count: tl.tensor,
    tile: tl.tensor,
    real: tl.tensor,
    with_slopes: tl.constexpr,
) -> tl.tensor:
    """M <- mu M + D, V <- beta V + (1 - beta) D^2; stores what is measured of the step, and returns M."""
    m = momentum_decay * tl.load(momentum + offsets, mask=mask, other=0.0) + d
    step = m
    if moment is not None:
        v = moment_decay * tl.load(moment + offsets, mask=mask, other=0.0) + (1.0 - moment_decay) * d * d
        step = tl.where(mask, m / (tl.sqrt(v) + epsilon), 0.0)
        tl.store(moment + offsets, v, mask=mask)
        if with_slopes:
            tl.store(sums + 4 * count + tile, _inner_product(d, d), mask=real)
            tl.store(sums + 5 * count + tile, tl.sum(tl.sum(v, 0), 1), mask=real)
    tl.store(momentum + offsets, m, mask=mask)
    _store_measures(step, m, sums + (2 if with_slopes else 1) * count, count, tile, real, with_slopes)
    return m


# Where `packed` is known to be aligned, the compiler makes a thread load a quarter of each of four blocks.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def _kernel(
    packed: tl.tensor,
    gradient: tl.tensor,  # D, or None: then nothing is averaged
    momentum: tl.tensor,  # M, or None: then nothing is solved
    moment: tl.tensor,  # V, or None: then the first-order step is M
    means: tl.tensor,
    direction: tl.tensor,
    sums: tl.tensor,  # [measures, tiles of all rows]: see `fused_step`; or None without M
    count: tl.tensor,  # tiles of all rows
    tiles: tl.tensor,  # tiles of one row
    length: tl.tensor,
    decay: tl.tensor,
    damping: tl.tensor,
    momentum_decay: tl.tensor,
    moment_decay: tl.tensor,
    epsilon: tl.tensor,
    relative: tl.constexpr,
    nesterov: tl.constexpr,  # whether mu M + D is solved for, instead of M
    with_first_order: tl.constexpr,  # whether M and V are updated
    with_slopes: tl.constexpr,
    width: tl.constexpr,
    blocks: tl.constexpr,
    TILES: tl.constexpr,  # the tiles of one program: a power of two
    BLOCKS: tl.constexpr,  # `blocks` and `width` rounded up to powers of two
    ENTRIES: tl.constexpr,
) -> None:
    """`average`, `solve` or `fused_step`, depending on which tensors are given, for one program's tiles."""
    size: tl.constexpr = width * (width + 1) // 2 * blocks
    index, block = tl.arange(0, ENTRIES)[:, None, None], tl.arange(0, BLOCKS)[None, None, :]
    first, place = tl.program_id(0) * TILES, tl.arange(0, TILES)
    tile, first_row = first + place, first // tiles
    row, real = tile // tiles, tile < count
    here = real[None, :, None] & (block < blocks)
    start = ((tile % tiles)[None, :, None] * blocks + block) * width  # first entry of the block in its row
    mask = here & (index < width) & (start + index < length)
    # 64 bits are needed only for the index of a program's first entry.
    offsets = first_row.to(tl.int64) * length + (((row - first_row) * length)[None, :, None] + start + index)
    i, j = index[:, None], index[None, :]
    entry, stored = (i * (i + 1) // 2 + j) * blocks, here[:, None] & (i < width) & (j <= i)
    triangles = packed + first.to(tl.int64) * size + ((place[None, :, None] * size + block)[:, None] + entry)
    if gradient is not None:
        d = tl.load(gradient + offsets, mask=mask, other=0.0)
    if with_first_order:
        m = _first_order_step(
            d, momentum, moment, offsets, mask, momentum_decay, moment_decay, epsilon,
            sums, count, tile, real, with_slopes,
        )  # fmt: skip
    elif momentum is not None:
        m = tl.load(momentum + offsets, mask=mask, other=0.0)
    triangle = tl.load(triangles, mask=stored, other=0.0).to(tl.float32)
    if gradient is not None:
        triangle = _averaged(triangle, _to_own_thread(d, index, width), decay, triangles, stored)
    if momentum is not None:
        level = _level(triangle, i, j, length - start, width, damping, means + row, real, relative)
        own_m, level = _to_own_thread(m, index, width), _above_rounding(level, triangle, i, j, triangles)
        own_n = _to_own_thread(momentum_decay * m + d, index, width) if nesterov else own_m
        solution = tl.where(mask, _solve(triangle, level, own_n, i, j, width), 0.0)
        # Summed in another order than `offsets`, which the compiler would keep until here, in 60 registers.
        own = index + start + first_row.to(tl.int64) * length + ((row - first_row) * length)[None, :, None]
        tl.store(direction + tl.max_contiguous(own, (1, 1, 1)), solution, mask=mask)
        _store_measures(solution, own_m, sums, count, tile, real, with_slopes)


# ---- the same for tensors ----


def average(packed: Tensor, gradient: Tensor, *, width: int, decay: float) -> None:
    """F_b <- decay F_b + (1 - decay) d_b d_b^T, in place."""
    _launch(packed, gradient, width=width, decay=decay)


def solve(
    packed: Tensor, vectors: Tensor, means: Tensor, *, width: int, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """(F_b + lambda_b I)^-1 x_b, [rows, length], and the squared norm of each of its rows, [rows]."""
    direction, sums = torch.empty_like(vectors), _empty_sums(packed, 1)
    _launch(
        packed,
        momentum=vectors,
        means=means,
        direction=direction,
        sums=sums,
        width=width,
        damping=damping,
        relative=relative,
    )
    return direction, sums[0].sum(1, dtype=torch.float64)


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
) -> tuple[Tensor, Tensor]:
    """As `minifisher.kernels.packed.fused_step`, but sums over rows, [2 | 4 | 6, rows].

    They are those of x^2 and, `with_slopes`, of M x, for the direction and for the first-order step; then
    those of D^2 and V.
    """
    measures = 2 if not with_slopes else 4 if moment is None else 6
    direction, sums = torch.empty_like(momentum), _empty_sums(packed, measures)
    _launch(
        packed,
        gradient,
        momentum,
        moment,
        means,
        direction,
        sums,
        width=width,
        decay=decay,
        damping=damping,
        relative=relative,
        momentum_decay=momentum_decay,
        moment_decay=moment_decay,
        epsilon=epsilon,
        nesterov=nesterov,
        with_first_order=True,
        with_slopes=with_slopes,
    )
    return direction, sums.sum(2, dtype=torch.float64)


def _empty_sums(packed: Tensor, measures: int) -> Tensor:
    return torch.empty(measures, *packed.shape[:2], dtype=torch.float32, device=packed.device)


def constants(width: int, blocks: int) -> dict[str, int]:
    """The compile-time constants of the kernel for blocks of one width in tiles of so many blocks.

    A block up to sixteen wide is computed by one thread, a wider one by eight.
    """
    padded_blocks, padded_width = triton.next_power_of_2(blocks), triton.next_power_of_2(width)
    blocks_per_program = _THREADS if padded_width <= 16 else _THREADS // 8
    return {
        "width": width,
        "blocks": blocks,
        "TILES": max(1, blocks_per_program // padded_blocks),
        "BLOCKS": padded_blocks,
        "ENTRIES": padded_width,
    }


def options(width: int) -> dict[str, int]:
    """The compiler options; with 128 registers a thread, a multiprocessor runs four programs, not two."""
    return {"num_warps": _THREADS // 32} | ({"maxnreg": 128} if width <= 9 else {})


# What a kernel that does not need them gets.
_NUMBERS = ("decay", "damping", "momentum_decay", "moment_decay", "epsilon")
_FLAGS = ("relative", "nesterov", "with_first_order", "with_slopes")
_NOT_GIVEN = dict.fromkeys(_NUMBERS, 0.0) | dict.fromkeys(_FLAGS, False)


def _launch(
    packed: Tensor,
    gradient: Tensor | None = None,
    momentum: Tensor | None = None,
    moment: Tensor | None = None,
    means: Tensor | None = None,
    direction: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    width: int,
    **numbers: float,
) -> None:
    weight = gradient if momentum is None else momentum
    assert weight is not None
    rows, tiles, _, blocks = packed.shape
    fixed = constants(width, blocks)
    _kernel[triton.cdiv(rows * tiles, fixed["TILES"]),](
        packed,
        gradient,
        momentum,
        moment,
        means,
        direction,
        sums,
        rows * tiles,
        tiles,
        weight.shape[1],
        **_NOT_GIVEN | numbers,
        **fixed,
        **options(width),
    )
