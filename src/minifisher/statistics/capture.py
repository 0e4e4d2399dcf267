"""Hooks that keep what a layer saw when statistics are due; no `.grad` is ever touched."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once

from minifisher.callers import stacklevel_of_caller
from minifisher.statistics.calls import Passes, Pending, edges_below, fasten, may_be_answered
from minifisher.statistics.compiled_hooks import (
    forget_compiled_code,
    graphs_that_are_walked_twice,
    place_of,
    tap,
)
from minifisher.statistics.likelihood import LABELLED
from minifisher.statistics.positions import batched
from minifisher.statistics.samples import Call, CapturedSamples

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # new in torch 2.7

_UNLABELLED = (
    'fisher="{}" has seen a forward pass but no labels: call optimizer.observe(outputs) between the forward '
    "pass and loss.backward()"
)
_SILENT = (
    "{} got a gradient, but no call of its module {}: it has no samples and steps without their curvature. "
    'Call the module itself, not torch.nn.functional with its weight, {}, or use fisher="gradient" where the '
    "method has it; of these weights this warning is not repeated"
)
_SILENT_BECAUSE = {
    False: ("took part in loss.backward()", "and let loss.backward() fill .grad"),
    True: ("led to the outputs that optimizer.observe was given", "and observe outputs that depend on it"),
}  # by whether labels are drawn


class Captures:
    """The captures of one optimizer, one for each estimator that reads samples; false where there is none.

    `arm` turns hooks on for the coming step, `collect` hands over the samples that the step's backward passes
    left. The hooks of one estimator are turned on together, as soon as one of its layers is due: a compiled
    model then has two graphs, and not one for every set of layers.
    """

    def __init__(self, layers_by_estimator: Mapping[str, Sequence[Layer]], memory: int) -> None:
        self.by_estimator = {
            estimator: Capture(layers, memory, estimator in LABELLED)
            for estimator, layers in layers_by_estimator.items()
            if any(layer.reads_samples for layer in layers)
        }

    def __bool__(self) -> bool:
        return bool(self.by_estimator)

    def arm(self, is_due: Callable[[Layer], bool]) -> None:
        """Turn hooks on where the coming step reads statistics of a layer, and off elsewhere."""
        for capture in self.by_estimator.values():
            if any(is_due(layer) for layer in capture.layers):
                capture.arm()
            else:
                capture.disarm()

    def disarm(self) -> None:
        """Turn all hooks off; what was captured so far stays until `collect`."""
        for capture in self.by_estimator.values():
            capture.disarm()

    def draw_labels(self, outputs: Tensor, likelihood: str) -> None:
        """Run the extra backward pass of the estimators whose labels come from the model, where armed."""
        for estimator, capture in self.by_estimator.items():
            if estimator in LABELLED and capture.armed:
                with torch.enable_grad():
                    capture.sample(*LABELLED[estimator](outputs, likelihood))

    def forget_backward(self) -> None:
        """Forget the gradients of earlier backward passes, because every `.grad` was cleared."""
        for capture in self.by_estimator.values():
            capture.forget_backward()

    def collect(self, loss_scale: Callable[[bool], float]) -> dict[Layer, LayerSamples]:
        """Hand over the samples of every layer that has some, and forget them.

        `loss_scale(captured)` returns what the training loss was multiplied by; `captured` says whether there
        are output gradients to divide by it. Raises RuntimeError where `draw_labels` should have been
        called, and warns where a layer has a gradient but no samples.
        """
        collected: dict[Layer, LayerSamples] = {}
        for estimator, capture in self.by_estimator.items():
            seen = capture.seen
            samples = capture.collect(loss_scale(seen and estimator == "empirical"))
            capture.check_heard(samples, estimator, seen)
            collected.update(samples)
        return collected

    def release(self) -> None:
        """Remove all hooks for good."""
        for capture in self.by_estimator.values():
            capture.release()
        self.by_estimator.clear()


class Capture:
    """Keeps inputs and output gradients of layers between `arm` and `collect`.

    The empirical estimator reads the training loss's own backward pass; the sampled one (`sampled=True`) the
    extra one that `sample` makes. `Passes` tells which calls are of the same samples; calls of one pass with
    different numbers of samples cannot be, and count as others. A call whose gradient never arrives is
    dropped: with its graph, so that a network in use without `no_grad` takes no memory here.

    The hooks stay as long as the capture and look at one switch. A compiled model therefore has two graphs,
    an armed one and a bare one, however often it is turned; what was compiled before is compiled anew.
    """

    def __init__(self, layers: Iterable[Layer], memory: int, sampled: bool = False) -> None:
        self._layers = {module: layer for layer in layers for module in layer.modules}
        self.layers = tuple(dict.fromkeys(self._layers.values()))
        """The layers whose samples it reads."""
        self._memory = memory
        self._sampled = sampled
        self._draws = False
        self._reported: set[Layer] = set()
        self._passes: dict[Layer, Passes] = {}
        self._switch = _Switch()
        self._calls: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()
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
        self._forget()
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
        pending = [call for passes in self._passes.values() for call in passes.pending()]
        if pending and not all(loss_sum.requires_grad for loss_sum in loss_sums):
            raise RuntimeError("the outputs hang on no graph: observe them as the model returned them")
        edges: dict[Pending, Any] = edges_below(loss_sums, pending)
        edges.update({call: self._layers[call.module].weight for call in pending if call.compiled})
        if not edges:
            return
        draws = [self._draw(loss_sum, edges) for loss_sum in loss_sums]
        for call, received in zip(edges, zip(*draws, strict=True), strict=True):
            self._passes[self._layers[call.module]].receive_all(call, received)

    def _draw(self, loss_sum: Tensor, edges: dict[Pending, Any]) -> list[Tensor | None]:
        self._draws = True
        try:
            gradients = torch.autograd.grad(
                loss_sum, list(edges.values()), retain_graph=True, allow_unused=True
            )
        finally:
            self._draws = False
        return [call.take(gradient) for call, gradient in zip(edges, gradients, strict=True)]

    def forget_backward(self) -> None:
        """Every `.grad` was cleared: the backward passes so far do not count, the forward passes still do."""
        if not self._sampled:
            for passes in self._passes.values():
                passes.forget()

    def collect(self, loss_scale: float = 1.0) -> dict[Layer, CapturedSamples]:
        """What each layer saw, and forget it; a layer without a gradient is absent.

        The training loss was multiplied by `loss_scale` before its backward pass.
        """
        collected = {layer: _complete(passes.take()) for layer, passes in self._passes.items()}
        self._forget()
        return {
            layer: self._samples(layer, passes, loss_scale) for layer, passes in collected.items() if passes
        }

    def check_heard(self, collected: Collection[Layer], source: str, seen: bool) -> None:
        """Raises where no labels were drawn; warns once of each weight with a gradient and no samples."""
        if self._sampled and seen and not collected:
            raise RuntimeError(_UNLABELLED.format(source))
        if not self.armed:
            return
        missing = (layer for layer in self.layers if layer not in collected and layer not in self._reported)
        silent = [layer for layer in missing if _has_gradient(layer.weight)]
        if silent:
            self._reported.update(silent)
            names = ", ".join(layer.name for layer in silent)
            message = _SILENT.format(names, *_SILENT_BECAUSE[self._sampled])
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel_of_caller())

    def _forget(self) -> None:
        self._passes.clear()
        self._calls.clear()

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
        layer = self._layers.get(module)
        if not may_be_answered(layer, output):
            return
        # Under autocast the module computes with a copy of its input, and the original may change afterwards.
        kept = batched(module, inputs.detach().to(output.dtype))
        call, passes = Pending(module, kept, next(self._numbers)), self._passes_of(layer)
        passes.add(call)
        # What is put on the graph holds the call.
        if self._sampled:
            fasten(call, output)
        else:
            # A hook on the tensor also sees the gradient before a following in-place activation; one on the
            # module does not.
            output.register_hook(partial(passes.receive, call))  # type: ignore[no-untyped-call]

    def show(self, module: nn.Module, inputs: Tensor) -> Pending:
        """One call of a module in compiled code."""
        call = Pending(module, batched(module, inputs), next(self._numbers), compiled=True)
        self._passes_of(self._layers[module]).add(call)
        self._calls[call.number] = call
        return call

    def hand_back(self, number: int, gradients: Tensor) -> None:
        """The output gradient of that call."""
        call = self._calls.get(number)  # None where it was collected by now
        if call is None or not gradients.numel():
            return
        if not self._sampled:
            self._passes[self._layers[call.module]].receive(call, gradients)
        elif self._draws:
            call.drawn = gradients if call.drawn is None else call.drawn + gradients

    def _passes_of(self, layer: Layer) -> Passes:
        return self._passes.setdefault(layer, Passes(layer.weight))


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
            needed = output.requires_grad and module.weight.requires_grad and not _is_exporting()
            return tap(output, inputs.detach().to(output.dtype), self._place) if needed else None
        capture = self._capture() if self._capture is not None else None
        if capture is not None:
            capture.keep(module, inputs, output)
        return None

    def show(self, inputs: Tensor) -> tuple[int, object]:
        """An input in compiled code."""
        capture, module = self._capture and self._capture(), self._module and self._module()
        call = capture.show(module, inputs) if capture and module else None
        return -1 if call is None else call.number, call

    def hand_back(self, call: int, gradients: Tensor) -> None:
        """The output gradient of that call."""
        capture = self._capture and self._capture()
        if capture:
            capture.hand_back(call, gradients)

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script compiles forward hooks, and an optimizer's it cannot: script a fresh model "
            "with the same state_dict, or use torch.export"
        )

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return (_ForwardHook, ())


def _has_gradient(weight: Tensor) -> bool:
    """Zeros are what a layer has that was idle: `zero_grad` or DistributedDataParallel left them."""
    return weight.grad is not None and bool(weight.grad.any())


def _complete(passes: list[list[Pending]]) -> tuple[tuple[Call, ...], ...]:
    """The calls whose gradient arrived, those of the same samples and the same draw together."""
    complete: list[tuple[Call, ...]] = []
    for pending in passes:
        together: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for call in pending:
            for draw, gradients in enumerate(call.output_gradients):
                together[call.inputs.shape[0], draw].append(Call(call.module, call.inputs, gradients))
        complete += [tuple(calls) for calls in together.values()]
    return tuple(complete)
