"""LayerSamples made from the calls that a capture kept, unfolded a few samples at a time."""

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


# On a CPU, chunks that stay in its caches, in memory that the allocator does not hand back in between: the
# statistics of ResNet-32 took half the time that chunks of 256 MiB took.
_CACHED_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module."""

    module: nn.Module
    inputs: Tensor  # [n, ...]
    output_gradients: Tensor  # [n, ...], as autograd handed them back


@dataclass(frozen=True, eq=False)
class CapturedSamples(LayerSamples):
    """What one layer saw.

    The calls of one pass saw the same samples, each at positions of its own; different passes saw different
    samples. Beyond one sample, no chunk takes more than `memory` bytes.
    """

    layer: Layer
    count: int
    passes: tuple[tuple[Call, ...], ...]
    scale: float
    """Turns what autograd handed back into per-sample gradients: N for a mean loss, 1 for a summed one."""
    memory: int

    @property
    def positions(self) -> int:
        """The most shared positions of a sample, those of all calls of a pass together."""
        return max(
            sum(output_positions(c.module, c.output_gradients)[0, 0, ..., 0].numel() for c in calls)
            for calls in self.passes
        )

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in], output gradients [n, groups, s, out / groups], few samples at a time.

        With the bias folded in, `in` counts one more input, which is 1.
        """
        return self._chunks(numbers_beside=0)

    def gradients(self) -> Iterator[Tensor]:
        """Per-sample gradients D_n = sum_s g_ns a_ns^T, [n, *layer.shape], few samples at a time."""
        for inputs, gradients in self._chunks(numbers_beside=self.layer.shape.numel()):
            products = gradients.mT @ inputs  # [n, groups, out / groups, in]
            yield products.reshape(inputs.shape[0], *self.layer.shape)

    def is_finite(self) -> bool:
        """Whether every input and output gradient is finite, and so small that its square is."""
        calls = tuple(call for calls in self.passes for call in calls)
        tensors = [tensor for call in calls for tensor in (call.inputs, call.output_gradients)]
        dtype = _dtype_of(calls)  # narrower than the tensor's it would raise
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors])
        return bool(torch.isfinite(norms.mul_(self.scale).square_()).all())

    def _chunks(self, numbers_beside: int) -> Iterator[tuple[Tensor, Tensor]]:
        for calls in self.passes:
            count = calls[0].inputs.shape[0]
            size = self._chunk_size(calls, numbers_beside)
            for start in range(0, count, size):
                yield self._read(calls, slice(start, start + size))

    def _chunk_size(self, calls: tuple[Call, ...], numbers_beside: int) -> int:
        numbers = numbers_beside
        for call in calls:
            one = call.inputs[:1].to("meta")
            numbers += padded(call.module, one).numel() + input_positions(call.module, one).numel()
            numbers += call.output_gradients[0].numel()
        # A folded bias's ones need no room of their own: they are fewer than the padded input, freed by then.
        on_cpu = calls[0].inputs.device.type == "cpu"
        memory = min(self.memory, _CACHED_BYTES) if on_cpu else self.memory
        return max(1, memory // (numbers * _dtype_of(calls).itemsize))

    def _read(self, calls: tuple[Call, ...], samples: slice) -> tuple[Tensor, Tensor]:
        dtype = _dtype_of(calls)
        inputs = [input_positions(call.module, call.inputs[samples]) for call in calls]
        gradients = [output_positions(call.module, call.output_gradients[samples]) for call in calls]
        places = gradients[0].dim() - 3
        if self._folds_bias or not _in_normal_form(inputs, dtype):
            inputs = [_join(inputs, places, dtype, ones=self._folds_bias)]
        if self.scale != 1 or not _in_normal_form(gradients, dtype):
            gradients = [_join(gradients, places, dtype).mul_(self.scale)]
        return inputs[0], gradients[0]

    @property
    def _folds_bias(self) -> bool:
        return self.layer.bias is not None


def _dtype_of(calls: tuple[Call, ...]) -> torch.dtype:
    """Float32, or float64 where the network computes in it."""
    dtypes = [tensor.dtype for call in calls for tensor in (call.inputs, call.output_gradients)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def _in_normal_form(views: list[Tensor], dtype: torch.dtype) -> bool:
    return len(views) == 1 and views[0].dim() == 4 and views[0].dtype == dtype


def _join(views: list[Tensor], places: int, dtype: torch.dtype, ones: bool = False) -> Tensor:
    """Views [n, groups, *places, *features] one after another -> [n, groups, s, features], plus one of 1."""
    groups, features = views[0].shape[1], views[0].shape[2 + places :]
    lengths = [view.shape[2 : 2 + places].numel() for view in views]
    joined = _empty(views[0], groups, sum(lengths), features.numel() + ones, dtype)
    if ones:
        joined[..., -1] = 1
    start = 0
    for view in views:
        spatial = view.shape[2 : 2 + places]
        target = joined[:, :, start : start + spatial.numel(), : features.numel()]
        torch.unflatten(torch.unflatten(target, 3, features), 2, spatial).copy_(view)
        start += spatial.numel()
    return joined


def _empty(view: Tensor, groups: int, positions: int, features: int, dtype: torch.dtype) -> Tensor:
    """Room for [n, groups, s, features], laid out so that filling it copies whole rows of the image.

    Both sums over positions and sums over samples and positions can then be products without another copy
    (with groups, the former only). Copying 3x3 patches the other way round took 4 to 20 times as long.
    """
    n = view.shape[0]
    if view.dim() == 4 and view.stride(-1) == 1:
        return view.new_empty((n, groups, positions, features), dtype=dtype)
    if groups == 1:
        return view.new_empty((features, n, positions), dtype=dtype).permute(1, 2, 0).unsqueeze(1)
    return view.new_empty((n, groups, features, positions), dtype=dtype).mT
