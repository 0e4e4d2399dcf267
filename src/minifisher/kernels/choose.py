"""The choice of a leaf: loops compiled by numba (extra `fast`) or by triton, where the tensors suit them."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

INSTALLED = find_spec("numba") is not None
GPU_INSTALLED = find_spec("triton") is not None

_PLAIN = (Tensor, nn.Parameter)  # a subclass, such as a sharded tensor, has its own idea of an operation


def fits_compiled(*tensors: Tensor, halves: bool = False) -> bool:
    """Whether loops compiled by numba can take these tensors: plain, float32, dense in memory, on the CPU.

    With `halves` bfloat16 will do as well.
    """
    return INSTALLED and _fit(tensors, "cpu", halves)


def fits_gpu(*tensors: Tensor, halves: bool = False) -> bool:
    """The same for kernels compiled by triton, on a CUDA device."""
    return GPU_INSTALLED and _fit(tensors, "cuda", halves)


def _fit(tensors: tuple[Tensor, ...], device: str, halves: bool) -> bool:
    dtypes = (torch.float32, torch.bfloat16) if halves else (torch.float32,)
    return not torch.compiler.is_compiling() and all(
        type(tensor) in _PLAIN
        and tensor.dtype in dtypes
        and tensor.device.type == device
        and tensor.is_contiguous()
        and tensor.numel() > 0
        for tensor in tensors
    )


def advance_adam(
    gradient: Tensor, momentum: Tensor, moment: Tensor, *, mu: float, decay: float, epsilon: float
) -> Tensor:
    """M <- mu M + D, V <- decay V + (1 - decay) D^2; |M / (sqrt(V) + epsilon)| of every layer, [layers].

    All tensors are [layers, entries] and such that `fits_compiled`.
    """
    from minifisher.kernels import (
        elementwise_cpu as _adam_cpu,  # importing numba takes most of a second: only when it is used
    )

    return _adam_cpu.advance(gradient, momentum, moment, mu, decay, epsilon)


WORTH_COMPILED = 65_536
"""Entries of a weight from which a call of a compiled loop costs no more than one of torch's."""


def mean_square(gradient: Tensor, layers: int) -> Tensor:
    """The mean of D^2 in every layer, [layers], of a contiguous gradient."""
    if layers == 1 and gradient.numel() >= WORTH_COMPILED and fits_compiled(gradient):
        from minifisher.kernels import _ends_cpu

        return gradient.new_tensor([_ends_cpu.square(gradient) / gradient.numel()])
    rows = gradient.reshape(layers, -1)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norm.square() / rows.shape[1]


def add_scaled(weight: Tensor, direction: Tensor, length: Tensor, rate: float) -> None:
    """W <- W - rate length direction, in place; `length` is []."""
    if weight.numel() >= WORTH_COMPILED and fits_compiled(weight, direction, length):
        from minifisher.kernels import _ends_cpu

        _ends_cpu.add(weight, direction, -rate * float(length))
        # A graph that saved the weight must notice, as it does of torch's own changes in place.
        torch.autograd.graph.increment_version(weight)
    else:
        weight.addcmul_(direction, length.to(direction.dtype), value=-rate)
