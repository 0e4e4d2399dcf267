"""The calls of a layer's modules, from the forward pass until their samples are collected."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakValueDictionary

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minifisher.statistics.positions import with_sample_dimension

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.autograd.graph import Node

    from minifisher.statistics.layers import Layer


@dataclass(eq=False)
class PendingCall:
    """One call of a module, which waits for its output gradient."""

    module: nn.Module
    inputs: Tensor  # [n, ...]
    number: int
    """Counts the calls in the order in which they were made."""
    output_index: int = 0
    """Which output of its autograd node the output of the module is."""
    forward_pass: int = 0
    """Counts the forward passes of the layer."""
    recomputed: bool = False
    """Whether the call was made inside a backward pass, as activation checkpointing does."""
    backward_pass: int = -1
    """Autograd's id of the training loss's backward pass through it; -1 where `.grad` has none of it."""
    output_gradients: tuple[Tensor, ...] = ()  # [n, ...] each
    """One of the training loss, or one of each loss on labels from the model, in the order of `observe`."""

    def release(self) -> None:
        """Free the memory: the autograd graph, which somebody may keep, refers to the call."""
        self.inputs, self.output_gradients = self.inputs.new_empty(0), ()


class CallsOfLayer:
    """The calls of one layer since the last `collect`.

    Calls of one forward pass have the same samples at different positions. A call that is made after an
    earlier call received its gradient begins a new forward pass, with other samples.

    Of the training loss, the output gradients kept are those that are summed in `.grad` of the weight. A
    backward pass that adds nothing to `.grad` is ignored (`torch.autograd.grad` for adversarial inputs, say).
    Once `.grad` is None or zero again, the gradients of earlier backward passes are forgotten.

    Of losses on labels from the model, those of forward passes that the training loss was not differentiated
    through are left out, where there are others: that batch was lost to an error, and is not in `.grad`.

    A call without a gradient lives as long as its autograd graph: this class holds a weak reference to it.
    """

    def __init__(self, weight: Tensor, model_labels: bool = False) -> None:
        self._weight, self._model_labels = weight, model_labels
        # Both as they were when a gradient arrived last.
        self._weight_version, self._backward_pass = 0, -1
        self._calls: WeakValueDictionary[int, PendingCall] = WeakValueDictionary()
        self._with_gradient: list[PendingCall] = []
        self._forward_pass = 0
        self._last_with_gradient = -1  # a forward pass

    def add(self, call: PendingCall) -> None:
        """Add a call that was just made."""
        self._forward_pass = max(self._forward_pass, self._last_with_gradient + 1)
        call.forward_pass, call.recomputed = self._forward_pass, torch._C._current_graph_task_id() != -1
        self._calls[call.number] = call

    def alive(self) -> list[PendingCall]:
        """The calls that have a gradient or may still receive one."""
        return list(self._calls.values())

    def add_gradient(self, call: PendingCall, gradients: Tensor | None) -> None:
        """Add an output gradient of the training loss; two backward passes on one graph bring two terms.

        DistributedDataParallel calls the hook of an output that the loss does not depend on with None.
        """
        if gradients is not None and self.note_backward(call):
            arrived = with_sample_dimension(call.module, gradients.detach())
            self._store(call, (sum(call.output_gradients, arrived),))

    def note_backward(self, call: PendingCall) -> bool:
        """Note that the training loss's backward pass reached a call; returns whether it adds to `.grad`."""
        if not accumulates_into_grad(self._weight):
            return False
        backward_pass = torch._C._current_graph_task_id()
        is_new = backward_pass != self._backward_pass
        # A recomputed call is in a backward pass inside another one, which may not have filled .grad yet.
        if is_new and not call.recomputed and self._with_gradient and self._grad_was_cleared():
            self.forget_gradients(except_of=backward_pass)
        self._weight_version = self._weight._version
        self._backward_pass = call.backward_pass = backward_pass
        return True

    def _grad_was_cleared(self) -> bool:
        """Whether `.grad` contains nothing of earlier backward passes."""
        gradient = self._weight.grad
        # To look for zeros costs time: do so only where the weight has changed, that is, after a step.
        return gradient is None or (self._weight._version != self._weight_version and not gradient.any())

    def forget_gradients(self, except_of: int | None = None) -> None:
        """Forget all backward passes of the training loss but one; a call whose graph is kept waits again."""
        for call in self._with_gradient:
            if call.backward_pass != except_of:
                call.backward_pass = -1
                call.output_gradients = call.output_gradients if self._model_labels else ()
        self._with_gradient = [call for call in self._with_gradient if call.output_gradients]

    def add_losses(self, gradients: Mapping[PendingCall, Sequence[Tensor | None]]) -> None:
        """Add the output gradients of the E losses of one `observe`; None where a loss ignores a call.

        Several outputs of one forward pass, such as those of two heads, are observed one after the other.
        Their Fisher matrices add up. As the mean over all L losses of the pass is taken, those of each output
        are multiplied by sqrt(L / E).
        """
        reached = {
            call: of_call for call, of_call in gradients.items() if any(g is not None for g in of_call)
        }
        for number in {call.forward_pass for call in reached}:
            peers = [call for call in self.alive() if call.forward_pass == number]
            before = max(len(peer.output_gradients) for peer in peers)
            for peer in peers:
                if before:
                    factor = (1 + len(next(iter(reached.values()))) / before) ** 0.5
                    peer.output_gradients = tuple(factor * each for each in peer.output_gradients)
                if peer in reached:
                    self._append(peer, reached[peer], before)

    def _append(self, call: PendingCall, gradients: Sequence[Tensor | None], before: int) -> None:
        """Add those of one call, whose pass had so many losses `before`."""
        batches = [None if g is None else with_sample_dimension(call.module, g.detach()) for g in gradients]
        zeros = torch.zeros_like(next(batch for batch in batches if batch is not None))
        factor = (1 + before / len(batches)) ** 0.5
        missing = before - len(call.output_gradients)
        new = [zeros] * missing + [zeros if batch is None else factor * batch for batch in batches]
        self._store(call, (*call.output_gradients, *new))

    def _store(self, call: PendingCall, gradients: tuple[Tensor, ...]) -> None:
        if call.number not in self._calls:  # already collected
            return
        if not call.output_gradients:
            self._with_gradient.append(call)
            self._last_with_gradient = max(self._last_with_gradient, call.forward_pass)
        call.output_gradients = gradients

    def take(self) -> list[list[PendingCall]]:
        """Remove all calls; return those that have a gradient, one list for each forward pass."""
        forward_passes: dict[int, list[PendingCall]] = defaultdict(list)
        complete = [call for call in self._calls.values() if call.output_gradients]
        trained = {call.forward_pass for call in complete if call.backward_pass != -1}
        for call in complete:
            if call.forward_pass in trained or not trained:
                forward_passes[call.forward_pass].append(replace(call))
        for call in self._calls.values():
            call.release()
        self._calls.clear()
        self._with_gradient.clear()
        return list(forward_passes.values())


def can_receive_gradient(layer: Layer | None, output: Tensor) -> TypeGuard[Layer]:
    """Whether a call may receive a gradient of the training loss; the layer of a replica's module is None."""
    # Inside torch.func the tensors are not those of training; inside torch.jit.trace our operations would be
    # recorded as part of the model.
    if layer is None or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return False
    return output.requires_grad and layer.weight.requires_grad and output.numel() > 0


def accumulates_into_grad(weight: Tensor) -> bool:
    """Whether the backward pass that is running adds to `.grad` of the weight."""
    # Compiled code inside torch.func runs backward formulas outside of any backward pass: the id is -1.
    if torch._C._current_graph_task_id() == -1 or not weight.requires_grad:
        return False
    with torch.enable_grad():
        use: Any = weight.view_as(weight).grad_fn
    if use is None:  # torch._dynamo.compiled_autograd runs below autograd
        return True
    try:
        return bool(torch._C._will_engine_execute_node(use.next_functions[0][0]))
    except RuntimeError:  # raised for torch.autograd.grad with respect to the weight itself
        return False


def attach_to_graph(call: PendingCall, output: Tensor) -> None:
    """Let the autograd graph of the output keep the call alive, where `find_in_graph` finds it."""
    edge = get_gradient_edge(output)
    call.output_index = edge.output_nr
    _metadata(edge.node)[call] = None


def find_in_graph(losses: Iterable[Tensor], calls: Iterable[PendingCall]) -> dict[PendingCall, GradientEdge]:
    """The outputs of the calls that the losses depend on, as edges."""
    wanted = set(calls)
    return {
        call: GradientEdge(node, call.output_index)
        for node in _nodes(losses)
        for call in wanted.intersection(_metadata(node))
    }


def hides_layers(losses: Iterable[Tensor]) -> bool:
    """Whether a part of the graph is a reentrant checkpoint, whose calls come in the backward pass."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes(losses))


def passes_static_graph(losses: Iterable[Tensor]) -> bool:
    """Whether a part of the graph is the output of DistributedDataParallel with static_graph=True."""
    models = (getattr(node, "ddp_weakref", lambda: None)() for node in _nodes(losses))
    return any(model is not None and model.static_graph for model in models)


def _metadata(node: Any) -> dict[Any, None]:
    """A dictionary that lives as long as the node; torch's anomaly mode stores strings there."""
    metadata: dict[Any, None] = node.metadata
    return metadata


def _nodes(losses: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of the autograd graphs of the losses."""
    to_visit = [loss.grad_fn for loss in losses]
    seen: set[Node] = set()
    while to_visit:
        node = to_visit.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            to_visit += [function for function, _ in node.next_functions]
