"""Batches of small symmetric blocks: damped powers and products, a diagonal being blocks of size one."""

from __future__ import annotations

import torch
from torch import Tensor

from minifisher.linalg.spd import add_to_diagonal, inverse_power


def damped_inverse_power(blocks: Tensor, damping: Tensor, power: float) -> Tensor:
    """(F_b + diag(lambda_b))^(-power) for every block: blocks [..., b, b], damping [..., b]."""
    if blocks.shape[-1] == 1:
        return (blocks + damping.unsqueeze(-1)).pow(-power)
    return inverse_power(add_to_diagonal(blocks, damping), power)


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
