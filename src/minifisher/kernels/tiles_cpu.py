"""The direction of two-sided blocks on the CPU, with momentum and first-order step in one pass; needs numba.

A tile of the weight is small enough for the nearest cache. It is read once: M and V are updated, the block of
its outputs and that of its inputs multiply it, and what is measured is summed up. Tiles are divided among
threads, and every sum over a part of a row has its own place: the result does not depend on their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import binding

from minifisher.curvature import Measures
from minifisher.kernels.elementwise_cpu import update_chunk, update_momentum
from minifisher.kernels.jit import compiled, inlined
from minifisher.kernels.simd import LANES, multiply_rows
from minifisher.kernels.threads import run_parallel

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import FirstOrderStep

_ENTRIES_PER_THREAD = 16_384  # with fewer entries, waking a thread costs more than it gains
_WIDE = 4 * LANES  # columns of a product that are computed together; what is left, one vector at a time
# Rows that are computed together: as many as there are registers for. All divide _ROWS.
_MANY_REGISTERS = binding.get_host_cpu_features().get("avx512f", False)
_WIDE_ROWS, _NARROW_ROWS = (4, 8) if _MANY_REGISTERS else (1, 4)
_ROWS = 8

_multiply_wide = multiply_rows(_WIDE_ROWS, _WIDE // LANES)
_multiply_narrow = multiply_rows(_NARROW_ROWS, 1)


@inlined
def _multiply(left: Any, right: Any, product: Any, depth: int) -> None:
    """product <- left right, [_ROWS i, depth] times [depth, LANES j]."""
    rows, columns = product.shape
    whole = columns - columns % _WIDE
    for row in range(0, rows, _WIDE_ROWS):
        for column in range(0, whole, _WIDE):
            _multiply_wide(left, row, right, column, product, depth)
    for row in range(0, rows, _NARROW_ROWS):
        for column in range(whole, columns, LANES):
            _multiply_narrow(left, row, right, column, product, depth)


@compiled
def _process_tiles(
    gradient: Any,  # [layers, out, in], as all up to `direction`
    momentum: Any,
    moment: Any,  # or None: the first-order step is M
    direction: Any,
    outputs: Any,  # [layers, blocks, rows, b_out], rows as in `_multiply`
    inputs: Any,  # [layers, blocks, b_in, columns], likewise
    sums: Any,  # [6, layers, out, blocks]: x^2 and M x of the direction, s^2, M s, and with V D^2 and V
    scratch: Any,  # [2, rows, columns]
    numbers: Any,
    nesterov: bool,
    start: int,
    stop: int,
) -> float:
    row_blocks, column_blocks = outputs.shape[1], inputs.shape[1]
    height, width = outputs.shape[3], inputs.shape[2]
    ahead, product = scratch[0], scratch[1]
    momentum_decay, moment_decay, fresh, epsilon = numbers
    for index in range(start, stop):
        layer, block = index // (row_blocks * column_blocks), index % column_blocks
        row_block = index // column_blocks % row_blocks
        first, begin = row_block * height, block * width
        rows, end = min(height, gradient.shape[1] - first), min(begin + width, gradient.shape[2])
        if rows < height or end - begin < width:
            ahead[:] = 0
        for i in range(rows):
            row = first + i
            d, m, n = gradient[layer, row, begin:end], momentum[layer, row, begin:end], ahead[i]
            if moment is None:
                total = slope = update_momentum(d, m, momentum_decay)
            else:
                v = moment[layer, row, begin:end]
                total, slope, newest, usual = update_chunk(
                    d, m, v, momentum_decay, moment_decay, fresh, epsilon, True
                )
                sums[4, layer, row, block], sums[5, layer, row, block] = newest, usual
            sums[2, layer, row, block], sums[3, layer, row, block] = total, slope
            for j in range(d.shape[0]):
                n[j] = momentum_decay * m[j] + d[j] if nesterov else m[j]
        _multiply(ahead, inputs[layer, block], product, width)
        _multiply(outputs[layer, row_block], product, ahead, height)
        for i in range(rows):
            row = first + i
            x, m, n = direction[layer, row, begin:end], momentum[layer, row, begin:end], ahead[i]
            total, slope = np.float32(0), np.float32(0)
            for j in range(x.shape[0]):
                x[j] = n[j]
                total += n[j] * n[j]
                slope += m[j] * n[j]
            sums[0, layer, row, block], sums[1, layer, row, block] = total, slope
    return 0.0


def direction_of_tiles(
    gradient: Tensor, outputs: Tensor, inputs: Tensor, first_order: FirstOrderStep
) -> tuple[Tensor, Measures, Measures]:
    """Update M and V; the direction G N A of every tile, and the measures of it and of the first-order step.

    D, M and V are [layers, out, in], `outputs` [layers, blocks, b_out, b_out] is G, and `inputs`
    [layers, blocks, b_in, b_in] is A; all contiguous and float32.
    """
    height, width, blocks = outputs.shape[3], inputs.shape[2], inputs.shape[1]
    outputs = F.pad(outputs, (0, 0, 0, -height % _ROWS)) if height % _ROWS else outputs
    inputs = F.pad(inputs, (0, -width % LANES)) if width % LANES else inputs
    direction = torch.empty_like(gradient)
    tensors = gradient, first_order.momentum, first_order.second_moment, direction, outputs, inputs
    arrays = [None if tensor is None else tensor.detach().numpy() for tensor in tensors]
    sums = np.empty((4 if first_order.second_moment is None else 6, *gradient.shape[:2], blocks))
    beta = first_order.second_moment_decay
    numbers = first_order.momentum_decay, beta, 1 - beta, first_order.epsilon
    options = tuple(map(np.float32, numbers)), first_order.nesterov

    def loop(start: int, stop: int) -> float:
        # By torch, which aligns to whole vectors; numpy does not, and every second load would take longer.
        shape = 2, outputs.shape[2], inputs.shape[3]
        scratch = torch.zeros(shape, dtype=torch.float32, device="cpu").numpy()
        return float(_process_tiles(*arrays, sums, scratch, *options, start, stop))

    tiles = gradient.shape[0] * outputs.shape[1] * blocks
    run_parallel(loop, tiles, max(1, _ENTRIES_PER_THREAD // (height * width)))
    of_direction, of_first_order = _measures(sums, first_order)
    return direction, of_direction, of_first_order.corrected(first_order.scale, first_order.sum_of_weights)


def _measures(sums: Any, first_order: FirstOrderStep) -> tuple[Measures, Measures]:
    of_lengths = sums.reshape(len(sums), sums.shape[1] * first_order.lengths, -1).sum(2).astype(np.float32)
    of_lengths[[0, 2]] = np.sqrt(of_lengths[[0, 2]])
    norm, slope, of_norm, *others = map(torch.from_numpy, of_lengths)
    if not first_order.with_slopes:
        return Measures(norm), Measures(of_norm)
    return Measures(norm, slope), Measures(of_norm, *others)
