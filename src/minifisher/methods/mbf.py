"""MBF: the empirical Fisher matrix cut into many small blocks inside every layer.

Source: Bahamou, Goldfarb, Ren, "A Mini-Block Fisher Method for Deep Neural Networks", AISTATS 2023,
arXiv 2202.04124. What goes beyond its abstract is our reading: see docs/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch

from minifisher.curvature import Curvature, Plan
from minifisher.kernels.packed import WIDEST
from minifisher.linalg.blocks import (
    BlockReading,
    average_outer_products,
    damped_inverse_power,
    multiply_rows,
    outer_products,
    sum_of_outer_products,
    sum_over_positions,
)
from minifisher.linalg.dense import NO_CURVATURE, working_dtype
from minifisher.methods.mbf_packed import PackedBlocks
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# What is chosen where the user says nothing; docs/methods.md has the measurements.
_WIDTH = 64  # entries of a block
# Steps between statistics. A convolution's forward and backward pass cost so much more a weight than its
# statistics that it can afford them more often.
_STATISTICS_EVERY, _STATISTICS_EVERY_OF_CONVOLUTIONS = 8, 4
_ROWS_PER_WIDTH = (
    8  # a block is at most 8 times as wide as the rows that share it: 16 bytes a byte of the weight
)


@dataclass(frozen=True)
class MiniBlocks(Curvature):
    """Mini-blocks of the Fisher matrix: F_b = E[d_b d_b^T], direction (F_b + lambda I)^(-power) m_b.

    d_b are the entries of one block in the gradient. A shared block is the mean over the rows r of a layer,
    F_b = E[(1/R) sum_r d_rb d_rb^T]; the diagonal is blocks of one entry.
    """

    reading: BlockReading
    shape: torch.Size
    shared: bool
    needs: type[Statistics]
    dtype: torch.dtype
    power: float = 1.0
    relative_damping: bool = True
    of_piece: bool = False
    """Whether the weight may be a piece of the layer's: the layer's mean is then averaged over all pieces."""
    on_device: bool = False
    """Whether `refresh` never asks the host: a block without an inverse gets NaN, and no further attempts."""

    averages = ("fisher", "mean")

    inverse: str | None = None
    """"newton-schulz" begins at the last inverse; Cholesky otherwise."""

    @property
    def capturable(self) -> bool:
        """Whether it inverts on the device alone."""
        return self.on_device

    def shard(self, shape: torch.Size) -> MiniBlocks | None:
        """Rows are cut anywhere, and blocks along a row are whole."""
        if not shape:
            return replace(self, of_piece=True)
        leading = self._leading
        length = shape[leading:].numel()
        if length % self.reading.width and length != self.reading.length:
            return None
        reading = replace(self.reading, rows=shape[:leading].numel(), length=length)
        return replace(self, reading=reading, shape=shape, of_piece=True)

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """Rows are the first axis of the blocks if they have their own, blocks along a row the second."""
        along_rows = dimension < self._leading
        axis = 1 if not along_rows else None if self.shared else 0
        return {"fisher": axis, "inverse": axis, "mean": None}

    @property
    def _leading(self) -> int:
        """The first dimensions of the weight, which count its rows."""
        return next(n for n in range(1, len(self.shape) + 1) if self.shape[:n].numel() == self.reading.rows)

    @property
    def _averages_mean(self) -> bool:
        return self.of_piece and self.relative_damping

    def init(self, layer: Layer) -> State:
        """`fisher` is averaged, `inverse` last refreshed from it: [rows | 1, blocks, width, width]."""
        rows = 1 if self.shared else self.reading.rows
        size = (rows, self.reading.blocks, self.reading.width, self.reading.width)
        fisher = torch.zeros(size, dtype=self.dtype, device=layer.weight.device)
        state = {"fisher": fisher, "inverse": torch.zeros_like(fisher)}
        return {**state, "mean": fisher.new_zeros(1)} if self._averages_mean else state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """F_b <- decay F_b + (1 - decay) E[d_b d_b^T], over the mini-batch's gradient or over its samples."""
        if isinstance(statistics, BatchGradient):
            rows = self.reading.read(statistics.gradient, len(self.shape))
            rows = rows.to(working_dtype(self.dtype))
            if not self._averages_mean:
                average_outer_products(state["fisher"], rows, self.shared, decay)
                return
            fresh = outer_products(rows, self.shared)
        else:
            assert isinstance(statistics, LayerSamples)
            fresh = self._second_moment(statistics)
        state["fisher"].lerp_(fresh.to(self.dtype), 1 - decay)
        if self._averages_mean:
            diagonal = fresh.diagonal(dim1=-2, dim2=-1)
            mean = diagonal.sum((-3, -2, -1)) / (fresh.shape[-4] * self.reading.length)
            state["mean"].lerp_(mean.unsqueeze(-1).to(self.dtype), 1 - decay)

    def _second_moment(self, samples: LayerSamples) -> Tensor:
        """(1/N) sum_n d_nb d_nb^T; of rows with fewer positions than outputs without forming any d_n."""
        if self.shared and samples.positions < self.shape[0]:
            totals = (self._over_positions(*chunk) for chunk in samples.chunks())
        else:
            totals = (
                sum_of_outer_products(self.reading.read(gradients, len(self.shape)), self.shared)
                for gradients in samples.gradients()
            )
        return reduce(torch.add, totals) / samples.count

    def _over_positions(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        # Every row belongs to one group and reads the inputs of that group alone.
        inputs, gradients = inputs.flatten(0, 1), gradients.flatten(0, 1)
        return sum_over_positions(self.reading.cut(inputs), gradients).unsqueeze(0) / self.reading.rows

    def refresh(self, state: State, damping: float) -> None:
        """`inverse` <- (F_b + lambda_b I)^(-power)."""
        fisher = state["fisher"].to(working_dtype(self.dtype))
        levels = self._damping(fisher, state.get("mean"), damping)
        start = state["inverse"].to(fisher.dtype) if self.inverse == "newton-schulz" else None
        inverse = damped_inverse_power(fisher, levels, self.power, avoid_sync=self.on_device, start=start)
        state["inverse"].copy_(inverse)

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(F_b + lambda_b I)^(-power) m_b for every block of every row."""
        rows = self.reading.read(direction, len(self.shape))
        inverse = state["inverse"].to(working_dtype(self.dtype))
        product = multiply_rows(rows.to(inverse.dtype), inverse)
        return self.reading.write(product, self.shape).to(direction.dtype)

    def _damping(self, fisher: Tensor, mean: Tensor | None, damping: float) -> Tensor:
        """lambda_b for every entry, [..., rows | 1, blocks, width].

        Relative: `damping` times the average of two means of the diagonal, the block's and the layer's, so
        that a block without curvature (a dead unit) is damped as its layer is. Padding gets 1. An average
        kept in half precision is damped at least by its rounding, which may have left it indefinite.
        """
        scale = self._scale(fisher, mean) if self.relative_damping else fisher.new_ones(())
        levels = damping * scale
        if self.dtype != fisher.dtype:
            # Twice what one entry can be off by; of more, the row sums', too much curvature is lost.
            largest = fisher.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
            levels = torch.maximum(levels, torch.finfo(self.dtype).eps * largest)
        if self.reading.padding:
            entries = self.reading.entries(fisher)
            levels = levels * entries + (1 - entries)
        return levels.expand(fisher.shape[:-1])

    def _scale(self, fisher: Tensor, mean: Tensor | None) -> Tensor:
        """The mean of the block's and the layer's mean curvature, [..., rows | 1, blocks, 1]."""
        diagonal = fisher.diagonal(dim1=-2, dim2=-1)
        if mean is None:
            mean = diagonal.sum((-3, -2, -1)).unsqueeze(-1) / (fisher.shape[-4] * self.reading.length)
        if self.reading.padding:
            block = diagonal.sum(-1, keepdim=True) / self.reading.entries(fisher).sum(-1, keepdim=True)
        else:
            block = diagonal.mean(-1, keepdim=True)
        return (block + mean.to(block.dtype)[..., None, None]).mul_(0.5).clamp_min_(NO_CURVATURE)


class MBF(CurvatureOptimizer):
    """Mini-block Fisher: W <- W - lr (F + lambda I)^(-power) M, F block-diagonal inside every layer.

    Bahamou, Goldfarb, Ren 2023, arXiv 2202.04124. Every block F_b is the running mean of d_b d_b^T, with d_b
    the block's entries in the gradient: of the mini-batch (`fisher="gradient"`), of every sample
    ("empirical"), or of every sample with labels drawn from the model ("sampled"; call `observe`). A
    convolution has blocks for its kernels or rows, a fully connected layer for its rows, everything else a
    diagonal; `describe()` says which and why.

    `lr` is in step lengths of `graft`, so that AdamW's learning rate carries over; with `graft=None` it
    multiplies the raw natural-gradient step. `damping` is lambda, or with `relative_damping` the fraction of
    the mean curvature of block and layer that lambda is. `curvature_decay` is beta of the bias-corrected
    average. `inverse` is how blocks are inverted: "cholesky", "newton-schulz" (which begins at the last
    inverse, and leaves to Cholesky what it does not reach) or None, which chooses: blocks of at most 49
    entries that no rows share are solved anew in every step and keep no inverse, others take Cholesky
    (docs/performance.md). With `capturable` a step asks nothing of the host, so that a CUDA graph can record
    it and `torch.compile(opt.step)` makes one graph of it; it needs statistics_every = inverse_every = 1, and
    a learning rate that is to change must be a tensor. The published algorithm as arguments: docs/methods.md.
    Raises ValueError or TypeError for what it cannot use, naming the value and the cure.

    For [out, in] in blocks F_b [w, w]: a step and an observation cost O(out in w); where rows share their
    blocks a refresh costs O(in w^2) and memory is O(in w) numbers, where not O(out in w^2) and O(out in w).
    """

    power: float = option(
        default=1.0,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Power of the inverse curvature.",
    )
    conv_blocks: Literal["kernel", "row"] | None = option(
        default=None, meaning="Blocks of a convolution: one for each kernel, or pieces of rows; None chooses."
    )
    block_size: int | None = option(
        default=None, at_least=1, meaning="Entries of a block; None chooses what is cheap."
    )
    share: Literal["row", "layer"] | None = option(
        default=None, meaning="Blocks for every row, or shared by all rows of a layer; None chooses."
    )
    inverse: Literal["cholesky", "newton-schulz"] | None = option(
        default=None, meaning="How blocks are inverted; None chooses what is cheap."
    )
    capturable: bool = option(default=False, init=True)

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Kernels, rows or entries of a weight, shared or not, in blocks of a width that memory allows."""
        reading, shared, structure, reason = _choose(layer, options)
        blocks = reading.blocks * (1 if shared else reading.rows)
        packs = not shared and _packs(reading, options)
        every = _STATISTICS_EVERY_OF_CONVOLUTIONS if len(layer.shape) > 2 else _STATISTICS_EVERY
        statistics_every = options["statistics_every"] or (1 if packs else every)
        inverse_every = statistics_every if packs else options["inverse_every"] or statistics_every
        curvature = _packed(layer, reading, options) if packs else _inverted(layer, reading, shared, options)
        return Plan(curvature, structure, reason, blocks, reading.width, statistics_every, inverse_every)


def _packs(reading: BlockReading, options: dict[str, Any]) -> bool:
    """Whether blocks of rows of their own are solved in every step, rather than inverted every T2."""
    inverse_every = options["inverse_every"] or 1
    kept = options["inverse"] or options["capturable"] or inverse_every > (options["statistics_every"] or 1)
    return 1 < reading.width <= WIDEST and options["power"] == 1.0 and not kept


def _packed(layer: Layer, reading: BlockReading, options: dict[str, Any]) -> Curvature:
    return PackedBlocks(
        reading=reading,
        shape=layer.shape,
        needs=_needs(layer, options),
        dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
        relative_damping=options["relative_damping"],
    )


def _inverted(layer: Layer, reading: BlockReading, shared: bool, options: dict[str, Any]) -> Curvature:
    return MiniBlocks(
        reading=reading,
        shape=layer.shape,
        shared=shared,
        needs=_needs(layer, options),
        dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
        power=options["power"],
        relative_damping=options["relative_damping"],
        on_device=_stays_on_device(options),
        inverse=options["inverse"],
    )


def _needs(layer: Layer, options: dict[str, Any]) -> type[Statistics]:
    from_gradient = options["fisher"] == "gradient" or not layer.reads_samples
    return BatchGradient if from_gradient else LayerSamples


def _stays_on_device(options: dict[str, Any]) -> bool:
    return bool(options["capturable"] and options["power"] == 1.0 and options["inverse"] != "newton-schulz")


def _choose(layer: Layer, options: dict[str, Any]) -> tuple[BlockReading, bool, str, str]:
    """How a weight is read, whether its rows share their blocks, and the two in words with the reason."""
    shape = layer.shape
    if len(shape) < 2 or not shape.numel():
        return BlockReading(shape.numel(), 1, 1), False, "diagonal", "not a matrix"
    kernel = shape[2:].numel()
    if len(shape) > 2 and options["conv_blocks"] == "kernel":
        width = options["block_size"] or kernel
        reading = (
            BlockReading(shape[0], shape[1] * kernel, kernel)
            if 1 < kernel <= width  # otherwise pieces of kernels, or entries
            else BlockReading(shape[0] * shape[1], kernel, min(width, kernel))
        )
        return reading, False, "kernel blocks", "asked for; share is for rows"
    rows, length = shape[0], shape[1:].numel()
    shared = options["share"] != "row"
    widest = min(_WIDTH, _ROWS_PER_WIDTH * rows) if shared else _ROWS_PER_WIDTH
    width = min(options["block_size"] or _even_width(length, widest, kernel), length)
    structure = "blocks of shared rows" if shared else "blocks of rows"
    reason = "asked for" if options["block_size"] else f"the widest even cut up to {widest}"
    return BlockReading(rows, length, width), shared and width > 1, structure, reason


def _even_width(length: int, widest: int, kernel: int) -> int:
    """The largest even cut of a row up to `widest`, in whole kernels if there is one; else a ragged one."""
    divisors = [width for width in range(1, min(widest, length) + 1) if length % width == 0]
    whole = [width for width in divisors if width % kernel == 0]
    best = (whole or divisors)[-1]
    return best if 2 * best > min(widest, length) else _ragged_width(length, widest)


def _ragged_width(length: int, widest: int) -> int:
    """The fewest blocks that, the padding of the last one counted, take no more than an even cut would."""
    for blocks in range(math.ceil(length / widest), length):
        width = math.ceil(length / blocks)
        if blocks * width**2 <= widest * length:
            return width
    return 1
