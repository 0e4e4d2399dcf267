"""Elementwise operations of a step compiled for the CPU, each one pass over memory; needs numba.

Torch computes `sum_of_squares` as fast. But where kernels run in a pool (`minifisher.kernels.threads`), they
have no core for some milliseconds after such a call.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.jit import compiled, compiled_as_written, inlined
from minifisher.kernels.threads import run_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from minifisher.curvature import Measures

_ENTRIES_PER_THREAD = 65_536  # with fewer entries, waking a thread costs more than it gains
CHUNK = 4096
# this many squares are summed in float32, then added to a float64 sum


# ---- kernels: entries start to stop of flat arrays ----


@inlined
def update_chunk(
    gradient: Any,
    momentum: Any,
    moment: Any,
    momentum_decay: Any,
    moment_decay: Any,
    fresh: Any,
    epsilon: Any,
    with_slope: bool,
) -> Any:
    """M <- mu M + D, V <- beta V + fresh D^2; the sums of s^2, M s, D^2, V for s = M / (sqrt(V) + epsilon).

    `with_slope` is a constant of the kernel that inlines this; without it only the first sum is not 0.
    """
    total, slope = np.float32(0), np.float32(0)
    newest, usual = np.float32(0), np.float32(0)
    for i in range(gradient.shape[0]):
        momentum[i] = momentum_decay * momentum[i] + gradient[i]
        moment[i] = moment_decay * moment[i] + fresh * gradient[i] * gradient[i]
        step = momentum[i] / (np.sqrt(moment[i]) + epsilon)
        total += step * step
        if with_slope:
            slope += momentum[i] * step
            newest += gradient[i] * gradient[i]
            usual += moment[i]
    return total, slope, newest, usual


@inlined
def update_momentum(gradient: Any, momentum: Any, momentum_decay: Any) -> Any:
    """M <- mu M + D; returns the sum of the squares of M."""
    total = np.float32(0)
    for i in range(gradient.shape[0]):
        momentum[i] = momentum_decay * momentum[i] + gradient[i]
        total += momentum[i] * momentum[i]
    return total


@compiled
def _update_moments(
    gradient: Any,
    momentum: Any,
    moment: Any,
    momentum_decay: Any,
    moment_decay: Any,
    fresh: Any,  # 1 - beta
    epsilon: Any,
    sums: Any,  # [1 | 4, layers, chunks]
    start: int,
    stop: int,
) -> float:
    """`update_chunk` for chunks start to stop of all layers."""
    chunks, entries = sums.shape[2], gradient.shape[1]
    for index in range(start, stop):
        layer, chunk = index // chunks, index % chunks
        # Slices, because numba does not vectorise a loop whose index might be negative.
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, entries)
        d, m, v = gradient[layer, first:last], momentum[layer, first:last], moment[layer, first:last]
        if sums.shape[0] == 1:
            total, _, _, _ = update_chunk(d, m, v, momentum_decay, moment_decay, fresh, epsilon, False)
        else:
            total, slope, newest, usual = update_chunk(
                d, m, v, momentum_decay, moment_decay, fresh, epsilon, True
            )
            sums[1, layer, chunk], sums[2, layer, chunk], sums[3, layer, chunk] = slope, newest, usual
        sums[0, layer, chunk] = total
    return 0.0


@compiled
def _measure_chunks(step: Any, momentum: Any, squares: Any, slopes: Any, start: int, stop: int) -> float:
    """The sums of x^2 and M x in chunks start to stop of all layers, [layers, chunks]."""
    chunks, entries = squares.shape[1], step.shape[1]
    for index in range(start, stop):
        layer, chunk = index // chunks, index % chunks
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, entries)
        x, m = step[layer, first:last], momentum[layer, first:last]
        total, slope = np.float32(0), np.float32(0)
        for i in range(x.shape[0]):
            total += x[i] * x[i]
            slope += x[i] * m[i]
        squares[layer, chunk], slopes[layer, chunk] = total, slope
    return 0.0


@compiled
def _descent_lengths(
    norm: Any,
    slope: Any,
    of_norm: Any,
    of_slope: Any,
    newest: Any,  # or None: then the limit is the same for all
    usual: Any,
    limit: Any,
    usual_growth: Any,
    highest: Any,  # their product
    length: Any,
) -> bool:
    """`descent_length` for arrays; writes `length`."""
    finite = True
    for i in range(length.shape[0]):
        quotient = of_norm[i] / norm[i] if of_norm[i] != 0 else np.float32(0)
        most = limit
        if newest is not None and newest[i] > usual_growth * usual[i]:
            most = max(np.float32(1), highest * usual[i] / newest[i])
        descent, most = of_slope[i] / slope[i], most * quotient
        if descent > 0:
            length[i] = descent if descent < most else most
        else:
            length[i] = quotient
        # Not np.isfinite: where sums may be reordered, numba compiles it to True.
        finite = finite and abs(norm[i] + length[i]) < np.inf
    return finite


@compiled
def _sum_of_squares(vector: Any, start: int, stop: int) -> float:
    total = 0.0
    for first in range(start, stop, CHUNK):
        values = vector[first : min(first + CHUNK, stop)]
        part = np.float32(0)
        for i in range(values.shape[0]):
            part += values[i] * values[i]
        total += part
    return total


@compiled_as_written
def _subtract_scaled(
    weight: Any, direction: Any, lengths: Any, rate: Any, keep: Any, start: int, stop: int
) -> float:
    """For chunks start to stop of all rows."""
    entries = weight.shape[1]
    chunks = (entries + CHUNK - 1) // CHUNK
    for index in range(start, stop):
        row, first = index // chunks, index % chunks * CHUNK
        last = min(first + CHUNK, entries)
        w, d, length = weight[row, first:last], direction[row, first:last], lengths[row]
        for i in range(w.shape[0]):
            w[i] = keep * w[i] - rate * (length * d[i])
    return 0.0


# ---- the same for tensors, all contiguous and float32 ----


def adam_step(
    gradient: Tensor,
    momentum: Tensor,
    moment: Tensor,
    momentum_decay: float,
    moment_decay: float,
    epsilon: float,
    with_slope: bool,
) -> Iterator[Tensor]:
    """M <- mu M + D, V <- beta V + (1 - beta) D^2; |s| for s = M / (sqrt(V) + epsilon), [layers].

    `with_slope` also <M, s>, |D|^2 and the sum of V. All tensors are [layers, entries].
    """
    arrays = [tensor.detach().numpy() for tensor in (gradient, momentum, moment)]
    numbers = [np.float32(number) for number in (momentum_decay, moment_decay, 1 - moment_decay, epsilon)]
    layers, entries = gradient.shape
    sums = np.empty((4 if with_slope else 1, layers, -(-entries // CHUNK)))
    _run_over_chunks(partial(_update_moments, *arrays, *numbers, sums), layers, entries)
    of_layers = sums.sum(2).astype(np.float32)
    of_layers[0] = np.sqrt(of_layers[0])
    return map(torch.from_numpy, of_layers)


def norm_and_slope(step: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """|x| and <M, x>, [layers], of x and M [layers, entries]."""
    layers, entries = step.shape
    sums = np.empty((2, layers, -(-entries // CHUNK)))
    loop = partial(_measure_chunks, step.detach().numpy(), momentum.detach().numpy(), *sums)
    _run_over_chunks(loop, layers, entries)
    square, slope = sums.sum(2).astype(np.float32)
    return torch.from_numpy(np.sqrt(square)), torch.from_numpy(slope)


def descent_length(
    direction: Measures, first_order: Measures, limit: float, usual_growth: float
) -> tuple[Tensor, bool]:
    """`minifisher.step.first_order.graft_length` by slopes, and whether norm + length is finite everywhere.

    All tensors are [lengths].
    """
    arrays = [None if tensor is None else tensor.numpy() for tensor in (*direction[:2], *first_order)]
    length = np.empty_like(arrays[0])
    numbers = map(np.float32, (limit, usual_growth, limit * usual_growth))
    finite = _descent_lengths(*arrays, *numbers, length)
    return torch.from_numpy(length), finite


def sum_of_squares(tensor: Tensor) -> float:
    """The sum of the squares of all entries."""
    vector = tensor.detach().view(-1).numpy()
    return run_parallel(partial(_sum_of_squares, vector), vector.shape[0], _ENTRIES_PER_THREAD)


def subtract_scaled(weight: Tensor, direction: Tensor, lengths: Tensor, rate: float, keep: float) -> None:
    """W <- keep W - rate lengths direction, in place; one length for each of so many equal parts."""
    rows = lengths.shape[0]
    w, d = (tensor.detach().view(rows, -1).numpy() for tensor in (weight, direction))
    loop = partial(_subtract_scaled, w, d, lengths.numpy(), np.float32(rate), np.float32(keep))
    _run_over_chunks(loop, rows, w.shape[1])


def _run_over_chunks(loop: Callable[[int, int], float], rows: int, entries: int) -> None:
    """Call loop(start, stop) for the chunks of all rows, which it counts one row after another."""
    chunks = -(-entries // CHUNK)
    run_parallel(loop, rows * chunks, max(1, _ENTRIES_PER_THREAD * chunks // entries))
