"""Hooks inside compiled models: two custom operators that the compiler does not look into.

Tensor hooks work in eager mode only. In compiled code the output of a layer passes through `record`, which
calls a `Receiver` with the input in the forward pass and with the output gradient in the backward pass. A
compiled graph can hold numbers but no Python objects, so it knows the receiver by a number. A receiver gets
copies, because compiled code reuses its buffers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._functorch import config as functorch_config


class Receiver(Protocol):
    """What is called with the inputs and output gradients of a layer."""

    def receive_input(self, inputs: Tensor) -> tuple[int, object]:
        """Return a number for this call, and an object to keep alive as long as its autograd graph."""

    def receive_gradient(self, call: int, gradients: Tensor) -> None:
        """Take the output gradient of the call with that number."""


_RECEIVERS: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
_numbers = count()


def number_of(receiver: Receiver) -> Tensor:  # []
    """A new number by which compiled code knows the receiver, as long as the receiver lives.

    It is a tensor: an int would be a constant of the graph, and every block of a model that is compiled block
    by block would need a graph of its own.
    """
    number = next(_numbers)
    _RECEIVERS[number] = receiver
    return torch.tensor(number, device="cpu")  # wherever torch.set_default_device points


def record(output: Tensor, inputs: Tensor, receiver: Tensor) -> Tensor:
    """The output of a layer, unchanged; its receiver gets the inputs now and the output gradient later."""
    same_output: Tensor = _Record.apply(output, inputs, receiver)  # type: ignore[no-untyped-call]
    return same_output


class _Record(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, receiver: Tensor) -> Tensor:
        same_output: Tensor
        same_output, call = torch.ops.minifisher.record_input(output, inputs, receiver)
        ctx.save_for_backward(call, receiver)
        return same_output

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        call, receiver = ctx.saved_tensors
        return torch.ops.minifisher.record_gradient(gradients, call, receiver), None, None


# Each operator returns the tensor that it is given. So a compiler neither removes it as dead code, nor moves
# it from the forward into the backward pass. The tag keeps it out of CUDA graphs, whose replay skips Python.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
torch.library.define(
    "minifisher::record_input",
    "(Tensor output, Tensor inputs, Tensor receiver) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "minifisher::record_gradient", "(Tensor gradients, Tensor call, Tensor receiver) -> Tensor", tags=_TAGS
)


def _record_input(output: Tensor, inputs: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
    found = _RECEIVERS.get(int(receiver))
    number, companion = (-1, None) if found is None else found.receive_input(inputs.detach().clone())
    return output.clone(), _tensor_of(number, companion)


def _record_gradient(gradients: Tensor, call: Tensor, receiver: Tensor) -> Tensor:
    found = _RECEIVERS.get(int(receiver))
    if found is not None:
        found.receive_gradient(int(call), gradients.detach().clone())
    return gradients.clone()


def _record_input_shapes(output: Tensor, inputs: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty(1, dtype=torch.int64, device="cpu")


def _record_gradient_shapes(gradients: Tensor, call: Tensor, receiver: Tensor) -> Tensor:
    return torch.empty_like(gradients)


for _name, _real, _fake in (
    ("minifisher::record_input", _record_input, _record_input_shapes),
    ("minifisher::record_gradient", _record_gradient, _record_gradient_shapes),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _real)
    torch.library.register_fake(_name, _fake)


class _Memory(bytearray):
    """The memory of a tensor, and an object that is freed together with it."""

    companion: object


def _tensor_of(number: int, companion: object) -> Tensor:  # [1]
    # A saved tensor is all that a compiled graph frees together with itself.
    memory = _Memory(number.to_bytes(8, sys.byteorder, signed=True))
    memory.companion = companion
    return torch.frombuffer(memory, dtype=torch.int64)


def discard_compiled_code() -> None:
    """Make torch compile every model again: code compiled before the hooks were registered lacks them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _SharedSetting(threading.local):
    """A setting of torch, which has its own in every thread: made for the first user, undone for the last."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._users, self._setting = make, 0, ExitStack()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold the setting in this thread; a use that ends in another thread undoes nothing there.

        An optimizer may be deleted in another thread than the one that made it.
        """
        thread = threading.get_ident()
        if not self._users:
            self._setting.enter_context(self._make())
        self._users += 1
        try:
            yield
        finally:
            if threading.get_ident() == thread:
                self._users -= 1
                if not self._users:
                    self._setting.close()


def _check_for_hooks() -> AbstractContextManager[None]:
    from torch._dynamo import config  # a second's work, which torch has done once any optimizer was made

    setting: AbstractContextManager[None] = config.patch(skip_nnmodule_hook_guards=False)
    return setting


code_checks_for_hooks: _SharedSetting = _SharedSetting(_check_for_hooks)
"""Code that was compiled for a layer without hooks does not run for an equal layer with hooks.

Torch's default is not to check for hooks. Then the code of a copy of the model, such as a teacher or an
average of its weights, would run for the model, too, and record nothing.
"""
no_donated_buffers: _SharedSetting = _SharedSetting(lambda: functorch_config.patch(donated_buffer=False))
"""Compiled graphs allow a second backward pass: the first one must not overwrite the saved tensors."""
