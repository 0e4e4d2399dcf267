"""The inputs and output gradients of one call, with their positions as in the normal form of `records.py`.

The results are views: patches of a convolution are copied only later, for a few samples at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from torch import Tensor, nn


def with_sample_dimension(module: nn.Module, tensor: Tensor) -> Tensor:
    """Input or output of a call, [n, ...]; torch also takes one sample without the first dimension."""
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    return tensor.unsqueeze(0) if tensor.dim() == spatial + 1 else tensor


def padded(module: nn.Module, inputs: Tensor) -> Tensor:  # [n, ...]
    """The input with the padding of the module around it; without padding the input itself, no copy."""
    if not isinstance(module, _ConvNd) or not any(_padding(module)):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, _padding(module), mode)


def input_positions(module: nn.Module, inputs: Tensor) -> Tensor:  # [n, ...]
    """[n, groups, *locations, in / groups, *kernel]; the last dimensions are those of the weight."""
    if not isinstance(module, _ConvNd):
        return _tokens(inputs)
    channels = torch.unflatten(padded(module, inputs), 1, (module.groups, -1))
    sizes, (n, group, channel, *spatial) = channels.shape, channels.stride()
    locations = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes[3:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]
    location_steps = [step * stride for step, stride in zip(spatial, module.stride, strict=True)]
    kernel_steps = [step * dilation for step, dilation in zip(spatial, module.dilation, strict=True)]
    return channels.as_strided(
        (*sizes[:2], *locations, sizes[2], *module.kernel_size),
        (n, group, *location_steps, channel, *kernel_steps),
    )


def output_positions(module: nn.Module, gradients: Tensor) -> Tensor:  # [n, ...]
    """[n, groups, *locations, out / groups]."""
    if not isinstance(module, _ConvNd):
        return _tokens(gradients)
    return torch.unflatten(gradients, 1, (module.groups, -1)).movedim(2, -1)


def _tokens(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], 1, -1, tensor.shape[-1])


def _padding(module: _ConvNd) -> list[int]:
    """The `pad` argument of `torch.nn.functional.pad`: last dimension first, before and after."""
    # As the module's own forward: for zeros it reads `padding`, which users change after construction. For
    # other modes and for 'same' it reads what was computed at construction.
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return [size for size in reversed(module.padding) for _ in range(2)]
    return module._reversed_padding_repeated_twice
