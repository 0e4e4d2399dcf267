"""MBF with two-sided mini-blocks: a tile of a weight has the Kronecker product of two blocks.

Ours, beyond the paper of MBF: see docs/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from minifisher.curvature import LARGEST_COPY, FusedDirection, Measures, Plan
from minifisher.kernels.choose import suits_numba
from minifisher.kernels.scratch import scratch_like
from minifisher.linalg.blocks import (
    BlockReading,
    average_outer_products,
    block_width,
    damped_inverse_power,
    damping_levels,
    multiply_columns,
    multiply_rows,
)
from minifisher.linalg.damping import LEAST_SCALE
from minifisher.linalg.dense import working_dtype
from minifisher.statistics.records import BatchGradient, LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.curvature import FirstOrderStep, State
    from minifisher.statistics.layers import Layer

# Defaults; docs/methods.md has the measurements.
_WIDTH = 64  # entries of a block, at most
_STATISTICS_EVERY = 4  # as for one-sided blocks
_LARGEST_BATCH = 262_144  # entries of blocks that are inverted together: it takes a few copies of them
# A block is at most this many times as wide as the other side of the weight is long. The two averages and
# their inverses then take at most 16 times the memory of the weight.
_WIDTH_PER_ENTRY = 4


@dataclass(frozen=True)
class TwoSidedBlocks(FusedDirection):
    """Tiles of b_out x b_in entries with the Fisher matrix G_r (x) A_c / f, a block for each side.

    W is read as a matrix [out, in]. Row of tiles r holds b_out outputs, column of tiles c holds b_in inputs.
    From the gradient D of the mini-batch, with D_c its columns and D_r its rows of the tiles:

        A_c = E[(1/out) D_c^T D_c],  G_r = E[(1/in) D_r D_r^T].

    From samples, as in KFAC ("expand") with the input a_ns and the output gradient g_ns at position s of S:

        A_c = (1/N) sum_ns a_c a_c^T mean(G),  G_r = (1/NS) sum_ns g_r g_r^T mean(A).

    Here mean(A) and mean(G) are the means of the layer's diagonals of the two plain sums. The diagonals of A
    and of G then both have the mean f of that of the Fisher matrix, and so has G_r (x) A_c / f. With relative
    damping d, lambda_c is d times `minifisher.linalg.damping.curvature_scale` of A_c and f, lambda_r that of
    G_r and f, and l is d f; otherwise all three are `damping`. The direction of a tile is

        ((G_r + lambda_r I) / (f + l))^(-p) M_rc (A_c + lambda_c I)^(-q),  p = output_power, q = power.

    The left factor has no unit: the block over inputs alone has the scale of the Fisher matrix. Where all
    outputs are alike, G_r = f I, the direction is that of one-sided blocks, M_rc (A_c + lambda_c I)^(-q).
    """

    inputs: BlockReading
    """Rows of the matrix, cut into blocks of b_in inputs."""
    outputs: BlockReading
    """Columns of the matrix, cut into blocks of b_out outputs."""
    shape: torch.Size
    needs: type[Statistics]
    dtype: torch.dtype
    power: float = 1.0
    output_power: float = 0.5
    relative_damping: bool = True
    inverse: Literal["cholesky", "newton-schulz"] | None = None
    """"newton-schulz" starts from the last inverse; the other two are Cholesky. A power other than 1 takes
    eigenvalues."""
    avoid_sync: bool = False
    """Whether `refresh` never makes the CPU wait for the device; a block without an inverse then gets NaN."""

    of_piece: bool = False
    """Whether the weight may be a piece of the layer's weight. The state then holds f, because only its
    average over all pieces is the layer's."""

    averages: ClassVar[tuple[str, ...]] = ("input_fisher", "output_fisher", "mean")
    recomputed: ClassVar[tuple[str, ...]] = ("input_inverse", "output_inverse")

    @property
    def capturable(self) -> bool:
        """Whether `refresh` avoids waiting for the device."""
        return self.avoid_sync

    def shard(self, shape: torch.Size) -> TwoSidedBlocks | None:
        """The same curvature of a piece of whole blocks, the last of a side as it is in the weight."""
        if not shape:
            return None
        rows, length = shape[0], shape[1:].numel()
        for entries, reading in ((rows, self.outputs), (length, self.inputs)):
            if entries % reading.width not in (0, reading.length % reading.width):
                return None
        inputs, outputs = (
            replace(self.inputs, rows=rows, length=length),
            replace(self.outputs, rows=length, length=rows),
        )
        return replace(self, inputs=inputs, outputs=outputs, shape=shape, of_piece=True)

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """Axis 1 counts the blocks; a cut between outputs cuts G alone, one between inputs A alone."""
        cut = "output" if dimension == 0 else "input"
        names = (f"{side}_{kind}" for side in ("input", "output") for kind in ("fisher", "inverse"))
        return {"mean": None, **{name: 1 if name.startswith(cut) else None for name in names}}

    def matrices(self, state: State) -> Sequence[Tensor]:
        """A and G."""
        return state["input_fisher"], state["output_fisher"]

    def init(self, layer: Layer) -> State:
        """The averages A [1, in / b_in, b_in, b_in] and G [1, out / b_out, b_out, b_out], and the inverses.

        What is averaged from samples are the plain sums, without mean(A) and mean(G). For a piece also `mean`
        [1], which is f.
        """
        state = {}
        for side, reading in (("input", self.inputs), ("output", self.outputs)):
            size = (1, reading.blocks, reading.width, reading.width)
            state[f"{side}_fisher"] = torch.zeros(size, dtype=self.dtype, device=layer.weight.device)
            state[f"{side}_inverse"] = torch.zeros_like(state[f"{side}_fisher"])
        if self.of_piece:
            state["mean"] = state["input_fisher"].new_zeros(1)
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """A_c and G_r <- decay times themselves + (1 - decay) times those of the new statistics."""
        if isinstance(statistics, BatchGradient):
            matrix = self._matrix(statistics.gradient)
            _average(state["input_fisher"], self.inputs, matrix, decay)
            _average(state["output_fisher"], self.outputs, matrix.mT, decay)
            if "mean" in state:
                state["mean"].lerp_(_mean_square(matrix).to(self.dtype), 1 - decay)
            return
        assert isinstance(statistics, LayerSamples)
        inputs, outputs = self._second_moments(statistics)
        state["input_fisher"].lerp_(inputs.to(self.dtype), 1 - decay)
        state["output_fisher"].lerp_(outputs.to(self.dtype), 1 - decay)

    def _second_moments(self, samples: LayerSamples) -> tuple[Tensor, Tensor]:
        """(1/N) sum_ns a_c a_c^T and (1/NS) sum_ns g_r g_r^T, [1, blocks, width, width].

        The groups of a convolution have different inputs; A is the mean over groups.
        """
        input_sum = output_sum = torch.zeros((), device="cpu")  # wherever torch.set_default_device points
        positions = 0
        for inputs, gradients in samples.chunks():
            groups = inputs.shape[1]
            input_sum = input_sum + _outer_products(self.inputs, inputs.flatten(0, 2)) / groups
            rows = gradients.transpose(1, 2).flatten(2).flatten(0, 1)
            output_sum = output_sum + _outer_products(self.outputs, rows)
            positions += len(rows)
        return input_sum / samples.count, output_sum / positions

    def refresh(self, state: State, damping: float) -> None:
        """`input_inverse` <- (A_c + lambda_c I)^(-q), and `output_inverse` with (f + l) and p."""
        inputs, outputs, mean = self._scaled(state)
        mean = mean.clamp_min(LEAST_SCALE)
        level = damping * mean if self.relative_damping else damping
        unit = mean + level
        self._invert(state, "input", inputs, mean, damping)
        absolute = damping if self.relative_damping else damping / unit
        self._invert(state, "output", outputs / unit[..., None, None, None], mean / unit, absolute)

    def _scaled(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """A and G, [..., 1, blocks, width, width], and the mean f of both, [..., 1]."""
        dtype = working_dtype(self.dtype)
        inputs, outputs = state["input_fisher"].to(dtype), state["output_fisher"].to(dtype)
        if "mean" in state:
            return inputs, outputs, state["mean"].to(dtype)
        input_mean, output_mean = _mean(inputs, self.inputs), _mean(outputs, self.outputs)
        if self.needs is BatchGradient:
            return inputs, outputs, input_mean
        shape = (..., None, None, None)
        return inputs * output_mean[shape], outputs * input_mean[shape], input_mean * output_mean

    def _invert(self, state: State, side: str, blocks: Tensor, mean: Tensor, damping: float | Tensor) -> None:
        reading, power = (self.inputs, self.power) if side == "input" else (self.outputs, self.output_power)
        relative_to = mean if self.relative_damping else None
        levels = damping_levels(blocks, reading, damping, relative_to, self.dtype).expand(blocks.shape[:-1])
        inverse = state[f"{side}_inverse"]
        several = max(1, _LARGEST_BATCH // reading.width**2)  # matrices that are inverted together
        parts = (torch.split(tensor, several, dim=-3) for tensor in (inverse, blocks))
        for of_state, some, level in zip(*parts, torch.split(levels, several, dim=-2), strict=True):
            start = of_state.to(blocks.dtype) if self.inverse == "newton-schulz" else None
            of_state.copy_(damped_inverse_power(some, level, power, avoid_sync=self.avoid_sync, start=start))

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """((G_r + lambda_r I) / (f + l))^(-p) M_rc (A_c + lambda_c I)^(-q) for every tile."""
        rows = self.inputs.cut(self._matrix(direction))
        right, left = (state[f"{side}_inverse"].to(rows.dtype) for side in ("input", "output"))
        product = multiply_rows(rows, right, out=scratch_like(rows)).flatten(-2)
        product = multiply_columns(product[..., : self.inputs.length], left)
        return product.reshape(direction.shape).to(direction.dtype)

    @property
    def rows_of_block(self) -> int:
        """b_out."""
        return self.outputs.width

    def fused_direction(
        self, state: State, gradient: Tensor, first_order: FirstOrderStep
    ) -> tuple[Tensor, Measures, Measures] | None:
        """The first-order step and `precondition` in one pass, where a compiled kernel can."""
        momentum, moment = first_order.momentum, first_order.second_moment
        outputs, inputs = (state[f"{side}_inverse"].to(gradient.dtype) for side in ("output", "input"))
        if not suits_numba(gradient, momentum, outputs, inputs, *() if moment is None else (moment,)):
            return None
        from minifisher.kernels import tiles_cpu  # here, since importing numba takes most of a second

        of_matrices = replace(
            first_order,
            momentum=self._stacked(momentum),
            second_moment=None if moment is None else self._stacked(moment),
        )
        direction, of_direction, of_first_order = tiles_cpu.direction_of_tiles(
            self._stacked(gradient), outputs.flatten(0, -4), inputs.flatten(0, -4), of_matrices
        )
        return direction.view(gradient.shape), of_direction, of_first_order

    def _stacked(self, weight: Tensor) -> Tensor:
        """[..., *shape] as [layers, out, in], without a copy."""
        return weight.view(-1, self.outputs.length, self.inputs.length)

    def _matrix(self, weight: Tensor) -> Tensor:
        """[..., *shape] as [..., out, in], in the dtype to compute in."""
        leading = weight.shape[: weight.ndim - len(self.shape)]
        return weight.reshape(*leading, self.outputs.length, self.inputs.length).to(working_dtype(self.dtype))


def _average(fisher: Tensor, reading: BlockReading, rows: Tensor, decay: float | Tensor) -> None:
    """F_b <- decay F_b + (1 - decay) mean of x x^T over the rows x, in place.

    An uneven last block of a large weight is read apart: padding would copy the weight.
    """
    whole = reading.length // reading.width
    if rows.ndim > 2 or rows.numel() <= LARGEST_COPY or whole == reading.blocks:
        average_outer_products(fisher, reading.cut(rows), True, decay)
        return
    even, last = rows.tensor_split([whole * reading.width], dim=-1)
    average_outer_products(fisher[:, :whole], torch.unflatten(even, -1, (whole, reading.width)), True, decay)
    padded = F.pad(last, (0, reading.padding)).unsqueeze(-2)
    average_outer_products(fisher[:, whole:], padded, True, decay)


def _mean_square(matrix: Tensor) -> Tensor:
    """The mean of D^2, [..., out, in] to [..., 1]."""
    return matrix.square().mean((-2, -1)).unsqueeze(-1)


def _outer_products(reading: BlockReading, vectors: Tensor) -> Tensor:
    """sum_n x_n x_n^T of every block, [n, length] to [1, blocks, width, width]."""
    blocks = reading.cut(vectors).transpose(0, 1)  # [blocks, n, width]
    return (blocks.mT @ blocks).unsqueeze(0)


def _mean(blocks: Tensor, reading: BlockReading) -> Tensor:
    """The mean of the layer's diagonal without padding, [..., 1, blocks, width, width] to [..., 1]."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / reading.length


# ---- the plan ----


def plan_two_sided(layer: Layer, options: dict[str, Any], fields: dict[str, Any]) -> Plan:
    """Two-sided blocks of a weight that is read as a matrix; `fields` are those of every curvature of MBF."""
    for name, value in (("share", "row"), ("linear_blocks", "column")):
        if options[name] == value:
            raise ValueError(
                f"output_power={options['output_power']} makes blocks for both sides of a layer, got "
                f"{name}={value!r}: leave {name} out, or set output_power=0"
            )
    inputs, outputs = _tiles(layer, options["block_size"])
    power, output_power, inverse = (options[name] for name in ("power", "output_power", "inverse"))
    avoid_sync = options["capturable"] and power == output_power == 1.0 and inverse != "newton-schulz"
    curvature = TwoSidedBlocks(
        inputs,
        outputs,
        **fields,
        power=power,
        output_power=output_power,
        inverse=inverse,
        avoid_sync=avoid_sync,
    )
    every = options["statistics_every"] or _STATISTICS_EVERY
    return Plan(
        curvature,
        structure="two-sided blocks",
        reason=f"tiles of {outputs.width} outputs x {inputs.width} inputs",
        blocks=inputs.blocks + outputs.blocks,
        block_size=max(inputs.width, outputs.width),
        statistics_every=every,
        inverse_every=options["inverse_every"] or every,
    )


def _tiles(layer: Layer, asked: int | None) -> tuple[BlockReading, BlockReading]:
    """How the rows and how the columns of a matrix are cut.

    No block spans two groups of a convolution, or two pieces of a weight that processes share.
    """
    shape = layer.shape
    rows, length, kernel = shape[0], shape[1:].numel(), shape[2:].numel()
    units = layer.piece_units
    unit_rows = math.gcd(units.get(0, rows), rows // layer.groups)
    unit_columns = units[1] * kernel if 1 in units else length
    widest = [asked or min(_WIDTH, _WIDTH_PER_ENTRY * others) for others in (rows, length)]
    input_width = _width(length, unit_columns, widest[0], kernel, asked)
    output_width = _width(rows, unit_rows, widest[1], 1, asked)
    return BlockReading(rows, length, input_width), BlockReading(length, rows, output_width)


def _width(length: int, unit: int, widest: int, kernel: int, asked: int | None) -> int:
    """At most `widest` of `length` entries; a divisor of the unit, where that is smaller than `length`."""
    if unit < length:
        return max(width for width in range(1, min(widest, unit) + 1) if unit % width == 0)
    return min(asked or block_width(length, widest, kernel), length)
