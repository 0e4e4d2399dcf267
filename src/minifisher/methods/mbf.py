"""MBF: a Fisher matrix that is block-diagonal inside every layer, with many small blocks.

Source: Bahamou, Goldfarb, Ren, "A Mini-Block Fisher Method for Deep Neural Networks", AISTATS 2023,
arXiv 2202.04124. What goes beyond its abstract is our reading: see docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from minifisher.curvature import Curvature, Plan, first_order_plan
from minifisher.kernels.packed import WIDEST
from minifisher.linalg.blocks import (
    BlockReading,
    average_outer_products,
    block_width,
    damped_inverse_power,
    damping_levels,
    multiply_rows,
    outer_products,
    sum_of_outer_products,
    sum_over_positions,
)
from minifisher.linalg.dense import working_dtype
from minifisher.methods.choices import curvature_dtype, gradient_or_samples, power_option
from minifisher.methods.mbf_columns import ColumnBlocks, transpose_of
from minifisher.methods.mbf_packed import PackedBlocks
from minifisher.methods.mbf_two_sided import plan_two_sided
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# Defaults; docs/methods.md has the measurements.
_WIDTH = 64  # entries of a block, at most
_OUTPUT_POWER = 0.5  # of two-sided blocks
_STATISTICS_EVERY = 4
# A block is at most this many times as wide as the number of rows that share it. `fisher` and `inverse`
# together then take at most 16 times the memory of the weight.
_WIDTH_PER_ROW = 8


@dataclass(frozen=True)
class MiniBlocks(Curvature):
    """Mini-blocks F_b = E[d_b d_b^T] of the Fisher matrix; the direction is (F_b + lambda_b I)^(-power) m_b.

    d_b and m_b are the entries of block b in the gradient and in the momentum. If the rows of a layer share
    their blocks, F_b is the mean over the R rows, E[(1/R) sum_r d_rb d_rb^T]. Blocks of one entry are a
    diagonal.
    """

    reading: BlockReading
    shape: torch.Size
    shared: bool
    needs: type[Statistics]
    dtype: torch.dtype
    power: float = 1.0
    relative_damping: bool = True
    inverse: Literal["cholesky", "newton-schulz"] | None = None
    """"newton-schulz" starts from the last inverse; the other two are Cholesky."""
    avoid_sync: bool = False
    """Whether `refresh` never makes the CPU wait for the device; a block without an inverse then gets NaN."""
    of_piece: bool = False
    """Whether the weight may be a piece of the layer's weight. The state then holds the mean of the diagonal,
    because only its average over all pieces is the layer's."""

    averages: ClassVar[tuple[str, ...]] = ("fisher", "mean")
    recomputed: ClassVar[tuple[str, ...]] = ("inverse",)

    @property
    def capturable(self) -> bool:
        """Whether `refresh` avoids waiting for the device."""
        return self.avoid_sync

    def shard(self, shape: torch.Size) -> MiniBlocks | None:
        """The same curvature of a piece: any number of whole rows, or of each row whole blocks."""
        if not shape:
            return replace(self, of_piece=True)
        length = shape[self._row_dimensions :].numel()
        if length % self.reading.width and length != self.reading.length:
            return None
        rows = shape[: self._row_dimensions].numel()
        reading = replace(self.reading, rows=rows, length=length)
        return replace(self, reading=reading, shape=shape, of_piece=True)

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """Axis 0 of the blocks counts the rows that have their own; axis 1 the blocks along a row."""
        if dimension >= self._row_dimensions:
            axis: int | None = 1
        else:
            axis = None if self.shared else 0
        return {"fisher": axis, "inverse": axis, "mean": None}

    @property
    def _row_dimensions(self) -> int:
        """How many of the first dimensions of the weight number its rows."""
        return next(n for n in range(1, len(self.shape) + 1) if self.shape[:n].numel() == self.reading.rows)

    def init(self, layer: Layer) -> State:
        """`fisher` and its damped `inverse`, [rows | 1, blocks, width, width]; for a piece `mean` [1]."""
        rows = 1 if self.shared else self.reading.rows
        size = (rows, self.reading.blocks, self.reading.width, self.reading.width)
        fisher = torch.zeros(size, dtype=self.dtype, device=layer.weight.device)
        state = {"fisher": fisher, "inverse": torch.zeros_like(fisher)}
        if self.of_piece and self.relative_damping:
            state["mean"] = fisher.new_zeros(1)
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """F_b <- decay F_b + (1 - decay) E[d_b d_b^T], of the mini-batch or per-sample gradients."""
        if isinstance(statistics, BatchGradient):
            rows = self.reading.read(statistics.gradient, len(self.shape))
            rows = rows.to(working_dtype(self.dtype))
            if "mean" not in state:
                average_outer_products(state["fisher"], rows, self.shared, decay)
                return
            fresh = outer_products(rows, self.shared)
        else:
            assert isinstance(statistics, LayerSamples)
            fresh = self._second_moment(statistics)
        state["fisher"].lerp_(fresh.to(self.dtype), 1 - decay)
        if "mean" in state:
            state["mean"].lerp_(self._mean_of_layer(fresh).to(self.dtype), 1 - decay)

    def _second_moment(self, samples: LayerSamples) -> Tensor:
        """(1/N) sum_n d_nb d_nb^T of every block, [rows | 1, blocks, width, width].

        Shared blocks of samples with fewer positions than outputs need no per-sample gradient D_n.
        """
        if self.shared and samples.positions < self.shape[0]:
            totals = (self._sum_over_positions(*chunk) for chunk in samples.chunks())
        else:
            totals = (
                sum_of_outer_products(self.reading.read(gradients, len(self.shape)), self.shared)
                for gradients in samples.gradients()
            )
        return reduce(torch.add, totals) / samples.count

    def _sum_over_positions(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        # A row belongs to one group and reads only the inputs of that group: groups are summed like samples.
        inputs, gradients = inputs.flatten(0, 1), gradients.flatten(0, 1)
        return sum_over_positions(self.reading.cut(inputs), gradients).unsqueeze(0) / self.reading.rows

    def refresh(self, state: State, damping: float) -> None:
        """`inverse` <- (F_b + lambda_b I)^(-power)."""
        fisher = state["fisher"].to(working_dtype(self.dtype))
        levels = self._damping_levels(fisher, state.get("mean"), damping)
        start = state["inverse"].to(fisher.dtype) if self.inverse == "newton-schulz" else None
        inverse = damped_inverse_power(fisher, levels, self.power, avoid_sync=self.avoid_sync, start=start)
        state["inverse"].copy_(inverse)

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(F_b + lambda_b I)^(-power) m_b for every block of every row."""
        inverse = state["inverse"].to(working_dtype(self.dtype))
        rows = self.reading.read(direction, len(self.shape)).to(inverse.dtype)
        product = multiply_rows(rows, inverse)
        return self.reading.write(product, self.shape).to(direction.dtype)

    def matrices(self, state: State) -> Sequence[Tensor]:
        """The blocks F_b."""
        return (state["fisher"],)

    def _damping_levels(self, fisher: Tensor, mean: Tensor | None, damping: float) -> Tensor:
        """lambda_b, [..., rows | 1, blocks, width]; `mean` [..., 1] replaces that of the diagonal."""
        layer_mean = None
        if self.relative_damping:
            layer_mean = self._mean_of_layer(fisher) if mean is None else mean.to(fisher.dtype)
        return damping_levels(fisher, self.reading, damping, layer_mean, self.dtype)

    def _mean_of_layer(self, fisher: Tensor) -> Tensor:
        """The mean of the diagonal over all blocks, [..., 1], without padding."""
        total = fisher.diagonal(dim1=-2, dim2=-1).sum((-3, -2, -1))
        return total.unsqueeze(-1) / (fisher.shape[-4] * self.reading.length)


class MBF(CurvatureOptimizer):
    """Mini-block Fisher: W <- W - lr P N, P the inverse of a Fisher matrix of many small blocks.

    By default matrices and convolutions, read as [out, in k1 k2], have two-sided blocks: A_c over inputs and
    G_r over outputs. With p = `output_power` = 0.5 and q = `power` = 1, the direction of a tile N_rc is

        ((G_r + lambda_r I) / (f + l))^(-p) N_rc (A_c + lambda_c I)^(-q).

    `minifisher.methods.mbf_two_sided.TwoSidedBlocks` defines them; they are not in the paper. With
    `output_power=0` there are blocks over inputs alone, and the direction is (F_b + lambda I)^(-q) N_b for
    each block b, with F_b = E[d_b d_b^T] and d_b the entries of the block in a gradient. This is the method
    of Bahamou, Goldfarb, Ren 2023, arXiv 2202.04124; the published algorithm as arguments: docs/methods.md.

    The gradient is that of the mini-batch, or with `fisher="empirical"` or "sampled" those of the samples.
    Other weights, biases and norms, have blocks of single entries; `describe()` shows the choice for each.

    `lr` is in step lengths of `graft`: the learning rate of AdamW carries over. With `graft=None` it
    multiplies P N itself.

    For W [out, in] in blocks F_b [w, w], a step and an observation cost O(out in w). If rows share their
    blocks, a refresh costs O(in w^2) and the state has O(in w) numbers; otherwise O(out in w^2) and
    O(out in w). Two-sided blocks [v, v] and [w, w]: 2 out in (v + w) operations a step, a refresh
    O(out v^2 + in w^2), and 2 (out v + in w) numbers. Raises ValueError or TypeError for an option or a
    parameter that it cannot use.
    """

    curvature_decay: float = option(default=0.9)
    damping: float = option(default=0.03)
    power: float = power_option(1.0)
    output_power: float | None = option(
        default=None,
        at_least=0,
        meaning="Exponent of the inverse of a block over outputs, beside `power` for that over inputs: "
        "two-sided blocks; 0: blocks over inputs alone; None: 0.5, or 0 where `share`, `linear_blocks` or "
        "`capturable` asks for blocks of one side.",
    )
    block_size: int | None = option(
        default=None,
        at_least=1,
        meaning="Entries of a block, at most a row (two-sided: or a column); None: the widest even cut up "
        "to 64 that memory allows.",
    )
    share: Literal["row", "layer"] | None = option(
        default=None,
        meaning='"row": each row has its own blocks; "layer": all rows share their mean (not of single '
        'entries); None: "layer". With linear_blocks="column" the same for columns.',
    )
    linear_blocks: Literal["row", "column"] = option(
        default="row",
        meaning="Whether a matrix has blocks over its rows, all inputs to one output, or over its columns, "
        "one input to all outputs.",
    )
    vectors: Literal["diagonal", "column", "adam"] | None = option(
        default=None,
        meaning='What is no matrix, biases and norms: "diagonal"; "column": blocks as of one column; "adam": '
        'Adam\'s step at the same lr instead of a curvature; None: "column" where linear_blocks is, else '
        '"diagonal".',
    )
    conv_blocks: Literal["kernel", "row"] | None = option(
        default=None,
        meaning='"kernel": a convolution has one block, never shared, for each pair of channels; "row": it '
        'is read as a matrix [out, in k1 k2] and cut like a fully connected layer; None: "row".',
    )
    inverse: Literal["cholesky", "newton-schulz"] | None = option(
        default=None,
        meaning='"cholesky", or "newton-schulz" from the last inverse, with Cholesky where that does not '
        "converge; None: Cholesky, except that unshared blocks of at most 49 entries are solved in every "
        "step and store no inverse. This is for power 1; any other power takes eigenvalues.",
    )
    capturable: bool = option(
        default=False,
        init=True,
        meaning="Let a CUDA graph record the step, or torch.compile trace it as one graph; statistics_every "
        "and inverse_every must be 1, and an lr that changes must be a tensor.",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Blocks of the rows, columns, kernels or entries of a weight, or two-sided ones."""
        if len(layer.shape) < 2 and options["vectors"] == "adam":
            return first_order_plan("adam", "asked for; not a matrix")
        output_power = _output_power(options)
        if output_power and _reads_rows(layer.shape, options):
            fields = _common_fields(layer, layer.shape, options)
            return plan_two_sided(layer, options | {"output_power": output_power}, fields)
        over_columns = _has_column_blocks(layer.shape, options)
        shape = transpose_of(layer.shape) if over_columns else layer.shape
        reading, shared, structure, reason = _choose_blocks(shape, options)
        packed = not shared and _packs(reading, options)
        statistics_every = options["statistics_every"] or (1 if packed else _STATISTICS_EVERY)
        inverse_every = statistics_every if packed else options["inverse_every"] or statistics_every
        blocks = reading.blocks * (1 if shared else reading.rows)
        curvature = _curvature(layer, shape, reading, shared, packed, options)
        if over_columns:
            of_vector = len(layer.shape) == 1
            curvature = ColumnBlocks(curvature, of_vector)
            structure = "blocks of one column" if of_vector else structure.replace("rows", "columns")
        return Plan(curvature, structure, reason, blocks, reading.width, statistics_every, inverse_every)


def _output_power(options: dict[str, Any]) -> float:
    """The exponent of blocks over outputs; 0 where the other options are those of one-sided blocks."""
    if options["output_power"] is not None:
        return options["output_power"]  # type: ignore[no-any-return]
    of_one_side = options["share"] is not None or options["linear_blocks"] == "column"
    return 0.0 if of_one_side or options["capturable"] else _OUTPUT_POWER


def _packs(reading: BlockReading, options: dict[str, Any]) -> bool:
    """Whether unshared blocks are solved in every step, instead of inverted in every T2-th."""
    inverse_every = options["inverse_every"] or 1
    stores_inverse = (
        options["inverse"] or options["capturable"] or inverse_every > (options["statistics_every"] or 1)
    )
    return 1 < reading.width <= WIDEST and options["power"] == 1.0 and not stores_inverse


def _curvature(
    layer: Layer,
    shape: torch.Size,
    reading: BlockReading,
    shared: bool,
    packed: bool,
    options: dict[str, Any],
) -> Curvature:
    common = _common_fields(layer, shape, options)
    if packed:
        return PackedBlocks(reading, **common)
    power, inverse = options["power"], options["inverse"]
    avoid_sync = options["capturable"] and power == 1.0 and inverse != "newton-schulz"
    return MiniBlocks(reading, **common, shared=shared, power=power, inverse=inverse, avoid_sync=avoid_sync)


def _common_fields(layer: Layer, shape: torch.Size, options: dict[str, Any]) -> dict[str, Any]:
    """The fields that all curvatures of MBF have."""
    return {
        "shape": shape,
        "needs": gradient_or_samples(layer, options),
        "dtype": curvature_dtype(layer, options),
        "relative_damping": options["relative_damping"],
    }


# ---- the choice of blocks ----


def _has_column_blocks(shape: torch.Size, options: dict[str, Any]) -> bool:
    """Whether a weight with entries has blocks over columns; a vector counts as one column."""
    of_vectors = options["vectors"] or ("column" if options["linear_blocks"] == "column" else "diagonal")
    choice = {1: of_vectors, 2: options["linear_blocks"]}.get(len(shape))
    return choice == "column" and shape.numel() > 0


def _choose_blocks(shape: torch.Size, options: dict[str, Any]) -> tuple[BlockReading, bool, str, str]:
    """How a weight is cut, whether its rows share their blocks, the structure in words, and the reason."""
    if len(shape) < 2 or not shape.numel():
        return BlockReading(shape.numel(), 1, 1), False, "diagonal", "not a matrix"
    kernel = shape[2:].numel()
    if len(shape) > 2 and options["conv_blocks"] == "kernel":
        width = options["block_size"] or kernel
        reading = (
            BlockReading(shape[0], shape[1] * kernel, kernel)
            if 1 < kernel <= width
            else BlockReading(shape[0] * shape[1], kernel, min(width, kernel))  # pieces of kernels
        )
        return reading, False, "kernel blocks", "asked for; share is for rows"
    rows, length = shape[0], shape[1:].numel()
    shared = options["share"] != "row"
    widest = min(_WIDTH, _WIDTH_PER_ROW * rows) if shared else _WIDTH_PER_ROW
    width = min(options["block_size"] or block_width(length, widest, kernel), length)
    reason = "asked for" if options["block_size"] else f"the widest even cut up to {widest}"
    if width == 1:
        return BlockReading(rows, length, 1), False, "diagonal", f"{reason}; single entries are not shared"
    structure = "blocks of shared rows" if shared else "blocks of rows"
    return BlockReading(rows, length, width), shared, structure, reason


def _reads_rows(shape: torch.Size, options: dict[str, Any]) -> bool:
    """Whether a weight is read as the rows of a matrix."""
    is_matrix = len(shape) > 1 and shape.numel() > 0
    return is_matrix and not (len(shape) > 2 and options["conv_blocks"] == "kernel")
