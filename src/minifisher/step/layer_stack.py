"""Equal layers, stacked: what they keep between steps, and one tensor for all of them.

Layers of one shape, plan and history step together, so that each verb of their curvature is called once.
Their entries in the optimizer's state are then views of the stack.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minifisher.distributed.collectives import local
from minifisher.distributed.placement import local_part
from minifisher.statistics.records import BatchGradient, Secant
from minifisher.step.entries import (
    PARAMETER_SHAPED,
    Entry,
    StateOfStacks,
    has_memory,
    tensors_of,
    write,
)
from minifisher.step.first_order import Graft, graft_of
from minifisher.step.schedule import refresh_due, spread_phases, statistics_due, with_phases

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from minifisher.curvature import Curvature, Plan, State
    from minifisher.distributed.placement import Placement
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples

    Options = dict[str, Any]
    Entries = Mapping[Tensor, Entry]
    Samples = Mapping[Layer, LayerSamples]

SATURATED = 1_000_000
"""So many observations stand for a finished average, as after a warm start: no bias is corrected any more."""

# Stacking copies the gradients once. For a weight with more entries that costs more than a call of its own.
_LARGEST_STACKED = 65_536


class Enrolled(NamedTuple):
    """A layer that an optimizer trains, and all that was decided about it."""

    layer: Layer
    group: Options
    """Its parameter group."""
    plan: Plan
    placement: Placement

    def statistics_due(self, entry: Mapping[str, Any]) -> bool:
        """Whether the coming step reads statistics; `entry` is the weight's in the optimizer's state."""
        if entry.get("missed"):
            return True
        return statistics_due(self.placement.plan, entry.get("step", 0), self.group["jitter"])


@dataclass(eq=False)
class LayerStack:
    """Layers that step together; tensors are [*layer.shape], or [layers, *layer.shape] for more than one."""

    layers: list[Layer]
    options: Options
    placement: Placement
    state: State
    entries: list[list[Entry]]
    """The entries in the optimizer's state: of each layer's weight, and of its bias if it is folded in."""
    step: Any
    """Steps taken so far: an int, or with `capturable` a tensor []."""
    observations: Any
    """Observations averaged into the curvature so far, likewise."""
    missed: int = 0
    """1 if the statistics that were due were not read, because the gradient was zero; else 0."""

    def __post_init__(self) -> None:
        self.plan: Plan = self.placement.plan
        self.curvature: Curvature = self.plan.curvature
        self.observes_gradient: bool = self.curvature.needs is BatchGradient
        self.graft: Graft = graft_of(self.plan, self.options)
        self.parameters: list[Tensor] = [parameter for layer in self.layers for parameter in layer.parameters]
        self.pieces: list[Layer] = [local_part(layer) for layer in self.layers]
        shape = self.pieces[0].shape
        self.rows: int | None = shape[0] if self.graft.by_rows and shape else None
        self.lengths: int = len(self.layers) * (1 if self.rows is None else self.rows)
        """How many lengths a graft gives: one for each layer, or one for each row."""
        self.length_shape: tuple[int, ...] = _length_shape(len(self.layers), self.rows, len(shape))
        """[] or [layers, rows | 1, 1, ...]: one number for each length, as a factor of the stack."""
        self.is_plain: bool = all(piece.bias is None and not piece.transposed for piece in self.pieces)
        """Whether each layer is one parameter, read as it is stored."""

    @property
    def parameter_shaped(self) -> frozenset[str]:
        """The names of what the engine keeps for every parameter."""
        return PARAMETER_SHAPED & self.state.keys()

    @property
    def measures_slope(self) -> bool:
        """Whether the length of the direction depends on slopes."""
        by_descent = self.options["length"] != "norm" and self.graft.rescales
        return by_descent and self.curvature.needs is not None

    @cached_property
    def length_groups(self) -> tuple[Any, ...]:
        """The ranks that hold the other pieces of what has one length."""
        whole_rows = 0 if self.rows is not None else None
        return tuple(group for dimension, group in self.placement.cuts if dimension != whole_rows)

    # ---- between the parameters and the stack ----

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor a parameter -> the stack; for a single layer without folded bias no copy."""
        held = [tensor if type(tensor) is Tensor else local(tensor) for tensor in tensors]
        if not self.is_plain:
            iterator = iter(held)
            held = [layer.join([next(iterator) for _ in layer.parameters]) for layer in self.layers]
        return torch.stack(held) if len(held) > 1 else held[0]

    def scatter(self, stack: Tensor) -> Sequence[Tensor]:
        """The inverse of `gather`, as views: one tensor a parameter."""
        parts = stack.unbind() if len(self.layers) > 1 else (stack,)
        if self.is_plain:
            return parts
        return [t for piece, part in zip(self.pieces, parts, strict=True) for t in piece.split(part)]

    def weights(self) -> Tensor:
        """W."""
        return self.gather(self.parameters)

    def gradient(self) -> Tensor:
        """D of what is minimised; zero where only the weight or only the bias of a layer has a gradient."""
        gradient = self.gather([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        if gradient.dtype == torch.float16:  # which cannot hold the square of a gradient
            gradient = gradient.float()
        gradient = -gradient if self.options["maximize"] else gradient
        return self.with_decay(gradient) if self.curvature.averages_momentum else gradient

    def joined(self, gradient: Tensor) -> Tensor:
        """D as it joins the momentum: that of a curvature that averages momentum has the decay already."""
        return gradient if self.curvature.averages_momentum else self.with_decay(gradient)

    def with_decay(self, gradient: Tensor) -> Tensor:
        """D + weight_decay W, unless the decay is decoupled."""
        decay = float(self.options["weight_decay"])
        if self.options["decoupled_weight_decay"] or not decay:
            return gradient
        return gradient + decay * self.weights()

    def local_parameters(self, stack: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter that has a gradient, as this process holds it, with its part of the stack."""
        for parameter, part in zip(self.parameters, self.scatter(stack), strict=True):
            if parameter.grad is not None:
                yield parameter if type(parameter) is nn.Parameter else local(parameter), part

    def keep_counts(self) -> None:
        """Write the counts into the optimizer's state."""
        for weight, *biases in self.entries:
            write(weight, "observations", self.observations)
            write(weight, "missed", self.missed)
            write(weight, "step", self.step)
            for bias in biases:
                write(bias, "step", self.step)

    # ---- statistics and curvature ----

    @property
    def statistics_due(self) -> bool:
        """Whether the coming step reads statistics."""
        return bool(self.missed) or statistics_due(self.plan, self.step, self.options["jitter"])

    def refresh_due(self, observed: bool) -> bool:
        """Whether the coming step recomputes inverses.

        By the schedule; also where it `observed` for the first time, or later than it was due.
        """
        if not self.observations:
            return False
        if observed and (self.observations == 1 or self.missed):
            return True
        return refresh_due(self.plan, self.step, self.options["jitter"])

    def corrected_decay(self, samples: Samples, zero: AbstractSet[Layer]) -> float | None:
        """The decay of an observation that is due, without bias in the average; None if nothing was seen.

        The k-th observation has the weight (1 - decay) / (1 - decay^k): 1 for the first, and all sum to one.
        """
        if not self.has_statistics(samples, zero):
            return None
        decay: float = self.options["curvature_decay"]
        if self.observations >= SATURATED:
            return decay
        return float(1 - (1 - decay) / (1 - decay ** (self.observations + 1)))

    def decay_of_warm_start(self, samples: Samples, zero: AbstractSet[Layer]) -> float | None:
        """Likewise of a batch of a warm start, all of which weigh alike."""
        weight = 1 / (int(self.observations) + 1)
        return 1 - weight if self.has_statistics(samples, zero) else None

    def has_statistics(self, samples: Samples, zero: AbstractSet[Layer]) -> bool:
        """Whether the backward pass brought what the curvature needs; `zero`: the layers with zero gradients.

        A gradient that is zero says nothing about the curvature where there is one.
        """
        if zero and self.layers[0] in zero:
            return False
        needs = self.curvature.needs
        return self.observes_gradient or (
            needs is not None and all(layer in samples for layer in self.layers)
        )

    def renew_curvature(self) -> int:
        """Begin the averages of the curvature anew where they are not finite; returns of how many layers.

        One record of 1e12 can be enough. Averages that ranks exchange are never so: the step is skipped.
        """
        names = self.curvature.averages or self.state.keys() - PARAMETER_SHAPED
        tensors = [self.state[name] for name in names if name in self.state]
        if not self.placement.alone or all(bool(tensor.isfinite().all()) for tensor in tensors):
            return 0
        for name, tensor in self.curvature.init(self.layers[0]).items():
            self.state[name].copy_(tensor)
        self.observations, self.missed = 0, 1
        return len(self.layers)

    def keep_missed(self, zero: AbstractSet[Layer], observed: bool) -> None:
        """Remember whether the statistics that the coming step was to read were not there.

        A zero gradient hides them; so do hooks that were off, where somebody emptied the state. The next
        gradient other than zero is then observed. To look for it in samples costs hooks, or another backward
        pass: after the first T1 steps, only the very next step looks.
        """
        if self.curvature.needs is not None and self.statistics_due:
            every_step = self.observes_gradient or self.step < self.plan.statistics_every
            tries = every_step or statistics_due(self.plan, self.step, self.options["jitter"])
            absent = self.layers[0] in zero or not (observed or self.observations)
            self.missed = int(tries and absent)

    def observe(
        self, curvature: Curvature, state: State, gradient: Tensor, samples: Samples, decay: float
    ) -> None:
        """Average the statistics of one backward pass into a state of the stack's shapes."""
        if self.observes_gradient:
            curvature.observe(state, BatchGradient(gradient), decay)
            return
        for index, layer in enumerate(self.layers):
            curvature.observe(self.state_of(index, state), samples[layer], decay)

    def observe_secants(self, secants: Mapping[Layer, Secant]) -> None:
        """Average in how far the means of the layers moved with the step that was just taken."""
        for index, layer in enumerate(self.layers):
            if layer in secants:
                secant = secants[layer]
                if self.options["maximize"]:
                    secant = Secant(secant.output_change, -secant.gradient_change)
                state = self.state_of(index, self.state)
                self.curvature.observe(state, secant, self.options["curvature_decay"])

    def state_of(self, index: int, state: State) -> State:
        """The state of one layer, as views."""
        if len(self.layers) == 1:
            return state
        return {name: tensor[index] for name, tensor in state.items()}

    def must_split(self, samples: Samples, zero: AbstractSet[Layer]) -> bool:
        """Whether the coming step reads statistics, and only some of the layers have them."""
        kinds = {(layer in samples, layer in zero) for layer in self.layers}
        return len(kinds) > 1 and self.statistics_due


def _length_shape(layers: int, rows: int | None, dimensions: int) -> tuple[int, ...]:
    if rows is None:
        return (layers, *[1] * dimensions) if layers > 1 else ()
    of_layer = rows, *[1] * (dimensions - 1)
    return (layers, *of_layer) if layers > 1 else of_layer


def state_of_stacks(state: Mapping[Any, Any], stacks: Iterable[LayerStack]) -> StateOfStacks:
    """The state that these stacks were just formed of.

    Memory is watched of the first layer of each stack only: all of it would cost time in every step, and who
    moves memory by hand moves that of every layer.
    """
    stacks = list(stacks)
    entries = [entry for stack in stacks for of_layer in stack.entries for entry in of_layer]
    first = [entry for stack in stacks if len(stack.parameters) > 1 for entry in stack.entries[0]]
    views = [tensor for entry in first for tensor in tensors_of(entry).values() if has_memory(tensor)]
    return StateOfStacks(state, entries, views)


def with_schedules(placements: Mapping[Layer, Placement]) -> dict[Layer, Placement]:
    """The placements with plans whose phases spread the work; equal small layers have one phase."""
    alike = {layer: _alike(layer) for layer in placements}
    entries: dict[Hashable, int] = defaultdict(int)
    for layer, key in alike.items():
        entries[key] += layer.weight.numel()
    phases = spread_phases(entries)
    return {
        layer: replace(placement, plan=with_phases(placement.plan, phases[alike[layer]]))
        for layer, placement in placements.items()
    }


# ---- stacks are formed ----


def form_stacks(
    enrolled: Iterable[Enrolled], entries: Entries, samples: Samples, zero: AbstractSet[Layer]
) -> list[LayerStack]:
    """Stack equal layers; their entries in the optimizer's state become views of the stack.

    Layers with samples are stacked apart from equal layers without, because they observe more from now on;
    likewise layers whose gradient is zero.
    """
    members: dict[object, list[Enrolled]] = defaultdict(list)
    for member in enrolled:
        key = _key(member, entries[member.layer.weight])
        members[key, member.layer in samples, member.layer in zero].append(member)
    return [_stack(equal, entries) for equal in members.values()]


def _key(member: Enrolled, entry: Entry) -> object:
    history = int(entry["step"]), int(entry["observations"]), entry["missed"]
    return _alike(member.layer), id(member.group), member.placement, history, entry.names


def _alike(layer: Layer) -> Hashable:
    """Equal for layers that can be stacked where group, placement and history are the same, too."""
    weight = layer.weight
    if weight.numel() > _LARGEST_STACKED:
        return layer
    return layer.shape, layer.bias is None, weight.dtype, weight.device


def _stack(members: list[Enrolled], entries: Entries) -> LayerStack:
    first = members[0]
    layers = [member.layer for member in members]
    entry = entries[first.layer.weight]
    of_layers = [[entries[parameter] for parameter in layer.parameters] for layer in layers]
    # A copy, since layers that part later count on their own.
    step, observations = (
        c.clone() if isinstance(c, Tensor) else c for c in (entry["step"], entry["observations"])
    )
    counts = step, observations, entry["missed"]
    stack = LayerStack(layers, first.group, first.placement, {}, of_layers, *counts)
    for name in tensors_of(entry):
        if name in PARAMETER_SHAPED:
            stack.state[name] = stack.gather([entries[parameter][name] for parameter in stack.parameters])
            for parameter, view in zip(stack.parameters, stack.scatter(stack.state[name]), strict=True):
                write(entries[parameter], name, view)
        else:
            tensors = [entries[layer.weight][name] for layer in layers]
            stack.state[name] = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
            for index, layer in enumerate(layers):
                write(entries[layer.weight], name, stack.state_of(index, stack.state)[name])
    return stack
