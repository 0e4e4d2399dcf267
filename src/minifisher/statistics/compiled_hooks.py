"""How a compiled model shows what a layer saw: two operators that a compiler carries along unopened.

Tensor hooks exist in eager mode alone, so a traced layer's output passes through `tap`: forward it shows the
input, backward it hands back the output gradient. Both reach a `Receiver` by number, which is all that a
compiled graph can hold. What they hand out are copies, for a compiler uses its buffers again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._functorch import config as functorch_config


class Receiver(Protocol):
    """Whoever wants to see a layer."""

    def show(self, inputs: Tensor) -> tuple[int, object]:
        """An input arrived: the number under which its gradient will come, and what lives as long as it."""

    def hand_back(self, call: int, gradients: Tensor) -> None:
        """The output gradient of that call arrived."""


_PLACES: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
_numbers = count()


def place_of(receiver: Receiver) -> int:
    """A number that stands for the receiver as long as somebody holds it."""
    place = next(_numbers)
    _PLACES[place] = receiver
    return place


def tap(output: Tensor, inputs: Tensor, place: int) -> Tensor:
    """The output itself; its layer's receiver gets the inputs now and the output gradient later."""
    output_again: Tensor = _Tap.apply(output, inputs, place)  # type: ignore[no-untyped-call]
    return output_again


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, place: int) -> Tensor:
        output_again: Tensor
        output_again, call = torch.ops.minifisher.show(output, inputs, place)
        ctx.save_for_backward(call)
        ctx.place = place
        return output_again

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        (call,) = ctx.saved_tensors
        return torch.ops.minifisher.hand_back(gradients, call, ctx.place), None, None


# The tensor that passes through keeps an operator where it stands: it is neither dead code, nor put off until
# the backward pass. A recorded CUDA graph would not call Python again.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
torch.library.define(
    "minifisher::show", "(Tensor output, Tensor inputs, int place) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "minifisher::hand_back", "(Tensor gradients, Tensor call, int place) -> Tensor", tags=_TAGS
)


def _show(output: Tensor, inputs: Tensor, place: int) -> tuple[Tensor, Tensor]:
    receiver = _PLACES.get(place)
    number, call = (-1, None) if receiver is None else receiver.show(inputs.detach().clone())
    return output.clone(), _number(number, call)


class _Memory(bytearray):
    """The bytes of a tensor, and what lives as long as they."""

    companion: object


def _number(number: int, companion: object) -> Tensor:  # [1]
    # What a graph keeps for its backward pass is all that goes when it goes.
    memory = _Memory(number.to_bytes(8, sys.byteorder, signed=True))
    memory.companion = companion
    return torch.frombuffer(memory, dtype=torch.int64)


def _hand_back(gradients: Tensor, call: Tensor, place: int) -> Tensor:
    receiver = _PLACES.get(place)
    if receiver is not None:
        receiver.hand_back(int(call), gradients.detach().clone())
    return gradients.clone()


def _show_shapes(output: Tensor, inputs: Tensor, place: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty(1, dtype=torch.int64)


def _hand_back_shapes(gradients: Tensor, call: Tensor, place: int) -> Tensor:
    return torch.empty_like(gradients)


for _name, _real, _fake in (
    ("minifisher::show", _show, _show_shapes),
    ("minifisher::hand_back", _hand_back, _hand_back_shapes),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _real)
    torch.library.register_fake(_name, _fake)


def forget_compiled_code() -> None:
    """What was compiled before hooks were put on does not have them: it is compiled once more."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Shared:
    """A setting of the whole process: made by the first who enters, undone by the last who leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._holders, self._held = make, 0, ExitStack()

    def __enter__(self) -> None:
        if not self._holders:
            self._held.enter_context(self._make())
        self._holders += 1

    def __exit__(self, *_: object) -> None:
        self._holders -= 1
        if not self._holders:
            self._held.close()


graphs_that_are_walked_twice = _Shared(lambda: functorch_config.patch(donated_buffer=False))
"""Compiled backward passes leave their inputs as they are: there is another one, for labels drawn."""
