"""Batches of small symmetric blocks: averages, damped powers, products. Blocks of width 1 are a diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minifisher.linalg.damping import above_rounding, curvature_scale
from minifisher.linalg.dense import add_to_diagonal, inverse_power, inverse_without_sync
from minifisher.linalg.newton import newton_schulz_inverse


@dataclass(frozen=True)
class BlockReading:
    """A weight read as `rows` vectors of `length` entries, each cut into `blocks` blocks of `width` entries.

    The last block of a row is padded with zeros. The vectors may be the rows of a fully connected layer, the
    kernels of a convolution or the entries of a bias.
    """

    rows: int
    length: int
    width: int

    blocks: int = field(init=False, compare=False)
    """The number of blocks of one row."""
    padding: int = field(init=False, compare=False)
    """The number of zeros that fill the last block of each row."""

    def __post_init__(self) -> None:
        # Not cached properties, which torch.compile cannot trace.
        object.__setattr__(self, "blocks", math.ceil(self.length / self.width))
        object.__setattr__(self, "padding", self.blocks * self.width - self.length)

    def read(self, weight: Tensor, trailing: int) -> Tensor:
        """The last `trailing` dimensions of a weight as [..., rows, blocks, width]."""
        return self.cut(weight.reshape(*weight.shape[: weight.ndim - trailing], self.rows, self.length))

    def cut(self, rows: Tensor) -> Tensor:
        """Rows [..., length] as [..., blocks, width]."""
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        return torch.unflatten(rows, -1, (self.blocks, self.width))

    def write(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `read`: [..., rows, blocks, width] to [..., *shape]."""
        rows = blocks.flatten(-2)
        if self.padding:
            rows = rows[..., : self.length]
        return rows.reshape((*rows.shape[:-2], *shape))

    def entries(self, like: Tensor) -> Tensor:
        """1 for every entry of a row and 0 for padding, [blocks, width], in the dtype of `like`."""
        mask = torch.ones(self.blocks * self.width, dtype=like.dtype, device=like.device)
        mask[self.length :] = 0
        return mask.view(self.blocks, self.width)


def block_width(length: int, widest: int, kernel: int) -> int:
    """The widest even cut up to `widest`, in whole kernels if possible; an uneven one if it is narrow."""
    divisors = [width for width in range(1, min(widest, length) + 1) if length % width == 0]
    whole_kernels = [width for width in divisors if width % kernel == 0]
    best = (whole_kernels or divisors)[-1]
    return best if 2 * best > min(widest, length) else _uneven_width(length, widest)


def _uneven_width(length: int, widest: int) -> int:
    """The width of the fewest blocks that, padded, take no more memory than blocks of `widest` would."""
    for blocks in range(math.ceil(length / widest), length):
        width = math.ceil(length / blocks)
        if blocks * width**2 <= widest * length:
            return width
    return 1


def damped_inverse_power(
    blocks: Tensor,
    damping: Tensor,
    power: float,
    *,
    avoid_sync: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """(F_b + diag(lambda_b))^(-power) for every block: blocks [..., b, b], damping [..., b | 1].

    With `avoid_sync` and power 1 the CPU does not wait for the device, see `inverse_without_sync`. With
    `start`, the inverses of the last time, inverses are computed by the Newton-Schulz iteration from there.
    """
    if blocks.shape[-1] == 1:
        damped = blocks + damping.unsqueeze(-1)
        return damped.reciprocal_() if power == 1.0 else damped.pow_(-power)
    damped = add_to_diagonal(blocks, damping)
    if start is not None and power == 1.0:
        return newton_schulz_inverse(damped, start)
    return inverse_without_sync(damped) if avoid_sync else inverse_power(damped, power)


def damping_levels(
    blocks: Tensor,
    reading: BlockReading,
    damping: float | Tensor,
    layer_mean: Tensor | None,
    kept: torch.dtype,
) -> Tensor:
    """lambda_b for every entry of a block: blocks [..., rows | 1, k, b, b], levels [..., rows | 1, k, b].

    Relative to `layer_mean` [..., 1], the mean of the layer's diagonal: `damping` times `curvature_scale`.
    Without it `damping` itself, a number or [..., 1]. `kept` is the dtype in which the blocks are kept. A
    padded entry has damping 1.
    """
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    if layer_mean is None:
        levels = damping * blocks.new_ones(())
        levels = levels[..., None, None] if levels.ndim else levels
    else:
        if reading.padding:
            block_mean = diagonal.sum(-1, keepdim=True) / reading.entries(blocks).sum(-1, keepdim=True)
        else:
            block_mean = diagonal.mean(-1, keepdim=True)
        levels = damping * curvature_scale(block_mean, layer_mean[..., None, None])
    levels = above_rounding(levels[..., 0] if levels.ndim else levels, blocks, kept).unsqueeze(-1)
    if reading.padding:
        entries = reading.entries(blocks)
        levels = levels * entries + (1 - entries)
    return levels.expand(blocks.shape[:-1])


def multiply_rows(vectors: Tensor, blocks: Tensor, out: Tensor | None = None) -> Tensor:
    """x_rk B_rk for every row r and block k: vectors [..., rows, k, b], blocks [..., rows | 1, k, b, b].

    Where all rows share their blocks, it is one matrix product for each block instead of one for each row.
    The result may be written to `out`, a contiguous tensor like `vectors`.
    """
    if blocks.shape[-1] == 1:
        return vectors * blocks.squeeze(-1)
    if blocks.shape[-4] == 1:
        product = torch.empty_like(vectors, memory_format=torch.contiguous_format) if out is None else out
        torch.matmul(vectors.transpose(-3, -2), blocks.squeeze(-4), out=product.transpose(-3, -2))
        return product
    return (vectors.unsqueeze(-2) @ blocks).squeeze(-2)


def multiply_columns(matrix: Tensor, blocks: Tensor) -> Tensor:
    """blockdiag(B_1, ..., B_k) X, with X [..., n, columns] and blocks [..., 1, k, b, b]; n is at most k b."""
    count, width = blocks.shape[-3], blocks.shape[-1]
    n = matrix.shape[-2]
    if width == 1:
        return matrix * blocks.flatten(-4)[..., None]
    if n != count * width:
        matrix = F.pad(matrix, (0, 0, 0, count * width - n))
    slabs = torch.unflatten(matrix, -2, (count, width))
    return (blocks.squeeze(-4) @ slabs).flatten(-3, -2)[..., :n, :]


def outer_products(vectors: Tensor, shared: bool) -> Tensor:
    """x x^T of every block, [..., rows, k, b] to [..., rows, k, b, b]; shared, the mean over rows.

    The mean over rows is [..., 1, k, b, b].
    """
    if not shared:
        return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)
    columns = vectors.transpose(-3, -2)  # [..., k, rows, b]
    return (columns.mT @ columns).div_(vectors.shape[-3]).unsqueeze(-4)


def sum_of_outer_products(vectors: Tensor, shared: bool) -> Tensor:
    """sum_n x_n x_n^T of every block, [n, rows, k, b] to [rows, k, b, b]; shared, the mean over rows.

    The mean over rows is [1, k, b, b]. There is one matrix product for each block, which sums over samples
    (and rows).
    """
    n, rows, blocks, width = vectors.shape
    if width == 1 and not shared:
        return vectors.square().sum(0).unsqueeze(-1)
    columns = vectors.reshape(n * rows, blocks, width) if shared else vectors.reshape(n, rows * blocks, width)
    columns = columns.transpose(0, 1)
    total = (columns.mT @ columns).view(1 if shared else rows, blocks, width, width)
    return total.div_(rows) if shared else total


def sum_over_positions(inputs: Tensor, gradients: Tensor) -> Tensor:
    """sum_n sum_st (g_s . g_t) a_s a_t^T of every block, which is sum_n sum_r d_nr d_nr^T: [k, b, b].

    Inputs a are [n, s, k, b], output gradients g [n, s, r]. The gradient of
    sample n is d_nr = sum_s g_sr a_s.
    """
    n, positions, blocks, width = inputs.shape
    weights = gradients @ gradients.mT  # [n, s, s]
    weighted = (weights @ inputs.flatten(2)).view(n * positions, blocks, width)
    columns = inputs.reshape(n * positions, blocks, width)
    return columns.transpose(0, 1).mT @ weighted.transpose(0, 1)


def average_outer_products(average: Tensor, vectors: Tensor, shared: bool, decay: float | Tensor) -> None:
    """F_b <- decay F_b + (1 - decay) x x^T in place; shared, with the mean of x x^T over rows.

    F_b is `average`, [..., rows | 1, k, b, b]; vectors are [..., rows, k, b], decay is a number or [].
    """
    rows, width = vectors.shape[-3], vectors.shape[-1]
    # A process may hold no rows of a weight that is sharded over processes; the general branch handles that.
    in_place = vectors.dtype == average.dtype and average.is_contiguous() and rows > 0
    if isinstance(decay, Tensor):  # baddbmm_ takes its factors as numbers only
        average.mul_(decay).add_(outer_products(vectors, shared) * (1 - decay))
    elif in_place and shared:
        columns = vectors.transpose(-3, -2).reshape(-1, rows, width)
        average.view(-1, width, width).baddbmm_(columns.mT, columns, beta=decay, alpha=(1 - decay) / rows)
    elif in_place and width == 1:
        average.view(vectors.shape).mul_(decay).addcmul_(vectors, vectors, value=1 - decay)
    else:
        average.lerp_(outer_products(vectors, shared).to(average.dtype), 1 - decay)
