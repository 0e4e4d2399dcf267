"""One step, as one page: from gradients and statistics to new weights.

    F <- beta F + (1 - beta) E[d d^T]                                      every T1 steps
    P <- (F + lambda I)^-power                                             every T2 steps
    M <- mu M + D,  N <- mu M + D or M,  direction P N                     every step
    length |s| / |P N| or <M, s> / <M, P N>
    W <- (1 - lr weight_decay) W - lr length P N

D is the gradient of the mini-batch, d what the curvature reads of it or of its samples, s the first-order
step. `ranks` says what processes exchange: nothing (`Alone`), or averages, directions and lengths
(`minifisher.step.together.Together`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from minifisher.curvature import FusedCurvature, FusedDirection
from minifisher.step.adaptive_damping import predicted_change
from minifisher.step.first_order import look_ahead
from minifisher.step.rows import by_rows, is_large
from minifisher.step.update import Update, clip_divergence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from minifisher.curvature import FirstOrderStep, Measures
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import LayerStack, Samples

    Decays = Sequence[float | None]  # one a stack; None where no statistics are due


class Ranks(Protocol):
    """What the processes of a step exchange."""

    finite: bool
    """Whether this process's gradients are finite."""
    one_by_one: bool
    """Whether a stack may take its step before the next one computes its own: less memory is in use then."""
    fuses: bool
    """Whether a stack may use a fused kernel, which leaves no time for an exchange."""
    zero: AbstractSet[Layer]
    """The layers whose gradient is zero on all ranks."""

    def average_statistics(
        self, stacks: Sequence[LayerStack], gradients: Sequence[Tensor], samples: Samples, decays: Decays
    ) -> bool:
        """Average the statistics of all ranks in; False, and no change, where one of them is not finite."""

    def agree(self, updates: Sequence[Update]) -> bool:
        """Complete directions and norms; False, and all as before, where a rank's gradient is not finite."""


@dataclass
class Alone:
    """One process: nothing is exchanged."""

    finite: bool
    zero: AbstractSet[Layer] = frozenset()
    one_by_one = fuses = True

    def average_statistics(
        self, stacks: Sequence[LayerStack], gradients: Sequence[Tensor], samples: Samples, decays: Decays
    ) -> bool:
        """Average this process's statistics in."""
        for stack, gradient, decay in zip(stacks, gradients, decays, strict=True):
            if self.finite and decay is not None:
                stack.observe(stack.curvature, stack.state, gradient, samples, decay)
                stack.observations += 1
        return self.finite

    def agree(self, updates: Sequence[Update]) -> bool:
        """There is nothing to exchange: True."""
        return True


@dataclass
class StepTaken:
    """What a step did, for those who report it."""

    zero: AbstractSet[Layer] = frozenset()
    """The layers whose gradient was zero."""
    fallbacks: int = 0
    """Layers that took the first-order step because their direction was not finite."""
    frozen: int = 0
    """Layers that stayed: their first-order step was not finite either, or led beyond float16."""
    renewed: int = 0
    """Layers whose curvature begins anew, because its averages were not finite."""
    changes: list[tuple[Tensor, tuple[Any, ...]]] = field(default_factory=list)
    """Predicted changes of the loss, each with the groups of ranks over which it is summed."""


def take_step(
    stacks: Sequence[LayerStack], samples: Samples, ranks: Ranks, kl_clip: float | None, predicts: bool
) -> StepTaken | None:
    """Step all stacks; None, and nothing changed, where a gradient of any rank is not finite."""
    taken = StepTaken(ranks.zero)
    alone = ranks.one_by_one and not kl_clip
    for together in [[stack] for stack in stacks] if alone else [stacks]:
        updates = compute_updates(together, samples, ranks, in_parts=alone)
        if updates is None:
            return None
        if kl_clip and (updates := list(updates)):
            clip_divergence(updates, kl_clip)
        for update in updates:
            if predicts:
                taken.changes.append((predicted_change(update), update.stack.placement.groups))
            update.apply()
            del update.direction  # its memory is free before the next one is made
            update.stack.keep_counts()
            taken.fallbacks += update.fallbacks
            taken.frozen += update.frozen
            taken.renewed += update.renewed
    return taken


def compute_updates(
    stacks: Sequence[LayerStack], samples: Samples, ranks: Ranks, in_parts: bool = False
) -> list[Update] | Iterator[Update] | None:
    """The update of every stack; None, and nothing changed, where a gradient of any rank is not finite.

    With `in_parts` the single stack may be so large that its updates have to be taken one after another.
    """
    # D; zero where it is not finite: the ranks then agree not to step.
    gradients = [stack.gradient() if ranks.finite else torch.zeros_like(stack.gradient()) for stack in stacks]
    decays = [
        stack.corrected_decay(samples, ranks.zero) if stack.statistics_due else None for stack in stacks
    ]
    # All of the below in one pass over memory, where a kernel can.
    fused = [
        fused_update(stack, gradient, decay)
        if ranks.fuses and isinstance(stack.curvature, FusedCurvature)
        else None
        for stack, gradient, decay in zip(stacks, gradients, decays, strict=True)
    ]
    rest = [index for index, update in enumerate(fused) if update is None]
    # F <- beta F + (1 - beta) E[d d^T]
    observers, observed = [stacks[index] for index in rest], [decays[index] for index in rest]
    if not ranks.average_statistics(observers, [gradients[index] for index in rest], samples, observed):
        return None
    # P <- (F + lambda I)^-power
    for stack, decay in zip(observers, observed, strict=True):
        if stack.refresh_due(decay is not None):
            stack.curvature.refresh(stack.state, stack.options["damping"])
        if ranks.zero or stack.missed or not stack.observations:
            stack.keep_missed(ranks.zero, decay is not None)
    # M <- mu M + D, |s|, P N
    if in_parts and is_large(stacks[0]):
        return updates_by_rows(*stacks)
    updates = [
        update or compute_direction(stack, gradient)
        for update, stack, gradient in zip(fused, stacks, gradients, strict=True)
    ]
    if not ranks.agree(updates):
        return None
    # |s| / |P N|, or <M, s> / <M, P N>
    for update in updates:
        update.set_length()
    return updates


def updates_by_rows(stack: LayerStack) -> Iterator[Update]:
    """The updates of a large layer, a few rows at a time: each is applied before the next one is made.

    A direction of all rows at once would need as much memory as the weight. Rows have lengths of their own.
    """
    fallbacks = frozen = 0
    for part in by_rows(stack):
        update = compute_direction(part, part.gradient())
        update.set_length()
        # The layer counts once, however many of its parts are concerned.
        update.fallbacks = min(update.fallbacks, 1 - fallbacks)
        update.frozen = min(update.frozen, 1 - frozen)
        fallbacks, frozen = fallbacks + update.fallbacks, frozen + update.frozen
        yield update
    stack.step += 1
    stack.keep_counts()


def compute_direction(stack: LayerStack, gradient: Tensor) -> Update:
    """M <- mu M + D; the direction P N, and what is measured of the first-order step.

    N is mu M + D (Nesterov), or M. A stack without an observation so far takes the first-order step itself.
    """
    state, curvature, graft, options = stack.state, stack.curvature, stack.graft, stack.options
    mu = options["momentum"]
    stack.step += 1
    joined = stack.joined(gradient)
    fused = fused_direction(stack, joined) if isinstance(curvature, FusedDirection) else None
    if fused is not None:
        direction, measures, first_order = fused
        return Update(stack, gradient, state["momentum"], direction, first_order, measures, is_fused=True)
    first_order = graft.update(state, joined, stack.lengths, stack.step, mu, stack.measures_slope)
    momentum = state["momentum"] if mu else joined
    if not stack.observations:
        direction = graft.step(state, momentum, stack.step, mu).clone()
    else:
        ahead = look_ahead(joined, momentum, options, curvature, stack.step)
        direction = curvature.precondition(state, ahead, options["damping"])
    return Update(stack, gradient, momentum, direction, first_order)


def fused_direction(stack: LayerStack, joined: Tensor) -> tuple[Tensor, Measures, Measures] | None:
    """Momentum, first-order step and direction by one fused kernel; None where there is none for them."""
    curvature = stack.curvature
    assert isinstance(curvature, FusedDirection)
    # A rank that receives the direction would measure it otherwise, in the last bits.
    if not stack.observations or stack.placement.owner is not None:
        return None
    first_order = first_order_numbers(stack, stack.step)
    return None if first_order is None else curvature.fused_direction(stack.state, joined, first_order)


def fused_update(stack: LayerStack, gradient: Tensor, decay: float | None) -> Update | None:
    """The update by one fused kernel, statistics and momentum included; None where there is none for it."""
    curvature, options, state = stack.curvature, stack.options, stack.state
    assert isinstance(curvature, FusedCurvature)
    coupled_decay = options["weight_decay"] and not options["decoupled_weight_decay"]
    if not stack.observes_gradient or decay is None or coupled_decay:
        return None
    first_order = first_order_numbers(stack, stack.step + 1)
    if first_order is None:
        return None
    fused = curvature.fused_step(state, gradient, decay, options["damping"], first_order)
    if fused is None:
        return None
    direction, *measured = fused
    stack.step, stack.observations, stack.missed = stack.step + 1, stack.observations + 1, 0
    measures, of_first_order = (numbers.map(torch.flatten) for numbers in measured)
    return Update(stack, gradient, state["momentum"], direction, of_first_order, measures, is_fused=True)


def first_order_numbers(stack: LayerStack, count: int) -> FirstOrderStep | None:
    """The first-order step number `count` as a kernel takes it; None where none takes it."""
    options = stack.options
    numbers = stack.graft.for_kernel(stack.state, count, options["momentum"])
    lengths = 1 if stack.rows is None else stack.rows
    return numbers and replace(
        numbers, lengths=lengths, with_slopes=stack.measures_slope, nesterov=options["nesterov"]
    )
