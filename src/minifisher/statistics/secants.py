"""Mean outputs and mean output gradients of layers, for secants; only sums over samples are stored."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from minifisher.statistics.calls import accumulates_into_grad, can_receive_gradient
from minifisher.statistics.positions import output_positions, with_sample_dimension
from minifisher.statistics.records import Secant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer

    Means = dict[Layer, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Call:
    """One call of a module, with sums [groups, out / groups] over its samples and positions."""

    module: nn.Module
    weight: Tensor
    samples: int
    positions: int  # of one sample
    outputs: Tensor
    gradients: Tensor | None = None

    def add_gradient(self, gradients: Tensor | None) -> None:
        # DistributedDataParallel brings None for an output that the loss does not depend on.
        if gradients is None or not accumulates_into_grad(self.weight):
            return
        # Two backward passes on one graph, one for each of two losses, bring two terms of one gradient.
        arrived = _sum(_positions(self.module, gradients))
        self.gradients = arrived if self.gradients is None else self.gradients + arrived


class OutputMeans:
    """Mean output and mean output gradient of layers, over all samples and positions of one closure.

    Calls are grouped into forward passes as in `CallsOfLayer`. A call counts only if it receives a gradient
    in a backward pass that adds to `.grad` of the weight.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layer_of = {module: layer for layer in layers for module in layer.modules}
        self._passes: dict[Layer, list[list[_Call]]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside the `with` block."""
        with ExitStack() as hooks:
            if self._layer_of:
                # Compiled code would not call hooks that are registered only for a while.
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._layer_of:
                hooks.callback(module.register_forward_hook(self._record_call).remove)
            yield

    def read(self) -> Means:
        """Mean h and mean g [groups, out / groups] of every layer with a gradient; g is per sample."""
        complete = {
            layer: [[call for call in calls if call.gradients is not None] for calls in passes]
            for layer, passes in self._passes.items()
        }
        return {layer: _means(passes) for layer, passes in complete.items() if any(passes)}

    def _record_call(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        layer = self._layer_of.get(module)
        if not can_receive_gradient(layer, output):
            return
        positions = _positions(module, output)
        samples, positions_of_one = positions.shape[0], positions[0, 0, ..., 0].numel()
        call = _Call(module, layer.weight, samples, positions_of_one, _sum(positions))
        # A hook on the tensor sees the gradient also where an in-place activation follows; a backward hook on
        # the module does not.
        output.register_hook(call.add_gradient)  # type: ignore[no-untyped-call]
        passes = self._passes[layer]
        if not passes or any(earlier.gradients is not None for earlier in passes[-1]):
            passes.append([])
        passes[-1].append(call)


def secants(before: Means, after: Means, loss_scale: float = 1.0) -> dict[Layer, Secant]:
    """The change of the means, for every layer in both; gradients are divided by `loss_scale`."""
    changes = {
        layer: [new - old for new, old in zip(after[layer], before[layer], strict=True)]
        for layer in before
        if layer in after
    }
    return {layer: Secant(outputs, gradients / loss_scale) for layer, (outputs, gradients) in changes.items()}


def _means(passes: list[list[_Call]]) -> tuple[Tensor, Tensor]:
    # NOTE autograd of a mean loss returns g / N, with the N of all forward passes together.
    samples = sum(sum({call.samples for call in calls}) for calls in passes)
    all_calls = [call for calls in passes for call in calls]
    positions = sum(call.samples * call.positions for call in all_calls)
    outputs = reduce(torch.add, (call.outputs for call in all_calls))
    gradients = reduce(torch.add, (call.gradients for call in all_calls if call.gradients is not None))
    return outputs / positions, gradients * (samples / positions)


def _positions(module: nn.Module, tensor: Tensor) -> Tensor:
    return output_positions(module, with_sample_dimension(module, tensor.detach()))


def _sum(positions: Tensor) -> Tensor:  # [n, groups, *locations, out / groups]
    dtype = torch.promote_types(positions.dtype, torch.float32)
    return positions.sum((0, *range(2, positions.dim() - 1)), dtype=dtype)
