"""Scratch memory that is reused: on a CPU, allocating a large temporary costs more than computing with it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}


_BUFFERS = _Buffers()


def scratch_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape and dtype, which the next call on this thread overwrites.

    So use it inside one function: do not return it and do not store it. On other devices, whose caching
    allocators are fast, under torch.compile, and for a subclass such as a fake tensor, which must not stay in
    the memory of later steps, it is a new tensor.
    """
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    flat = _BUFFERS.flat.get(tensor.dtype)
    if flat is None or flat.numel() < tensor.numel():
        flat = _BUFFERS.flat[tensor.dtype] = torch.empty(
            tensor.numel(), dtype=tensor.dtype, device=tensor.device
        )
    return flat[: tensor.numel()].view(tensor.shape)
