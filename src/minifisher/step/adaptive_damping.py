"""Adaptive damping: the Levenberg-Marquardt rule on the ratio of the actual to the predicted decrease.

Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, arXiv 1503.05671, Section 6.5; its quadratic model is that of Section 6.4, damping included.

A step moves the weights by delta = u + w. The update is u = -c P N, with the damped inverse curvature P, the
momentum N (`minifisher.step.first_order.look_ahead`), and the factor c = lr x length. The decoupled decay is
w = -lr weight_decay W. The model of the loss has the gradient D of the mini-batch and the curvature P^-1:

    q(delta) = D^T delta + delta^T P^-1 delta / 2

P is symmetric and P^-1 u = -c N, so all terms but one need inner products only:

    q(delta) = u^T (D - c N / 2) + w^T (D - c N) + w^T P^-1 w / 2

The last term is of the order (lr weight_decay)^2 and is left out. The prediction is for the step that was
taken: c includes the length of the graft, and a layer that took the first-order step counts with the metric
of that step. If the loss is quadratic and its Hessian matrix is P^-1, the ratio is exactly 1.

If c is well below 1, as with most grafts and small learning rates, the slope alone decides the prediction.
The ratio is then near 1 for any curvature, and the damping falls to its lower bound. The rule is meant for
`graft=None` with learning rates near 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minifisher.step.update import Update

ADAPT_EVERY = 5  # steps; T1 of Section 6.5
_FACTOR = (19 / 20) ** ADAPT_EVERY  # omega_1 of Section 6.5
_TRUSTED, _DISTRUSTED = 3 / 4, 1 / 4  # likewise
_BOUNDS = (1e-8, 1e8)  # in float32, a matrix damped by less is the undamped one, and by more lambda I


def predicted_change(update: Update) -> Tensor:
    """q(delta) - q(0) for the layers of one stack, before the update is applied."""
    options, rate = update.stack.options, float(update.stack.options["lr"])
    pull = rate * update.scale * update.length * update.preconditioned  # c N
    step = -rate * update.scale * update.length * update.direction  # u
    change = (step * (update.gradient - 0.5 * pull)).sum()
    if options["weight_decay"] and options["decoupled_weight_decay"]:
        decay = -rate * options["weight_decay"] * update.stack.weights()  # w
        change += (decay * (update.gradient - pull)).sum()
    return -change if options["maximize"] else change


def damping_factor(before: Any, after: Any, predicted: float, maximize: bool) -> float:
    """What the damping is multiplied by: omega if the model is trusted, 1 / omega if it is not, else 1.

    The ratio is (after - before) / predicted. A loss that became infinite or NaN counts against the model. A
    step says nothing if the model predicts no progress (because of momentum, or a graft longer than the
    model's own step), or less progress than the rounding of the loss.
    """
    start, end = as_number(before), as_number(after)
    if not math.isfinite(end):
        return 1 / _FACTOR
    progress = predicted if maximize else -predicted
    if not progress > torch.finfo(dtype_of_loss(before)).eps * abs(start):
        return 1.0
    ratio = (end - start) / predicted
    return _FACTOR if ratio > _TRUSTED else 1 / _FACTOR if ratio < _DISTRUSTED else 1.0


def within_bounds(damping: float) -> float:
    """The damping, kept where it makes a difference to a matrix in float32."""
    return min(max(damping, _BOUNDS[0]), _BOUNDS[1])


def as_number(loss: Any) -> float:
    """The loss that a closure returned; TypeError where it is no number."""
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"adaptive_damping compares losses: the closure must return one, got {loss!r}"
        ) from error


def dtype_of_loss(loss: Any) -> torch.dtype:
    """The dtype that a loss was rounded to."""
    return loss.dtype if isinstance(loss, Tensor) and loss.is_floating_point() else torch.float32
