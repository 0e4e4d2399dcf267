"""Forward and backward hooks that record the samples of layers; no `.grad` is touched."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo  # the public one would import the compiler at once

from minifisher.callers import warn_caller
from minifisher.statistics.calls import (
    CallsOfLayer,
    PendingCall,
    attach_to_graph,
    can_receive_gradient,
    find_in_graph,
    hides_layers,
    passes_static_graph,
)
from minifisher.statistics.compiled_hooks import (
    code_checks_for_hooks,
    discard_compiled_code,
    no_donated_buffers,
)
from minifisher.statistics.forward_hooks import ForwardHook, Switch, put_on
from minifisher.statistics.likelihood import MODEL_LABEL_LOSSES
from minifisher.statistics.positions import with_sample_dimension
from minifisher.statistics.samples import Call, CapturedSamples

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.autograd.graph import GradientEdge

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.likelihood import NextGenerator
    from minifisher.statistics.records import LayerSamples

_NO_LABELS = (
    'fisher="{}" takes its labels from the model, but none were drawn: call optimizer.observe(outputs) '
    "between the forward pass and loss.backward()"
)
_NO_SAMPLES = (
    "{} got a gradient, but no call of its module {}. Without samples its curvature is not updated. Call the "
    'module itself instead of torch.nn.functional with its weight, {}; or use fisher="gradient" if the '
    "method offers it. A forward hook of somebody else that returns no tensor hides a call, too, and so does "
    "torch.utils.checkpoint with use_reentrant=True where labels are drawn from the model. This warning is "
    "shown once for each weight"
)
_HIDDEN = (
    "optimizer.observe found none of the layers behind these outputs: torch.utils.checkpoint with "
    'use_reentrant=True hides them until loss.backward(). Set use_reentrant=False, or use fisher="empirical"'
)
_STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) averages gradients in the first backward pass from an output "
    "alone, and optimizer.observe would be that pass: leave static_graph=True out, or use "
    'fisher="empirical" or "gradient"'
)
_TOO_LATE = (
    "optimizer.observe came after loss.backward(), which has freed the graph: call it between the forward "
    "pass and loss.backward()"
)
_SAMPLES_AS_CLASSES = (
    "optimizer.observe reads outputs of shape [{0}] as the logits of {0} classes of one sample, and the "
    'layers saw {0} samples: pass likelihood="bernoulli" or "gaussian", or outputs [samples, classes]. This '
    "warning is shown once"
)
_NO_SAMPLES_BECAUSE = {
    False: ("took part in loss.backward()", "and let loss.backward() fill .grad"),
    True: ("led to the outputs given to optimizer.observe", "and observe outputs that depend on it"),
}  # whether the labels come from the model


class Captures:
    """The captures of one optimizer, one for each estimator that reads samples.

    `arm` turns the hooks on for the coming step. `collect` returns what they recorded. The hooks of one
    estimator are on as soon as statistics of one of its layers are due, so that a compiled model has two
    graphs instead of one for each set of layers.
    """

    def __init__(self, layers_by_estimator: Mapping[str, Sequence[Layer]], memory: int) -> None:
        self._made_for = layers_by_estimator, memory
        self.by_estimator: dict[str, Capture] = {
            estimator: Capture(layers, memory, estimator in MODEL_LABEL_LOSSES)
            for estimator, layers in layers_by_estimator.items()
            if any(layer.reads_samples for layer in layers)
        }

    def reads(self, layers_by_estimator: Mapping[str, Sequence[Layer]], memory: int) -> bool:
        """Whether it was made for these."""
        return self._made_for == (layers_by_estimator, memory)

    def arm(self, is_due: Callable[[Layer], bool]) -> None:
        """Turn the hooks of an estimator on if statistics of one of its layers are due, else off."""
        for capture in self.by_estimator.values():
            if any(is_due(layer) for layer in capture.layers):
                capture.arm()
            else:
                capture.disarm()

    def disarm(self) -> None:
        """Turn all hooks off; what they recorded stays until `collect`."""
        for capture in self.by_estimator.values():
            capture.disarm()

    def draw_labels(
        self, outputs: Tensor, likelihood: str, generator: NextGenerator = lambda _: None
    ) -> None:
        """Draw labels from the model's prediction, and run the extra backward pass, where hooks are on.

        `generator(device)` returns the random numbers of one draw; None means torch's own.
        """
        for estimator, capture in self.by_estimator.items():
            if estimator in MODEL_LABEL_LOSSES and capture.armed:
                if likelihood == "categorical":
                    capture.warn_of_samples_as_classes(outputs)
                with torch.enable_grad():
                    capture.differentiate(*MODEL_LABEL_LOSSES[estimator](outputs, likelihood, generator))

    def forget_backward(self) -> None:
        """Forget the earlier backward passes of the training loss: call it when every `.grad` is cleared."""
        for capture in self.by_estimator.values():
            capture.forget_backward()

    def collect(self, loss_scale: Callable[[bool], float]) -> dict[Layer, LayerSamples]:
        """Return the samples of every layer that has some, and forget them.

        `loss_scale(needed)` returns the factor by which the training loss was multiplied; `needed` says
        whether output gradients have to be divided by it. Raises RuntimeError where `draw_labels` was not
        called. Warns of a layer that has a gradient but no samples.
        """
        collected: dict[Layer, LayerSamples] = {}
        for estimator, capture in self.by_estimator.items():
            saw_calls = capture.saw_calls
            samples = capture.collect(loss_scale(saw_calls and estimator == "empirical"))
            if saw_calls and not samples and estimator in MODEL_LABEL_LOSSES:
                raise RuntimeError(_NO_LABELS.format(estimator))
            capture.warn_of_missing(samples)
            collected.update(samples)
        return collected

    def release(self) -> None:
        """Remove all hooks for good."""
        for capture in self.by_estimator.values():
            capture.release()
        self.by_estimator.clear()


class Capture:
    """Records the inputs and output gradients of layers, for one estimator.

    By default the gradients are those of the training loss. With `model_labels=True` they are those of the
    losses given to `differentiate`. `CallsOfLayer` decides which calls have the same samples. A call that
    never receives a gradient is freed with its autograd graph, so that a network used without `no_grad` takes
    no memory here.

    The hooks are registered once and ask a switch whether to record. A compiled model therefore has two
    graphs, one that records and one that does not, however often the switch is turned. Models compiled before
    the hooks were registered are compiled again. An equal model without hooks has a graph of its own.
    """

    def __init__(self, layers: Iterable[Layer], memory: int, model_labels: bool = False) -> None:
        self._layer_of = {module: layer for layer in layers for module in layer.modules}
        self.layers: tuple[Layer, ...] = tuple(dict.fromkeys(self._layer_of.values()))
        """The layers whose samples it records."""
        self._memory = memory
        self._model_labels = model_labels
        self._is_differentiating = False
        self._warned_of: set[Layer] = set()
        self._warned_of_shape = False
        self._calls: dict[Layer, CallsOfLayer] = {}
        self._switch = Switch()
        self._compiled_calls: weakref.WeakValueDictionary[int, PendingCall] = weakref.WeakValueDictionary()
        self._compiled_layers: dict[Layer, None] = {}
        """Those that compiled code has called."""
        self._delivered: dict[PendingCall, Tensor] = {}
        """What compiled code has delivered of the loss that is being differentiated."""
        self._numbers = count()
        hooks = ExitStack()
        hooks.callback(self._switch.turn_off)
        for module in self._layer_of:
            hooks.callback(put_on(module, ForwardHook(self, module, self._switch)))
        if self._layer_of:
            discard_compiled_code()
            hooks.enter_context(code_checks_for_hooks.use())
        # Runs also when the optimizer is deleted while the hooks are on.
        self._remove_hooks = weakref.finalize(self, hooks.close)
        self._remove_hooks.atexit = False

    @property
    def armed(self) -> bool:
        """Whether the hooks record."""
        return self._switch.on

    @property
    def saw_calls(self) -> bool:
        """Whether a call was recorded since the last `collect`, with or without a gradient."""
        return bool(self._calls)

    @_disable_dynamo
    def arm(self) -> None:
        """Record from now on."""
        if self.armed:
            return
        self._forget()
        self._switch.on = True
        if self._model_labels:
            self._switch.settings.enter_context(no_donated_buffers.use())

    @_disable_dynamo
    def disarm(self) -> None:
        """Stop recording; what was recorded stays until `collect`."""
        self._switch.turn_off()

    @_disable_dynamo
    def release(self) -> None:
        """Remove the hooks for good."""
        self._remove_hooks()

    def differentiate(self, *loss_sums: Tensor) -> None:
        """Run a backward pass from each loss, a *sum* over samples, and record the output gradients.

        Each loss stands for one choice of labels: every sample counts once for each of them. The graph can be
        used again.
        """
        if not self._model_labels:
            raise RuntimeError("this capture reads the training loss: make it with model_labels=True")
        if self._calls and not all(loss_sum.requires_grad for loss_sum in loss_sums):
            raise RuntimeError(
                "the outputs do not require a gradient: pass optimizer.observe the outputs as the model "
                "returned them, not detached and not computed under torch.no_grad()"
            )
        edges = find_in_graph(loss_sums, (call for calls in self._calls.values() for call in calls.alive()))
        if not (edges or self._compiled_layers):
            if hides_layers(loss_sums):
                raise RuntimeError(_HIDDEN)
            return
        if passes_static_graph(loss_sums):
            raise RuntimeError(_STATIC_GRAPH)
        by_loss = [self._output_gradients(loss_sum, edges) for loss_sum in loss_sums]
        by_layer: dict[Layer, dict[PendingCall, list[Tensor | None]]] = defaultdict(dict)
        for call in dict.fromkeys(call for gradients in by_loss for call in gradients):
            by_layer[self._layer_of[call.module]][call] = [gradients.get(call) for gradients in by_loss]
        for layer, of_layer in by_layer.items():
            self._calls[layer].add_losses(of_layer)

    def _output_gradients(
        self, loss_sum: Tensor, edges: dict[PendingCall, GradientEdge]
    ) -> dict[PendingCall, Tensor | None]:
        # Compiled graphs have no edges at layer outputs: they deliver the gradient on the way to the weight,
        # to the call of the forward pass or, inside a checkpoint, to one that is made in the backward pass.
        targets: list[Any] = [*edges.values(), *(layer.weight for layer in self._compiled_layers)]
        self._is_differentiating = True
        try:
            gradients = torch.autograd.grad(loss_sum, targets, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "a second time" in str(error):
                raise RuntimeError(_TOO_LATE) from error
            raise
        finally:
            self._is_differentiating = False
            delivered, self._delivered = self._delivered, {}
        return {**dict(zip(edges, gradients, strict=False)), **delivered}

    def forget_backward(self) -> None:
        """Forget the backward passes of the training loss, not the forward passes: `.grad` was cleared."""
        for calls in self._calls.values():
            calls.forget_gradients()

    def collect(self, loss_scale: float = 1.0) -> dict[Layer, CapturedSamples]:
        """Return the samples of every layer that received a gradient, and forget all calls.

        `loss_scale` is the factor by which the training loss was multiplied before its backward pass.
        """
        collected = {layer: _complete_calls(calls.take()) for layer, calls in self._calls.items()}
        self._forget()
        return {
            layer: self._samples(layer, passes, loss_scale) for layer, passes in collected.items() if passes
        }

    def _samples(
        self, layer: Layer, passes: tuple[tuple[Call, ...], ...], loss_scale: float
    ) -> CapturedSamples:
        count = sum(calls[0].inputs.shape[0] for calls in passes)
        # NOTE autograd of a mean loss returns g / N. Micro-batches whose mean losses are divided by their
        # number return the same, with the N of all micro-batches together.
        scale = 1.0 if self._model_labels else count / loss_scale
        return CapturedSamples(layer, count, passes, scale, self._memory)

    def warn_of_missing(self, collected: Collection[Layer]) -> None:
        """Warn of layers that have a gradient but were not collected, once for each layer."""
        if not self.armed:
            return
        missing = [
            layer
            for layer in self.layers
            if layer not in collected and layer not in self._warned_of and _has_gradient(layer.weight)
        ]
        if missing:
            self._warned_of.update(missing)
            names = ", ".join(layer.name for layer in missing)
            message = _NO_SAMPLES.format(names, *_NO_SAMPLES_BECAUSE[self._model_labels])
            warn_caller(message)

    def warn_of_samples_as_classes(self, outputs: Tensor) -> None:
        """Warn, once, of outputs [n] that are read as n classes of one sample, where layers saw n samples."""
        if self._warned_of_shape or getattr(outputs, "ndim", 0) != 1:
            return
        calls = (call for calls in self._calls.values() for call in calls.alive())
        if len(outputs) in {call.inputs.shape[0] for call in calls}:
            self._warned_of_shape = True
            warn_caller(_SAMPLES_AS_CLASSES.format(len(outputs)))

    def record_call(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Record a call of a module in eager mode."""
        layer = self._layer_of.get(module)
        if not can_receive_gradient(layer, output):
            return
        # Under autocast the module computes with a copy of its input; the original may change afterwards.
        inputs = with_sample_dimension(module, inputs.detach().to(output.dtype))
        call, calls = PendingCall(module, inputs, next(self._numbers)), self._calls_of(layer)
        calls.add(call)
        # From here on the graph keeps the call alive, either way.
        if self._model_labels:
            attach_to_graph(call, output)
            # A weak reference: once its samples are collected, the graph must not keep them.
            note = partial(self._note_backward, weakref.ref(call), weakref.ref(calls))
            output.register_hook(note)  # type: ignore[no-untyped-call]
        else:
            # A hook on the tensor sees the gradient also where an in-place activation follows; a backward
            # hook on the module does not.
            output.register_hook(partial(calls.add_gradient, call))  # type: ignore[no-untyped-call]

    def _note_backward(
        self, call: weakref.ref[PendingCall], calls: weakref.ref[CallsOfLayer], gradients: Tensor | None
    ) -> None:
        held, among = call(), calls()
        if held is not None and among is not None and not self._is_differentiating:
            among.note_backward(held)

    def record_compiled_call(self, module: nn.Module, inputs: Tensor) -> PendingCall:
        """Record a call of a module in compiled code, which has to keep the result alive."""
        inputs = with_sample_dimension(module, inputs)
        layer, call = self._layer_of[module], PendingCall(module, inputs, next(self._numbers))
        self._calls_of(layer).add(call)
        self._compiled_layers[layer] = None
        self._compiled_calls[call.number] = call
        return call

    def record_compiled_gradient(self, number: int, gradients: Tensor) -> None:
        """Record the output gradient of the compiled call with that number."""
        call = self._compiled_calls.get(number)  # None if it was collected already
        if call is None or not gradients.numel():
            return
        if not self._model_labels:
            self._calls[self._layer_of[call.module]].add_gradient(call, gradients)
        elif self._is_differentiating:
            self._delivered[call] = self._delivered.get(call, 0) + gradients
        else:
            self._calls[self._layer_of[call.module]].note_backward(call)

    def _calls_of(self, layer: Layer) -> CallsOfLayer:
        return self._calls.setdefault(layer, CallsOfLayer(layer.weight, self._model_labels))

    def _forget(self) -> None:
        self._calls.clear()
        self._compiled_calls.clear()
        self._compiled_layers.clear()


def _has_gradient(weight: Tensor) -> bool:
    """Whether `.grad` has an entry other than zero: an unused layer may have zeros."""
    # They are left by zero_grad(set_to_none=False) and by DistributedDataParallel.
    return weight.grad is not None and bool(weight.grad.any())


def _complete_calls(passes: list[list[PendingCall]]) -> tuple[tuple[Call, ...], ...]:
    """Calls with their gradients; those of one forward pass, loss and number of samples in one tuple.

    Calls of one forward pass with different numbers of samples cannot have the same samples.
    """
    complete: list[tuple[Call, ...]] = []
    for pending in passes:
        together: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for call in pending:
            for loss, gradients in enumerate(call.output_gradients):
                together[call.inputs.shape[0], loss].append(Call(call.module, call.inputs, gradients))
        complete += [tuple(calls) for calls in together.values()]
    return tuple(complete)
