"""Adaptive damping: the Levenberg-Marquardt rule on the ratio of actual to predicted decrease.

Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015,
arXiv 1503.05671, Section 6.5; its quadratic model is that of Section 6.4, damping included.

A step moves the weights by delta = u + w. The update u = -c P M has the direction P M, the damped inverse
curvature P times the momentum M, and the length factor c = lr x what the graft makes of it. w = -lr weight_decay W
is the decoupled decay. The model of the loss has the mini-batch's gradient D and the curvature P^-1:

    q(delta) = D^T delta + delta^T P^-1 delta / 2

Because P is symmetric and P^-1 u = -c M, all but the decay's own square costs inner products only:

    q(delta) = u^T (D - c M / 2) + w^T (D - c M) + w^T P^-1 w / 2

The last term is of the order (lr weight_decay)^2 and is left out. The prediction is that of the step that was
taken: c holds the length which the graft gave, M the momentum, and a layer that took a first-order step counts
with that step's own metric. On a quadratic loss whose Hessian matrix is P^-1 the ratio is exactly 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

ADAPT_EVERY = 5  # steps; T1 of Section 6.5
_FACTOR = (19 / 20) ** ADAPT_EVERY  # omega_1 of Section 6.5
_TRUSTED, _DISTRUSTED = 3 / 4, 1 / 4  # likewise
_BOUNDS = (1e-8, 1e8)  # beyond them float32 cannot tell a damped matrix from an undamped one, or from lambda I


@dataclass(eq=False)
class Prediction:
    """The change of the loss that the quadratic model predicts for a step, summed over layers."""

    total: Tensor | float = 0.0

    def add(
        self,
        gradient: Tensor,  # D, [..., *layer.shape] as all of them
        momentum: Tensor,  # M
        direction: Tensor,  # P M
        scale: Tensor,  # c, [..., 1, ...]
        shrinkage: Tensor | None,  # w
        sign: int,  # -1 where the loss is maximised, and D and M are negated
    ) -> None:
        """Add q(delta) of some layers."""
        pull = scale * momentum
        change = (-scale * direction).mul_(gradient - 0.5 * pull).sum()
        if shrinkage is not None:
            change += shrinkage.mul(gradient - pull).sum()
        self.total = self.total + sign * change


def damping_factor(before: float, after: float, predicted: float, maximize: bool = False) -> float:
    raise NotImplementedError
