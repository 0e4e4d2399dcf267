"""Grafting: the step's length borrowed from a first-order method, its direction from the curvature.

Source: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling Adaptive Gradient Methods from Learning Rates",
2020, arXiv 2002.11803. The learning rate then has the scale that people know from the first-order method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import FirstOrderStep
from minifisher.kernels.choose import adam_step_norm, suits_numba
from minifisher.kernels.scratch import scratch_like

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

ADAM_DECAY = 0.999  # beta_2 of torch.optim.AdamW, so that its learning rate carries over
ADAM_EPSILON = 1e-8  # likewise


class Graft:
    """The null graft: a direction keeps its own length, and the momentum M stands in where it is not finite.

    M <- mu M + D is a sum, `momentum` is mu, `count` the steps so far, an int or a tensor []; other tensors
    are those of a cohort.
    """

    rescales = False
    by_rows = False
    """Whether every row of a weight (an output's) borrows a length of its own."""
    state_names: tuple[str, ...] = ()
    """Tensors of the parameter's shape that the graft keeps in the state."""

    def advance(self, state: State, gradient: Tensor, parts: int, count: Any, momentum: float) -> Tensor:
        """Update momentum and averages in place; returns the length of the first-order step, [parts].

        The cohort's tensors are so many parts of one size: its layers, or their rows.
        """
        return norms(_advance_momentum(state, gradient, momentum), parts)

    def step(self, state: State, direction: Tensor, count: Any, momentum: float) -> Tensor:
        """The first-order method's step, before the learning rate."""
        return direction

    def as_pass(self, state: State, count: int, momentum: float) -> FirstOrderStep | None:
        """`advance` in numbers, for a pass that does more; None where it cannot be told so."""
        return FirstOrderStep(momentum, state["momentum"]) if momentum else None


class MomentumGraft(Graft):
    """SGD with momentum: the step M."""

    rescales = True


class AdamGraft(Graft):
    """Adam: (1 - mu) M / (1 - mu^t) over sqrt(v / (1 - beta_2^t)) + epsilon (Kingma, Ba 2015, Alg. 1)."""

    rescales = True
    state_names = ("second_moment",)

    def advance(self, state: State, gradient: Tensor, parts: int, count: Any, momentum: float) -> Tensor:
        """Also v <- beta_2 v + (1 - beta_2) D^2."""
        scale, epsilon = self._corrected(count, momentum)
        tensors = (gradient, state.get("momentum", gradient), state["second_moment"])
        if momentum and isinstance(count, int) and suits_numba(*tensors):
            d, m, v = (tensor.view(parts, -1) for tensor in tensors)
            norm = adam_step_norm(d, m, v, momentum_decay=momentum, moment_decay=ADAM_DECAY, epsilon=epsilon)
            return norm.mul_(scale)
        direction = _advance_momentum(state, gradient, momentum)
        moment = state["second_moment"].mul_(ADAM_DECAY).addcmul_(gradient, gradient, value=1 - ADAM_DECAY)
        denominator = torch.sqrt(moment, out=scratch_like(moment)).add_(epsilon)
        return norms(torch.div(direction, denominator, out=denominator), parts).mul_(scale)

    def step(self, state: State, direction: Tensor, count: Any, momentum: float) -> Tensor:
        """Adam's step."""
        scale, epsilon = self._corrected(count, momentum)
        step: Tensor = direction / state["second_moment"].sqrt().add_(epsilon) * scale
        return step

    def as_pass(self, state: State, count: int, momentum: float) -> FirstOrderStep | None:
        """Adam's."""
        if not momentum:
            return None
        scale, epsilon = self._corrected(count, momentum)
        return FirstOrderStep(momentum, state["momentum"], state["second_moment"], ADAM_DECAY, epsilon, scale)

    def _corrected(self, count: Any, momentum: float) -> tuple[Any, Any]:
        """Both bias corrections moved out of the root: scale M / (sqrt(v) + epsilon)."""
        correction = (1 - ADAM_DECAY**count) ** 0.5
        return share_of_newest(momentum, count) * correction, ADAM_EPSILON * correction


class AdamRowsGraft(AdamGraft):
    """Adam's step length of every row by itself: nothing is exchanged where whole rows are cut apart."""

    by_rows = True


def share_of_newest(momentum: float, count: Any) -> Any:
    """What the newest of so many gradients weighs in their mean, (1 - mu) / (1 - mu^t): the mean over M."""
    return (1 - momentum) / (1 - momentum**count)


def _advance_momentum(state: State, gradient: Tensor, momentum: float) -> Tensor:
    if not momentum:
        return gradient
    # Two roundings: fused into one, the last bits would depend on how layers are stacked.
    return state["momentum"].mul_(momentum).add_(gradient)


def norms(stack: Tensor, parts: int) -> Tensor:
    """The norm of each of so many equal parts of a contiguous stack, [parts]."""
    norm: Tensor
    if parts == 1:
        norm = torch.linalg.vector_norm(stack)
        return norm.view(1)
    norm = torch.linalg.vector_norm(stack.reshape(parts, stack.numel() // max(1, parts)), dim=1)
    return norm


GRAFTS: dict[str | None, Graft] = {
    None: Graft(),
    "sgd": MomentumGraft(),
    "adam": AdamGraft(),
    "adam-rows": AdamRowsGraft(),
}
