"""Scratch memory that is used again: on a CPU a large new temporary costs more than arithmetic on it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}


_BUFFERS = _Buffers()


def scratch_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, valid until the next call: never return it, never keep it.

    Other devices have allocators of their own that are fast enough, and a compiler plans memory itself.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    flat = _BUFFERS.flat.get(tensor.dtype)
    if flat is None or flat.numel() < tensor.numel():
        flat = _BUFFERS.flat[tensor.dtype] = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat[: tensor.numel()].view(tensor.shape)
