"""MBF with small blocks that rows do not share: every step factorises them anew and stores no inverse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, ClassVar

import torch

from minifisher.curvature import FusedCurvature
from minifisher.kernels import packed
from minifisher.kernels.choose import mean_square
from minifisher.linalg.blocks import BlockReading, sum_of_outer_products
from minifisher.linalg.dense import working_dtype
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.curvature import FirstOrderStep, Measures, State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class PackedBlocks(FusedCurvature):
    """Mini-blocks F_b = E[d_b d_b^T] stored as packed triangles; the direction is (F_b + lambda_b I)^-1 m_b.

    The same curvature as `MiniBlocks` with `power=1` and an inverse after every observation. It stores
    b (b + 1) / 2 numbers for a block of b entries, and one number for the layer. lambda_b is `damping`, or
    with relative damping `damping` times `minifisher.linalg.damping.curvature_scale` of the mean diagonal of
    the block and of the layer.
    """

    reading: BlockReading
    shape: torch.Size
    needs: type[Statistics]
    dtype: torch.dtype
    relative_damping: bool = True

    averages: ClassVar[tuple[str, ...]] = ("fisher", "mean")

    @cached_property
    def _tiling(self) -> packed.Tiling:
        return packed.Tiling(self.reading)

    def shard(self, shape: torch.Size) -> PackedBlocks | None:
        """The same curvature of a piece of the weight; None if the piece would have other tiles.

        A piece has any number of whole rows, or a part of each row: whole tiles, or whole blocks if a row is
        one tile.
        """
        whole, length = self._tiling, shape[1:].numel()
        piece = replace(self, reading=replace(self.reading, rows=shape[0], length=length), shape=shape)
        unit = self.reading.width * (1 if whole.tiles == 1 else whole.blocks_per_tile)
        fits = whole.tiles == 1 or piece._tiling.blocks_per_tile in (0, whole.blocks_per_tile)
        return piece if length == self.reading.length or (length % unit == 0 and fits) else None

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """Axis 0 of `fisher` counts rows, axis 1 the tiles of a row, axis 3 the blocks of a tile."""
        axis = 0 if dimension == 0 else 1 if self._tiling.tiles > 1 else 3
        return {"fisher": axis, "mean": None}

    def init(self, layer: Layer) -> State:
        """`fisher` [rows, tiles, entries, blocks], see `minifisher.kernels.packed`, and `mean` [1]."""
        device = layer.weight.device
        state = {"fisher": torch.zeros(self._tiling.shape, dtype=self.dtype, device=device)}
        if self.relative_damping:
            state["mean"] = torch.zeros(1, dtype=working_dtype(self.dtype), device=device)
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """F_b <- decay F_b + (1 - decay) E[d_b d_b^T], of the mini-batch or per-sample gradients."""
        if isinstance(statistics, BatchGradient):
            rows = self._rows(statistics.gradient)
            packed.average(state["fisher"], rows, self._tiling, decay)
            fresh = self._mean_square(rows) if self.relative_damping else None
        else:
            assert isinstance(statistics, LayerSamples)
            blocks = self._second_moment(statistics)
            state["fisher"].lerp_(self._tiling.pack(blocks).to(self.dtype), 1 - decay)
            trace = blocks.diagonal(dim1=-2, dim2=-1).sum()
            fresh = trace.view(1) / self.shape.numel() if self.relative_damping else None
        if fresh is not None:
            state["mean"].copy_(self._averaged_mean(state, fresh, decay))

    def _second_moment(self, samples: LayerSamples) -> Tensor:
        """(1/N) sum_n d_nb d_nb^T of every block, [rows, blocks, b, b]."""
        totals = (
            sum_of_outer_products(self.reading.read(gradients, len(self.shape)), shared=False)
            for gradients in samples.gradients()
        )
        return reduce(torch.add, totals) / samples.count

    @staticmethod
    def _mean_square(rows: Tensor) -> Tensor:
        """The mean of D^2 in every layer, [..., 1], of D [..., rows, length]."""
        leading = rows.shape[:-2]
        return mean_square(rows, leading.numel()).view(*leading, 1)

    @staticmethod
    def _averaged_mean(state: State, fresh: Tensor, decay: float) -> Tensor:
        """The mean of the layer's diagonal, [..., 1], after averaging the fresh one in."""
        return state["mean"].lerp(fresh.to(state["mean"].dtype), 1 - decay)

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(F_b + lambda_b I)^-1 m_b for every block of every row."""
        means = state["mean"] if self.relative_damping else direction.new_zeros(1)
        solved = packed.solve(
            state["fisher"], self._rows(direction), means, self._tiling, damping, self.relative_damping
        )
        return solved.reshape(direction.shape)

    def matrices(self, state: State) -> Sequence[Tensor]:
        """The blocks F_b of the first sixteen rows: dense, all of them would take twice the memory."""
        return (self._tiling.unpack(state["fisher"][..., :16, :, :, :]),)

    def fused_step(
        self, state: State, gradient: Tensor, decay: float, damping: float, first_order: FirstOrderStep
    ) -> tuple[Tensor, Measures, Measures] | None:
        """`observe`, the first-order step and `precondition` in one pass, where a compiled kernel can."""
        rows = self._rows(gradient)
        means = gradient.new_zeros(1)
        if self.relative_damping:
            means = self._averaged_mean(state, self._mean_square(rows), decay)
        computed = packed.fused_step(
            state["fisher"],
            rows,
            first_order.momentum,
            first_order.second_moment,
            means,
            self._tiling,
            decay=decay,
            damping=damping,
            relative=self.relative_damping,
            momentum_decay=first_order.momentum_decay,
            moment_decay=first_order.second_moment_decay,
            epsilon=first_order.epsilon,
            lengths=first_order.lengths,
            with_slopes=first_order.with_slopes,
            nesterov=first_order.nesterov,
        )
        if computed is None:
            return None
        if self.relative_damping:
            state["mean"].copy_(means)
        direction, of_direction, of_first_order = computed
        scaled = of_first_order.corrected(first_order.scale, first_order.sum_of_weights)
        return direction.view(gradient.shape), of_direction, scaled

    def _rows(self, weight: Tensor) -> Tensor:
        """A weight [..., *shape] as [..., rows, length]."""
        leading = weight.shape[: weight.ndim - len(self.shape)]
        return weight.reshape(*leading, self.reading.rows, self.reading.length)
