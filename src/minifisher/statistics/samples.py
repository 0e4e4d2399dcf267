"""`LayerSamples` from recorded calls, brought into the normal form a few samples at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch

from minifisher.statistics.positions import input_positions, output_positions, padded
from minifisher.statistics.records import LayerSamples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer


# Chunks that fit in the caches of a CPU, and whose memory the allocator reuses instead of returning it to the
# system: the statistics of ResNet-32 took half as long as with chunks of 256 MiB.
_CACHED_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, with its output gradient."""

    module: nn.Module
    inputs: Tensor  # [n, ...]
    output_gradients: Tensor  # [n, ...], as autograd returned them


@dataclass(frozen=True, eq=False)
class CapturedSamples(LayerSamples):
    """Samples of one layer, as recorded by a `Capture`.

    Calls of one forward pass have the same samples at different positions; other forward passes have other
    samples. No chunk takes more than `memory` bytes, unless a single sample does.
    """

    layer: Layer
    count: int
    passes: tuple[tuple[Call, ...], ...]
    """The calls of each forward pass."""
    scale: float
    """Factor that makes autograd's gradients per-sample gradients: N for a mean loss, 1 for a sum."""
    memory: int

    @property
    def positions(self) -> int:
        """The largest number of positions of a sample, over all calls of a forward pass."""
        return max(
            sum(output_positions(c.module, c.output_gradients)[0, 0, ..., 0].numel() for c in calls)
            for calls in self.passes
        )

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in] and output gradients [n, groups, s, out / groups], a few samples each.

        With the bias folded in, `in` includes one more input, which is 1.
        """
        return self._chunks(extra_numbers=0)

    def gradients(self) -> Iterator[Tensor]:
        """Per-sample gradients D_n = sum_s g_ns a_ns^T, [n, *layer.shape], a few samples each."""
        for inputs, gradients in self._chunks(extra_numbers=self.layer.shape.numel()):
            products = gradients.mT @ inputs  # [n, groups, out / groups, in]
            yield products.reshape(inputs.shape[0], *self.layer.shape)

    def is_finite(self) -> bool:
        """Whether every input and output gradient is finite, and its square too."""
        calls = tuple(call for calls in self.passes for call in calls)
        tensors = [tensor for call in calls for tensor in (call.inputs, call.output_gradients)]
        dtype = _dtype_of(calls)  # vector_norm refuses a narrower one than the tensor's
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors])
        return bool(torch.isfinite(norms.mul_(self.scale).square_()).all())

    def _chunks(self, extra_numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
        for calls in self.passes:
            count = calls[0].inputs.shape[0]
            size = self._chunk_size(calls, extra_numbers)
            for start in range(0, count, size):
                yield self._chunk(calls, slice(start, start + size))

    def _chunk_size(self, calls: tuple[Call, ...], extra_numbers: int) -> int:
        numbers = extra_numbers
        for call in calls:
            one = call.inputs[:1].to("meta")
            numbers += padded(call.module, one).numel() + input_positions(call.module, one).numel()
            numbers += call.output_gradients[0].numel()
        # The ones of a folded bias are not counted: they are fewer than the entries of the padded input,
        # which is freed before.
        on_cpu = calls[0].inputs.device.type == "cpu"
        memory = min(self.memory, _CACHED_BYTES) if on_cpu else self.memory
        return max(1, memory // (numbers * _dtype_of(calls).itemsize))

    def _chunk(self, calls: tuple[Call, ...], samples: slice) -> tuple[Tensor, Tensor]:
        dtype = _dtype_of(calls)
        inputs = [input_positions(call.module, call.inputs[samples]) for call in calls]
        gradients = [output_positions(call.module, call.output_gradients[samples]) for call in calls]
        location_dims = gradients[0].dim() - 3
        if self._folds_bias or not _is_in_normal_form(inputs, dtype):
            inputs = [_concatenated(inputs, location_dims, dtype, ones=self._folds_bias)]
        if self.scale != 1 or not _is_in_normal_form(gradients, dtype):
            gradients = [_concatenated(gradients, location_dims, dtype).mul_(self.scale)]
        return inputs[0], gradients[0]

    @property
    def _folds_bias(self) -> bool:
        return self.layer.bias is not None


def _dtype_of(calls: tuple[Call, ...]) -> torch.dtype:
    """Float32, or float64 if the network uses it."""
    dtypes = [tensor.dtype for call in calls for tensor in (call.inputs, call.output_gradients)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def _is_in_normal_form(views: list[Tensor], dtype: torch.dtype) -> bool:
    return len(views) == 1 and views[0].dim() == 4 and views[0].dtype == dtype


def _concatenated(views: list[Tensor], location_dims: int, dtype: torch.dtype, ones: bool = False) -> Tensor:
    """Views [n, groups, *locations, *features], one for each call -> [n, groups, s, features].

    With `ones` there is one more feature, which is 1.
    """
    groups, features = views[0].shape[1], views[0].shape[2 + location_dims :]
    positions = sum(view.shape[2 : 2 + location_dims].numel() for view in views)
    joined = _empty(views[0], groups, positions, features.numel() + ones, dtype)
    if ones:
        joined[..., -1] = 1
    start = 0
    for view in views:
        locations = view.shape[2 : 2 + location_dims]
        target = joined[:, :, start : start + locations.numel(), : features.numel()]
        torch.unflatten(torch.unflatten(target, 3, features), 2, locations).copy_(view)
        start += locations.numel()
    return joined


def _empty(view: Tensor, groups: int, positions: int, features: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor [n, groups, s, features] in the memory layout that is fastest to fill.

    For patches, positions come last in memory, so that whole rows of an image are copied at once: for 3x3
    kernels the usual layout took 4 to 20 times as long. The layouts also allow matrix products over positions
    without another copy, and without groups over samples and positions.
    """
    n = view.shape[0]
    if view.dim() == 4 and view.stride(-1) == 1:
        return view.new_empty((n, groups, positions, features), dtype=dtype)
    if groups == 1:
        return view.new_empty((features, n, positions), dtype=dtype).permute(1, 2, 0).unsqueeze(1)
    return view.new_empty((n, groups, features, positions), dtype=dtype).mT
