"""Adaptive damping: the Levenberg-Marquardt rule on the ratio of actual to predicted decrease.

Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, arXiv 1503.05671, Section 6.5; its quadratic model is that of Section 6.4, damping included.

A step moves the weights by delta = u + w. The update u = -c P M has the direction P M, the damped inverse
curvature P times the momentum M, and the length factor c = lr x what the graft makes of it. The decoupled
decay is w = -lr weight_decay W. The model of the loss has the mini-batch's gradient D and the curvature P^-1:

    q(delta) = D^T delta + delta^T P^-1 delta / 2

Because P is symmetric and P^-1 u = -c M, all but the decay's own square costs inner products only:

    q(delta) = u^T (D - c M / 2) + w^T (D - c M) + w^T P^-1 w / 2

The last term is of the order (lr weight_decay)^2 and is left out. The prediction is that of the step that
was taken: c holds the length which the graft gave, M the momentum, and a layer that took a first-order step
counts with that step's own metric. On a quadratic loss whose Hessian matrix is P^-1 the ratio of the actual
to the predicted change is exactly 1.

A step that is short against the model's own (c well below 1: most grafts, small learning rates) is told by
its slope alone. The ratio is then near 1 whatever the curvature, and the damping falls to its lower bound:
the rule is meant for `graft=None` with learning rates near 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minifisher.step.layer_stack import Move

ADAPT_EVERY = 5  # steps; T1 of Section 6.5
_FACTOR = (19 / 20) ** ADAPT_EVERY  # omega_1 of Section 6.5
_TRUSTED, _DISTRUSTED = 3 / 4, 1 / 4  # likewise
_BOUNDS = (1e-8, 1e8)  # beyond, a matrix damped in float32 is the undamped one, or lambda I


def predicted_change(move: Move, scale: Tensor | float) -> Tensor:
    """q(delta) - q(0) for the layers of one cohort, before the move is applied with `scale`."""
    cohort = move.cohort
    options, rate = cohort.options, float(cohort.options["lr"])
    pull = rate * scale * move.length * move.momentum  # c M
    update = -rate * scale * move.length * move.direction  # u
    change = (update * (move.gradient - 0.5 * pull)).sum()
    if options["weight_decay"] and options["decoupled_weight_decay"]:
        decay = -rate * options["weight_decay"] * cohort.gather(cohort.tensors)  # w
        change += (decay * (move.gradient - pull)).sum()
    return -change if options["maximize"] else change


def damping_factor(before: Any, after: Any, predicted: float, maximize: bool) -> float:
    """What the damping is multiplied by: omega where the model is trusted, 1 / omega where it is not, else 1.

    The ratio is (after - before) / predicted of the losses. A loss that became infinite or NaN speaks against
    the model. A step for which the model predicts no progress (momentum, or a graft longer than the model
    goes), or less than the rounding of the loss, says nothing.
    """
    start, end = _as_number(before), _as_number(after)
    if not math.isfinite(end):
        return 1 / _FACTOR
    progress = predicted if maximize else -predicted
    if not progress > _rounding(before) * abs(start):
        return 1.0
    ratio = (end - start) / predicted
    return _FACTOR if ratio > _TRUSTED else 1 / _FACTOR if ratio < _DISTRUSTED else 1.0


def within_bounds(damping: float) -> float:
    """The damping itself, unless no matrix could tell."""
    return min(max(damping, _BOUNDS[0]), _BOUNDS[1])


def _as_number(loss: Any) -> float:
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"adaptive_damping compares losses: the closure must return one, got {loss!r}"
        ) from error


def _rounding(loss: Any) -> float:
    dtype = loss.dtype if isinstance(loss, Tensor) and loss.is_floating_point() else torch.float32
    return torch.finfo(dtype).eps
