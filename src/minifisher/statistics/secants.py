"""Means of what a layer put out and got back: all that a secant needs, and nothing is kept but their sums."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from minifisher.statistics.calls import adds_to_gradient, may_be_answered
from minifisher.statistics.positions import batched, output_positions
from minifisher.statistics.records import Secant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer

    Means = dict[Layer, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Call:
    """One call of a module: sums [groups, out / groups] over its samples and their positions."""

    module: nn.Module
    weight: Tensor
    samples: int
    positions: int  # of one sample
    outputs: Tensor
    gradients: Tensor | None = None

    def receive(self, gradients: Tensor) -> None:
        if not adds_to_gradient(self.weight):
            return
        # A graph that is walked twice, once for each of two losses, hands back two terms of one gradient.
        arrived = _sum(_positions(self.module, gradients))
        self.gradients = arrived if self.gradients is None else self.gradients + arrived


class OutputMeans:
    """Mean output and mean output gradient of layers, over the samples and positions of one closure.

    Calls, passes and samples as in `Capture`; a call does not count where no gradient arrives, or where that
    adds to no `.grad`.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = {module: layer for layer in layers for module in layer.modules}
        self._passes: dict[Layer, list[list[_Call]]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks on."""
        with ExitStack() as hooks:
            if self._layers:
                # Compiled code does not see hooks that come and go.
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._layers:
                hooks.callback(module.register_forward_hook(self._keep).remove)
            yield

    def read(self) -> Means:
        """Mean h and mean g [groups, out / groups] of every layer that got a gradient; g is per sample."""
        complete = {
            layer: [[call for call in calls if call.gradients is not None] for calls in passes]
            for layer, passes in self._passes.items()
        }
        return {layer: _means(passes) for layer, passes in complete.items() if any(passes)}

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        layer = self._layers.get(module)
        if not may_be_answered(layer, output):
            return
        positions = _positions(module, output)
        places = positions[0, 0, ..., 0].numel()
        call = _Call(module, layer.weight, positions.shape[0], places, _sum(positions))
        # A hook on the tensor also sees the gradient before a following in-place activation; one on the
        # module does not.
        output.register_hook(call.receive)  # type: ignore[no-untyped-call]
        passes = self._passes[layer]
        if not passes or any(earlier.gradients is not None for earlier in passes[-1]):
            passes.append([])
        passes[-1].append(call)


def secants(before: Means, after: Means, loss_scale: float = 1.0) -> dict[Layer, Secant]:
    """How far the means moved, for every layer that both passes saw."""
    changes = {
        layer: [new - old for new, old in zip(after[layer], before[layer], strict=True)]
        for layer in before
        if layer in after
    }
    return {layer: Secant(outputs, gradients / loss_scale) for layer, (outputs, gradients) in changes.items()}


def _means(passes: list[list[_Call]]) -> tuple[Tensor, Tensor]:
    # NOTE autograd of a mean loss hands back g / N, with the N of all passes together.
    samples = sum(sum({call.samples for call in calls}) for calls in passes)
    together = [call for calls in passes for call in calls]
    positions = sum(call.samples * call.positions for call in together)
    outputs = reduce(torch.add, (call.outputs for call in together))
    gradients = reduce(torch.add, (call.gradients for call in together if call.gradients is not None))
    return outputs / positions, gradients * (samples / positions)


def _positions(module: nn.Module, tensor: Tensor) -> Tensor:
    return output_positions(module, batched(module, tensor.detach()))


def _sum(positions: Tensor) -> Tensor:  # [n, groups, *places, out / groups]
    dtype = torch.promote_types(positions.dtype, torch.float32)
    return positions.sum((0, *range(2, positions.dim() - 1)), dtype=dtype)
