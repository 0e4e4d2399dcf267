"""Batches of small symmetric blocks: damped powers and products, a diagonal being blocks of size one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minifisher.linalg.dense import add_to_diagonal, cholesky_inverse, inverse_power
from minifisher.linalg.warm import newton_schulz_inverse


@dataclass(frozen=True)
class BlockReading:
    """A weight read as `rows` vectors, each cut into `blocks` blocks of `width` entries, the last one padded.

    Rows of a fully connected layer, kernels of a convolution and entries of a bias are three readings.
    """

    rows: int
    length: int
    width: int

    @property
    def blocks(self) -> int:
        """The blocks of one row."""
        return math.ceil(self.length / self.width)

    @property
    def padding(self) -> int:
        """The zeros behind each row that fill its last block."""
        return self.blocks * self.width - self.length

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
        """1 for every true entry of a block and 0 for padding, [blocks, width]."""
        mask = torch.ones(self.blocks * self.width, dtype=like.dtype, device=like.device)
        mask[self.length :] = 0
        return mask.view(self.blocks, self.width)


def damped_inverse_power(
    blocks: Tensor,
    damping: Tensor,
    power: float,
    *,
    on_device: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """(F_b + diag(lambda_b))^(-power) for every block: blocks [..., b, b], damping [..., b].

    With `on_device` nothing is asked of the host, as `cholesky_inverse` says. Inverses begin at `start`, the
    last ones, where it is given.
    """
    if blocks.shape[-1] == 1:
        damped = blocks + damping.unsqueeze(-1)
        return damped.reciprocal_() if power == 1.0 else damped.pow_(-power)
    damped = add_to_diagonal(blocks, damping)
    if start is not None and power == 1.0:
        return newton_schulz_inverse(damped, start)
    return cholesky_inverse(damped) if on_device else inverse_power(damped, power)


def multiply_rows(vectors: Tensor, blocks: Tensor) -> Tensor:
    """x_rk B_rk for every row r and block k: vectors [..., rows, k, b], blocks [..., rows or 1, k, b, b].

    Blocks that all rows share make one matrix product a block instead of one a row.
    """
    if blocks.shape[-1] == 1:
        return vectors * blocks.squeeze(-1)
    if blocks.shape[-4] == 1:
        product = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        torch.matmul(vectors.transpose(-3, -2), blocks.squeeze(-4), out=product.transpose(-3, -2))
        return product
    return (vectors.unsqueeze(-2) @ blocks).squeeze(-2)


def outer_products(vectors: Tensor, shared: bool) -> Tensor:
    """x x^T of every block, or their mean over rows: [..., rows, k, b] to [..., rows | 1, k, b, b]."""
    if not shared:
        return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)
    columns = vectors.transpose(-3, -2)  # [..., k, rows, b]
    return (columns.mT @ columns).div_(vectors.shape[-3]).unsqueeze(-4)


def sum_of_outer_products(vectors: Tensor, shared: bool) -> Tensor:
    """sum_n x_n x_n^T of every block, [n, rows, k, b] to [rows, k, b, b]; shared, their mean [1, k, b, b].

    One product of matrices a block, over samples (and rows) at once.
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

    Inputs [n, s, k, b], output gradients [n, s, r] of per-sample gradients d_nr = sum_s g_sr a_s.
    """
    n, positions, blocks, width = inputs.shape
    weights = gradients @ gradients.mT  # [n, s, s]
    weighted = (weights @ inputs.flatten(2)).view(n * positions, blocks, width)
    columns = inputs.reshape(n * positions, blocks, width)
    return columns.transpose(0, 1).mT @ weighted.transpose(0, 1)


def average_outer_products(average: Tensor, vectors: Tensor, shared: bool, decay: float | Tensor) -> None:
    """F_b <- decay F_b + (1 - decay) x x^T in place; rows that share their blocks take the mean of x x^T.

    `average` is [..., rows | 1, k, b, b], vectors [..., rows, k, b]; decay a number or [].
    """
    rows, width = vectors.shape[-3], vectors.shape[-1]
    # A rank may hold no rows at all of a weight that is cut over processes: the general way serves it, too.
    in_place = vectors.dtype == average.dtype and average.is_contiguous() and rows > 0
    if isinstance(decay, Tensor):  # a matrix product takes no factor from the device
        average.mul_(decay).add_(outer_products(vectors, shared) * (1 - decay))
    elif in_place and shared:
        columns = vectors.transpose(-3, -2).reshape(-1, rows, width)
        average.view(-1, width, width).baddbmm_(columns.mT, columns, beta=decay, alpha=(1 - decay) / rows)
    elif in_place and width == 1:
        average.view(vectors.shape).mul_(decay).addcmul_(vectors, vectors, value=1 - decay)
    else:
        average.lerp_(outer_products(vectors, shared).to(average.dtype), 1 - decay)
