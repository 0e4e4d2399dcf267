"""The calls of a layer's modules, forward pass by forward pass, until what they saw is collected."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakValueDictionary

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minifisher.statistics.positions import batched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from torch.autograd.graph import Node

    from minifisher.statistics.layers import Layer


@dataclass(eq=False)
class Pending:
    """One call of a module, waiting for its output gradient."""

    module: nn.Module
    inputs: Tensor
    number: int
    """One after another, as the calls were made."""
    output_number: int = 0
    """Which output of its node the call's is."""
    compiled: bool = False
    turn: int = 0
    """The forward pass that it belongs to."""
    recomputed: bool = False
    """Made inside a backward pass, as activation checkpoints do."""
    task: int = -1
    """The backward pass that answered it."""
    output_gradients: tuple[Tensor, ...] = ()
    """One of the training loss, or one of each loss that was sampled."""
    drawn: Tensor | None = None
    """What compiled code handed back of the loss that is being sampled."""

    def take(self, gradients: Tensor | None) -> Tensor | None:
        """The gradient of the loss that was just sampled, which autograd answered with `gradients`."""
        if self.compiled:
            gradients, self.drawn = self.drawn, None
        return gradients


class Passes:
    """The calls that one layer saw since the last `collect`.

    Calls of one forward pass are the same samples at other positions: a call that begins after an earlier one
    has received its gradient opens another pass, of other samples.

    Of the training loss they keep what `.grad` of the weight keeps: a backward pass that adds nothing to it
    (`torch.autograd.grad`, for the inputs of an attack) tells nothing, and what was in it before it became
    None, or zero, is forgotten.

    A call without a gradient lives with the graph that it belongs to: here is no more than a weak reference.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # Of the weight, and of the backward pass, when a call was answered last.
        self._version, self._task = 0, -1
        self._calls: WeakValueDictionary[int, Pending] = WeakValueDictionary()
        self._answered: list[Pending] = []
        self._turn = 0
        self._last_answered = -1

    def add(self, call: Pending) -> None:
        """Another call."""
        self._turn = max(self._turn, self._last_answered + 1)
        call.turn, call.recomputed = self._turn, torch._C._current_graph_task_id() != -1
        self._calls[call.number] = call

    def pending(self) -> list[Pending]:
        """The calls that may still get a gradient for the first time."""
        return [call for call in self._calls.values() if not call.output_gradients]

    def receive(self, call: Pending, gradients: Tensor) -> None:
        """The gradient of the training loss; of a graph that is walked twice the second of two terms."""
        if not adds_to_gradient(self._weight):
            return
        task = torch._C._current_graph_task_id()
        # One that is recomputed has another backward pass around it, which may have added nothing yet.
        if task != self._task and not call.recomputed and self._answered and self._is_cleared():
            self.forget(but=task)
        self._version, self._task, call.task = self._weight._version, task, task
        arrived = batched(call.module, gradients.detach())
        self._answer(call, (sum(call.output_gradients, arrived),))

    def _is_cleared(self) -> bool:
        """Whether nothing of earlier backward passes is in `.grad`."""
        gradient = self._weight.grad  # whether it is zero is only asked where somebody took a step
        return gradient is None or (self._weight._version != self._version and not gradient.any())

    def forget(self, but: int | None = None) -> None:
        """What backward passes told, except the one named; a call whose graph is kept waits once more."""
        for call in self._answered:
            if call.task != but:
                call.output_gradients = ()
        self._answered = [call for call in self._answered if call.output_gradients]

    def receive_all(self, call: Pending, gradients: Iterable[Tensor | None]) -> None:
        """The gradients of several losses; one that does not depend on the call counts as zero."""
        batches = [None if g is None else batched(call.module, g.detach()) for g in gradients]
        arrived = next((batch for batch in batches if batch is not None), None)
        if arrived is not None:
            zeros = torch.zeros_like(arrived)
            self._answer(call, tuple(zeros if batch is None else batch for batch in batches))

    def _answer(self, call: Pending, gradients: tuple[Tensor, ...]) -> None:
        if call.number not in self._calls:  # collected by now
            return
        if not call.output_gradients:
            self._answered.append(call)
            self._last_answered = max(self._last_answered, call.turn)
        call.output_gradients = gradients

    def take(self) -> list[list[Pending]]:
        """The calls that got a gradient, those of one forward pass together; and forget all of them."""
        passes: dict[int, list[Pending]] = defaultdict(list)
        for call in self._calls.values():
            if call.output_gradients:
                passes[call.turn].append(call)
        self._calls.clear()
        self._answered.clear()
        return list(passes.values())


def may_be_answered(layer: Layer | None, output: Tensor) -> TypeGuard[Layer]:
    """Whether a call may get a gradient of the training loss; a replica's has no layer of ours."""
    # Tensors of a transform are not those of training, and what is done to traced ones is recorded.
    if layer is None or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return False
    return output.requires_grad and layer.weight.requires_grad and output.numel() > 0


def adds_to_gradient(weight: Tensor) -> bool:
    """Whether the backward pass that goes on adds to `.grad` of the weight."""
    if torch._C._current_graph_task_id() == -1 or not weight.requires_grad:  # -1: of torch.func, compiled
        return False
    with torch.enable_grad():
        use: Any = weight.view_as(weight).grad_fn
    if use is None:  # below autograd: torch._dynamo.compiled_autograd walks compiled code by itself
        return True
    try:
        return bool(torch._C._will_engine_execute_node(use.next_functions[0][0]))
    except RuntimeError:  # torch.autograd.grad for the weight itself, which the engine does not tell apart
        return False


def fasten(call: Pending, output: Tensor) -> None:
    """The graph of the output holds the call from now on, until `edges_below` finds it there."""
    edge = get_gradient_edge(output)
    call.output_number = edge.output_nr
    _notes(edge.node)[call] = None


def edges_below(losses: Iterable[Tensor], calls: Iterable[Pending]) -> dict[Pending, GradientEdge]:
    """Where the outputs of those calls are that the graph of the losses holds; it lets go of them."""
    wanted, edges = set(calls), {}
    for node in _nodes_below(losses):
        notes = _notes(node)
        for call in wanted.intersection(notes):
            del notes[call]
            edges[call] = GradientEdge(node, call.output_number)
    return edges


def _notes(node: Any) -> dict[Any, None]:
    """A dictionary that lives as long as the node; torch's anomaly mode keeps notes of its own there."""
    notes: dict[Any, None] = node.metadata
    return notes


def _nodes_below(losses: Iterable[Tensor]) -> Iterator[Node]:
    waiting = [loss.grad_fn for loss in losses]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions]
