"""Weights as tensors of several modes (dimensions): cutting into blocks, unfolding, products along a mode.

mat_i(X) is the tensor X [w_1, ..., w_K] unfolded to a matrix [w_i, all others]. The product of X with a
matrix A along mode i is written X x_i A and defined by mat_i(X x_i A) = A mat_i(X).
(Kolda, Bader, "Tensor Decompositions and Applications", 2009, Sections 2.4 and 2.5.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class TensorReading:
    """A weight read as a tensor of K modes, cut into blocks of the same shape.

    The last blocks are padded with zeros. Every block is treated as if it were a weight by itself.
    """

    dims: tuple[int, ...]
    """n_1, ..., n_K of the tensor: their product is the number of entries of the weight."""
    widths: tuple[int, ...]
    """w_1, ..., w_K of a block: mode i is cut where w_i < n_i."""

    @property
    def order(self) -> int:
        """K, the number of modes."""
        return len(self.dims)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks along each mode."""
        return tuple(math.ceil(n / w) for n, w in zip(self.dims, self.widths, strict=True))

    @property
    def blocks(self) -> int:
        """The number of blocks of the weight."""
        return math.prod(self.counts)

    def read(self, weight: Tensor, trailing: int) -> Tensor:
        """The last `trailing` dimensions of a weight as [..., blocks, w_1, ..., w_K]."""
        tensor = weight.reshape((*weight.shape[: weight.ndim - trailing], *self.dims))
        if self.blocks == 1:
            return tensor.unsqueeze(-1 - self.order)
        leading = tensor.ndim - self.order
        sizes = [size for pair in zip(self.counts, self.widths, strict=True) for size in pair]
        pairs = F.pad(tensor, self._padding()).reshape(*tensor.shape[:leading], *sizes)
        outer = range(leading, pairs.ndim, 2)
        inner = range(leading + 1, pairs.ndim, 2)
        return pairs.permute(*range(leading), *outer, *inner).flatten(leading, leading + self.order - 1)

    def write(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `read`: [..., blocks, w_1, ..., w_K] to [..., *shape]."""
        leading = blocks.ndim - 1 - self.order
        pairs = torch.unflatten(blocks, leading, self.counts)
        order = [axis for mode in range(self.order) for axis in (leading + mode, leading + self.order + mode)]
        padded = [count * width for count, width in zip(self.counts, self.widths, strict=True)]
        tensor = pairs.permute(*range(leading), *order).reshape(*blocks.shape[:leading], *padded)
        for mode, n in enumerate(self.dims):
            tensor = tensor.narrow(leading + mode, 0, n)
        return tensor.reshape((*blocks.shape[:leading], *shape))

    def lengths(self, mode: int, like: Tensor) -> Tensor:
        """The length of every block along a mode, without padding, [blocks]."""
        count, width = self.counts[mode], self.widths[mode]
        lengths = torch.full((count,), width, dtype=like.dtype, device=like.device)
        lengths[-1] = self.dims[mode] - (count - 1) * width
        shape = [count if axis == mode else 1 for axis in range(self.order)]
        return lengths.view(shape).expand(self.counts).flatten()

    def _padding(self) -> list[int]:
        missing = [c * w - n for n, w, c in zip(self.dims, self.widths, self.counts, strict=True)]
        return [size for amount in reversed(missing) for size in (0, amount)]


def merged(shape: Sequence[int], limit: int | None, kept: int = 1) -> tuple[int, ...]:
    """The modes of a weight: its dimensions without those of size one, small neighbours merged into one.

    Neighbours are merged from the last to the first while their product is at most `limit`, so that the
    dimensions of a kernel are merged before the channels. With `limit` None all dimensions after the first
    `kept` ones are merged: (out, in k_1 k_2) for kept = 1, (out, in, k_1 k_2) for kept = 2.
    """
    if limit is None:
        dims = [*shape[:kept], math.prod(shape[kept:])]
        return tuple(n for n in dims if n > 1) or (1,)
    dims = [1]
    for n in reversed(shape):
        if n * dims[0] <= limit or 1 in (n, dims[0]):
            dims[0] *= n
        else:
            dims.insert(0, n)
    return tuple(dims)


def even_width(length: int, widest: int) -> int:
    """The width of blocks that cut a mode evenly into as few blocks of at most `widest` as possible."""
    return math.ceil(length / math.ceil(length / widest))


def unfold(tensor: Tensor, mode: int, order: int) -> Tensor:
    """mat_i of the last `order` dimensions: [..., w_1, ..., w_K] to [..., w_i, all others]."""
    if order == 1:
        return tensor.unsqueeze(-1)
    return tensor.movedim(mode - order, -order).flatten(1 - order)


def second_moment(tensor: Tensor, mode: int, order: int) -> Tensor:
    """mat_i(X) mat_i(X)^T of the last `order` dimensions: [..., w_i, w_i]."""
    matrix = unfold(tensor, mode, order)
    if matrix.shape[-2] == 1:  # a diagonal: one matrix product for each entry would be slow
        return matrix.square().sum(-1, keepdim=True)
    return matrix @ matrix.mT


def mode_products(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """X x_1 A_1 ... x_K A_K: the tensor X is [..., w_1, ..., w_K], the matrices A_i are [..., w_i, w_i]."""
    order = len(matrices)
    for mode, matrix in enumerate(matrices):
        unfolded = unfold(tensor, mode, order)
        product = matrix * unfolded if matrix.shape[-1] == 1 else matrix @ unfolded
        tensor = _fold(product, mode, tensor.shape[tensor.ndim - order :])
    return tensor


def _fold(matrix: Tensor, mode: int, widths: Sequence[int]) -> Tensor:
    """The inverse of `unfold`: [..., w_i, all others] to [..., w_1, ..., w_K]."""
    order = len(widths)
    if order == 1:
        return matrix.squeeze(-1)
    others = [width for axis, width in enumerate(widths) if axis != mode]
    return torch.unflatten(matrix, -1, others).movedim(-order, mode - order)
