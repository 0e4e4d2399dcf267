"""The closure evaluated again after the step: the same mini-batch, the new weights, and no trace left."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from minifisher.statistics.secants import OutputMeans, secants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import Secant

    RandomState = dict[torch.device, Tensor]


@dataclass(eq=False)
class SecondPass:
    """Two evaluations of one closure, and what moved between them in `layers`.

    The second one draws the random numbers of the first, so that dropout masks are the same. Afterwards
    `.grad` of every parameter, every buffer of the modules (running statistics of batch norm) and torch's
    random state (CPU, CUDA) are as the first one left them, bit by bit. Other side effects of the closure
    happen twice.
    """

    closure: Callable[[], Any]
    parameters: list[Tensor]
    modules: list[nn.Module]
    layers: list[Layer]
    _before: OutputMeans = field(init=False)
    _after: OutputMeans = field(init=False)
    _random_state: RandomState = field(init=False)

    def __post_init__(self) -> None:
        self._before, self._after = OutputMeans(self.layers), OutputMeans(self.layers)

    def first(self) -> Any:
        """What the closure returns at the present weights."""
        self._random_state = _random_state({parameter.device for parameter in self.parameters})
        with self._before.recording():
            return self.closure()

    def second(self) -> Any:
        """What it returns at the weights by now."""
        with (
            torch.no_grad(),
            _gradients_kept(self.parameters),
            _buffers_kept(self.modules),
            _random_numbers_from(self._random_state),
            torch.enable_grad(),
            self._after.recording(),
        ):
            return self.closure()

    def secants(self, loss_scale: float) -> dict[Layer, Secant]:
        """How far the means of the layers moved between the two; what the loss was multiplied by undone."""
        return secants(self._before.read(), self._after.read(), loss_scale)


@contextmanager
def _gradients_kept(parameters: list[Tensor]) -> Iterator[None]:
    # DistributedDataParallel may hand out views of buffers that its next backward pass overwrites.
    kept = [
        (p, p.grad, p.grad.clone() if p.grad is not None and p.grad._is_view() else None) for p in parameters
    ]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient, copy in kept:
            parameter.grad = gradient
            if gradient is not None and copy is not None:
                gradient.copy_(copy)


@contextmanager
def _buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    owners = {owner for module in modules for owner in module.modules()}
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, name, buffer, copy in kept:
            owner._buffers[name] = buffer
            buffer.copy_(copy)


def _random_state(devices: set[torch.device]) -> RandomState:
    state = {torch.device("cpu"): torch.get_rng_state()}
    state.update({device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"})
    return state


def _set_random_state(state: RandomState) -> None:
    for device, numbers in state.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(numbers, device)
        else:
            torch.set_rng_state(numbers)


@contextmanager
def _random_numbers_from(state: RandomState) -> Iterator[None]:
    later = _random_state(set(state))
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(later)
