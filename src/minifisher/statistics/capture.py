"""Hooks that keep what a layer saw when statistics are due; no `.grad` is ever touched."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minifisher.statistics.positions import batched
from minifisher.statistics.samples import Call, CapturedSamples
from minifisher.statistics.taps import (
    forget_compiled_code,
    graphs_that_are_walked_twice,
    place_of,
    tap,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer


# While labels are drawn the backward pass is not that of the training loss: the captures that it speaks to.
_drawing: list[Capture] = []


@dataclass(eq=False)
class _Pending:
    """One call of a module, waiting for its output gradient."""

    module: nn.Module
    inputs: Tensor
    edge: GradientEdge | Tensor | None
    """Where the gradient of a sampled loss is asked for; of a compiled call, its weight."""
    output_gradients: tuple[Tensor, ...] = ()
    """One of the training loss, or one of each loss that was sampled."""
    compiled: bool = False
    drawn: Tensor | None = None
    """What compiled code handed back of the loss that is being sampled."""

    def receive(self, gradients: Tensor) -> None:
        if _drawing:
            return
        # A graph that is walked twice, once for each of two losses, hands back two terms of one gradient.
        arrived = batched(self.module, gradients.detach())
        self.output_gradients = (sum(self.output_gradients, arrived),)

    def take(self, gradients: Tensor | None) -> Tensor | None:
        """The gradient of the loss that was just sampled, which autograd answered with `gradients`."""
        if self.compiled:
            gradients, self.drawn = self.drawn, None
        return gradients

    def receive_all(self, gradients: Iterable[Tensor | None]) -> None:
        """The gradients of several losses; one that does not depend on the call counts as zero."""
        batches = [None if g is None else batched(self.module, g.detach()) for g in gradients]
        arrived = next((batch for batch in batches if batch is not None), None)
        if arrived is not None:
            zeros = torch.zeros_like(arrived)
            self.output_gradients = tuple(zeros if batch is None else batch for batch in batches)
            self.edge = None


class Capture:
    """Keeps inputs and output gradients of layers between `arm` and `collect`.

    The empirical estimator reads the training loss's own backward pass; the sampled one (`sampled=True`) the
    extra one that `sample` makes. Calls of one forward pass are the same samples at other positions: a call
    that begins after an earlier one has received its gradient opens another pass, of other samples. Calls of
    one pass with different numbers of samples cannot be the same samples and count as others. A call whose
    gradient never arrives is dropped.

    The hooks stay as long as the capture and look at one switch. A compiled model therefore has two graphs,
    an armed one and a bare one, however often it is turned; what was compiled before is compiled anew.
    """

    def __init__(self, layers: Iterable[Layer], memory: int, sampled: bool = False) -> None:
        self._layers = {module: layer for layer in layers for module in layer.modules}
        self._memory = memory
        self._sampled = sampled
        self._passes: dict[Layer, list[list[_Pending]]] = defaultdict(list)
        self._switch = _Switch()
        self._calls: weakref.WeakValueDictionary[int, _Pending] = weakref.WeakValueDictionary()
        self._numbers = count()
        hooks = ExitStack()
        hooks.callback(self._switch.off)
        for module in self._layers:
            hook = _ForwardHook(self, module, self._switch)
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        if self._layers:
            forget_compiled_code()
        # Also when the optimizer is thrown away while armed.
        self._release = weakref.finalize(self, hooks.close)
        self._release.atexit = False

    @property
    def layers(self) -> list[Layer]:
        """The layers whose samples it reads."""
        return list(dict.fromkeys(self._layers.values()))

    @property
    def armed(self) -> bool:
        """Whether the hooks keep what they see."""
        return self._switch.on

    @property
    def seen(self) -> bool:
        """Whether a forward pass was seen since the last `collect`."""
        return bool(self._passes)

    @_disable_dynamo
    def arm(self) -> None:
        """Keep what the hooks see from now on."""
        if self.armed:
            return
        self._passes.clear()
        self._switch.on = True
        if self._sampled:
            self._switch.held.enter_context(graphs_that_are_walked_twice)

    @_disable_dynamo
    def disarm(self) -> None:
        """Keep no more; what was kept stays until it is collected."""
        self._switch.off()

    @_disable_dynamo
    def release(self) -> None:
        """Take the hooks away for good."""
        self._release()

    def sample(self, *loss_sums: Tensor) -> None:
        """Fills the output gradients with those of a loss *summed* over samples; the graph stays usable.

        Of several losses each is a further draw: every sample counts once for each of them.
        """
        if not self._sampled:
            raise RuntimeError("this capture reads the training loss: make it with sampled=True")
        calls = [call for passes in self._passes.values() for calls in passes for call in calls]
        pending = [call for call in calls if not call.output_gradients]
        if not pending:
            return
        draws = [self._draw(loss_sum, pending) for loss_sum in loss_sums]
        for call, received in zip(pending, zip(*draws, strict=True), strict=True):
            call.receive_all(received)

    def _draw(self, loss_sum: Tensor, pending: list[_Pending]) -> list[Tensor | None]:
        edges: list[Any] = [call.edge for call in pending if call.edge is not None]
        _drawing.append(self)
        try:
            gradients = torch.autograd.grad(loss_sum, edges, retain_graph=True, allow_unused=True)
        finally:
            _drawing.remove(self)
        return [call.take(gradient) for call, gradient in zip(pending, gradients, strict=True)]

    def collect(self, loss_scale: float = 1.0) -> dict[Layer, CapturedSamples]:
        """What each layer saw, and forget it; a layer without a gradient is absent.

        The training loss was multiplied by `loss_scale` before its backward pass.
        """
        collected = {layer: _complete(passes) for layer, passes in self._passes.items()}
        self._passes.clear()
        return {
            layer: self._samples(layer, passes, loss_scale) for layer, passes in collected.items() if passes
        }

    def _samples(
        self, layer: Layer, passes: tuple[tuple[Call, ...], ...], loss_scale: float
    ) -> CapturedSamples:
        count = sum(calls[0].inputs.shape[0] for calls in passes)
        # NOTE autograd of a mean loss hands back g / N. Micro-batches, each with its mean loss divided by
        # their number, hand back the same: the N of all passes together.
        scale = 1.0 if self._sampled else count / loss_scale
        return CapturedSamples(layer, count, passes, scale, self._memory)

    def keep(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """One call of a module in eager mode."""
        layer = self._layers.get(module)  # None for a replica, which no parameter of ours belongs to
        if layer is None or not (output.requires_grad and layer.weight.requires_grad and output.numel()):
            return
        # Under autocast the module computes with a copy of its input, and the original may change afterwards.
        kept = batched(module, inputs.detach().to(output.dtype))
        call = _Pending(module, kept, get_gradient_edge(output) if self._sampled else None)
        if not self._sampled:
            # A hook on the tensor also sees the gradient before a following in-place activation; one on the
            # module does not.
            output.register_hook(call.receive)  # type: ignore[no-untyped-call]
        self._open_pass(layer).append(call)

    def show(self, module: nn.Module, inputs: Tensor) -> int:
        """One call of a module in compiled code; returns its number."""
        layer, number = self._layers[module], next(self._numbers)
        call = _Pending(module, batched(module, inputs), layer.weight, compiled=True)
        self._calls[number] = call
        self._open_pass(layer).append(call)
        return number

    def hand_back(self, number: int, gradients: Tensor) -> None:
        """The output gradient of that call."""
        call = self._calls.get(number)  # None where it was collected by now
        if call is None or not gradients.numel():
            return
        if not self._sampled:
            call.receive(gradients)
        elif self in _drawing:
            call.drawn = gradients if call.drawn is None else call.drawn + gradients

    def _open_pass(self, layer: Layer) -> list[_Pending]:
        passes = self._passes[layer]
        if not passes or any(call.output_gradients for call in passes[-1]):
            passes.append([])
        return passes[-1]


class _Switch:
    """What every hook of a capture looks at, compiled or not."""

    def __init__(self) -> None:
        self.on = False
        self.held = ExitStack()

    def off(self) -> None:
        self.on = False
        self.held.close()


class _ForwardHook:
    """What is registered on the modules; a copy or a pickle of a module carries one that does nothing."""

    def __init__(
        self, capture: Capture | None = None, module: nn.Module | None = None, switch: _Switch | None = None
    ) -> None:
        self._capture = weakref.ref(capture) if capture is not None else None
        self._module = weakref.ref(module) if module is not None else None
        self._switch = switch or _Switch()
        self._place = place_of(self)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not self._switch.on:
            return None
        inputs = args[0] if args else kwargs["input"]
        if torch.compiler.is_compiling():
            needed = output.requires_grad and module.weight.requires_grad
            return tap(output, inputs.detach().to(output.dtype), self._place) if needed else None
        capture = self._capture() if self._capture is not None else None
        if capture is not None:
            capture.keep(module, inputs, output)
        return None

    def show(self, inputs: Tensor) -> int:
        """An input in compiled code."""
        capture, module = self._capture and self._capture(), self._module and self._module()
        return capture.show(module, inputs) if capture and module else -1

    def hand_back(self, call: int, gradients: Tensor) -> None:
        """The output gradient of that call."""
        capture = self._capture and self._capture()
        if capture:
            capture.hand_back(call, gradients)

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return (_ForwardHook, ())


def _complete(passes: list[list[_Pending]]) -> tuple[tuple[Call, ...], ...]:
    """The calls whose gradient arrived, those of the same samples and the same draw together."""
    complete: list[tuple[Call, ...]] = []
    for pending in passes:
        together: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for call in pending:
            for draw, gradients in enumerate(call.output_gradients):
                together[call.inputs.shape[0], draw].append(Call(call.module, call.inputs, gradients))
        complete += [tuple(calls) for calls in together.values()]
    return tuple(complete)
