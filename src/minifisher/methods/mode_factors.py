"""What Shampoo, SOAP and TNT share: a second moment for each mode of a weight, its blocks and options."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.curvature import Curvature, Plan, no_curvature
from minifisher.linalg.damping import curvature_scale
from minifisher.linalg.dense import working_dtype
from minifisher.linalg.modes import TensorReading, even_width, merged, mode_products, second_moment
from minifisher.methods.choices import curvature_dtype, gradient_or_samples, power_option
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics, mean_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# Defaults; docs/methods.md has the measurements.
_WIDTH = 256  # entries of a block along one mode, at most
# A block is at most this many times as wide along one mode as along all others together. The factors and what
# is computed from them then take at most 16 times the memory of the weight.
_ASPECT = 7


@dataclass(frozen=True)
class ModeCurvature(Curvature):
    """A curvature with matrices [blocks, w_i, w_i] for each mode i of a weight.

    The weight is read as a tensor of K modes and cut into blocks of w_1 x ... x w_K entries.
    """

    reading: TensorReading
    shape: torch.Size
    needs: type[Statistics]
    dtype: torch.dtype
    relative_damping: bool = True

    def _read(self, tensor: Tensor) -> Tensor:
        """[..., *shape] as blocks [..., blocks, w_1, ..., w_K], in the dtype to compute in."""
        return self.reading.read(tensor.to(working_dtype(self.dtype)), len(self.shape))

    def matrices(self, state: State) -> Sequence[Tensor]:
        """The factors H_i."""
        return self._matrices(state, "factor")

    def _matrices(self, state: State, name: str) -> list[Tensor]:
        """`name_i` of the state for every mode i, in the dtype to compute in."""
        return [state[f"{name}_{mode}"].to(working_dtype(self.dtype)) for mode in range(self.reading.order)]


@dataclass(frozen=True)
class ModeFactors(ModeCurvature):
    """A factor H_i = E[mat_i(D) mat_i(D)^T] for each mode i; the direction is M x_1 P_1 ... x_K P_K.

    P_i is a damped inverse or root that `refresh` of a subclass computes from the factors. E is the mean over
    mini-batch gradients D, or over per-sample gradients D_n.
    """

    per_sample: bool = True
    """Whether samples count one by one, with D_n, or as their mean gradient."""

    @property
    def averages(self) -> tuple[str, ...]:
        """The factors."""
        return tuple(f"factor_{mode}" for mode in range(self.reading.order))

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The inverses."""
        return tuple(f"inverse_{mode}" for mode in range(self.reading.order))

    @property
    def reads_mean_gradient(self) -> bool:
        """Whether samples count as their mean gradient."""
        return not self.per_sample

    def init(self, layer: Layer) -> State:
        """`factor_i`, which is H_i, and `inverse_i`, which is P_i: [blocks, w_i, w_i]."""
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
        product = mode_products(self._read(direction), self._matrices(state, "inverse"))
        return self.reading.write(product, self.shape).to(direction.dtype)

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
        return [total / samples.count for total in totals if isinstance(total, Tensor)]

    def _chunk_moments(self, samples: LayerSamples) -> Iterator[list[Tensor]]:
        if all(self._is_outer_product(*chunk) for chunk in samples.chunks()):
            for inputs, gradients in samples.chunks():
                yield outer_product_moments(self.reading, gradients.flatten(1), inputs.flatten(1))
            return
        order = self.reading.order
        for gradients in samples.gradients():
            # As one more mode, the samples are summed over in every product.
            blocks = self._read(gradients).movedim(0, -1)
            yield [second_moment(blocks, mode, order + 1) for mode in range(order)]

    def _is_outer_product(self, inputs: Tensor, gradients: Tensor) -> bool:
        """Whether every D_n is g_n a_n^T: there is one position, and the modes are (out, in)."""
        sizes = gradients.shape[1:], inputs.shape[1:]
        return sizes == tuple((1, 1, n) for n in self.reading.dims)

    # ---- damping ----

    def _damping_levels(self, state: State, damping: float) -> list[Tensor]:
        """lambda_i of every block for each mode i, [..., blocks]."""
        block, layer = self._mean_squares(state)
        if self.relative_damping:
            return self._relative_damping(curvature_scale(block, layer), damping)
        return [block.new_tensor(damping).expand_as(block)] * self.reading.order

    @abstractmethod
    def _relative_damping(self, scale: Tensor, damping: float) -> list[Tensor]:
        """The same if `damping` is relative; `scale` is that of the mean squares, [..., blocks]."""

    def _mean_squares(self, state: State) -> tuple[Tensor, Tensor]:
        """The mean square of a gradient's entries in each block, [..., blocks], and in the layer, [..., 1].

        The trace of every H_i is the sum of squares. Padding does not count.
        """
        sums = state["factor_0"].to(working_dtype(self.dtype)).diagonal(dim1=-2, dim2=-1).sum(-1)
        entries = self._entries(sums)
        return sums / entries, sums.sum(-1, keepdim=True) / entries.sum()

    def _entries(self, like: Tensor) -> Tensor:
        """The number of entries of every block, [blocks]."""
        return math.prod(self._lengths(like), start=like.new_ones(()))

    def _lengths(self, like: Tensor) -> list[Tensor]:
        """The number of entries of every block along each mode, [blocks]."""
        return [self.reading.lengths(mode, like) for mode in range(self.reading.order)]


def outer_product_moments(reading: TensorReading, left: Tensor, right: Tensor) -> list[Tensor]:
    """sum_n mat_i(D_n) mat_i(D_n)^T for D_n = l_n r_n^T, without forming D_n: [blocks, w_i, w_i].

    left is [n, n_1], right [n, n_2]. The moments of block (p, q) are sum_n |r_nq|^2 l_np l_np^T and
    sum_n |l_np|^2 r_nq r_nq^T.
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


# ---- options and plans ----


class ModeOptimizer(CurvatureOptimizer):
    """The options of the methods that read a weight as a tensor."""

    power: float = power_option(1.0)
    max_dim: int | None = option(
        default=None,
        at_least=1,
        meaning="Largest width of a block along a mode; longer modes are cut evenly; None: 256, less if "
        "the other modes are short, and 1 for vectors.",
    )
    merge_dims: int | None = option(
        default=None,
        at_least=1,
        meaning="Neighbouring dimensions, from the last on, form one mode while their product is at most "
        "this: 9 gives (out, in, k1 k2) for 3x3 kernels, 1 merges nothing; None: (out, all others).",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """A matrix for each mode of a weight, in blocks that memory allows."""
        return self._plan(layer, options) if layer.shape.numel() else no_curvature("without entries")

    @abstractmethod
    def _plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """The plan of a weight that has entries."""


def choose_reading(shape: torch.Size, options: Mapping[str, Any], kept: int = 1) -> TensorReading:
    """The modes and blocks of a weight; with merge_dims=None, all but `kept` dimensions are merged."""
    dims, widest = merged(shape, options["merge_dims"], kept), options["max_dim"]
    if widest is None and len(dims) == 1:
        widest = 1
    widths = tuple(even_width(n, widest or _widest(mode, dims)) for mode, n in enumerate(dims))
    return TensorReading(dims, widths)


def factor_fields(layer: Layer, reading: TensorReading, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModeFactors` that Shampoo and TNT choose alike."""
    return {
        "reading": reading,
        "shape": layer.shape,
        "needs": gradient_or_samples(layer, options),
        "dtype": curvature_dtype(layer, options),
        "relative_damping": options["relative_damping"],
    }


def choose_schedule(curvature: ModeFactors, options: Mapping[str, Any]) -> tuple[int, int]:
    """T1 and T2; a diagonal of the mini-batch gradient is so cheap that both are 1."""
    cheap = curvature.needs is BatchGradient and max(curvature.reading.widths) == 1
    every, refresh = (1, 1) if cheap else (4, 20)
    return options["statistics_every"] or every, options["inverse_every"] or refresh


def plan_of(curvature: ModeCurvature, max_dim: int | None, schedule: tuple[int, int]) -> Plan:
    """The plan of a curvature, described in words."""
    reading = curvature.reading
    structure = "one factor" if reading.order == 1 else f"{reading.order} factors"
    if max(reading.widths) == 1:
        structure = "diagonal"
    reason = _reason(reading, max_dim)
    return Plan(curvature, structure, reason, reading.blocks, max(reading.widths), *schedule)


def _reason(reading: TensorReading, max_dim: int | None) -> str:
    cut = "uncut" if reading.blocks == 1 else f"blocks of {'x'.join(map(str, reading.widths))}"
    if max_dim is not None:
        return f"{cut}: max_dim={max_dim}"
    if reading.order == 1:
        return "not a matrix"
    return f"{cut}: at most {_WIDTH} wide, and {_ASPECT} times the other modes"


def _widest(mode: int, dims: Sequence[int]) -> int:
    """The widest block along a mode whose factor stays small beside the block itself."""
    others = math.prod(n for axis, n in enumerate(dims) if axis != mode)
    return min(_WIDTH, _ASPECT * others)
