"""The first-order step: the momentum M, the method whose step length a direction borrows, and that length.

Grafting takes the length of a step from a first-order method and its direction from the curvature, so that
the learning rate has the scale that people know. Source: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling
Adaptive Gradient Methods from Learning Rates", 2020, arXiv 2002.11803.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from minifisher.curvature import FirstOrderStep, Measures
from minifisher.kernels.choose import LEAST_ENTRIES, elementwise
from minifisher.kernels.scratch import scratch_like

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from minifisher.curvature import Curvature, Plan

    State = dict[str, Tensor]
    Growth = tuple[Tensor | None, Tensor | None]

ADAM_DECAY = 0.999  # beta_2 of torch.optim.AdamW, so that its learning rate carries over
ADAM_EPSILON = 1e-8  # likewise
USUAL_GROWTH = 3.0
"""|D|^2 is usual up to so many times its average over the steps so far: see docs/why.md."""


class Graft:
    """No grafting: the direction keeps its own length. The first-order step is the momentum M.

    M <- mu M + D is a sum; `momentum` is mu. `count` is the number of steps, an int or a tensor []. Tensors
    have the shape of a stack, which has so many `lengths`: one for each layer, or for each row.
    """

    rescales = False
    by_rows = False
    """Whether every row of a weight (one output) has a length of its own."""
    state_names: ClassVar[tuple[str, ...]] = ()
    """Tensors of the parameter's shape that the graft keeps in the state."""

    def update(
        self, state: State, gradient: Tensor, lengths: int, count: Any, momentum: float, with_slope: bool
    ) -> Measures:
        """Update M and the graft's averages in place; returns what is measured of the first-order step."""
        norm = measure(update_momentum(state, gradient, momentum), None, lengths).norm
        return Measures(norm, norm.square() if with_slope else None)

    def growth(self, state: State, gradient: Tensor, lengths: int, count: Any) -> Growth:
        """`newest` and `usual` of `Measures` after `update`; None without V."""
        return None, None

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
    state_names: ClassVar[tuple[str, ...]] = ("second_moment",)

    def update(
        self, state: State, gradient: Tensor, lengths: int, count: Any, momentum: float, with_slope: bool
    ) -> Measures:
        """Also V <- beta_2 V + (1 - beta_2) D^2."""
        scale, epsilon = _corrections(count, momentum)
        tensors = (gradient, state.get("momentum", gradient), state["second_moment"])
        compiled = elementwise(*tensors) if momentum and isinstance(count, int) else None
        if compiled is not None:
            d, m, v = (tensor.view(lengths, -1) for tensor in tensors)
            measures = Measures(*compiled.adam_step(d, m, v, momentum, ADAM_DECAY, epsilon, with_slope))
        else:
            direction = update_momentum(state, gradient, momentum)
            moment = state["second_moment"].mul_(ADAM_DECAY)
            moment.addcmul_(gradient, gradient, value=1 - ADAM_DECAY)
            denominator = torch.sqrt(moment, out=scratch_like(moment)).add_(epsilon)
            step = torch.div(direction, denominator, out=denominator)
            measures = measure(step, direction if with_slope else None, lengths)
            if with_slope:
                measures = Measures(*measures[:2], *_sums_of_squares(gradient, moment, lengths))
        return measures.corrected(scale, 1 - ADAM_DECAY**count)

    def growth(self, state: State, gradient: Tensor, lengths: int, count: Any) -> Growth:
        """|D|^2, and the sum of V / (1 - beta_2^t)."""
        newest, usual = _sums_of_squares(gradient, state["second_moment"], lengths)
        return newest, usual / (1 - ADAM_DECAY**count)

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
        moments = state["momentum"], state["second_moment"]
        return FirstOrderStep(momentum, *moments, ADAM_DECAY, epsilon, scale, 1 - ADAM_DECAY**count)


class AdamRowsGraft(AdamGraft):
    """The length of Adam's step for each row; under sharding by rows no norm is exchanged."""

    by_rows = True


GRAFTS: dict[str | None, Graft] = {
    None: Graft(),
    "sgd": MomentumGraft(),
    "adam": AdamGraft(),
    "adam-rows": AdamRowsGraft(),
}


def graft_length(direction: Measures, first_order: Measures, rescales: bool, limit: float) -> Tensor:
    """The factor of a direction P N, [lengths]: |s| / |P N|, or that of equal descent; 1 without `rescales`.

    Equal descent, where slopes were measured: <M, s> / <M, P N>, at most `limits` times |s| / |P N|. Both
    steps then promise the same decrease: a step x changes the loss by -lr <gradient, x> to first order, and M
    stands for the gradient. Where the quotient is not positive, no factor of P N promises what s does: a row
    of P N may ascend where P mixes rows, and a matrix may be indefinite by rounding. The factor is then
    |s| / |P N|. So it is where both slopes are too small for a number of this dtype.

    It is 0 where s is 0: such units have no gradient, and 0 / 0 would look like a direction that was lost.
    """
    if not rescales:
        return torch.ones_like(direction.norm)
    length = torch.where(first_order.norm == 0, 0.0, first_order.norm / direction.norm)
    if direction.slope is None or first_order.slope is None:
        return length
    descent = first_order.slope / direction.slope
    return torch.where(descent > 0, torch.minimum(descent, limits(first_order, limit) * length), length)


def limits(first_order: Measures, limit: float) -> Tensor:
    """How many lengths of s a step may have, [lengths]: `limit`, and less after a sudden growth of D.

    Let g be |D|^2 over its average so far. The limit is 3 limit / g where that is less, and at least 1.
    The curvature of the newest gradient is g times the one that P was made from: P N is too long.
    """
    _, _, newest, usual = first_order
    if newest is None or usual is None:
        return torch.full_like(first_order.norm, limit)
    lower = (USUAL_GROWTH * limit * usual / newest).clamp(min=1)
    return torch.where(newest > USUAL_GROWTH * usual, lower, limit)


def masks_of_steps(
    direction: Measures, first_order: Measures, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three masks, [lengths]: where the direction is usable, where it was lost, and where nothing moves.

    A direction is usable if it has a finite length. Where it has not, the layer takes the first-order step s;
    it has `fallen` back unless one of the two is zero: that unit has no gradient, and nothing was lost. Where
    s is not finite either, the layer is `frozen`.
    """
    usable = torch.isfinite(direction.norm + length)
    frozen = ~(usable | torch.isfinite(first_order.norm))
    fallen = ~(usable | frozen) & (first_order.norm != 0) & (direction.norm != 0)
    return usable, fallen, frozen


def graft_of(plan: Plan, options: Mapping[str, Any]) -> Graft:
    """The first-order method that a layer takes its step, or the length of it, from."""
    return GRAFTS[plan.first_order or options["graft"]]


def check_length(options: Mapping[str, Any]) -> None:
    """Raise ValueError where a length is asked for that no first-order step gives."""
    if options["length"] == "descent" and options["graft"] is None:
        raise ValueError(
            'length="descent" promises the decrease of a first-order step, and graft=None names none: set '
            'graft="adam", "adam-rows" or "sgd", or length="norm"'
        )


def update_momentum(state: State, gradient: Tensor, momentum: float) -> Tensor:
    """M <- mu M + D in place; the gradient itself without momentum."""
    if not momentum:
        return gradient
    # Two roundings: if they were fused into one, the last bits would depend on how layers are stacked.
    return state["momentum"].mul_(momentum).add_(gradient)


def newest_share(momentum: float, count: Any) -> Any:
    """The weight of the newest gradient in the mean of `count`, (1 - mu) / (1 - mu^t): mean = share M."""
    return (1 - momentum) / (1 - momentum**count)


def look_ahead(
    gradient: Tensor, momentum: Tensor, options: Mapping[str, Any], curvature: Curvature, count: Any
) -> Tensor:
    """N, the vector that is preconditioned: mu M + D with `nesterov`, else M; of the shape of D.

    M holds D already, so mu M + D is what M would be after one more gradient like D: Nesterov's momentum as
    Sutskever, Martens, Dahl, Hinton, ICML 2013, Section 2, and torch.optim.SGD have it. A curvature that
    averages momentum gets the mean of the same gradients.
    """
    mu = options["momentum"]
    nesterov = bool(mu) and options["nesterov"]
    # Not torch.add(alpha=mu), which rounds once: the compiled kernels round twice.
    ahead = (momentum * mu).add_(gradient) if nesterov else momentum
    return ahead * newest_share(mu, count + nesterov) if curvature.averages_momentum else ahead


def measure(step: Tensor, momentum: Tensor | None, lengths: int, *, by_torch: bool = False) -> Measures:
    """|x| and <M, x> of each of so many equal parts of a step x, [lengths]; without M the norm alone."""
    shape = lengths, step.numel() // max(1, lengths)  # a weight without rows has no part
    if momentum is not None and step.numel() >= LEAST_ENTRIES and not by_torch:
        compiled = elementwise(step, momentum)
        if compiled is not None:
            return Measures(*compiled.norm_and_slope(step.view(shape), momentum.view(shape)))
    if lengths == 1:
        norm = torch.linalg.vector_norm(step).view(1)
        slope = None if momentum is None else torch.dot(momentum.reshape(-1), step.reshape(-1)).view(1)
    else:
        norm = torch.linalg.vector_norm(step.reshape(shape), dim=1)
        slope = None if momentum is None else (momentum * step).reshape(shape).sum(1)
    return Measures(norm, slope)


def _sums_of_squares(gradient: Tensor, moment: Tensor, lengths: int) -> tuple[Tensor, Tensor]:
    """|D|^2 and the sum of V for each of so many equal parts, [lengths]."""
    norm = measure(gradient, None, lengths).norm
    return norm.square(), moment.reshape(lengths, moment.numel() // max(1, lengths)).sum(1)


def _corrections(count: Any, momentum: float) -> tuple[Any, Any]:
    """Adam's bias corrections, taken out of the root: the step is scale M / (sqrt(V) + epsilon)."""
    correction = (1 - ADAM_DECAY**count) ** 0.5
    return newest_share(momentum, count) * correction, ADAM_EPSILON * correction
