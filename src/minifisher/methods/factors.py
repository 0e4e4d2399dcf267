"""What Shampoo, SOAP and TNT have in common: one matrix for each mode of a weight, and how it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Curvature
from minifisher.linalg.modes import TensorReading, even_width, merged, mode_products, second_moment
from minifisher.linalg.spd import add_to_diagonal, inverse_power
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics, mean_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# A block that never had a gradient has no scale of its own; whatever its zero direction is divided by, the
# quotient must be finite.
NO_CURVATURE = 1e-30

# What is chosen where the user says nothing; docs/methods.md has the measurements.
_WIDTH = 256
_ASPECT = 7  # a block is at most 7 times as wide along one mode as all others together: 16 bytes a byte of the weight


@dataclass(frozen=True)
class ModeFactors(Curvature):
    """One symmetric matrix for each mode i of each block: H_i = E[mat_i(D) mat_i(D)^T], [..., blocks, w_i, w_i].

    The direction is M x_1 P_1 ... x_K P_K; a subclass says in `refresh` which function P_i is of the factors.
    E is over mini-batch gradients D, or over per-sample gradients D_n.
    """

    reading: TensorReading
    shape: torch.Size
    needs: type[Statistics]
    dtype: torch.dtype
    relative_damping: bool = True
    per_sample: bool = True
    """Of LayerSamples: H_i over the samples' gradients D_n, or over their mean alone."""

    @property
    def averages(self) -> tuple[str, ...]:
        """The factors."""
        return tuple(f"factor_{mode}" for mode in range(self.reading.order))

    @property
    def reads_mean_gradient(self) -> bool:
        """Where the mean over samples comes before the product."""
        return not self.per_sample

    def init(self, layer: Layer) -> State:
        """`factor_i` is averaged, `inverse_i` is what was last refreshed from it: [blocks, w_i, w_i]."""
        state = {}
        for mode, width in enumerate(self.reading.widths):
            size = (self.reading.blocks, width, width)
            state[f"factor_{mode}"] = torch.zeros(size, dtype=self.dtype, device=layer.weight.device)
            state[f"inverse_{mode}"] = torch.zeros_like(state[f"factor_{mode}"])
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """H_i <- decay H_i + (1 - decay) E[mat_i(D) mat_i(D)^T]."""
        for mode, fresh in enumerate(self._second_moments(statistics)):
            state[f"factor_{mode}"].lerp_(fresh.to(self.dtype), 1 - decay)

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """M x_1 P_1 ... x_K P_K for every block."""
        blocks = self._read(direction)
        inverses = [state[f"inverse_{mode}"].to(blocks.dtype) for mode in range(self.reading.order)]
        return self.reading.write(mode_products(blocks, inverses), self.shape).to(direction.dtype)

    def _read(self, tensor: Tensor) -> Tensor:
        """[..., *shape] as blocks [..., blocks, w_1, ..., w_K], in the dtype to compute in."""
        return self.reading.read(tensor.to(working_dtype(self.dtype)), len(self.shape))

    def _factors(self, state: State) -> list[Tensor]:
        return [state[f"factor_{i}"].to(working_dtype(self.dtype)) for i in range(self.reading.order)]

    # ---- statistics ----

    def _second_moments(self, statistics: Statistics) -> list[Tensor]:
        """E[mat_i(D) mat_i(D)^T] for every mode, [..., blocks, w_i, w_i]."""
        if isinstance(statistics, LayerSamples):
            if self.per_sample:
                return self._sample_moments(statistics)
            gradient = mean_gradient(statistics, self.shape)
        else:
            assert isinstance(statistics, BatchGradient)
            gradient = statistics.gradient
        blocks, order = self._read(gradient), self.reading.order
        return [second_moment(blocks, mode, order) for mode in range(order)]

    def _sample_moments(self, samples: LayerSamples) -> list[Tensor]:
        """(1/N) sum_n mat_i(D_n) mat_i(D_n)^T: the samples are one more mode that every product sums over."""
        order = self.reading.order
        totals: list[Tensor | float] = [0.0] * order
        for gradients in samples.gradients():
            blocks = self._read(gradients).movedim(0, -1)
            totals = [total + second_moment(blocks, i, order + 1) for i, total in enumerate(totals)]
        return [torch.as_tensor(total) / samples.count for total in totals]

    # ---- scale ----

    def _mean_squares(self, state: State) -> tuple[Tensor, Tensor]:
        """The mean square of the gradient's entries, in every block, [..., blocks], and in the layer, [..., 1].

        The trace of H_i is the sum of squares, the same for all modes; padding does not count.
        """
        sums = state["factor_0"].to(working_dtype(self.dtype)).diagonal(dim1=-2, dim2=-1).sum(-1)
        entries = self._entries(sums)
        return sums / entries, sums.sum(-1, keepdim=True) / entries.sum()

    def _entries(self, like: Tensor) -> Tensor:
        """The entries of every block, [blocks]."""
        return math.prod(self._lengths(like), start=like.new_ones(()))

    def _lengths(self, like: Tensor) -> list[Tensor]:
        """The entries of every block along each mode, [blocks]."""
        return [self.reading.lengths(mode, like) for mode in range(self.reading.order)]


def damped_power(matrices: Tensor, damping: Tensor, power: float) -> Tensor:
    """(A + lambda I)^(-power): matrices [..., b, b], damping [...]."""
    damped = add_to_diagonal(matrices, damping.unsqueeze(-1))
    return damped.pow(-power) if matrices.shape[-1] == 1 else inverse_power(damped, power)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: half precision only stores."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def choose_reading(shape: torch.Size, options: dict[str, Any]) -> tuple[TensorReading, str, str]:
    """The modes and blocks of a weight under `max_dim` and `merge_dims`, and the two in words with the reason."""
    dims = merged(shape, options["merge_dims"])
    widest = options["max_dim"]
    if widest is not None:
        reason = f"dimensions cut at max_dim={widest}"
    elif len(dims) == 1:
        widest, reason = 1, "not a matrix"
    else:
        reason = f"dimensions cut at {_WIDTH}"
    widths = tuple(even_width(n, widest or _widest(mode, dims)) for mode, n in enumerate(dims))
    reading = TensorReading(dims, widths)
    if max(widths) == 1:
        return reading, "diagonal", reason
    structure = "one factor" if len(dims) == 1 else f"{len(dims)} factors"
    return reading, structure, reason if reading.blocks > 1 else f"no dimension above {widest or _WIDTH}"


def _widest(mode: int, dims: Sequence[int]) -> int:
    """The widest block along a mode whose factor stays small beside the block itself."""
    others = 1
    for axis, n in enumerate(dims):
        others *= min(n, _WIDTH) if axis != mode else 1
    return min(_WIDTH, _ASPECT * others)
