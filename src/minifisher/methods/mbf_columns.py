"""MBF with blocks over the columns of a matrix: the weights that lead from one input to all outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from minifisher.curvature import Curvature
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class ColumnBlocks(Curvature):
    """Mini-blocks over columns: those over the rows of the transposed weight.

    The columns of W [out, in] are the rows of W^T [in, out]. With shared blocks of width `out` the direction
    is ((1/in) E[D D^T] + lambda I)^(-power) M. A folded bias is the last column, and a vector [out] is one.
    """

    transposed: Curvature
    """The curvature of W^T, [in, out], or of a vector as a row, [1, out]."""
    of_vector: bool = False

    @property
    def needs(self) -> type[Statistics] | None:  # type: ignore[override]
        """What the blocks read."""
        return self.transposed.needs

    @property
    def capturable(self) -> bool:
        """Whether the curvature of W^T is."""
        return self.transposed.capturable

    @property
    def averages(self) -> tuple[str, ...] | None:
        """Those of the curvature of W^T."""
        return self.transposed.averages

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Likewise."""
        return self.transposed.recomputed

    def matrices(self, state: State) -> Sequence[Tensor]:
        """The blocks F_b of W^T."""
        return self.transposed.matrices(state)

    def shard(self, shape: torch.Size) -> ColumnBlocks | None:
        """The same curvature of a piece: any number of whole columns, or of each column whole blocks."""
        piece = self.transposed.shard(transpose_of(shape))
        return None if piece is None else replace(self, transposed=piece)

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """Those of W^T along its other dimension."""
        return self.transposed.state_axes(1 - dimension)

    def init(self, layer: Layer) -> State:
        """The state of the blocks of W^T; only the device of the layer is read."""
        return self.transposed.init(layer)

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """F_b <- decay F_b + (1 - decay) E[d_b d_b^T], with d_b the entries of a block of D^T."""
        if isinstance(statistics, BatchGradient):
            statistics = BatchGradient(self._transpose(statistics.gradient))
        else:
            assert isinstance(statistics, LayerSamples)
            statistics = _TransposedSamples(statistics)
        self.transposed.observe(state, statistics, decay)

    def refresh(self, state: State, damping: float) -> None:
        """The inverses of the blocks of W^T."""
        self.transposed.refresh(state, damping)

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(F_b + lambda_b I)^(-power) m_b for every block of every column."""
        product = self.transposed.precondition(state, self._transpose(direction), damping)
        return product.squeeze(-2) if self.of_vector else product.mT.contiguous()

    def _transpose(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(-2) if self.of_vector else weight.mT


def transpose_of(shape: torch.Size) -> torch.Size:
    """The shape of W^T: (in, out) of (out, in), and (1, out) of (out,)."""
    outputs, inputs = (*shape, 1)[:2]
    return torch.Size((inputs, outputs))


@dataclass(frozen=True)
class _TransposedSamples(LayerSamples):
    """The samples of W^T: D_n^T = sum_s a_ns g_ns^T."""

    samples: LayerSamples

    @property
    def count(self) -> int:  # type: ignore[override]
        """N."""
        return self.samples.count

    @property
    def positions(self) -> int:
        """As of the layer."""
        return self.samples.positions

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Output gradients in the place of inputs, and inputs in that of output gradients."""
        return ((gradients, inputs) for inputs, gradients in self.samples.chunks())

    def gradients(self) -> Iterator[Tensor]:
        """D_n^T, [n, in, out]."""
        return (gradients.mT for gradients in self.samples.gradients())
