"""The first-order step: the momentum M, the method whose step length a direction borrows, and that length.

Grafting takes the length of a step from a first-order method and its direction from the curvature, so that
the learning rate has the scale that people know. Source: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling
Adaptive Gradient Methods from Learning Rates", 2020, arXiv 2002.11803.
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
    """No grafting: the direction keeps its own length. The first-order step is the momentum M.

    M <- mu M + D is a sum; `momentum` is mu. `count` is the number of steps, an int or a tensor []. Tensors
    have the shape of a stack, which has so many `lengths`: one for each layer, or for each row.
    """

    rescales = False
    by_rows = False
    """Whether every row of a weight (one output) has a length of its own."""
    state_names: tuple[str, ...] = ()
    """Tensors of the parameter's shape that the graft keeps in the state."""

    def update(self, state: State, gradient: Tensor, lengths: int, count: Any, momentum: float) -> Tensor:
        """Update M and the graft's averages in place; returns the norm of the first-order step, [lengths]."""
        return norms(update_momentum(state, gradient, momentum), lengths)

    def step(self, state: State, direction: Tensor, count: Any, momentum: float) -> Tensor:
        """The first-order step for M = direction, before the learning rate."""
        return direction

    def for_kernel(self, state: State, count: int, momentum: float) -> FirstOrderStep | None:
        """The numbers of `update` for a fused kernel; None without momentum, which no kernel expects."""
        return FirstOrderStep(momentum, state["momentum"]) if momentum else None


class MomentumGraft(Graft):
    """SGD with momentum: the step M."""

    rescales = True


class AdamGraft(Graft):
    """Adam: (1 - mu) M / (1 - mu^t) over sqrt(V / (1 - beta_2^t)) + epsilon (Kingma, Ba 2015, Alg. 1)."""

    rescales = True
    state_names = ("second_moment",)

    def update(self, state: State, gradient: Tensor, lengths: int, count: Any, momentum: float) -> Tensor:
        """Also V <- beta_2 V + (1 - beta_2) D^2."""
        scale, epsilon = _corrections(count, momentum)
        tensors = (gradient, state.get("momentum", gradient), state["second_moment"])
        if momentum and isinstance(count, int) and suits_numba(*tensors):
            d, m, v = (tensor.view(lengths, -1) for tensor in tensors)
            norm = adam_step_norm(d, m, v, momentum_decay=momentum, moment_decay=ADAM_DECAY, epsilon=epsilon)
            return norm.mul_(scale)
        direction = update_momentum(state, gradient, momentum)
        moment = state["second_moment"].mul_(ADAM_DECAY).addcmul_(gradient, gradient, value=1 - ADAM_DECAY)
        denominator = torch.sqrt(moment, out=scratch_like(moment)).add_(epsilon)
        return norms(torch.div(direction, denominator, out=denominator), lengths).mul_(scale)

    def step(self, state: State, direction: Tensor, count: Any, momentum: float) -> Tensor:
        """Adam's step."""
        scale, epsilon = _corrections(count, momentum)
        step: Tensor = direction / state["second_moment"].sqrt().add_(epsilon) * scale
        return step

    def for_kernel(self, state: State, count: int, momentum: float) -> FirstOrderStep | None:
        """Those of Adam."""
        if not momentum:
            return None
        scale, epsilon = _corrections(count, momentum)
        return FirstOrderStep(momentum, state["momentum"], state["second_moment"], ADAM_DECAY, epsilon, scale)


class AdamRowsGraft(AdamGraft):
    """The length of Adam's step for each row; under sharding by rows no norm is exchanged."""

    by_rows = True


GRAFTS: dict[str | None, Graft] = {
    None: Graft(),
    "sgd": MomentumGraft(),
    "adam": AdamGraft(),
    "adam-rows": AdamRowsGraft(),
}


def graft_length(norm: Tensor, first_order_norm: Tensor, rescales: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The factor of a direction, |s| / |P M|, where the two norms are those of the step s and of P M.

    Returns it with two masks of its shape. Where it is not `usable`, the layer takes the first-order step;
    where that is not finite either, the layer is `frozen`.
    """
    length = first_order_norm / norm if rescales else torch.ones_like(norm)
    usable = torch.isfinite(norm + length)
    return length, usable, ~(usable | torch.isfinite(first_order_norm))


def update_momentum(state: State, gradient: Tensor, momentum: float) -> Tensor:
    """M <- mu M + D in place; the gradient itself without momentum."""
    if not momentum:
        return gradient
    # Two roundings: if they were fused into one, the last bits would depend on how layers are stacked.
    return state["momentum"].mul_(momentum).add_(gradient)


def newest_share(momentum: float, count: Any) -> Any:
    """The weight of the newest gradient in the mean of `count`, (1 - mu) / (1 - mu^t): mean = share M."""
    return (1 - momentum) / (1 - momentum**count)


def norms(stack: Tensor, lengths: int) -> Tensor:
    """The norm of each of so many equal parts of a contiguous stack, [lengths]."""
    norm: Tensor
    if lengths == 1:
        norm = torch.linalg.vector_norm(stack)
        return norm.view(1)
    norm = torch.linalg.vector_norm(stack.reshape(lengths, stack.numel() // max(1, lengths)), dim=1)
    return norm


def _corrections(count: Any, momentum: float) -> tuple[Any, Any]:
    """Adam's bias corrections, taken out of the root: the step is scale M / (sqrt(V) + epsilon)."""
    correction = (1 - ADAM_DECAY**count) ** 0.5
    return newest_share(momentum, count) * correction, ADAM_EPSILON * correction
