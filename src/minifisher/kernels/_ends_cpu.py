"""The two ends of a step in compiled loops: the square of a gradient, the update of a weight; needs numba.

Torch does both as fast, but its threads spin behind them for some milliseconds, on the cores that the
compiled passes between the two ends want.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minifisher.kernels.elementwise_cpu import LEAST, VECTOR
from minifisher.kernels.jit import compiled
from minifisher.kernels.threads import in_parts

if TYPE_CHECKING:
    from torch import Tensor


@compiled
def _square(vector: Any, start: int, stop: int) -> float:
    total = 0.0
    for first in range(start, stop, VECTOR):
        values = vector[first : min(first + VECTOR, stop)]
        part = np.float32(0)
        for i in range(values.shape[0]):
            part += values[i] * values[i]
        total += part
    return total


@compiled
def _add(weight: Any, direction: Any, factor: Any, start: int, stop: int) -> float:
    w, d = weight[start:stop], direction[start:stop]
    for i in range(w.shape[0]):
        w[i] += factor * d[i]
    return 0.0


def square(tensor: Tensor) -> float:
    """The sum of squares of all entries; contiguous float32."""
    vector = tensor.detach().view(-1).numpy()
    return in_parts(lambda start, stop: _square(vector, start, stop), vector.shape[0], LEAST)


def add(weight: Tensor, direction: Tensor, factor: float) -> None:
    """W <- W + factor direction; contiguous float32."""
    w, d, f = weight.detach().view(-1).numpy(), direction.view(-1).numpy(), np.float32(factor)
    in_parts(lambda start, stop: _add(w, d, f, start, stop), w.shape[0], LEAST)
