"""The closure evaluated again after the step: the same mini-batch at the new weights."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from minifisher.statistics.secants import OutputMeans, secants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import Secant

    RandomState = dict[torch.device, Tensor]


_NO_CLOSURE = (
    "{}.step() looks at the mini-batch before and after the step and needs a closure: call "
    "optimizer.step(closure), where closure() calls optimizer.zero_grad(), computes the loss, calls "
    "loss.backward() and returns the loss. Lightning passes a closure, except with 16-mixed precision; the "
    "Trainer of transformers and GradScaler pass none: use a method with one pass there, such as KFAC or MBF"
)


def refuse_missing_closure(method: str) -> NoReturn:
    """Raise TypeError: the method needs a closure."""
    raise TypeError(_NO_CLOSURE.format(method))


@dataclass(eq=False)
class SecondPass:
    """Evaluates a closure before and after a step, and measures the change of `layers` in between.

    The second evaluation uses the random numbers of the first, so that dropout masks are the same. After it,
    three things are exactly as the first evaluation left them: `.grad` of every parameter, every buffer of
    the modules (running statistics of batch norm) and torch's random state (CPU, CUDA). Other side effects of
    the closure happen twice.
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
        """Evaluate the closure before the step; return what it returns."""
        self._random_state = _random_state({parameter.device for parameter in self.parameters})
        with self._before.recording():
            return self.closure()

    def second(self) -> Any:
        """Evaluate the closure after the step; return what it returns."""
        with (
            torch.no_grad(),
            _restoring_gradients(self.parameters),
            _restoring_buffers(self.modules),
            _using_random_state(self._random_state),
            torch.enable_grad(),
            self._after.recording(),
        ):
            return self.closure()

    def secants(self, loss_scale: float) -> dict[Layer, Secant]:
        """The change of the mean outputs and output gradients; the latter are divided by `loss_scale`."""
        return secants(self._before.read(), self._after.read(), loss_scale)


@contextmanager
def _restoring_gradients(parameters: list[Tensor]) -> Iterator[None]:
    # A gradient of DistributedDataParallel may be a view of a buffer that the next backward pass overwrites.
    saved = [
        (p, p.grad, p.grad.clone() if p.grad is not None and p.grad._is_view() else None) for p in parameters
    ]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient, copy in saved:
            parameter.grad = gradient
            if gradient is not None and copy is not None:
                gradient.copy_(copy)


@contextmanager
def _restoring_buffers(modules: list[nn.Module]) -> Iterator[None]:
    owners = {owner for module in modules for owner in module.modules()}
    saved = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, name, buffer, copy in saved:
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
def _using_random_state(state: RandomState) -> Iterator[None]:
    later = _random_state(set(state))
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(later)
