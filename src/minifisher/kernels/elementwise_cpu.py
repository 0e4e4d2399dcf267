"""Elementwise operations of a step compiled for the CPU, each one pass over memory; needs numba.

Torch computes `sum_of_squares` and `add_scaled` as fast. But after such a call torch's threads wait actively
for some milliseconds, on the cores that the other compiled kernels of the step need.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.jit import compiled
from minifisher.kernels.threads import run_parallel

if TYPE_CHECKING:
    from torch import Tensor

_ENTRIES_PER_THREAD = 65_536  # with fewer entries, waking a thread costs more than it gains
_CHUNK = 4096  # this many squares are summed in float32, then added to a float64 sum


# ---- kernels: entries start to stop of flat arrays ----


@compiled
def update_moments(
    gradient: Any,
    momentum: Any,
    moment: Any,
    momentum_decay: Any,
    moment_decay: Any,
    fresh: Any,
    epsilon: Any,
    start: int,
    stop: int,
) -> float:
    """M <- mu M + D, V <- beta V + fresh D^2; returns the sum of (M / (sqrt(V) + epsilon))^2.

    Without V (a `moment` of no entries) it returns the sum of M^2.
    """
    total = 0.0
    for first in range(start, stop, _CHUNK):
        # Slices, because numba does not vectorise a loop whose index might be negative.
        last = min(first + _CHUNK, stop)
        d, m, v = gradient[first:last], momentum[first:last], moment[first:last]
        part = np.float32(0)
        if moment.shape[0] == 0:
            for i in range(d.shape[0]):
                m[i] = momentum_decay * m[i] + d[i]
                part += m[i] * m[i]
            total += part
            continue
        for i in range(d.shape[0]):
            m[i] = momentum_decay * m[i] + d[i]
            v[i] = moment_decay * v[i] + fresh * d[i] * d[i]
            step = m[i] / (np.sqrt(v[i]) + epsilon)
            part += step * step
        total += part
    return total


@compiled
def _update_moments_of_layers(
    gradient: Any,
    momentum: Any,
    moment: Any,
    momentum_decay: Any,
    moment_decay: Any,
    fresh: Any,
    epsilon: Any,
    squares: Any,
    start: int,
    stop: int,
) -> float:
    for layer in range(start, stop):
        d, m, v = gradient[layer], momentum[layer], moment[layer]
        squares[layer] = update_moments(d, m, v, momentum_decay, moment_decay, fresh, epsilon, 0, d.shape[0])
    return 0.0


@compiled
def _sum_of_squares(vector: Any, start: int, stop: int) -> float:
    total = 0.0
    for first in range(start, stop, _CHUNK):
        values = vector[first : min(first + _CHUNK, stop)]
        part = np.float32(0)
        for i in range(values.shape[0]):
            part += values[i] * values[i]
        total += part
    return total


@compiled
def _add_scaled(weight: Any, direction: Any, factor: Any, start: int, stop: int) -> float:
    w, d = weight[start:stop], direction[start:stop]
    for i in range(w.shape[0]):
        w[i] += factor * d[i]
    return 0.0


# ---- the same for tensors, all contiguous and float32 ----


def adam_step_norm(
    gradient: Tensor,
    momentum: Tensor,
    moment: Tensor,
    momentum_decay: float,
    moment_decay: float,
    epsilon: float,
) -> Tensor:
    """M <- mu M + D, V <- beta V + (1 - beta) D^2; the norm of M / (sqrt(V) + epsilon), [layers].

    All tensors are [layers, entries].
    """
    arrays = [tensor.detach().numpy() for tensor in (gradient, momentum, moment)]
    numbers = [np.float32(number) for number in (momentum_decay, moment_decay, 1 - moment_decay, epsilon)]
    layers, entries = gradient.shape
    squares = np.empty(layers, np.float32)
    if layers == 1:
        rows = [array[0] for array in arrays]
        squares[0] = run_parallel(partial(update_moments, *rows, *numbers), entries, _ENTRIES_PER_THREAD)
    else:
        layers_per_thread = max(1, _ENTRIES_PER_THREAD // max(1, entries))
        run_parallel(
            partial(_update_moments_of_layers, *arrays, *numbers, squares),
            layers,
            layers_per_thread,
        )
    return torch.from_numpy(np.sqrt(squares))


def sum_of_squares(tensor: Tensor) -> float:
    """The sum of the squares of all entries."""
    vector = tensor.detach().view(-1).numpy()
    return run_parallel(partial(_sum_of_squares, vector), vector.shape[0], _ENTRIES_PER_THREAD)


def add_scaled(weight: Tensor, direction: Tensor, factor: float) -> None:
    """W <- W + factor direction, in place."""
    w, d, f = weight.detach().view(-1).numpy(), direction.view(-1).numpy(), np.float32(factor)
    run_parallel(partial(_add_scaled, w, d, f), w.shape[0], _ENTRIES_PER_THREAD)
