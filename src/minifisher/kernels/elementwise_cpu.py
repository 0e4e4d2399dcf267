"""One pass over momentum and second moment that also sums up the square of Adam's step; needs numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minifisher.kernels.jit import compiled
from minifisher.kernels.threads import in_parts

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 65_536  # entries that pay for waking a thread
VECTOR = 4096  # entries whose squares are summed in float32 before they join the float64 sum


@compiled
def first_order_pass(
    gradient: Any,
    momentum: Any,
    moment: Any,
    mu: Any,
    decay: Any,
    fresh: Any,
    epsilon: Any,
    start: int,
    stop: int,
) -> float:
    """M <- mu M + D, V <- decay V + fresh D^2 from start to stop; the sum of (M / (sqrt(V) + epsilon))^2.

    Without V (a `moment` of no entries) the sum of M^2.
    """
    total = 0.0
    for first in range(start, stop, VECTOR):
        # Slices: numba vectorises no loop whose index might be negative.
        last = min(first + VECTOR, stop)
        d, m, v = gradient[first:last], momentum[first:last], moment[first:last]
        part = np.float32(0)
        if moment.shape[0] == 0:
            for i in range(d.shape[0]):
                m[i] = mu * m[i] + d[i]
                part += m[i] * m[i]
            total += part
            continue
        for i in range(d.shape[0]):
            m[i] = mu * m[i] + d[i]
            v[i] = decay * v[i] + fresh * d[i] * d[i]
            step = m[i] / (np.sqrt(v[i]) + epsilon)
            part += step * step
        total += part
    return total


@compiled
def _layers(
    gradient: Any,
    momentum: Any,
    moment: Any,
    mu: Any,
    decay: Any,
    fresh: Any,
    epsilon: Any,
    squares: Any,
    start: int,
    stop: int,
) -> float:
    for layer in range(start, stop):
        d, m, v = gradient[layer], momentum[layer], moment[layer]
        squares[layer] = first_order_pass(d, m, v, mu, decay, fresh, epsilon, 0, d.shape[0])
    return 0.0


def advance(
    gradient: Tensor, momentum: Tensor, moment: Tensor, mu: float, decay: float, epsilon: float
) -> Tensor:
    """M <- mu M + D, V <- decay V + (1 - decay) D^2; |M / (sqrt(V) + epsilon)| of every layer, [layers].

    All tensors are [layers, entries], contiguous float32.
    """
    arrays = [tensor.detach().numpy() for tensor in (gradient, momentum, moment)]
    numbers = [np.float32(number) for number in (mu, decay, 1 - decay, epsilon)]
    layers, entries = gradient.shape
    squares = np.empty(layers, np.float32)
    if layers == 1:
        rows = [array[0] for array in arrays]
        squares[0] = in_parts(
            lambda start, stop: first_order_pass(*rows, *numbers, start, stop), entries, LEAST
        )
    else:
        least = max(1, LEAST // max(1, entries))
        in_parts(lambda start, stop: _layers(*arrays, *numbers, squares, start, stop), layers, least)
    return torch.from_numpy(np.sqrt(squares))
