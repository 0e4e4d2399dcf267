"""How the input and the output of one call read as positions: the border where the normal form is reached.

Both are views, so that nothing is unfolded before a chunk of samples is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from torch import Tensor, nn


def batched(module: nn.Module, tensor: Tensor) -> Tensor:
    """Input or output of one call with its sample dimension, which torch lets a single sample leave out."""
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    return tensor.unsqueeze(0) if tensor.dim() == spatial + 1 else tensor


def padded(module: nn.Module, inputs: Tensor) -> Tensor:  # [n, ...]
    """The input as the places of the output see it: a copy only where the module pads."""
    if not isinstance(module, _ConvNd) or not any(_padding(module)):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, _padding(module), mode)


def input_positions(module: nn.Module, inputs: Tensor) -> Tensor:  # [n, ...]
    """[n, groups, *places, in / groups, *kernel], the last dimensions in the order of `weight.flatten(1)`."""
    if not isinstance(module, _ConvNd):
        return _tokens(inputs)
    channels = torch.unflatten(padded(module, inputs), 1, (module.groups, -1))
    sizes, (n, group, channel, *spatial) = channels.shape, channels.stride()
    places = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes[3:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]
    steps = [step * stride for step, stride in zip(spatial, module.stride, strict=True)]
    taps = [step * dilation for step, dilation in zip(spatial, module.dilation, strict=True)]
    return channels.as_strided(
        (*sizes[:2], *places, sizes[2], *module.kernel_size), (n, group, *steps, channel, *taps)
    )


def output_positions(module: nn.Module, gradients: Tensor) -> Tensor:  # [n, ...]
    """[n, groups, *places, out / groups]."""
    if not isinstance(module, _ConvNd):
        return _tokens(gradients)
    return torch.unflatten(gradients, 1, (module.groups, -1)).movedim(2, -1)


def _tokens(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], 1, -1, tensor.shape[-1])


def _padding(module: _ConvNd) -> list[int]:
    """As `torch.nn.functional.pad` takes it: last dimension first, before and after."""
    # With zeros the convolution reads `padding`, which people change after construction; otherwise, and for
    # 'same', the module itself reads what it worked out when it was made.
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return [size for size in reversed(module.padding) for _ in range(2)]
    return module._reversed_padding_repeated_twice
