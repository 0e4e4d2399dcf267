"""What Shampoo, SOAP and TNT have in common: one matrix for each mode of a weight, and how it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Curvature
from minifisher.linalg.dense import add_to_diagonal, inverse_power, working_dtype
from minifisher.linalg.modes import TensorReading, even_width, merged, mode_products, second_moment
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics, mean_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# What is chosen where the user says nothing; docs/methods.md has the measurements.
_WIDTH = 256
# A block is at most so many times as wide along one mode as along all others together: then factors, and what
# is refreshed from them, take at most 16 times the memory of the weight.
_ASPECT = 7


@dataclass(frozen=True)
class ModeFactors(Curvature):
    """One symmetric matrix for each mode i of each block: H_i = E[mat_i(D) mat_i(D)^T], [blocks, w_i, w_i].

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
        """(1/N) sum_n mat_i(D_n) mat_i(D_n)^T for every mode."""
        totals: list[Tensor | float] = [0.0] * self.reading.order
        for moments in self._chunk_moments(samples):
            totals = [total + moment for total, moment in zip(totals, moments, strict=True)]
        return [torch.as_tensor(total) / samples.count for total in totals]

    def _chunk_moments(self, samples: LayerSamples) -> Iterator[list[Tensor]]:
        if all(self._is_outer_product(*chunk) for chunk in samples.chunks()):
            for inputs, gradients in samples.chunks():
                yield outer_product_moments(self.reading, gradients.flatten(1), inputs.flatten(1))
            return
        order = self.reading.order
        for gradients in samples.gradients():
            # The samples are one more mode, which every product sums over.
            blocks = self._read(gradients).movedim(0, -1)
            yield [second_moment(blocks, mode, order + 1) for mode in range(order)]

    def _is_outer_product(self, inputs: Tensor, gradients: Tensor) -> bool:
        """Whether every D_n is g_n a_n^T: one position, and modes (out, in)."""
        sizes = gradients.shape[1:], inputs.shape[1:]
        return sizes == tuple((1, 1, n) for n in self.reading.dims)

    # ---- scale ----

    def _mean_squares(self, state: State) -> tuple[Tensor, Tensor]:
        """The mean square of the gradient's entries in each block, [..., blocks], and in the layer, [..., 1].

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


def outer_product_moments(reading: TensorReading, left: Tensor, right: Tensor) -> list[Tensor]:
    """sum_n mat_i(D_n) mat_i(D_n)^T of D_n = l_n r_n^T, which is never formed: left [n, n_1], right [n, n_2].

    In block (p, q) it is sum_n |r_nq|^2 l_np l_np^T and sum_n |l_np|^2 r_nq r_nq^T: [blocks, w_i, w_i].
    """
    pieces = [
        TensorReading((n,), (width,)).read(vectors, 1)  # [n, blocks along the mode, w_i]
        for vectors, n, width in zip((left, right), reading.dims, reading.widths, strict=True)
    ]
    squares = [piece.square().sum(-1) for piece in pieces]
    first = _weighted_moments(pieces[0], squares[1])
    second = _weighted_moments(pieces[1], squares[0]).transpose(0, 1)
    return [first.flatten(0, 1), second.flatten(0, 1)]


def _weighted_moments(vectors: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_nq v_np v_np^T: vectors [n, p, w], weights [n, q] to [p, q, w, w]."""
    rows = vectors.permute(1, 2, 0).unsqueeze(1)  # [p, 1, w, n]
    return (rows * weights.T.unsqueeze(1)) @ rows.mT


def damped_power(matrices: Tensor, damping: Tensor, power: float) -> Tensor:
    """(A + lambda I)^(-power): matrices [..., b, b], damping [...]."""
    damped = add_to_diagonal(matrices, damping.unsqueeze(-1))
    return damped.pow(-power) if matrices.shape[-1] == 1 else inverse_power(damped, power)


def choose_reading(
    shape: torch.Size, options: dict[str, Any], kept: int = 1
) -> tuple[TensorReading, str, str]:
    """The modes and blocks of a weight under `max_dim` and `merge_dims`, in words too, and the reason."""
    dims, widest = merged(shape, options["merge_dims"], kept), options["max_dim"]
    if widest is None and len(dims) == 1:
        widest = 1
    widths = tuple(even_width(n, widest or _widest(mode, dims)) for mode, n in enumerate(dims))
    reading = TensorReading(dims, widths)
    structure = "one factor" if len(dims) == 1 else f"{len(dims)} factors"
    return reading, "diagonal" if max(widths) == 1 else structure, _reason(reading, options["max_dim"])


def choose_schedule(reading: TensorReading, from_gradient: bool, options: dict[str, Any]) -> tuple[int, int]:
    """T1 and T2: a diagonal of the mini-batch gradient costs next to nothing and is kept up to date."""
    cheap = from_gradient and max(reading.widths) == 1
    every, refresh = (1, 1) if cheap else (4, 20)
    return options["statistics_every"] or every, options["inverse_every"] or refresh


def _reason(reading: TensorReading, max_dim: int | None) -> str:
    cut = "uncut" if reading.blocks == 1 else f"blocks of {'x'.join(map(str, reading.widths))}"
    if max_dim is not None:
        return f"{cut}: max_dim={max_dim}"
    if reading.order == 1:
        return "not a matrix"
    return f"{cut}: at most {_WIDTH} wide, and {_ASPECT} times the other modes"


def _widest(mode: int, dims: Sequence[int]) -> int:
    """The widest block along a mode whose factor stays small beside the block itself."""
    others = 1
    for axis, n in enumerate(dims):
        others *= min(n, _WIDTH) if axis != mode else 1
    return min(_WIDTH, _ASPECT * others)
