"""The update of a stack of layers: W <- (1 - lr weight_decay) W - lr length direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from minifisher.curvature import Measures
from minifisher.kernels.choose import subtract_scaled
from minifisher.step.first_order import graft_length, look_ahead

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
    first_order: Measures  # of the step whose length it takes, [] or [layers, rows | 1, 1, ...]
    measures: Measures | None = None  # of the direction, likewise; None: it is still to be measured
    is_fused: bool = False
    """Whether a fused kernel made it."""
    length: Tensor = field(init=False)  # the factor of the direction, [] or [layers, rows | 1, 1, ...]
    scale: Tensor | float = 1.0
    """A further factor, of `kl_clip`."""
    fallbacks: int = 0
    """Layers that take the first-order step because their direction is not finite."""
    frozen: int = 0
    """Layers that stay, because their first-order step is not finite either."""
    renewed: int = 0
    """Layers whose curvature begins anew, because its averages were not finite."""

    @property
    def preconditioned(self) -> Tensor:
        """N, what the direction was made from, likewise."""
        joined = self.stack.with_decay(self.gradient)
        return look_ahead(joined, self.momentum, self.stack.options, self.stack.curvature, self.stack.step)

    def measured(self) -> Measures:
        """What is measured of the direction, [] or [layers, rows | 1, 1, ...]."""
        return self.stack.measured(self.direction, self.momentum)

    def set_length(self) -> None:
        """The length of the graft; the first-order step where that or the direction is not finite."""
        stack = self.stack
        measures = self.measures or self.measured()
        rescales = stack.graft.rescales and bool(stack.observations)
        limit = stack.options["length_limit"]
        self.length, usable, frozen = graft_length(measures, self.first_order, rescales, limit)
        if not usable.all():
            self._fall_back(measures.norm, usable, frozen)

    def _fall_back(self, norm: Tensor, usable: Tensor, frozen: Tensor) -> None:
        stack = self.stack
        # Where one of the two norms is zero no direction was lost: that unit has no gradient.
        fallen = ~usable & ~frozen & (self.first_order.norm != 0) & (norm != 0)
        self.fallbacks, self.frozen = (
            int(mask.view(len(stack.layers), -1).any(1).sum()) for mask in (fallen, frozen)
        )
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
        decay, rate = options["weight_decay"], float(options["lr"])
        direction, length = self.direction, self.length * self.scale
        if length.ndim:
            direction, length = direction.mul_(length), length.new_ones(())
        pairs = list(self.stack.local_parameters(direction))
        if decay and options["decoupled_weight_decay"]:
            torch._foreach_mul_([parameter for parameter, _ in pairs], 1 - rate * decay)
        # Both ways round alike, to the last bit: an eigenbasis of few samples would amplify a difference.
        for parameter, part in pairs:
            if self.is_fused:  # in the threads of the fused kernel, which still hold the cores
                subtract_scaled(parameter, part, length, rate)
            else:
                parameter.addcmul_(part, length.to(part.dtype), value=-rate)

    def divergence(self) -> Tensor:
        """lr^2 step^T P^-1 step; for a Fisher matrix, twice the Kullback-Leibler divergence of the step.

        P^-1 times the direction is N. An estimate where rows have lengths of their own and P mixes rows.
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
