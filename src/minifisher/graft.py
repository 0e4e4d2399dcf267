"""Grafting: the step's length borrowed from a first-order method, its direction from the curvature.

Source: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling Adaptive Gradient Methods from Learning Rates",
2020, arXiv 2002.11803. The learning rate then has the scale that people know from the first-order method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

ADAM_DECAY = 0.999  # beta_2 of torch.optim.AdamW, so that its learning rate carries over
ADAM_EPSILON = 1e-8  # likewise


class Graft:
    """The null graft: a direction keeps its own length, and the momentum M stands in where it is not finite.

    M <- mu M + D is a sum, `momentum` is mu, `count` the steps so far; all tensors are [..., *layer.shape].
    """

    rescales = False
    state_names: tuple[str, ...] = ()
    """Tensors of the parameter's shape that the graft keeps in the state."""

    def observe(self, state: State, gradient: Tensor) -> None:
        """Average what the first-order method averages, in place."""

    def step(self, state: State, direction: Tensor, count: int, momentum: float) -> Tensor:
        """The first-order method's step, before the learning rate."""
        return direction


class MomentumGraft(Graft):
    """SGD with momentum: the step M."""

    rescales = True


class AdamGraft(Graft):
    """Adam: (1 - mu) M / (1 - mu^t) over sqrt(v / (1 - beta_2^t)) + epsilon (Kingma, Ba 2015, Alg. 1)."""

    rescales = True
    state_names = ("second_moment",)

    def observe(self, state: State, gradient: Tensor) -> None:
        """V <- beta_2 v + (1 - beta_2) D^2."""
        state["second_moment"].mul_(ADAM_DECAY).addcmul_(gradient, gradient, value=1 - ADAM_DECAY)

    def step(self, state: State, direction: Tensor, count: int, momentum: float) -> Tensor:
        """Adam's step."""
        correction = (1 - ADAM_DECAY**count) ** 0.5
        scale = (1 - momentum) / (1 - momentum**count) * correction
        denominator = state["second_moment"].sqrt().add_(ADAM_EPSILON * correction).div_(scale)
        return torch.div(direction, denominator, out=denominator)


GRAFTS: dict[str | None, Graft] = {None: Graft(), "sgd": MomentumGraft(), "adam": AdamGraft()}
