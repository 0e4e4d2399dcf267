"""Which tensors suit compiled kernels, and elementwise operations that use them where they do.

Kernels are compiled by numba (extra `fast`) on the CPU, and by triton on a GPU.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

NUMBA_INSTALLED = find_spec("numba") is not None
TRITON_INSTALLED = find_spec("triton") is not None

_PLAIN = (Tensor, nn.Parameter)  # a subclass, such as DTensor, may define other operations


def suits_numba(*tensors: Tensor, bfloat16: bool = False, device: str = "cpu") -> bool:
    """Whether the numba kernels take these tensors: plain, contiguous, not empty, float32, on the CPU.

    With `bfloat16` that dtype is accepted too.
    """
    if torch.compiler.is_compiling() or (device == "cpu" and not NUMBA_INSTALLED):
        return False
    for tensor in tensors:
        if not (
            type(tensor) in _PLAIN
            and (tensor.dtype == torch.float32 or (bfloat16 and tensor.dtype == torch.bfloat16))
            and tensor.device.type == device
            and tensor.is_contiguous()
            and tensor.numel() > 0
        ):
            return False
    return device != "cpu" or _numba_works()


def compiled_kernels(device: str) -> str:
    """Whether compiled kernels are used for weights on a kind of device, and what they would bring."""
    if device == "cpu":
        if NUMBA_INSTALLED:
            works = "is used" if _numba_works() else "is installed but switched off, or does not work"
            return f"numba {works} for float32 on the CPU"
        return (
            "numba is not installed: with pip install 'minifisher[fast]' steps on the CPU are faster, "
            "those of kernel blocks nearly three times"
        )
    if device == "cuda":
        if TRITON_INSTALLED:
            return "Triton is used for blocks of kernels on the GPU"
        return "Triton is not installed: with it, blocks of kernels take one pass over memory on the GPU"
    return f"there are no compiled kernels for {device}"


@lru_cache(maxsize=1)
def _numba_works() -> bool:
    """Whether numba can be imported and compiles; it does not with NUMBA_DISABLE_JIT=1.

    Tried once, when the first tensor suits: importing numba takes most of a second.
    """
    try:
        from numba.core import config

        if config.DISABLE_JIT:  # type: ignore[attr-defined]
            return False
        from minifisher.kernels import jit

        jit.check()
    except Exception as error:  # whatever it is, torch can take over
        warnings.warn(
            f"numba is installed but does not work ({type(error).__name__}: {error}). Steps are computed by "
            "torch, which is slower. Cure: install a release of numba that fits this Python and numpy, or "
            "uninstall numba.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def suits_triton(*tensors: Tensor, bfloat16: bool = False) -> bool:
    """The same as `suits_numba` for triton kernels: the tensors must be on a CUDA device."""
    return TRITON_INSTALLED and suits_numba(*tensors, bfloat16=bfloat16, device="cuda")


def elementwise(*tensors: Tensor) -> ModuleType | None:
    """The compiled operations of `minifisher.kernels.elementwise_cpu`, where they take these tensors."""
    if not suits_numba(*tensors):
        return None
    from minifisher.kernels import elementwise_cpu  # here, since importing numba takes most of a second

    return elementwise_cpu


LEAST_ENTRIES = 65_536
"""With fewer entries, calling a numba kernel costs more than calling torch's operation."""


def mean_square(gradient: Tensor, layers: int) -> Tensor:
    """The mean of D^2 in every layer, [layers], of a contiguous gradient."""
    compiled = elementwise(gradient) if layers == 1 and gradient.numel() >= LEAST_ENTRIES else None
    if compiled is not None:
        return gradient.new_tensor([compiled.sum_of_squares(gradient) / gradient.numel()])
    rows = gradient.reshape(layers, -1)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norm.square() / rows.shape[1]


def subtract_scaled(
    weight: Tensor, direction: Tensor, lengths: Tensor, rate: float, keep: float = 1.0
) -> bool:
    """W <- keep W - rate lengths direction in place, in one pass; False, and no change, if no kernel fits.

    `lengths` is [n], one for each of n equal parts of the weight.
    """
    compiled = elementwise(weight, direction, lengths) if weight.numel() >= LEAST_ENTRIES else None
    if compiled is None:
        return False
    compiled.subtract_scaled(weight, direction, lengths, rate, keep)
    # Autograd must notice that the weight changed, as it does with torch's own in-place operations.
    torch.autograd.graph.increment_version(weight)
    return True
