"""The update of a stack of layers: W <- (1 - lr weight_decay) W - lr length direction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from minifisher.curvature import Measures
from minifisher.kernels.choose import elementwise, subtract_scaled
from minifisher.step.first_order import (
    USUAL_GROWTH,
    graft_length,
    look_ahead,
    masks_of_steps,
    measure,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.step.layer_stack import LayerStack


@dataclass(eq=False)
class Update:
    """What a stack is about to do to its weights."""

    stack: LayerStack
    gradient: Tensor  # D of the loss, [*layer.shape] or [layers, *layer.shape]
    momentum: Tensor  # M, likewise
    direction: Tensor  # P N, likewise
    first_order: Measures  # of the step whose length it takes, [lengths]
    measures: Measures | None = None  # of the direction, likewise; None: it is still to be measured
    is_fused: bool = False
    """Whether a fused kernel made it."""
    length: Tensor = field(init=False)  # the factor of the direction, [] or [layers, rows | 1, 1, ...]
    scale: Tensor | float = 1.0
    """A further factor, of `kl_clip`."""
    fallbacks: int = 0
    """Layers that take the first-order step because their direction is not finite."""
    frozen: int = 0
    """Layers that stay: their first-order step is not finite either, or leads beyond float16."""
    renewed: int = 0
    """Layers whose curvature begins anew, because its averages were not finite."""

    @property
    def preconditioned(self) -> Tensor:
        """N, what the direction was made from, likewise."""
        joined = self.stack.joined(self.gradient)
        return look_ahead(joined, self.momentum, self.stack.options, self.stack.curvature, self.stack.step)

    def measured(self) -> Measures:
        """What the rule of length reads of the direction, [lengths]."""
        momentum = None if self.first_order.slope is None else self.momentum
        return measure(self.direction, momentum, self.stack.lengths)

    def set_length(self) -> None:
        """The length of the graft; the first-order step where that or the direction is not finite."""
        stack = self.stack
        measures = self.measures or self.measured()
        rescales = stack.graft.rescales and bool(stack.observations)
        first_order, limit = self.first_order, stack.options["length_limit"]
        by_slopes = measures.slope is not None and first_order.slope is not None
        numbers = [number for number in (*measures, *first_order) if number is not None]
        compiled = elementwise(*numbers) if rescales and by_slopes else None
        if compiled is not None:
            length, is_finite = compiled.descent_length(measures, first_order, limit, USUAL_GROWTH)
        else:
            length = graft_length(measures, first_order, rescales, limit)
            # One question about all numbers. Where only the sum is not finite, nothing falls back below.
            is_finite = math.isfinite((measures.norm + length).sum())
        self.length = length.view(stack.length_shape)
        if not is_finite:
            self._fall_back(measures, length)

    def _fall_back(self, measures: Measures, length: Tensor) -> None:
        stack = self.stack
        usable, fallen, frozen = masks_of_steps(measures, self.first_order, length)
        self.fallbacks, self.frozen = (
            int(mask.view(len(stack.layers), -1).any(1).sum()) for mask in (fallen, frozen)
        )
        usable, frozen = usable.view(stack.length_shape), frozen.view(stack.length_shape)
        step = stack.graft.step(stack.state, self.momentum, stack.step, stack.options["momentum"])
        self.direction = torch.where(usable, self.direction, step.masked_fill(frozen, 0))
        self.length = self.length.masked_fill(~usable, 1)
        self.renewed = stack.renew_curvature()
        # An average that has become NaN stays NaN: reset it to zero.
        for name in stack.parameter_shaped:
            stack.state[name].masked_fill_(frozen, 0)

    def apply(self) -> None:
        """W <- (1 - lr weight_decay) W - lr scale length direction."""
        options = self.stack.options
        rate = float(options["lr"])
        keep = 1 - rate * float(options["weight_decay"]) if options["decoupled_weight_decay"] else 1.0
        direction, length = self.direction, self.length * self.scale
        if direction.dtype != self.stack.pieces[0].weight.dtype:
            self._apply_within_range(direction.mul_(length), keep)
            return
        pairs = list(self.stack.local_parameters(direction))
        # In one pass, and in the threads of the fused kernel, which still hold the cores.
        if self.is_fused and self.stack.is_plain and len(pairs) == 1:
            ((parameter, part),) = pairs
            if subtract_scaled(parameter, part, length.view(-1), rate, keep):
                return
        if length.ndim:
            length = direction.mul_(length).new_ones(())
        if keep != 1:
            torch._foreach_mul_([parameter for parameter, _ in pairs], keep)
        for parameter, part in pairs:  # rounded as above: an eigenbasis of few samples amplifies a difference
            parameter.addcmul_(part, length.to(part.dtype), value=-rate)

    def _apply_within_range(self, step: Tensor, keep: float) -> None:
        """The same for weights of a narrower dtype, float16; a layer that would become infinite stays."""
        weights, layers = self.stack.weights(), len(self.stack.layers)
        moved = (weights * keep).sub_(step, alpha=float(self.stack.options["lr"]))
        leaves = weights.isfinite() & ~moved.isfinite()
        stays = leaves.reshape(layers, leaves.numel() // layers).any(1)
        self.frozen += int(stays.sum())
        kept = torch.where(stays.view(-1, *[1] * (moved.ndim - 1)) if layers > 1 else stays, weights, moved)
        for parameter, part in self.stack.local_parameters(kept.view(moved.shape)):
            parameter.copy_(part)

    def divergence(self) -> Tensor:
        """lr^2 step^T P^-1 step: undamped, twice the Kullback-Leibler divergence of the step.

        P^-1 is the damped curvature, and P^-1 times the direction is N. It is an estimate where rows have
        lengths of their own and P mixes rows.
        """
        if not self.stack.observations:
            return torch.zeros((), dtype=self.length.dtype, device=self.length.device)
        rate = float(self.stack.options["lr"])
        return rate**2 * (self.length**2 * self.direction * self.preconditioned).sum()


def clip_divergence(updates: Sequence[Update], bound: float) -> None:
    """Scale all updates that have a curvature by min(1, sqrt(bound / sum of their divergences)).

    Ba, Grosse, Martens, "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
    ICLR 2017.
    """
    # Rounding can make an inverse indefinite and a divergence negative: that must not let other layers go
    # further.
    divergences = torch.stack([update.divergence().float() for update in updates]).clamp(min=0)
    scale = (bound / divergences.sum().nan_to_num(nan=torch.inf)).sqrt().clamp(max=1)
    for update in updates:
        update.scale = scale if update.stack.observations else 1.0
