"""Equal layers on their way through a step: statistics, curvature, direction, graft, update.

Layers of one shape, plan and history are stacked, so that each verb is called once for all of them. What the
optimizer keeps of a parameter is a slice of the stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import local
from minifisher.distributed.placement import piece
from minifisher.kernels.choose import subtract_scaled
from minifisher.statistics.records import BatchGradient, Secant
from minifisher.step.first_order import GRAFTS, norms, share_of_newest

if TYPE_CHECKING:
    from minifisher.curvature import Curvature, Plan, State
    from minifisher.distributed.placement import Seat
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples

    Options = dict[str, Any]
    Entries = Mapping[Tensor, dict[str, Any]]

# Tensors of the parameter's own shape that the engine and its grafts keep; the rest is the curvature's.
OF_PARAMETER_SHAPE = frozenset(
    {"momentum", *(name for graft in GRAFTS.values() for name in graft.state_names)}
)

# The bias correction has died out: an average that was warm-started goes on as a plain one.
SATURATED = 1_000_000


@dataclass(eq=False)
class Cohort:
    """Layers that step together; tensors are [*layer.shape], or [layers, *layer.shape] for more than one."""

    layers: list[Layer]
    plan: Plan
    options: Options
    state: State
    step: Any  # taken so far; an int, or with `capturable` a tensor []
    observations: Any  # averaged into the curvature so far, likewise
    seat: Seat

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Every parameter of every layer, in order."""
        return [parameter for layer in self.layers for parameter in layer.parameters]

    @property
    def tensors(self) -> list[Tensor]:
        """What this process holds of every parameter."""
        return [local(parameter) for parameter in self.parameters]

    @cached_property
    def _rows(self) -> int | None:
        """Rows of a layer, as this process holds it, where each borrows a length; None: the layer does."""
        shape = piece(self.layers[0]).shape
        return shape[0] if GRAFTS[self.options["graft"]].by_rows and shape else None

    @property
    def parts(self) -> int:
        """How many lengths are borrowed: one a layer, or one a row."""
        return len(self.layers) * (1 if self._rows is None else self._rows)

    @property
    def length_groups(self) -> tuple[Any, ...]:
        """The ranks that hold the other pieces of what borrows one length."""
        whole_rows = 0 if self._rows is not None else None
        return tuple(group for dimension, group in self.seat.cuts if dimension != whole_rows)

    # ---- between the parameters and the stack ----

    def gather(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor a parameter -> the stack; for a single layer without folded bias the tensor itself."""
        iterator = iter(tensors)
        joined = [layer.join([local(next(iterator)) for _ in layer.parameters]) for layer in self.layers]
        return torch.stack(joined) if len(joined) > 1 else joined[0]

    def scatter(self, stack: Tensor) -> list[Tensor]:
        """The inverse of `gather`, as views: one tensor a parameter."""
        parts = stack.unbind() if len(self.layers) > 1 else (stack,)
        return [
            tensor
            for layer, part in zip(self.layers, parts, strict=True)
            for tensor in piece(layer).split(part)
        ]

    def gradient(self) -> Tensor:
        """D; zero where only the weight or only the bias of a layer got one."""
        gradient = self.gather(torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        gradient = gradient.to(kept(gradient.dtype))
        gradient = -gradient if self.options["maximize"] else gradient
        return self.with_decay(gradient) if self.plan.curvature.steps_by_mean else gradient

    @property
    def coupled_decay(self) -> float:
        """The weight decay that joins the gradient; 0 where it is decoupled."""
        decay: float = self.options["weight_decay"]
        return 0.0 if self.options["decoupled_weight_decay"] else decay

    def with_decay(self, gradient: Tensor) -> Tensor:
        """D + weight_decay W, unless the decay is decoupled."""
        decay = self.coupled_decay
        return gradient + decay * self.gather(self.tensors) if decay else gradient

    def past(self, gradient: Tensor) -> Tensor:
        """M; without momentum the gradient that it would be."""
        return self.state["momentum"] if self.options["momentum"] else gradient

    def moving(self, stack: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What this process holds of every parameter, with its part of the stack; not of a frozen half."""
        for parameter, part in zip(self.parameters, self.scatter(stack), strict=True):
            if parameter.grad is not None:
                yield local(parameter), part

    # ---- statistics and curvature ----

    @property
    def statistics_due(self) -> bool:
        """Whether the coming step reads statistics."""
        return bool(self.step % self.plan.statistics_every == 0)

    def corrected_decay(self) -> float:
        """The decay under which the average is bias-corrected as it runs.

        The k-th observation weighs (1 - decay) / (1 - decay^k): the first counts whole, all sum to one.
        """
        decay: float = self.options["curvature_decay"]
        if self.observations >= SATURATED:
            return decay
        return float(1 - (1 - decay) / (1 - decay ** (self.observations + 1)))

    def observe(self, gradient: Tensor, samples: Mapping[Layer, LayerSamples], decay: float) -> None:
        """Average in what the backward pass told; nothing where it told nothing of these layers."""
        if self.tells(samples):
            self.observe_into(self.plan.curvature, self.state, gradient, samples, decay)
            self.observations += 1

    def tells(self, samples: Mapping[Layer, LayerSamples]) -> bool:
        """Whether the backward pass told what the curvature needs."""
        needs = self.plan.curvature.needs
        return needs is BatchGradient or (
            needs is not None and all(layer in samples for layer in self.layers)
        )

    def is_outdated(self, samples: Mapping[Layer, LayerSamples]) -> bool:
        """Whether its layers part: only some were told of, or momentum is wanted of which nothing is kept."""
        told = [layer in samples for layer in self.layers]
        parts = any(told) and not all(told) and self.statistics_due
        return parts or (bool(self.options["momentum"]) and "momentum" not in self.state)

    def observe_into(
        self,
        curvature: Curvature,
        state: State,
        gradient: Tensor,
        samples: Mapping[Layer, LayerSamples],
        decay: float,
    ) -> None:
        """What the backward pass told, averaged into a state of the stack's shapes."""
        if curvature.needs is BatchGradient:
            curvature.observe(state, BatchGradient(gradient), decay)
            return
        for index, layer in enumerate(self.layers):
            curvature.observe(self._of_layer(index, state), samples[layer], decay)

    def observe_secants(self, secants: Mapping[Layer, Secant]) -> None:
        """Average in how the layers' means moved with the step that was just taken."""
        curvature = self.plan.curvature
        for index, layer in enumerate(self.layers):
            if layer in secants:
                secant = secants[layer]
                if self.options["maximize"]:
                    secant = Secant(secant.output_change, -secant.gradient_change)
                curvature.observe(self._of_layer(index, self.state), secant, self.options["curvature_decay"])

    def _of_layer(self, index: int, state: State) -> State:
        if len(self.layers) == 1:
            return state
        return {name: tensor[index] for name, tensor in state.items()}

    @property
    def refresh_due(self) -> bool:
        """Whether the coming step recomputes what the direction needs.

        In the first `inverse_every` steps the statistics change fast: every observation counts (published).
        """
        plan = self.plan
        every = plan.statistics_every if self.step < plan.inverse_every else plan.inverse_every
        is_first = self.observations == 1 and self.statistics_due
        return bool(self.observations) and (self.step % every == 0 or is_first)

    def refresh(self) -> None:
        """Recompute what the direction needs, where it is due."""
        if self.refresh_due:
            self.plan.curvature.refresh(self.state, self.options["damping"])

    # ---- direction, graft, update ----

    def stride(self, gradient: Tensor, samples: Mapping[Layer, LayerSamples]) -> Move:
        """Statistics, curvature and direction of layers that exchange nothing with other processes."""
        fused = self._fused(gradient)
        if fused is not None:
            return fused
        if self.statistics_due:
            self.observe(gradient, samples, self.corrected_decay())
        self.refresh()
        return self.move(gradient)

    def _fused(self, gradient: Tensor) -> Move | None:
        """The same in one pass, where graft and curvature have one; None where they do not."""
        options, curvature = self.options, self.plan.curvature
        separate = not self.statistics_due or self.coupled_decay or self._rows
        if curvature.needs is not BatchGradient or separate:
            return None
        first_order = GRAFTS[options["graft"]].as_pass(self.state, self.step + 1, options["momentum"])
        if first_order is None:
            return None
        decay, damping = self.corrected_decay(), options["damping"]
        advanced = curvature.advance(self.state, gradient, decay, damping, first_order)
        if advanced is None:
            return None
        direction, *lengths = advanced
        norm, first_order_norm = map(self._for_each, lengths)
        self.step, self.observations = self.step + 1, self.observations + 1
        move = Move(self, gradient, self.state["momentum"], direction, first_order_norm, fused=True)
        self.settle(move, norm, first_order_norm)
        return move

    def move(self, gradient: Tensor) -> Move:
        """M <- mu M + D, and the step that follows from it; the weights stay as they are.

        The direction is P M, with the length of the graft's first-order step. A layer without curvature yet,
        or whose direction is not finite, takes the first-order step itself.
        """
        move = self.propose(gradient)
        self.settle(move, *self.norms(move))
        return move

    def propose(self, gradient: Tensor) -> Move:
        """The direction and the first-order step, whose length it is to have."""
        self.step += 1
        of_loss, curvature = gradient, self.plan.curvature
        if not curvature.steps_by_mean:
            gradient = self.with_decay(gradient)
        graft, mu = GRAFTS[self.options["graft"]], self.options["momentum"]
        length = self._for_each(graft.advance(self.state, gradient, self.parts, self.step, mu))
        momentum = self.past(gradient)
        if not self.observations:
            return Move(self, of_loss, momentum, self._first_order(momentum).clone(), length)
        if curvature.steps_by_mean:
            momentum = momentum * share_of_newest(mu, self.step)
        direction = curvature.precondition(self.state, momentum, self.options["damping"])
        return Move(self, of_loss, momentum, direction, length)

    def _first_order(self, momentum: Tensor) -> Tensor:
        graft = GRAFTS[self.options["graft"]]
        return graft.step(self.state, momentum, self.step, self.options["momentum"])

    def norms(self, move: Move) -> tuple[Tensor, Tensor]:
        """Of the direction and of the first-order step, [] or [layers, 1, ...]; of rows, [rows, 1, ...]."""
        return self._for_each(norms(move.direction, self.parts)), move.first_order_norm

    def settle(self, move: Move, norm: Tensor, first_order_norm: Tensor) -> None:
        """The length; where it or the direction is not finite, the first-order step; else no step at all."""
        rescales = bool(self.observations) and GRAFTS[self.options["graft"]].rescales
        length = first_order_norm / norm if rescales else torch.ones_like(norm)
        usable = torch.isfinite(norm + length)
        if not usable.all():
            held = ~(usable | torch.isfinite(first_order_norm))
            # Where one of the two is zero it is no direction that was lost: a unit that is all but dead.
            fallen = ~usable & ~held & (first_order_norm != 0) & (norm != 0)
            move.fallen, move.held = (
                int(where.view(len(self.layers), -1).any(1).sum()) for where in (fallen, held)
            )
            fallback = self._first_order(self.past(move.momentum)).masked_fill(held, 0)
            move.direction = torch.where(usable, move.direction, fallback)
            self._forget(held)
            length = length.masked_fill(~usable, 1)
        move.length = length

    def _forget(self, held: Tensor) -> None:
        """Averages that led to a number that is none would lead to it for ever: they start anew."""
        for name in OF_PARAMETER_SHAPE & self.state.keys():
            self.state[name].masked_fill_(held, 0)

    def apply(self, move: Move, scale: Tensor | float = 1.0) -> None:
        """W <- (1 - lr weight_decay) W - lr scale length direction."""
        decay, rate = self.options["weight_decay"], float(self.options["lr"])
        direction, length = move.direction, move.length * scale
        if length.ndim:
            direction, length = direction.mul_(length), length.new_ones(())
        moving = list(self.moving(direction))
        if decay and self.options["decoupled_weight_decay"]:
            torch._foreach_mul_([parameter for parameter, _ in moving], 1 - rate * decay)
        # The same operation either way, to the last bit: an eigenbasis of few samples amplifies it.
        for parameter, part in moving:
            if move.fused:  # what follows a compiled pass is best in its threads
                subtract_scaled(parameter, part, length, rate)
            else:
                parameter.addcmul_(part, length.to(part.dtype), value=-rate)

    def _for_each(self, numbers: Tensor) -> Tensor:
        """One number a part, [parts], as a factor of the stack: [] or [layers, 1, ...], with rows for a 1."""
        shape = [1] * len(self.layers[0].shape)
        if self._rows is not None:
            shape[0] = self._rows
        elif len(self.layers) == 1:
            shape = []
        return numbers.view([len(self.layers), *shape] if len(self.layers) > 1 else shape)


@dataclass(eq=False)
class Move:
    """The step that a cohort is about to take: W <- W - lr length direction."""

    cohort: Cohort
    gradient: Tensor  # D of the loss, [*layer.shape] or [layers, *layer.shape]
    momentum: Tensor  # M, or the mean of what it sums: what the direction was made from, likewise
    direction: Tensor  # likewise
    first_order_norm: Tensor  # of the step whose length it takes, [] or [layers, 1, ...]
    length: Tensor = field(init=False)  # [] or [layers, 1, ...]
    fused: bool = False  # made by one compiled pass
    fallen: int = 0  # layers that took the first-order step because their direction was not finite
    held: int = 0  # layers that took none because neither was

    def divergence(self) -> Tensor:
        """lr^2 step^T P^-1 step: of a Fisher matrix, twice the step's Kullback-Leibler divergence."""
        if not self.cohort.observations:
            return torch.zeros((), dtype=self.length.dtype, device=self.length.device)
        rate = float(self.cohort.options["lr"])
        return rate**2 * (self.length**2 * self.direction * self.momentum).sum()


def clipped(moves: Sequence[Move], bound: float) -> Iterator[tuple[Move, Tensor | float]]:
    """Every move with its scale: min(1, sqrt(bound / sum of divergences)) for those that have a curvature.

    Ba, Grosse, Martens, "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
    ICLR 2017.
    """
    # An inverse that rounding made indefinite can make one negative: it must not make room for others.
    divergences = torch.stack([move.divergence().float() for move in moves]).clamp(min=0)
    scale = (bound / divergences.sum().nan_to_num(nan=torch.inf)).sqrt().clamp(max=1)
    return ((move, scale if move.cohort.observations else 1.0) for move in moves)


def kept(dtype: torch.dtype) -> torch.dtype:
    """Float16 has no room for a square of a gradient, nor for a direction: float32 in its place."""
    return torch.float32 if dtype == torch.float16 else dtype
